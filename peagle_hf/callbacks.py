"""`VllmExportCallback`: a folder an epoch that vLLM serves and training resumes from, and `checkpoint_best`."""

import logging
import math
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .arguments import config_path, write_config
from .checkpoints import (
    BEST,
    CURVES,
    TRAINER_STATE,
    epoch_folders,
    epoch_number,
    export_checkpoint,
    link_folder,
    metric_name,
    scores_by_step,
    step_of_best,
    trainer_checkpoints,
    trainer_state,
)
from .files import atomic_path, remove_folder, remove_leftovers
from .metrics import draw

logger = logging.getLogger(__name__)


class VllmExportCallback(TrainerCallback):
    """At each epoch's end, write `output_dir/<epoch>/` from the Trainer's checkpoint and keep `checkpoint_best`.

    An epoch folder holds `config.json` and `model.safetensors` as vLLM serves them, `optimizer_state_dict.pt`,
    `scheduler_state_dict.pt`, and in `trainer_state/` the Trainer's whole checkpoint (full-precision weights,
    optimizer, scheduler, RNG, Trainer state), from which training resumes exactly. Files are hard-linked where the
    disk allows. `checkpoint_best` is a relative link to the folder with the best `metric_for_best_model`, or to the
    last one where nothing is validated; the log says which, and by which metric. `save_total_limit` counts epoch
    folders too; the best and the last are never removed. Beside them `training.png` shows the run's curves (see
    `metrics.draw`), from its beginning also when it was resumed.

    Args:
        dtype: of the exported weights: "bfloat16", "float16" or "float32".

    Attributes:
        run_folder: where the checkpoints are, which `PeagleTrainer` sets: `output_dir`, or a trial's folder in it.
    """

    def __init__(self, dtype: str = "bfloat16"):
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.run_folder: Path | None = None
        self._epoch_ended = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Make the folders that an interrupted run had no time for, and remove what it left half written."""
        if not state.is_world_process_zero:
            return
        remove_leftovers(self._folder(args), rf"\d+|checkpoint-\d+|{BEST}|run\.json|(config|train)\.yaml|{CURVES}")
        write_config(args, config_path(self._folder(args), "train"), "train")
        if state.global_step == 0:
            return
        for checkpoint in trainer_checkpoints(self._folder(args)):
            saved = trainer_state(checkpoint)
            ended = math.isclose(saved["epoch"], round(saved["epoch"])) or saved["global_step"] == saved["max_steps"]
            if ended and not (checkpoint.parent / str(epoch_number(saved["epoch"]))).exists():
                self._export(checkpoint)
        self._update(args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        control.should_save = self._epoch_ended = args.save_strategy != SaveStrategy.NO

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if self._epoch_ended and state.is_world_process_zero:
            self._export(self._folder(args) / f"checkpoint-{state.global_step}")
            self._update(args, state)
            self._draw(args, state)
        self._epoch_ended = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            self._draw(args, state)
            if scores_by_step(args, state) and not metric_name(args).endswith("loss"):
                logger.info(
                    "%s is chosen by %s. With --metric-for-best-model loss the lowest validation loss chooses, as in "
                    "the tutorial of vLLM's speculators.",
                    BEST,
                    metric_name(args),
                )

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        with atomic_path(self._folder(args) / CURVES) as temporary:
            draw(state.log_history, temporary)

    def _folder(self, args: TrainingArguments) -> Path:
        return self.run_folder or Path(args.output_dir or ".")

    def _export(self, checkpoint: Path) -> None:
        folder = checkpoint.parent / str(epoch_number(trainer_state(checkpoint)["epoch"]))
        export_checkpoint(checkpoint, folder, self.dtype)
        logger.info("Wrote %s.", folder)

    def _update(self, args: TrainingArguments, state: TrainerState) -> None:
        """Point `checkpoint_best` at the best epoch folder and remove those over the limit."""
        folders = epoch_folders(self._folder(args))
        if not folders:
            return
        step_of = {folder: trainer_state(folder / TRAINER_STATE)["global_step"] for folder in folders}
        scores = scores_by_step(args, state)
        best_step = step_of_best(args, {step: scores[step] for step in step_of.values() if step in scores})
        best = next((folder for folder in folders if step_of[folder] == best_step), folders[-1])
        with atomic_path(self._folder(args) / BEST) as temporary:
            link_folder(best, temporary)
        reason = "the last epoch, as no epoch has a validation"
        if best_step is not None:
            rule = "highest" if args.greater_is_better else "lowest"
            reason = f"the epoch with the {rule} {metric_name(args)}, {scores[best_step]:.4g}"
        logger.info("%s -> %s, %s.", BEST, best.name, reason)
        if args.save_total_limit:
            removable = [folder for folder in folders if folder not in (best, folders[-1])]
            for folder in removable[: max(0, len(folders) - args.save_total_limit)]:
                remove_folder(folder)
