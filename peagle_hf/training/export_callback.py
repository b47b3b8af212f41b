"""`VllmExportCallback`: decides when a checkpoint is saved, keeps `checkpoint_best`, and draws the run's curves."""

import logging
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..arguments import config_path, write_config
from .checkpoints import (
    CURVES,
    best_checkpoint,
    checkpoints_by_step,
    folders_of_run,
    link_best,
    metric_name,
    remove_over_limit,
    scores_by_step,
)
from .metrics import draw

logger = logging.getLogger(__name__)


class VllmExportCallback(TrainerCallback):
    """Save a checkpoint that vLLM serves at each epoch's end, and keep the link `checkpoint_best`.

    `PeagleTrainer` writes the checkpoints (see `checkpoints`), and adds this callback itself if it isn't given one. An
    epoch's end is saved as `output_dir/<epoch>/`, also where `save_steps` meets it; a step within an epoch that
    `save_steps` asks for as `checkpoint-<step>/`. `save_strategy` best leaves it to the Trainer what is saved.

    `checkpoint_best` is a relative link to the saved step with the best `metric_for_best_model`, or to the newest one
    where nothing saved has been validated; the log says which, and by which metric. `save_total_limit` counts all
    checkpoints; the best and the newest are never removed. Beside them `training.png` shows the run's curves (see
    `metrics.draw`), from its beginning also when it was resumed.

    Args:
        dtype: of the weights that vLLM serves: "bfloat16", "float16" or "float32"; default: `export_dtype` of the
            training's arguments.

    Attributes:
        run_folder: where the checkpoints are, which `PeagleTrainer` sets: `output_dir`, or a trial's folder in it.
    """

    def __init__(self, dtype: str | None = None):
        self.dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self.run_folder: Path | None = None
        self._saved_step: int | None = None
        self._is_described = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Update `checkpoint_best` and the checkpoints over the limit, in case the run was interrupted before that."""
        self._saved_step, self._is_described = None, False
        if not args.should_save:
            return
        # The folder keeps the arguments of an earlier run until this run has trained.
        if state.global_step > 0 or not folders_of_run(self._folder(args)):
            self._describe(args)
        if state.global_step > 0:
            self._update(args, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Leave the last step of an epoch to `on_epoch_end`, which saves it after the validation of the epoch."""
        is_last = (state.epoch or 0.0).is_integer() or state.global_step >= state.max_steps > 0
        if is_last and args.save_strategy == SaveStrategy.STEPS:
            control.should_save = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if args.save_strategy not in (SaveStrategy.NO, SaveStrategy.BEST):
            control.should_save = control.should_evaluate or self._saved_step != state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._saved_step = state.global_step
        if args.should_save:
            self._describe(args)
            self._update(args, state)
            if checkpoints_by_step(self._folder(args))[state.global_step].name.isdecimal():
                draw(state.log_history, self._folder(args) / CURVES)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not args.should_save:
            return
        if state.global_step in checkpoints_by_step(self._folder(args)):
            draw(state.log_history, self._folder(args) / CURVES)
        if scores_by_step(args, state) and not metric_name(args).endswith("loss"):
            logger.info(
                "checkpoint_best is chosen by %s. With --metric-for-best-model loss the lowest validation loss "
                "chooses, as in the tutorial of vLLM's speculators.",
                metric_name(args),
            )

    def _describe(self, args: TrainingArguments) -> None:
        if not self._is_described:
            write_config(args, config_path(self._folder(args), "train"), "train")
        self._is_described = True

    def _folder(self, args: TrainingArguments) -> Path:
        return self.run_folder or Path(args.output_dir or ".")

    def _update(self, args: TrainingArguments, state: TrainerState) -> None:
        """Point `checkpoint_best` at the best checkpoint, then remove those over the limit."""
        found = checkpoints_by_step(self._folder(args))
        if not found:
            return
        newest = found[max(found)]
        best = best_checkpoint(args, state, found)
        reason = "the newest checkpoint, as none has a validation"
        if best is not None:
            score = next(scores_by_step(args, state)[step] for step, folder in found.items() if folder == best)
            rule = "highest" if args.greater_is_better else "lowest"
            reason = f"the checkpoint with the {rule} {metric_name(args)}, {score:.4g}"
        link_best(best or newest)
        logger.info("Wrote %s; checkpoint_best -> %s, %s.", newest, (best or newest).name, reason)
        if args.save_total_limit:
            remove_over_limit(self._folder(args), args.save_total_limit, {best or newest, newest})
