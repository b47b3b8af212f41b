"""`VllmExportCallback`: a folder an epoch that vLLM serves and training resumes from, and `checkpoint_best`."""

import json
import logging
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from .arguments import write_config
from .errors import PeagleError
from .files import allow_as_umask, atomic_path, remove_folder, remove_leftovers, save_file, write_json
from .metrics import draw
from .serving import check_checkpoint

logger = logging.getLogger(__name__)

BEST = "checkpoint_best"
TRAINER_STATE = "trainer_state"
MERGED = "merged"
EXPORTED = "exported"
CURVES = "training.png"
FILES = "files.json"
"""In a checkpoint: the names of all files that were written before the Trainer's state."""
TRAINER_FILES = {
    "optimizer.pt": "optimizer_state_dict.pt",
    "optimizer.bin": "optimizer_state_dict.pt",
    "scheduler.pt": "scheduler_state_dict.pt",
}


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
        remove_leftovers(self._folder(args), rf"\d+|checkpoint-\d+|{BEST}")
        write_config(args, self._folder(args), "train")
        if state.global_step == 0:
            return
        for checkpoint in _trainer_checkpoints(self._folder(args)):
            saved = trainer_state(checkpoint)
            ended = math.isclose(saved["epoch"], round(saved["epoch"])) or saved["global_step"] == saved["max_steps"]
            if ended and not (checkpoint.parent / str(_epoch_number(saved["epoch"]))).exists():
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
        folder = checkpoint.parent / str(_epoch_number(trainer_state(checkpoint)["epoch"]))
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
            _link_folder(best, temporary)
        reason = "the last epoch, as no epoch has a validation"
        if best_step is not None:
            rule = "highest" if args.greater_is_better else "lowest"
            reason = f"the epoch with the {rule} {metric_name(args)}, {scores[best_step]:.4g}"
        logger.info("%s -> %s, %s.", BEST, best.name, reason)
        if args.save_total_limit:
            removable = [folder for folder in folders if folder not in (best, folders[-1])]
            for folder in removable[: max(0, len(folders) - args.save_total_limit)]:
                remove_folder(folder)


def export_checkpoint(checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    """Turn a checkpoint that the Trainer saved into an epoch folder (see `VllmExportCallback`), atomically.

    Raises:
        PeagleError: the checkpoint's weights are not in one file, or vLLM would load the result wrongly.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        export_drafter(checkpoint, temporary, dtype)
        shutil.copytree(checkpoint, temporary / TRAINER_STATE, copy_function=_link_or_copy)
        for source, target in TRAINER_FILES.items():
            if (checkpoint / source).exists():
                _link_or_copy(checkpoint / source, temporary / target)


def export_drafter(saved: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write `config.json` and `model.safetensors`, as vLLM serves them, of what the Trainer saved into `folder`.

    Raises:
        PeagleError: the saved weights are not in one file, or vLLM would load the result wrongly.
    """
    drafter = whole_drafter(saved)
    weights = drafter / "model.safetensors"
    if not weights.exists():
        raise PeagleError(
            f"{saved} holds no model.safetensors, so it can't be exported for vLLM. Save whole weights: with FSDP "
            "set fsdp_state_dict_type to FULL_STATE_DICT, with ZeRO-3 stage3_gather_16bit_weights_on_model_save."
        )
    allow_as_umask(weights)  # of the Trainer's own checkpoint, which is served and resumed from as well
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in load_file(weights).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((drafter / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    check_checkpoint(folder)


def metric_name(args: TrainingArguments) -> str:
    """What the best checkpoint is chosen by, as it is called in the metrics of an evaluation."""
    return f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"


def scores_by_step(args: TrainingArguments, state: TrainerState) -> dict[int, float]:
    """What the best checkpoint is chosen by, at each step that was validated."""
    name = metric_name(args)
    return {int(entry["step"]): entry[name] for entry in state.log_history if name in entry}


def step_of_best(args: TrainingArguments, scores: dict[int, float]) -> int | None:
    """The step with the best score, of equal ones the first; None if there are no scores."""
    return (max if args.greater_is_better else min)(scores, key=scores.__getitem__, default=None)


def whole_drafter(checkpoint: Path) -> Path:
    """Where in a checkpoint the whole drafter is: with an adapter, merged beside it."""
    return checkpoint / MERGED if (checkpoint / MERGED).is_dir() else checkpoint


def epoch_folders(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The epoch folders, oldest first."""
    folders = [path for path in Path(output_dir).glob("*") if path.name.isdecimal() and (path / TRAINER_STATE).is_dir()]
    return sorted(folders, key=lambda path: int(path.name))


def checkpoints_by_step(output_dir: str | os.PathLike[str]) -> dict[int, Path]:
    """The Trainer's own checkpoint of each step that a run has one of, alone or in an epoch folder; no half ones."""
    in_epochs = [folder / TRAINER_STATE for folder in epoch_folders(output_dir)]
    folders = [*filter(is_whole, in_epochs), *_trainer_checkpoints(output_dir)]
    return {trainer_state(folder)["global_step"]: folder for folder in folders}


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """What a run would go on from; None if there is nothing."""
    found = checkpoints_by_step(output_dir)
    return found[max(found)] if found else None


def resumable_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """The Trainer's own checkpoint inside an epoch folder, or the folder itself if it is one.

    Raises:
        PeagleError: it is neither, or holds the model only.
    """
    path = Path(checkpoint)
    for folder in (path / TRAINER_STATE, path):
        if is_whole(folder):
            if not (folder / "scheduler.pt").exists() and not any(folder.glob("global_step*")):  # DeepSpeed's
                raise PeagleError(
                    f"{folder} was saved without optimizer and schedule (save_only_model), so that training can't be "
                    "resumed from it. Start anew with --no-resume, or from its weights with --from-pretrained and "
                    "another --save-path."
                )
            return folder.resolve()
    raise PeagleError(
        f"{path} holds no checkpoint of the Trainer, or half of one, so training can't be resumed from it. Name a "
        "checkpoint-N, an epoch folder or checkpoint_best of an earlier run; to start from its weights alone use "
        "--from-pretrained."
    )


def remove_checkpoints(output_dir: str | os.PathLike[str]) -> None:
    """Remove every checkpoint of an earlier run, `checkpoint-N`, epoch folders, `checkpoint_best`, and its curves."""
    (Path(output_dir) / CURVES).unlink(missing_ok=True)
    for folder in Path(output_dir).glob("*"):
        if re.fullmatch(r"checkpoint-\d+", folder.name) or folder in epoch_folders(folder.parent):
            remove_folder(folder)
        elif folder.name == BEST and folder.is_symlink():
            folder.unlink()
        elif folder.name == BEST and is_whole(folder / TRAINER_STATE):  # a copy, where there are no links
            remove_folder(folder)


def list_files(checkpoint: Path) -> None:
    """Note what is in a checkpoint, just before the Trainer's state is written (see `is_whole`)."""
    files = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]
    write_json(checkpoint / FILES, sorted(files))


def is_whole(checkpoint: Path) -> bool:
    """Whether the Trainer has written all of a checkpoint, its state last, and since then no file was removed.

    The Trainer removes old checkpoints file by file, so that a kill may leave half of one, its state included.
    """
    try:
        trainer_state(checkpoint)
        files = json.loads((checkpoint / FILES).read_text(encoding="utf-8")) if (checkpoint / FILES).exists() else []
    except (OSError, ValueError):
        return False
    return all((checkpoint / name).exists() for name in files)


def _trainer_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    return [path for path in Path(output_dir).glob("checkpoint-*") if is_whole(path)]


def trainer_state(folder: Path) -> dict:
    """What the Trainer saved of its state in one of its own checkpoints."""
    return json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def _epoch_number(epoch: float) -> int:
    """0 for anything in the first epoch, its end included."""
    return max(0, math.ceil(epoch - 1e-6) - 1)


def _link_folder(folder: Path, link: Path) -> None:
    """Make a relative link beside a folder, or a copy of hard links where the system has no links of folders."""
    try:
        os.symlink(folder.name, link, target_is_directory=True)
    except OSError as error:
        logger.warning(
            "%s is a copy of %s, not a link to it: this system or disk makes no symbolic links (%s). On Windows the "
            "developer mode allows them.",
            folder.with_name(BEST),
            folder.name,
            error.strerror or error,
        )
        shutil.copytree(folder, link, copy_function=_link_or_copy)


def _link_or_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
