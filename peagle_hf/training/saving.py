"""Saving the state of a training as one checkpoint (see `checkpoints`), on all processes and all at once."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ..files import write_json, writing
from ..hub.training_json import RECORD
from ..processes import on_first, together
from .adapters import add_mask_hidden, merge_adapter
from .checkpoints import (
    ADAPTER,
    FULL_PRECISION,
    checkpoint_name,
    export_served_weights,
    put_in_place,
    trainer_state,
)
from .sharding import bare_optimizer, gather_optimizer_state, is_fsdp2

if TYPE_CHECKING:
    from .trainer import PeagleTrainer


def save_checkpoint(trainer: "PeagleTrainer", run_folder: Path) -> None:
    """Write the state of a training under a hidden name, and give it its name when it is complete.

    Raises:
        PeagleError: a process could not write its part; on all processes.
    """
    args, state, run = trainer.args, trainer.state, trainer.current_run
    folder = run_folder / checkpoint_name(state, trainer.control.should_training_stop)
    same_step = folder.with_name(f"checkpoint-{state.global_step}")
    if args.should_save and not run.superseded:
        _keep_best(folder, state.best_global_step, state.global_step)
    with written_to(trainer, folder, [same_step, *run.superseded]) as temporary:
        if not args.save_only_model:
            with together():
                _save_optimizer_and_schedule(trainer, temporary)
            trainer._save_scaler(str(temporary))
            trainer._save_rng_state(str(temporary))
        if args.should_save:
            _save_state(trainer, temporary / TRAINER_STATE_NAME)
    run.superseded = []


@contextmanager
def written_to(trainer: "PeagleTrainer", folder: Path, superseded: Sequence[Path] = ()) -> Iterator[Path]:
    """A hidden folder with the weights, the same one on all processes, which becomes `folder` if the block ends well.

    Args:
        superseded: folders that are removed then, as is an older `folder`.
    """
    temporary = folder.with_name(f".{folder.name}.{on_first(lambda: token_hex(4))}.tmp")
    should_save, model = trainer.args.should_save, trainer.model
    weights = temporary / (ADAPTER if isinstance(model, PeftModel) else FULL_PRECISION)
    with writing(folder):
        try:
            with together():
                # A process that fails must not leave the others waiting for it in the next part.
                with together():
                    trainer.save_model(str(weights), _internal_call=True)
                    if should_save:
                        write_records(trainer, temporary)
                yield temporary
            with together():
                if should_save:
                    merged = merge_adapter(model) if isinstance(model, PeftModel) else None
                    dtype = trainer.export_callback.dtype or getattr(torch, trainer.args.export_dtype)
                    export_served_weights(temporary, dtype, merged)
                    put_in_place(temporary, folder, superseded)
        except BaseException:
            if should_save:
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def complete_saved_model(trainer: "PeagleTrainer", folder: Path, is_checkpoint: bool) -> None:
    """Add what `Trainer.save_model` leaves out: `mask_hidden` beside an adapter, and the records of the training.

    Args:
        is_checkpoint: the folder is part of a checkpoint, which has the records elsewhere.
    """
    if isinstance(trainer.model, PeftModel):
        add_mask_hidden(trainer.model, folder)
    if not is_checkpoint:
        write_records(trainer, folder)


def write_records(trainer: "PeagleTrainer", folder: Path) -> None:
    """Write how the drafter was trained: `training.json` for its card, and `run.json` for going on from it."""
    write_json(folder / RECORD, trainer.record())
    if trainer.current_run.record is not None:
        trainer.current_run.record.write(folder)


def _keep_best(folder: Path, best_step: int | None, step: int) -> None:
    """Rename the best checkpoint if it has the name of the one to be saved: a run had ended within this epoch."""
    if best_step in (None, step) or not folder.exists():
        return
    if trainer_state(folder)["global_step"] == best_step:
        folder.rename(folder.with_name(f"checkpoint-{best_step}"))


def _save_optimizer_and_schedule(trainer: "PeagleTrainer", folder: Path) -> None:
    """Like the Trainer; under FSDP2 in the files that one process would write, from which any number goes on."""
    if not is_fsdp2(trainer):
        trainer._save_optimizer_and_scheduler(str(folder))
        return
    state = gather_optimizer_state(trainer.model, bare_optimizer(trainer))
    if trainer.args.should_save:
        schedule: Any = trainer.lr_scheduler
        torch.save(state, folder / OPTIMIZER_NAME)
        torch.save(schedule.state_dict(), folder / SCHEDULER_NAME)


def _save_state(trainer: "PeagleTrainer", path: Path) -> None:
    """Like the end of `Trainer._save_checkpoint`, but without the path of the best, as folders may be moved."""
    state = trainer.state
    saved: Any = state.stateful_callbacks
    for one in (*trainer.callback_handler.callbacks, trainer.control):
        if isinstance(one, ExportableState):
            name = type(one).__name__
            if isinstance(saved.get(name), list):
                saved[name].append(one.state())
            else:
                saved[name] = one.state()
    state.best_model_checkpoint = None
    state.save_to_json(str(path))
