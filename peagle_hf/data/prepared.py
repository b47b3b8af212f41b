"""Opening what `peagle-hf prepare` wrote; a file that is missing, truncated or damaged is named."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PeagleError
from ..files import read_json
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
REMEDY = "Run the same peagle-hf prepare command again: it makes a damaged dataset anew and keeps its hidden states."


def load_prepared(data_path: str | os.PathLike[str]) -> "datasets.Dataset":
    """Open a prepared dataset, memory-mapped.

    Raises:
        PeagleError: the folder isn't one, or one of its files is missing, truncated or damaged.
    """
    from datasets import load_from_disk

    folder = Path(data_path)
    if not any((folder / name).exists() for name in (DATASET_INFO, DATASET_STATE, PREPARE_RECORD)):
        raise PeagleError(f"{folder} is not a prepared dataset. Make it with peagle-hf prepare --output {folder}.")
    record = read_prepare_record(folder)
    for name in (DATASET_INFO, DATASET_STATE):
        read_json(folder / name, REMEDY)
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
    if not isinstance(record.get("counts", {}), dict):
        raise PeagleError(f"{path} is damaged (its counts are no object). Put it back, or remove it.")
    return record


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


def _can_be_opened(path: Path) -> bool:
    from datasets import Dataset

    try:
        Dataset.from_file(str(path))
    except Exception:
        return False
    return True
