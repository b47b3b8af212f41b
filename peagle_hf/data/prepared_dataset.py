"""The folder of a prepared dataset: opening it, its record `prepare.json`, and whether it may be replaced.

A file that is missing, truncated or damaged is named in the error.
"""

import hashlib
import logging
import os
import shlex
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..arguments import CONFIG, config_path
from ..console import number_of
from ..errors import PeagleError
from ..files import read_json, resolve_relative_path
from ..fingerprint import file_fingerprint
from ..verifier.draft_vocabulary import load_token_freq
from .cache_storage import cache_folder, cached_rows
from .tokenizer import ChatOptions

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

PREPARE_RECORD = "prepare.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""The chat template that `prepare --chat-template` chose, beside the prepared dataset, and on the hub beside a drafter
that was trained with it."""
CHAT_TEMPLATE_KWARGS_FILE = "chat_template_kwargs.json"
"""On the hub, beside a drafter that was trained with variables for the chat template: these."""
DATASET_INFO, DATASET_STATE = "dataset_info.json", "state.json"
SKIPPED = "skipped.json"
INSPECTION = "inspect"
"""Name, without its ending, of the files that `peagle-hf data inspect` writes into the folder."""
_CHECKED_FILES = ("data-*.arrow", DATASET_INFO, DATASET_STATE, "token_freq.pt", CHAT_TEMPLATE_FILE)
"""Files of which `prepare.json` has a fingerprint, so that another file in their place is noticed."""
_OWN_FILES = (PREPARE_RECORD, *_CHECKED_FILES, SKIPPED, f"{INSPECTION}.html", f"{INSPECTION}.json")
UNMOVED = ".prepared"
"""Folder in which `prepare` makes a dataset. When it is complete, its files are moved out of it, the record last."""
REMEDY = "Run the same peagle-hf prepare command again: it replaces a damaged dataset and keeps its hidden states."


def load_prepared(data_path: str | os.PathLike[str]) -> "datasets.Dataset":
    """Open a prepared dataset, memory-mapped.

    Raises:
        PeagleError: the folder isn't one, or one of its files is missing, truncated, damaged or another one than
            `peagle-hf prepare` wrote; the message names it.
    """
    from datasets import load_from_disk

    folder = Path(data_path)
    if not any((folder / name).exists() for name in (DATASET_INFO, DATASET_STATE, PREPARE_RECORD)):
        command = f"peagle-hf prepare --output {shlex.quote(str(folder))}"
        raise PeagleError(f"{folder} is not a prepared dataset. Make it with {command}.")
    if (folder / UNMOVED / PREPARE_RECORD).exists():
        raise PeagleError(
            f"{folder} is not complete: peagle-hf prepare was stopped while it moved the files of a new dataset into "
            f"place, and some are still in {folder / UNMOVED}. Run it again to finish."
        )
    record = read_prepare_record(folder)
    for name in (DATASET_INFO, DATASET_STATE):
        read_json(folder / name, REMEDY)
    for name, recorded in record.get("files", {}).items():
        _check_file(folder / name, recorded)
    try:
        data = load_from_disk(str(folder))
    # datasets and Arrow raise many kinds of errors for a file that they can't read.
    except Exception as error:
        damaged = next((path for path in sorted(folder.glob("data-*.arrow")) if not _can_be_opened(path)), folder)
        raise PeagleError(f"{damaged} is damaged ({' '.join(str(error).split())}). {REMEDY}") from error
    if lacking := {"input_ids", "loss_mask", "seq_len"} - set(data.column_names):
        raise PeagleError(f"The dataset {folder} lacks the columns {sorted(lacking)}. Make it with peagle-hf prepare.")
    recorded = record.get("counts", {}).get("rows", len(data))
    if recorded != len(data):
        raise PeagleError(
            f"The files data-*.arrow in {folder} hold {len(data)} samples, but {PREPARE_RECORD} counts {recorded}: a "
            f"file is truncated or missing. {REMEDY}"
        )
    return data


def read_prepare_record(data_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a dataset was made from, and its counts; empty if there is no such file, as beside other datasets.

    Raises:
        PeagleError: the file is damaged.
    """
    path = Path(data_path) / PREPARE_RECORD
    if not path.exists():
        return {}
    record = read_json(
        path,
        f"Put it back, or replace the dataset with peagle-hf prepare --overwrite. Without {PREPARE_RECORD} the dataset "
        "can still be used, but what it was made from isn't known.",
    )
    for name, kind in (("counts", dict), ("files", dict), ("data", list), ("data_sha256", list), ("model", str)):
        if not isinstance(record.get(name, kind()), kind):
            raise PeagleError(f"{path} is damaged (its field {name} is no {kind.__name__}). Put it back, or remove it.")
    return resolve_relative_path(record, "model", data_path)


def rows_fingerprint(data_path: str | os.PathLike[str]) -> str:
    """Fingerprint of a prepared dataset's samples: a digest of all tokens and loss masks, in order.

    It is in the record of `peagle-hf prepare`; of a dataset without one it is computed, which reads all of it.

    Raises:
        PeagleError: as `load_prepared`.
    """
    data = load_prepared(data_path)
    recorded = read_prepare_record(data_path).get("rows_fingerprint")
    if recorded is not None:
        return str(recorded)
    batches = data.select_columns(["input_ids", "loss_mask"]).with_format("numpy").iter(batch_size=1000)
    rows = (row for batch in batches for row in zip(batch["input_ids"], batch["loss_mask"], strict=True))
    return digest_of_rows(row_digest(ids, mask) for ids, mask in rows)


def row_digest(input_ids: np.ndarray, loss_mask: np.ndarray) -> str:
    """SHA-256 of a sample's tokens and loss mask, both [T]."""
    return hashlib.sha256(input_ids.astype(np.int32).tobytes() + loss_mask.astype(np.int8).tobytes()).hexdigest()


def digest_of_rows(digests: Iterable[str]) -> str:
    """The fingerprint of samples with these digests (see `row_digest`), in their order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:32]


def chat_options(data_path: str | os.PathLike[str]) -> tuple[str | None, dict[str, Any]]:
    """How the chats of a prepared dataset became text: the file of the chat template that was chosen, or None for the
    tokenizer's own, and the template's variables. Whoever renders chats for the same drafter must use the same.

    Raises:
        PeagleError: the record is damaged.
    """
    template = Path(data_path) / CHAT_TEMPLATE_FILE
    kwargs = read_prepare_record(data_path).get("chat_template_kwargs") or {}
    return str(template) if template.exists() else None, kwargs


def read_chat_options(data_path: str | os.PathLike[str]) -> ChatOptions:
    """The same with the text of the template.

    Raises:
        PeagleError: the record is damaged, or the template can't be read.
    """
    file, kwargs = chat_options(data_path)
    try:
        return ChatOptions(None if file is None else Path(file).read_text(encoding="utf-8"), kwargs)
    except (OSError, ValueError) as error:
        raise PeagleError(f"{file} can't be read ({error}). {REMEDY}") from error


def column(data: "datasets.Dataset", name: str) -> list[Any]:
    """A column of a dataset as plain Python values."""
    return data.with_format(None)[name][:]


def _check_file(path: Path, recorded: str) -> None:
    """Compare a file with what `file_fingerprint` said of it when it was written."""
    try:
        found = file_fingerprint(path)
    except OSError as error:
        raise PeagleError(f"{path} can't be read: {error.strerror}. {REMEDY}") from error
    if found != recorded:
        size, size_then = (int(text.partition(" ")[0]) for text in (found, recorded))
        what = f"has {size} instead of {size_then} bytes" if size != size_then else "was changed"
        raise PeagleError(
            f"{path} is damaged, or isn't the file that belongs to this dataset: it {what} since peagle-hf prepare "
            f"wrote it. {REMEDY}"
        )


def _can_be_opened(path: Path) -> bool:
    from datasets import Dataset

    try:
        Dataset.from_file(str(path))
    except Exception:
        return False
    return True


def is_made(output: Path, origin: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder already holds the dataset that `prepare` would make, complete and undamaged.

    Args:
        origin: everything that the dataset depends on, as `prepare.json` records it.
        overwrite: whether another dataset may be replaced.

    Raises:
        PeagleError: the folder holds another dataset, which must not be replaced.
    """
    if not any(_own_files(output)):
        return False
    record_path = output / PREPARE_RECORD
    if not record_path.exists() and not overwrite:
        raise PeagleError(
            f"{output} holds a dataset without {PREPARE_RECORD}: it is not complete, or something else made it. "
            "Pass --overwrite to replace it, or name another --output."
        )
    changes = _changes(read_prepare_record(output), origin) if record_path.exists() else ["it has no record"]
    if changes and not overwrite:
        raise PeagleError(
            f"{output} holds a dataset made with other settings: {'; '.join(changes)}. "
            "Pass --overwrite to replace it, or name another --output."
        )
    if changes:
        if cached_rows(cache_folder(output)):
            raise PeagleError(
                f"{cache_folder(output)} holds hidden states of the dataset in {output}; they would not fit "
                f"another one ({'; '.join(changes)}). Remove that folder first, or name another --output."
            )
        return False
    try:
        load_prepared(output)
        load_token_freq(output / "token_freq.pt")
        if not (output / SKIPPED).exists():
            raise PeagleError(f"{output / SKIPPED} is missing.")
    except PeagleError as error:
        logger.warning("The dataset is prepared again: %s", error)
        return False
    return True


def _changes(record: dict[str, Any], origin: dict[str, Any]) -> list[str]:
    """The settings in which a dataset's record differs from those wanted, one clause each.

    Fields that the record of an earlier version lacks aren't compared. Files are compared by content, not by name: the
    folder of the model, a file of data or of a template may have been renamed.
    """
    changes = [
        f"{name} was {record[name]}, is {value}"
        for name, value in origin.items()
        if name in record and record[name] != value and name not in ("model", "data", "data_sha256", "chat_template")
    ]
    if (record.get("chat_template") is None) != (origin["chat_template"] is None):
        changes.append(f"chat_template was {record.get('chat_template')}, is {origin['chat_template']}")
    then, now = (
        list(zip(one.get("data") or [], one.get("data_sha256") or [], strict=False)) for one in (record, origin)
    )
    if len(then) != len(now):
        changes.append(f"data was {record.get('data')}, is {origin['data']}")
    for (name_then, sha_then), (name, sha) in zip(then, now, strict=False):
        if sha_then != sha and name_then == name:
            changes.append(f"the content of {name} has changed (SHA-256 was {sha_then}, is {sha})")
        elif sha_then != sha or (sha is None and name_then != name):
            changes.append(f"data was {name_then}, is {name}")
    return changes


def fingerprints_of_files(folder: Path) -> dict[str, str]:
    """Fingerprints by name of the files that `load_prepared` compares with the record."""
    checked = (path for pattern in _CHECKED_FILES for path in folder.glob(pattern))
    return {path.name: file_fingerprint(path) for path in checked}


def _own_files(folder: Path) -> list[Path]:
    arguments = {config_path(folder, "prepare"), folder / "prepare.yaml"}
    return [*(path for pattern in _OWN_FILES for path in folder.glob(pattern)), *filter(Path.exists, arguments)]


def finish_move(output: Path) -> None:
    """Move the files of a complete dataset out of `UNMOVED` into the folder; goes on where a killed process stopped.

    `prepare.json` of the old dataset is deleted first and that of the new one is moved last: its presence marks a
    complete dataset.
    """
    source = output / UNMOVED
    if not (source / PREPARE_RECORD).exists():
        shutil.rmtree(source, ignore_errors=True)
        return
    # Records of earlier versions have no list of files.
    files = read_prepare_record(source).get("files", {})
    (output / PREPARE_RECORD).unlink(missing_ok=True)
    for path in _own_files(output):
        if path.name not in (*files, SKIPPED, CONFIG, "prepare.yaml"):
            path.unlink()
    for path in _own_files(source):
        if path.name != PREPARE_RECORD:
            os.replace(path, output / path.name)
    os.replace(source / PREPARE_RECORD, output / PREPARE_RECORD)
    source.rmdir()


def check_skip_rows(skip_rows: Sequence[int] | None, num_rows: int, data_path: str | os.PathLike[str]) -> set[int]:
    """The rows that --skip-rows names, as a set.

    Raises:
        PeagleError: the prepared dataset has no such row.
    """
    if outside := sorted(row for row in skip_rows or () if not 0 <= row < num_rows):
        raise PeagleError(
            f"--skip-rows names row {outside[0]}, but the rows of {data_path} are 0 to {num_rows - 1}. Name rows of "
            "the prepared dataset, as the errors about them do."
        )
    return set(skip_rows or ())


def learnt_share(data_path: str | os.PathLike[str]) -> float:
    """The share of a prepared dataset's tokens that is trained on, 0 .. 1."""
    frequencies = load_token_freq(Path(data_path) / "token_freq.pt")
    counts = frequencies.values() if isinstance(frequencies, dict) else frequencies.tolist()
    return sum(counts) / max(1, sum(column(load_prepared(data_path), "seq_len")))


def split_rows(data_path: str | os.PathLike[str], train_ratio: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split the samples of a prepared dataset into training and validation, whole conversations at a time.

    Args:
        train_ratio: share of the conversations for training, in (0, 1]; 1 leaves validation empty.

    Returns:
        The rows for training and those for validation.

    Raises:
        PeagleError: the ratio is out of range or would leave a side empty.
    """
    if not 0 < train_ratio <= 1:
        raise PeagleError(f"train_data_ratio is {train_ratio}; it must be in (0, 1], 1 meaning no validation.")
    data = load_prepared(data_path)
    conversations = column(data, "conversation_id") if "conversation_id" in data.column_names else range(len(data))
    distinct = sorted(set(conversations))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {distinct[index] for index in order[: len(distinct) - int(len(distinct) * train_ratio)]}
    train = [row for row, conversation in enumerate(conversations) if conversation not in held_out]
    if not train or (train_ratio < 1 and not held_out):
        raise PeagleError(
            f"{number_of(len(distinct), 'conversation')} can't be split at train_data_ratio {train_ratio} with "
            "something on either side. Prepare more data or change --train-data-ratio."
        )
    return train, [row for row, conversation in enumerate(conversations) if conversation in held_out]
