"""Opening what `peagle-hf prepare` wrote; a file that is missing, truncated or damaged is named."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PeagleError
from ..files import found_place, read_json
from ..fingerprint import file_fingerprint
from .tokenizer import ChatOptions

if TYPE_CHECKING:
    import datasets

PREPARE_RECORD = "prepare.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""The chat template that `prepare --chat-template` chose, beside the prepared dataset, and on the hub beside a drafter
that was trained with it."""
CHAT_TEMPLATE_KWARGS_FILE = "chat_template_kwargs.json"
"""On the hub, beside a drafter that was trained with variables for the chat template: these."""
DATASET_INFO, DATASET_STATE = "dataset_info.json", "state.json"
UNMOVED = ".prepared"
"""Folder in which `prepare` makes a dataset; when it is complete, its files are moved out of it, the record last."""
REMEDY = "Run the same peagle-hf prepare command again: it makes a damaged dataset anew and keeps its hidden states."


def load_prepared(data_path: str | os.PathLike[str]) -> "datasets.Dataset":
    """Open a prepared dataset, memory-mapped.

    Raises:
        PeagleError: the folder isn't one, or one of its files is missing, truncated, damaged or another one than
            `peagle-hf prepare` wrote; the message names it.
    """
    from datasets import load_from_disk

    folder = Path(data_path)
    if not any((folder / name).exists() for name in (DATASET_INFO, DATASET_STATE, PREPARE_RECORD)):
        raise PeagleError(f"{folder} is not a prepared dataset. Make it with peagle-hf prepare --output {folder}.")
    if (folder / UNMOVED / PREPARE_RECORD).exists():
        raise PeagleError(
            f"{folder} is not complete: peagle-hf prepare was stopped while it put the files of a new dataset into "
            f"place, and some are in {folder / UNMOVED} still. Run it again, which does the rest."
        )
    record = read_prepare_record(folder)
    for name in (DATASET_INFO, DATASET_STATE):
        read_json(folder / name, REMEDY)
    for name, recorded in record.get("files", {}).items():
        _check_file(folder / name, recorded)
    try:
        data = load_from_disk(str(folder))
    except Exception as error:  # of datasets and Arrow, which have many for files that they can't read
        damaged = next((path for path in sorted(folder.glob("data-*.arrow")) if not _can_be_opened(path)), folder)
        raise PeagleError(f"{damaged} is damaged ({' '.join(str(error).split())}). {REMEDY}") from error
    if lacking := {"input_ids", "loss_mask", "seq_len"} - set(data.column_names):
        raise PeagleError(f"The dataset {folder} lacks the columns {sorted(lacking)}. Make it with peagle-hf prepare.")
    recorded = record.get("counts", {}).get("rows", len(data))
    if recorded != len(data):
        raise PeagleError(
            f"The files data-*.arrow in {folder} hold {len(data)} rows, but {PREPARE_RECORD} counts {recorded}: a file "
            f"is truncated or missing. {REMEDY}"
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
    for name in ("counts", "files"):
        if not isinstance(record.get(name, {}), dict):
            raise PeagleError(f"{path} is damaged (its {name} are no object). Put it back, or remove it.")
    return found_place(record, "model", data_path)


def rows_fingerprint(data_path: str | os.PathLike[str]) -> str:
    """What tells the rows of a prepared dataset from others: a digest of all tokens and loss masks, in order.

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
    """SHA-256 of a row's tokens and loss mask, both [T]."""
    return hashlib.sha256(input_ids.astype(np.int32).tobytes() + loss_mask.astype(np.int8).tobytes()).hexdigest()


def digest_of_rows(digests: Iterable[str]) -> str:
    """The fingerprint of rows with these digests, in their order."""
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
