"""The folders of checkpoints that a training writes: their names, their content, and which of them is the best."""

import json
import logging
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .errors import PeagleError
from .files import allow_as_umask, atomic_path, remove_folder, save_file, write_json
from .model.served import check_checkpoint

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
    folders = [*filter(is_whole, in_epochs), *trainer_checkpoints(output_dir)]
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


def trainer_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    return [path for path in Path(output_dir).glob("checkpoint-*") if is_whole(path)]


def trainer_state(folder: Path) -> dict:
    """What the Trainer saved of its state in one of its own checkpoints."""
    return json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def epoch_number(epoch: float) -> int:
    """0 for anything in the first epoch, its end included."""
    return max(0, math.ceil(epoch - 1e-6) - 1)


def link_folder(folder: Path, link: Path) -> None:
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
