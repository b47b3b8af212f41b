"""`CurrentRun`: the state of one call of `PeagleTrainer.train`, and its work at the events of the Trainer's loop."""

import logging
import math
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..data.dataset import HiddenStatesDataset
from ..data.errors import RowError
from ..errors import PeagleError
from ..hub.training_json import read_record
from ..processes import on_first, require_same
from .checkpoints import (
    checkpoints_by_step,
    folders_of_run,
    newest_checkpoint,
    release,
    remains_of_run,
    trainer_state,
)
from .memory import report
from .metrics import COUNTERS, summarize
from .nan_check import NanCheck, listed, rows_of
from .optimizer import describe_optimizer
from .record import RunRecord, describe_run, packing_of
from .resume_rules import check_resume, note_settings
from .resuming import find_best_again, load_best, load_optimizer_and_schedule, settings_as_made, view_of
from .sharding import bare_optimizer
from .throughput import Throughput
from .time_left import updates_in
from .warm_start import configuration_changes

if TYPE_CHECKING:
    from .trainer import PeagleTrainer

logger = logging.getLogger(__name__)

VALIDATION_OWED = "validation_owed"
"""Marks a step in the log history whose validation failed at a sample and has to be repeated when resuming."""


class NothingLeft(Exception):
    """The resumed checkpoint is already at the last step or beyond."""


class CurrentRun(TrainerCallback):
    """The state of one call of `PeagleTrainer.train`, and the first callback at the events of the Trainer's loop.

    Attributes:
        resumed_from: the checkpoint that training is resumed from; None for a new run.
        record: the inputs of this run; None before training.
        before: the record in the resumed checkpoint.
        superseded: folders of an earlier run, which are removed when this run saves its first checkpoint.
        owes_validation: the validation of the last step failed at a sample and has to be repeated.
        counters: int64 [4, K], of all batches since the last log (see `metrics.count_by_depth`).
        throughput: of the time since the last log.
        seconds_before: wall time of training before `resumed_from` was saved.
        started: clock time at which this call began.
    """

    def __init__(self, trainer: "PeagleTrainer"):
        # A strong reference would form a cycle, and a deleted trainer would keep its memory.
        self._trainer: PeagleTrainer = weakref.proxy(trainer)
        self.begin(None, None)

    def begin(self, resumed_from: Path | None, trial: Any) -> None:
        """Forget the call before. A trial's arguments aren't set yet (see `restore`)."""
        self.resumed_from, self._trial = resumed_from, trial
        self.record: RunRecord | None = None
        self.before: RunRecord | None = None
        self.superseded: list[Path] = []
        self.owes_validation = False
        self.seconds_before = (read_record(resumed_from) or {}).get("seconds", 0.0) if resumed_from else 0.0
        self.started = time.monotonic()
        self._view: Path | None = None
        self._best_at_end: str | None = None
        self._epoch, self._has_begun = 0, False
        self.restart_counting()

    def restart_counting(self) -> None:
        """Count and measure from here on, for the model that the trainer has now."""
        args = self._trainer.args
        self.counters = torch.zeros(len(COUNTERS), 0, dtype=torch.long, device=args.device)
        # Between the trials of a hyperparameter search the trainer has no model.
        if self._trainer.model is not None:
            self.counters = self.counters.new_zeros(len(COUNTERS), self._trainer.config.num_depths)
        self.nan_check, self.throughput = NanCheck(), Throughput(args.device)

    @property
    def folder(self) -> Path:
        """Where the checkpoints go: the output folder, or a trial's folder in it."""
        return Path(self._trainer._get_output_dir(self._trial))

    def restore(self) -> None:
        """Describe the run, and compare it with that of the checkpoint that it goes on from.

        Raises:
            PeagleError: the checkpoint is of another run, or this run would mix its checkpoints with those of an
                earlier one; raised on all processes.
        """
        trainer, folder = self._trainer, self.resumed_from
        earlier = [] if folder else folders_of_run(self.folder)
        if earlier and trainer.args.resume:
            raise PeagleError(
                f"Training begins anew, but {earlier[-1]} is of an earlier run, with which its checkpoints would mix. "
                "Go on from it with trainer.train(resume_from_checkpoint=True), name another output_dir, or pass "
                "--no-resume (resume=False) for its checkpoints to take the place of those."
            )
        self.superseded = [] if folder else remains_of_run(self.folder)
        remedy = "Give each machine the same prepared data and cache, and the same arguments."
        require_same(packing_of(trainer.train_dataset), "The packed sequences to train on are", remedy)

        def compare() -> tuple[RunRecord | None, RunRecord]:
            now = describe_run(trainer)
            if folder is None:
                return None, now
            before = RunRecord.read(folder)
            others = configuration_changes(folder, trainer.config, bool(before.verifier and now.verifier))
            return before, check_resume(folder, before, now, trainer_state(folder)["global_step"], others)

        self.before, self.record = on_first(compare)

    def on_arguments_known(self) -> None:
        """Called in each training once the model and the arguments are there, which a trial of a search may change."""
        self.restart_counting()
        if self.record is None and self._trainer.is_in_train:
            self.restore()

    @contextmanager
    def going_on(self, ignore_keys: list[str] | None) -> Iterator[str | None]:
        """Around the Trainer's own `train`; gives what it is to resume from."""
        trainer, args, checkpoint = self._trainer, self._trainer.args, self.resumed_from
        if checkpoint is None:
            yield None
            return
        state = trainer_state(checkpoint)
        self.owes_validation = args.eval_strategy != IntervalStrategy.NO and any(
            VALIDATION_OWED in entry and entry["step"] == state["global_step"] for entry in state["log_history"]
        )
        owed = OwedValidation(trainer, self._trial, ignore_keys)
        evaluates_first = args.eval_on_start
        if self.owes_validation:
            # It stands after all other callbacks, so that these have begun when it validates and saves.
            trainer.add_callback(owed)
            args.eval_on_start = False
        try:
            with view_of(trainer, checkpoint) as self._view:
                yield str(self._view)
        finally:
            args.eval_on_start = evaluates_first
            if owed in trainer.callback_handler.callbacks:
                trainer.callback_handler.callbacks.remove(owed)

    @contextmanager
    def failures_explained(self) -> Iterator[None]:
        """If memory runs out, advise; if a sample can't be read, save the last finished step before raising."""
        trainer, args = self._trainer, self._trainer.args
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise PeagleError(
                f"The memory of {args.device} is too small: {str(error).splitlines()[0]}\n"
                f"{report(args.memory_plan(trainer.config), args.usable_memory())}"
            ) from error
        except RowError as error:
            raise error.ended(self._save_what_was_trained()) from error
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            if self._has_begun or isinstance(error, PeagleError):
                raise
            raise PeagleError(f"The Trainer refuses these arguments: {' '.join(str(error).split())}") from error
        except Exception as error:
            tracker = type(error).__module__.partition(".")[0]
            if tracker not in INTEGRATION_TO_CALLBACK:
                raise
            raise PeagleError(
                f"The tracker {tracker} of --report-to failed: {' '.join(str(error).split())} Set it up, or train "
                "without it: --report-to none."
            ) from error

    def _save_what_was_trained(self) -> str:
        """Save the last finished step on all processes; returns a clause that says where, for the error message."""
        trainer, step, folder = self._trainer, self._trainer.state.global_step, self.folder
        if step == 0:
            return "Training ended before its first step"
        # A checkpoint of this step may also belong to an earlier run, which this run replaces.
        if not on_first(lambda: not self.superseded and step in checkpoints_by_step(folder)):
            try:
                trainer._save_checkpoint(trainer.model, self._trial)
            except (PeagleError, OSError) as error:
                return f"Training ended after step {step}, which could not be saved ({str(error).removesuffix('.')})"
        saved = on_first(lambda: checkpoints_by_step(folder).get(step))
        return (
            f"Training ended after step {step}{', in its validation' if self.owes_validation else ''}, and is saved "
            f"in {saved}, from which the same command{'' if trainer.args.resume else ' without --no-resume'} goes on"
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Complete the record, and load the checkpoint's optimizer and schedule, which the Trainer doesn't see."""
        trainer = self._trainer
        self._has_begun = True
        trainer.export_callback.run_folder = self.folder
        assert self.record is not None
        self.record = note_settings(self.record, self.before, *settings_as_made(trainer))
        if args.should_save:
            self.record.write(self.folder)
        is_chosen = trainer.own_optimizer is not None or trainer.args.as_given["optim"] is not None
        is_replaced = trainer.is_deepspeed_enabled and not is_chosen
        said = describe_optimizer(bare_optimizer(trainer), args.world_size, is_replaced)
        if said is not None and state.is_world_process_zero:
            logger.info(said)
        if self._view is not None and self.before is not None:
            load_optimizer_and_schedule(trainer, self._view, self.before, self.record)
            find_best_again(trainer, self.folder)
            release(self._view)
            if state.global_step >= state.max_steps and state.is_world_process_zero:
                logger.info(
                    "Nothing is left to train: the checkpoint is of step %d, and these arguments end at step %d. "
                    "Training goes on with more --epochs, or a higher --max-steps.",
                    state.global_step,
                    state.max_steps,
                )
        self._epoch = state.global_step // updates_in(len(kwargs["train_dataloader"]), args)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the sampler's epoch: the Trainer can't reach it when it skips batches on several processes.

        Raises:
            NothingLeft: all steps are done; the Trainer would take one more.
            PeagleError: the loader isn't that of `PeagleTrainer`, whose sampler knows of epochs.
        """
        if state.global_step >= state.max_steps:
            raise NothingLeft
        if not hasattr(self._trainer, "train_sampler"):
            raise PeagleError(
                "get_train_dataloader gives a loader of its own, which would draw the same slots in each epoch. Let it "
                "call super().get_train_dataloader(); a HiddenStatesDataset and a data_collator may be your own."
            )
        self._trainer.train_sampler.set_epoch(self._epoch)
        self._epoch += 1

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the drafter's metrics, before any other callback sees the log."""
        trainer, logs = self._trainer, kwargs["logs"]
        if trainer.is_in_train:
            self.require_finite()
        if "loss" in logs:
            metrics = summarize(trainer.accelerator.reduce(self.counters, reduction="sum"))
            metrics |= self.throughput.take(trainer.accelerator.gather)
            self.counters.zero_()
            logs |= metrics
            state.log_history[-1] |= metrics
        if "train_runtime" in logs:
            # After this last log the Trainer would load the best checkpoint itself, from files that have other names
            # here.
            self._best_at_end, state.best_model_checkpoint = state.best_model_checkpoint, None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._best_at_end is not None:
            state.best_model_checkpoint = self._best_at_end
            if args.load_best_model_at_end:
                load_best(self._trainer)

    def require_finite(self) -> None:
        """End training if a loss or a gradient since the last call was NaN or infinite. Waits for the device.

        Raises:
            PeagleError: one was; the message names the step, its samples, and the checkpoint from before it.
        """
        bad = self.nan_check.first_bad()
        if bad is None:
            return
        trainer, samples = self._trainer, ""
        if isinstance(trainer.train_dataset, HiddenStatesDataset):
            rows = rows_of(bad, trainer.train_dataset, trainer.train_sampler, trainer.args)
            samples = f", which was made from the samples {listed(rows)} of {trainer.train_dataset.data_path}"
        what = "gradient" if bad.batch is None else "loss"
        raise PeagleError(
            f"Training ended at step {bad.step}, whose {what} is not a finite number{samples}. This step isn't saved; "
            f"{self._newest_words()}. Look at these samples, lower --learning-rate, or set a lower --max-grad-norm."
        )

    def require_finite_validation(self, loss: float) -> None:
        """End training if the loss of its validation was NaN or infinite.

        Raises:
            PeagleError: it was; the message names the step, and the checkpoint from before it.
        """
        if not math.isfinite(loss):
            raise PeagleError(
                f"Training ended at the validation of step {self._trainer.state.global_step}, whose loss is not a "
                f"finite number. This step isn't saved; {self._newest_words()}. Lower --learning-rate or "
                "--max-grad-norm."
            )

    def _newest_words(self) -> str:
        newest = newest_checkpoint(self.folder)
        return f"the newest checkpoint is {newest}" if newest and not self.superseded else "no step was saved before"


class OwedValidation(TrainerCallback):
    """Repeat the validation that failed at a sample in an earlier run, before the first step.

    The choice of the best checkpoint and saving follow, as if the step that is resumed from had just ended.
    """

    def __init__(self, trainer: "PeagleTrainer", trial: Any, ignore_keys: list[str] | None):
        self._trainer, self._trial, self._ignore_keys = trainer, trial, ignore_keys

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self._trainer
        trainer.current_run.owes_validation = False
        state.log_history = [entry for entry in state.log_history if VALIDATION_OWED not in entry]
        epoch = float(state.epoch or 0.0)
        if math.isclose(epoch, round(epoch)):
            trainer.control = trainer.callback_handler.on_epoch_end(args, state, control)
        trainer.control.should_evaluate = True
        trainer.control.should_save = args.save_strategy != SaveStrategy.NO
        model: Any = trainer.model_wrapped
        trainer._maybe_log_save_evaluate(
            trainer._tr_loss, None, model, self._trial, epoch, self._ignore_keys, time.time()
        )
