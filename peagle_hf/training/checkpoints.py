"""Checkpoints on disk: what a folder holds, how it is written and removed, which one is the newest and which the best.

A checkpoint is one folder: `<epoch>/` (0, 1, …) at the end of an epoch or of the training, `checkpoint-<step>/` within
an epoch. It is written under a hidden name beside its place and renamed when it is complete; a folder that is removed
is renamed first. So a folder that has its name is complete. It holds

- `config.json` and `model.safetensors`, the drafter as vLLM serves it, an adapter merged into it;
- `optimizer_state_dict.pt` and `scheduler_state_dict.pt` (DeepSpeed keeps its optimizer in folders of its own);
- `full_precision/model.safetensors` with the weights that training goes on from, where those above have fewer bits, or
  `adapter/` in PEFT's layout. No other weights lie beside `model.safetensors`, as vLLM would load them with it;
- `trainer_state.json`, the states of the random number generators, and the records of how it was trained.
"""

import json
import logging
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import PeagleError
from ..files import allow_as_umask, atomic_path, read_json, remove_folder, remove_leftovers, save_file, write_json
from ..model.drafter import PeagleForSpeculation
from ..model.served_checkpoint import RUN_RECORD, check_checkpoint

logger = logging.getLogger(__name__)

BEST = "checkpoint_best"
CURVES = "training.png"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
OPTIMIZER, SCHEDULER = "optimizer_state_dict.pt", "scheduler_state_dict.pt"
FULL_PRECISION = "full_precision"
ADAPTER = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_NAME = re.compile(r"\d+|checkpoint-\d+")
_SUPERSEDED = ".superseded-by-"
_TRAINER_NAMES = {"optimizer.pt": OPTIMIZER, "optimizer.bin": OPTIMIZER, "scheduler.pt": SCHEDULER}


def checkpoint_name(state: TrainerState, is_ending: bool) -> str:
    """The folder of a checkpoint of this state.

    Args:
        is_ending: training ends with this step.
    """
    epoch = state.epoch or 0.0
    if epoch.is_integer() or is_ending or state.global_step >= state.max_steps > 0:
        return str(max(0, -int(-epoch // 1) - 1))
    return f"checkpoint-{state.global_step}"


def export_served_weights(folder: Path, dtype: torch.dtype, merged: PeagleForSpeculation | None = None) -> None:
    """Turn what the Trainer's functions have written into `folder` into a checkpoint.

    Args:
        folder: holds the Trainer's files, and in `full_precision/` or `adapter/` what `PeagleTrainer._save` wrote.
        dtype: of the weights that vLLM serves.
        merged: the drafter with its adapter merged, if `folder` holds an adapter.

    Raises:
        PeagleError: the weights are not in one file, or vLLM would load the result wrongly.
    """
    saved = folder / (FULL_PRECISION if merged is None else ADAPTER)
    if merged is None:
        config = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
    else:
        config = json.loads(merged.config.to_json_string()) | {"architectures": [type(merged).__name__]}
    for path in list(saved.iterdir()):
        # Nothing reads this pickle, and it holds the user's token of the hub.
        if path.name == "training_args.bin":
            path.unlink()
        elif path.name != WEIGHTS and not (merged is not None and path.name.startswith("adapter_")):
            path.rename(folder / path.name)
    if merged is None and not (saved / WEIGHTS).exists():
        raise PeagleError(
            f"The weights of {folder.parent} are not in one {WEIGHTS}, so vLLM can't serve them. Save whole weights: "
            "with FSDP set fsdp_state_dict_type to FULL_STATE_DICT, with ZeRO-3 "
            "stage3_gather_16bit_weights_on_model_save."
        )
    tensors = load_file(saved / WEIGHTS) if merged is None else merged.state_dict()
    if merged is None and all(tensor.dtype == dtype for tensor in tensors.values() if tensor.is_floating_point()):
        (saved / WEIGHTS).rename(folder / WEIGHTS)
        saved.rmdir()
        allow_as_umask(folder / WEIGHTS)
    else:
        served = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_file({name: tensor.contiguous() for name, tensor in served.items()}, folder / WEIGHTS, {"format": "pt"})
        for path in saved.glob("*.safetensors"):
            allow_as_umask(path)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / CONFIG, config)
    for theirs, ours in _TRAINER_NAMES.items():
        if (folder / theirs).exists():
            (folder / theirs).rename(folder / ours)
    check_checkpoint(folder)


def put_in_place(temporary: Path, folder: Path, superseded: Iterable[Path]) -> None:
    """Give a complete checkpoint its name, and remove what it supersedes: an older folder of that name, and others.

    The old ones are moved into a hidden folder first, which `recover` puts back if the process ends before the new one
    is in its place. The old folder of the same name is the first to go, so that `recover` can tell the two cases apart.
    """
    old = [path for path in dict.fromkeys((folder, *superseded)) if os.path.lexists(path)]
    hidden = folder.with_name(f"{_SUPERSEDED}{folder.name}")
    try:
        if old:
            hidden.mkdir()
        for path in old:
            path.rename(hidden / path.name)
        temporary.rename(folder)
    except BaseException:
        if hidden.is_dir():
            _put_back(hidden)
        raise
    if old:
        shutil.rmtree(hidden)


def _put_back(hidden: Path) -> None:
    name = hidden.name.removeprefix(_SUPERSEDED)
    # The folder of this name was moved away first, so it is moved back last.
    for path in sorted(hidden.iterdir(), key=lambda path: path.name == name):
        path.rename(hidden.parent / path.name)
    hidden.rmdir()


def recover(run_folder: str | os.PathLike[str]) -> None:
    """Repair a folder of checkpoints after a process was killed while saving.

    Checkpoints that were about to be superseded get their names back if the one to supersede them isn't in its place.
    """
    run_folder = Path(run_folder)
    for hidden in run_folder.glob(f"{_SUPERSEDED}*"):
        if (run_folder / hidden.name.removeprefix(_SUPERSEDED)).exists() and any(hidden.iterdir()):
            shutil.rmtree(hidden)
        else:
            _put_back(hidden)
    names = r"\d+|checkpoint-\d+|resume|exported|run\.json|(config|train)\.yaml"
    remove_leftovers(run_folder, rf"{names}|{BEST}|{re.escape(CURVES)}")


def folders_of_run(run_folder: str | os.PathLike[str]) -> list[Path]:
    """All folders of checkpoints, damaged ones too; not folders of other content that have such a name by chance."""
    names = (TRAINER_STATE_NAME, WEIGHTS, OPTIMIZER)
    return [
        path
        for path in Path(run_folder).glob("*")
        if _NAME.fullmatch(path.name) and any((path / name).exists() for name in names)
    ]


def remains_of_run(run_folder: str | os.PathLike[str]) -> list[Path]:
    """Everything that a new run in this folder supersedes: checkpoints, `checkpoint_best` and the curves."""
    others = (Path(run_folder) / name for name in (BEST, CURVES))
    return [*folders_of_run(run_folder), *(path for path in others if os.path.lexists(path))]


def epoch_folders(run_folder: str | os.PathLike[str]) -> list[Path]:
    """The folders of epochs, oldest first."""
    return sorted(
        (path for path in folders_of_run(run_folder) if path.name.isdecimal()), key=lambda path: int(path.name)
    )


def checkpoints_by_step(run_folder: str | os.PathLike[str]) -> dict[int, Path]:
    """The checkpoint of each step that a run has one of, oldest first.

    Raises:
        PeagleError: a checkpoint is damaged so that its step isn't known.
    """
    return _by_step(folders_of_run(run_folder))


def _by_step(folders: Iterable[Path]) -> dict[int, Path]:
    # If a step has two folders, the one that is named after the epoch comes last and so replaces the other.
    ordered = sorted(folders, key=lambda path: path.name.isdecimal())
    found = {_step_of(folder): folder for folder in ordered}
    return {step: found[step] for step in sorted(found)}


def _step_of(folder: Path) -> int:
    """The step of a checkpoint: by its name, which takes no reading of a long log, or by its state."""
    _, dash, step = folder.name.partition("-")
    return int(step if dash else trainer_state(folder)["global_step"])


def newest_checkpoint(run_folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that a run would be resumed from; None if there is none."""
    found = checkpoints_by_step(run_folder)
    return found[max(found)] if found else None


def trainer_state(folder: Path) -> dict[str, Any]:
    """The Trainer's state in a checkpoint.

    Raises:
        PeagleError: the state can't be read.
    """
    path = folder / TRAINER_STATE_NAME
    state = read_json(path, f"The checkpoint is damaged: remove {folder}, and training goes on from the one before it.")
    log = state.get("log_history")
    if (
        not isinstance(state.get("global_step"), int)
        or not isinstance(log, list)
        or not all("step" in one for one in log)
    ):
        raise PeagleError(f"{path} is damaged: it names no step. Remove {folder}, and training goes on from another.")
    try:
        TrainerState(**state)
    except TypeError as error:
        raise PeagleError(
            f"{path} is damaged, or of another version of transformers: {error}. Remove {folder}, and training goes on "
            "from another."
        ) from error
    return state


def check_no_later_checkpoints(folder: Path, run_folder: str | os.PathLike[str]) -> None:
    """Make sure that the checkpoints of a resumed run don't mix with those of another run in its folder.

    Raises:
        PeagleError: the folder has checkpoints, and the one to resume from isn't their newest.
    """
    found = checkpoints_by_step(run_folder)
    if not found or found[max(found)].resolve() == folder.resolve():
        return
    step = trainer_state(folder)["global_step"]
    later = [number for number in found if number > step]
    if folder.resolve().parent == Path(run_folder).resolve() and later:
        reason = (
            f"of the steps {', '.join(map(str, later))}, which would pass for later ones of a run that goes on from"
        )
    else:
        reason = "of another run, which would mix with those of a run that goes on from"
    raise PeagleError(
        f"{run_folder} holds checkpoints {reason} step {step} in {folder}. Remove them or name another --save-path; to "
        "go on from the newest one leave --resume-from-checkpoint out."
    )


def resumable_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """The real path of a checkpoint, after checking that all files are there from which training is resumed.

    Raises:
        PeagleError: the folder is no checkpoint, it holds the model only, or a file is missing or damaged.
    """
    folder = Path(checkpoint).resolve()
    if not any((folder / name).exists() for name in (TRAINER_STATE_NAME, OPTIMIZER)):
        raise PeagleError(
            f"{checkpoint} holds no checkpoint of a training, so training can't be resumed from it. Name a folder that "
            "training wrote, such as checkpoints/0, checkpoint-N or checkpoint_best; to start from its weights alone "
            "use --from-pretrained."
        )
    states = [(folder / name).exists() for name in (OPTIMIZER, SCHEDULER, "latest")]
    if not any(states) and not any(folder.glob("rng_state*")):
        raise PeagleError(
            f"{checkpoint} was saved without optimizer and schedule (save_only_model), so that training can't be "
            "resumed from it. Start anew with --no-resume, or from its weights with --from-pretrained and another "
            "--save-path."
        )
    problem = next(_problems(folder), None)
    if problem is not None:
        sound = (path for path in folders_of_run(folder.parent) if next(_problems(path), None) is None)
        others = list(_by_step(sound).values())
        instead = (
            f"remove {folder}: training then goes on from {others[-1]}" if others else "train anew with --no-resume"
        )
        raise PeagleError(f"Training can't go on from {folder}: {problem}. Put the file back, or {instead}.")
    return folder


@contextmanager
def trainer_view(
    checkpoint: Path, run_folder: Path, is_adapter: bool, has_optimizer: bool, has_fsdp_weights: bool = False
) -> Iterator[Path]:
    """A temporary folder in which a checkpoint's files have the names that the Trainer's loaders look for.

    Its files are links, or copies where the disk has none. Each process makes its own.

    Args:
        run_folder: where the temporary folder is made.
        is_adapter: an adapter is trained.
        has_optimizer: the Trainer is to find the optimizer and the schedule; else they are there under the names of
            this library only.
        has_fsdp_weights: the weights are to be there once more in accelerate's file of FSDP.

    Raises:
        PeagleError: the checkpoint is of an adapter and `is_adapter` is false, or the other way round.
    """
    view = run_folder / f".resume.{secrets.token_hex(4)}.tmp"
    try:
        _link_tree(checkpoint, view)
        for part in (FULL_PRECISION, ADAPTER):
            for path in (view / part).glob("*"):
                path.replace(view / path.name)
        if (view / ADAPTER_WEIGHTS).exists() != is_adapter:
            raise PeagleError(
                f"{checkpoint} is of a training {'without' if is_adapter else 'of'} an adapter, unlike this one. "
                "Resume with the same --lora-r, or train into another --save-path."
            )
        if is_adapter:
            (view / WEIGHTS).unlink(missing_ok=True)
        if has_fsdp_weights:
            torch.save(load_file(view / WEIGHTS), view / f"{FSDP_MODEL_NAME}.bin")
        for theirs, ours in _TRAINER_NAMES.items():
            if has_optimizer and (view / ours).exists():
                _link_or_copy(view / ours, view / theirs)
        yield view
    finally:
        shutil.rmtree(view, ignore_errors=True)


def release(view: Path) -> None:
    """Remove the files of a `trainer_view` that are loaded by now, as links keep the disk space of removed checkpoints.

    The states of the random number generators stay: the Trainer loads them last.
    """
    for path in view.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("rng_state"):
            path.unlink()


def metric_name(args: TrainingArguments) -> str:
    """The metric that chooses the best checkpoint, as it is called in the metrics of an evaluation."""
    return f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"


def scores_by_step(args: TrainingArguments, state: TrainerState) -> dict[int, float]:
    """The metric that chooses the best checkpoint at each step that was validated, where it is a finite number."""
    name = metric_name(args)
    scores = {int(entry["step"]): float(entry[name]) for entry in state.log_history if name in entry}
    # Comparisons with NaN are false, so this leaves out NaN as well as infinity.
    return {step: score for step, score in scores.items() if abs(score) < float("inf")}


def step_of_best(args: TrainingArguments, scores: Mapping[int, float]) -> int | None:
    """The step with the best score, of equal ones the first; None if there are no scores."""
    return (max if args.greater_is_better else min)(scores, key=scores.__getitem__, default=None)


def best_checkpoint(args: TrainingArguments, state: TrainerState, found: Mapping[int, Path]) -> Path | None:
    """The checkpoint with the best score; None if none has a score."""
    scores = {step: score for step, score in scores_by_step(args, state).items() if step in found}
    best = step_of_best(args, scores)
    return None if best is None else found[best]


def link_best(best: Path) -> None:
    """Let `checkpoint_best` be a relative link to a checkpoint, or a copy where the system has no links of folders."""
    link = best.with_name(BEST)
    if link.is_symlink() and os.readlink(link) == best.name:
        return
    with atomic_path(link) as temporary:
        try:
            os.symlink(best.name, temporary, target_is_directory=True)
        except OSError as error:
            logger.warning(
                "%s is a copy of %s, not a link to it: this system or disk makes no symbolic links (%s). On Windows "
                "the developer mode allows them.",
                link,
                best.name,
                error.strerror or error,
            )
            _link_tree(best, temporary)


def remove_over_limit(run_folder: Path, limit: int, kept: set[Path]) -> None:
    """Remove the oldest checkpoints until `limit` are left, but none of `kept`."""
    folders = sorted(folders_of_run(run_folder), key=_step_of)
    for folder in [folder for folder in folders if folder not in kept][: max(0, len(folders) - limit)]:
        remove_folder(folder)


def _problems(folder: Path) -> Iterator[str]:
    """Missing and damaged files among those that training is resumed from, as phrases.

    Of the files of torch.save all bytes are read and compared with their checksums, as torch doesn't compare them.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".json":
                if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                    raise ValueError("it holds no JSON object")
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as archive:
                    if (part := archive.testzip()) is not None:
                        raise ValueError(f"the checksum of {part} in it is wrong")
        except Exception as error:  # zipfile raises many kinds for a damaged archive
            yield f"{path} is damaged ({' '.join(str(error).split())})"
    if not any(path.is_file() for path in folder.glob("rng_state*")):
        yield f"{folder / 'rng_state.pth'} is missing"
    needed = [TRAINER_STATE_NAME, RUN_RECORD, CONFIG, WEIGHTS]
    if not (folder / "latest").exists():  # this file names the folder in which DeepSpeed keeps both
        needed += [OPTIMIZER, SCHEDULER]
    if (folder / ADAPTER).is_dir():
        needed.append(f"{ADAPTER}/{ADAPTER_WEIGHTS}")
    elif (folder / CONFIG).is_file() and read_json(folder / CONFIG, "").get("dtype") != "float32":
        needed.append(f"{FULL_PRECISION}/{WEIGHTS}")
    yield from (f"{folder / name} is missing" for name in needed if not (folder / name).is_file())


def _link_tree(source: Path, target: Path) -> None:
    """Make a folder with links to all files of another one."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            _link_tree(path, target / path.name)
        else:
            _link_or_copy(path, target / path.name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        try:
            os.symlink(source.resolve(), target)
        except OSError:
            shutil.copy2(source, target)
