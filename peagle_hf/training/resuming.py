"""Resuming: choosing the checkpoint, loading its optimizer and schedule, and finding the best step again."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from ..data.prepared_dataset import rows_fingerprint
from ..errors import PeagleError
from ..files import locked_folder
from ..model.config import PeagleConfig
from ..processes import on_first, together
from .arguments import PeagleTrainingArguments
from .checkpoints import (
    OPTIMIZER,
    SCHEDULER,
    best_checkpoint,
    check_no_later_checkpoints,
    checkpoints_by_step,
    metric_name,
    newest_checkpoint,
    recover,
    resumable_folder,
    scores_by_step,
    step_of_best,
    trainer_state,
    trainer_view,
)
from .optimizer import set_rates, set_settings, settings_of, settings_of_schedule
from .record import RunRecord, arguments_of
from .resume_rules import check_resume
from .sharding import bare_optimizer, is_fsdp2, scatter_optimizer_state
from .time_left import planned_steps
from .warm_start import configuration_changes

if TYPE_CHECKING:
    from .trainer import PeagleTrainer

logger = logging.getLogger(__name__)


@contextmanager
def only_training(args: PeagleTrainingArguments) -> Iterator[None]:
    """Keep other trainings out of the output folder while the block runs, on all processes of this one.

    Raises:
        PeagleError: another training is under way there; on all processes.
    """
    with ExitStack() as stack:
        with together():
            if args.should_save:
                remedy = "Wait until that training has ended, or train into another --save-path."
                stack.enter_context(locked_folder(args.output_dir, remedy))
        yield


def is_finished(args: PeagleTrainingArguments, newest: Path, config: PeagleConfig, num_packs: int) -> bool:
    """Whether a checkpoint is of the last step of a run with these arguments; the log says so. Nothing is written.

    Raises:
        PeagleError: it is, but of a run with other arguments, other samples or another drafter.
    """
    done, steps = trainer_state(newest)["global_step"], planned_steps(args, num_packs)[0]
    if done < steps:
        return False
    before = RunRecord.read(newest)
    now = replace(before, arguments=arguments_of(args), data=rows_fingerprint(args.data_path))
    check_resume(newest, before, now, done, configuration_changes(newest, config, is_verifier_known=True))
    logger.info("%s is complete: its last step is %d, and these arguments end at step %d.", newest, done, steps)
    return True


def checkpoint_to_go_on_from(trainer: "PeagleTrainer", wanted: str | bool | None, trial: Any) -> Path | None:
    """The checkpoint that training is resumed from, the same one on all processes; None for a new run.

    Args:
        wanted: as `resume_from_checkpoint` of `PeagleTrainer.train`.

    Raises:
        PeagleError: it can't be resumed from, a process doesn't see it, or the run's folder has other checkpoints; on
            all processes.
    """
    folder = on_first(lambda: _chosen(trainer, wanted, trial))
    with together():
        if folder is not None and not folder.is_dir():
            raise PeagleError(
                f"The first process goes on from {folder}, which isn't there for this one. All processes need "
                "the same output folder: name one on a disk that all machines share, or copy it to each, and train "
                "with --save-on-each-node where they share none."
            )
    return folder


def _chosen(trainer: "PeagleTrainer", wanted: str | bool | None, trial: Any) -> Path | None:
    if trial is not None and not wanted:
        # The name of a trial's folder may contain parameters that are chosen later.
        return None
    run_folder = Path(trainer._get_output_dir(trial))
    recover(run_folder)
    if wanted is True:
        newest = newest_checkpoint(run_folder)
        if newest is None:
            raise PeagleError(f"{trainer.args.output_dir} has no checkpoint to resume from. Leave out the resuming.")
        wanted = str(newest)
    if not wanted:
        return None
    folder = resumable_folder(wanted)
    check_no_later_checkpoints(folder, run_folder)
    return folder


def loads_states_itself(trainer: "PeagleTrainer") -> bool:
    """Whether only the Trainer can load the optimizer and the schedule, which are in shards (ZeRO, FSDP1)."""
    return trainer.is_sharded and not is_fsdp2(trainer)


@contextmanager
def view_of(trainer: "PeagleTrainer", checkpoint: Path) -> Iterator[Path]:
    """A temporary folder in which the Trainer finds what it loads of a checkpoint (see `checkpoints.trainer_view`)."""
    with ExitStack() as stack:
        # If the disk of one process is full, the others must not wait for it.
        with together():
            view = stack.enter_context(
                trainer_view(
                    checkpoint,
                    Path(trainer.args.output_dir),
                    is_adapter=isinstance(trainer.model, PeftModel),
                    has_optimizer=loads_states_itself(trainer),
                    has_fsdp_weights=is_fsdp2(trainer) and trainer.args.process_index == 0,
                )
            )
        yield view


def settings_as_made(trainer: "PeagleTrainer") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The settings of the optimizer and of the schedule as the arguments of this run make them.

    Where the Trainer has loaded those of a checkpoint already they are made once more, to be looked at; not if
    DeepSpeed's configuration makes them, which arguments don't change.
    """
    optimizer: Any = trainer.optimizer
    schedule: Any = trainer.lr_scheduler
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    is_by_deepspeed = plugin is not None and plugin.deepspeed_config.keys() & {"optimizer", "scheduler"}
    is_loaded = loads_states_itself(trainer) and trainer.current_run.resumed_from is not None
    if is_loaded and not is_by_deepspeed:
        trainer.optimizer = trainer.lr_scheduler = None
        try:
            new = trainer.create_optimizer()
            return settings_of(new), settings_of_schedule(trainer.create_scheduler(trainer.state.max_steps, new))
        finally:
            trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
    return settings_of(optimizer), settings_of_schedule(schedule)


def load_optimizer_and_schedule(trainer: "PeagleTrainer", view: Path, before: RunRecord, now: RunRecord) -> None:
    """Load both from a checkpoint, saved under any sharding; settings that are others than before take effect.

    Args:
        view: of `view_of`.
        before: what the checkpoint says of its run.
        now: of this run, with `settings_as_made`.

    Raises:
        PeagleError: the checkpoint's states are those of another optimizer, or of other parameters.
    """
    schedule: Any = trainer.lr_scheduler
    # Under ZeRO and FSDP1 the Trainer has loaded the optimizer and the schedule already.
    if loads_states_itself(trainer):
        schedule = getattr(schedule, "scheduler", schedule)
        saved = schedule.state_dict()
    else:
        _load_optimizer(trainer, view)
        saved = torch.load(view / SCHEDULER, map_location="cpu", weights_only=True)
    settings = now.optimizer_settings or []
    if before.optimizer_settings is not None:
        set_settings(trainer.optimizer, before.optimizer_settings, settings)
    rates = [group["lr"] for group in settings]
    was = [group["lr"] for group in before.optimizer_settings or settings]
    is_other = before.schedule not in (None, now.schedule) or rates != was
    set_rates(trainer.optimizer, schedule, rates, saved, is_other, trainer.state.global_step)


def _load_optimizer(trainer: "PeagleTrainer", view: Path) -> None:
    args, folder = trainer.args, trainer.current_run.resumed_from
    path, optimizer = view / OPTIMIZER, bare_optimizer(trainer)
    is_read = not is_fsdp2(trainer) or args.process_index == 0
    # A training on a GPU copies the states there, so the processes can map one file instead of reading it each.
    on_gpu = args.device.type == "cuda"
    try:
        state = torch.load(path, map_location="cpu", mmap=on_gpu, weights_only=True) if is_read else {}
        if is_fsdp2(trainer):
            scatter_optimizer_state(trainer.model, optimizer, state)
        else:
            optimizer.load_state_dict(state)
    except (ValueError, KeyError, IndexError) as error:
        raise PeagleError(
            f"The optimizer's states in {folder}/{OPTIMIZER} are those of other parameters or of "
            f"another optimizer than this run has ({' '.join(str(error).split())[:200]}). Resume with the "
            "arguments of that run, or train anew with --no-resume or another --save-path."
        ) from error


def find_best_again(trainer: "PeagleTrainer", run_folder: Path) -> None:
    """Find the best step so far anew when a run is resumed: the metric may be another, and a folder may be gone."""
    args, state = trainer.args, trainer.state
    found = on_first(lambda: checkpoints_by_step(run_folder))
    scores = scores_by_step(args, state)
    if args.load_best_model_at_end:
        scores = {step: score for step, score in scores.items() if step in found}
    before, best = state.best_global_step, step_of_best(args, scores)
    state.best_global_step = best
    state.best_metric = None if best is None else scores[best]
    note_best(trainer, found)
    if best != before and trainer.is_world_process_zero():
        logger.info("The best so far is another by %s: that of step %s.", metric_name(args), best)


def note_best(trainer: "PeagleTrainer", found: dict[int, Path]) -> None:
    """Let the Trainer's state name the best of the checkpoints that are there."""
    best = best_checkpoint(trainer.args, trainer.state, found)
    trainer.state.best_model_checkpoint = None if best is None else str(best)


def load_best(trainer: "PeagleTrainer") -> None:
    """Load the weights of the best checkpoint.

    Raises:
        PeagleError: a process doesn't see its folder; on all processes.
    """
    best = str(trainer.state.best_model_checkpoint)
    with together():
        if not Path(best).is_dir():
            raise PeagleError(
                f"The best checkpoint {best} isn't there for this process. Name an output folder that all machines "
                "share, or leave --load-best-model-at-end out."
            )
    with view_of(trainer, Path(best)) as view:
        trainer.state.best_model_checkpoint = str(view)
        try:
            trainer._load_best_model()
        finally:
            trainer.state.best_model_checkpoint = best
