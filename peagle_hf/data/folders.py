"""Folders of data: which files hold data, and which of them belong to a split."""

import logging
import os
import re
from pathlib import Path

import yaml

from ..console import number_of
from ..errors import PeagleError
from .prepared_dataset import PREPARE_RECORD

logger = logging.getLogger(__name__)

FILE_KINDS = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv")
NAMED_FILES = 5
"""Files of a folder that the log names."""
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_NO_DATA = ("dataset_infos.json", "dataset_info.json", ".report.json")
"""Ends of names of files beside data: what `datasets` says of a data set, and what `regenerate` dropped."""
_SPLIT_WORDS = {
    "train": "train training",
    "test": "test testing eval evaluation",
    "validation": "validation valid dev val",
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\b")
"""Name of a file as hub datasets have it, which begins with the split."""


def kind_of(path: Path) -> str | None:
    """The ending that tells a file's format, one of `FILE_KINDS`, or None."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((kind for kind in FILE_KINDS if name.endswith(kind)), None)


def files_in(folder: Path) -> list[Path]:
    """The files in a folder and below, but no hidden ones and none of a prepared dataset, which may be made of it."""
    made = {record.parent for record in folder.rglob(PREPARE_RECORD)}
    files = sorted(file for file in folder.rglob("*") if file.is_file() and made.isdisjoint(file.parents))
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def files_of_split(folder: Path, parts: list[str]) -> list[Path]:
    """The data files of a split in a folder; of `train` if none is named.

    Args:
        parts: the split, or the configuration and the split, as they are named behind the folder.
    """
    *configuration, wanted = parts or ["train"]
    by_split = _splits_of_card(folder, configuration)
    if by_split is None:
        wanted = ":".join([*configuration, wanted])
        by_split = {}
        for file in files_in(folder):
            by_split.setdefault(_split_by_name(file.relative_to(folder)), []).append(file)
    by_split = {
        name: data_files
        for name, files in by_split.items()
        if (data_files := [file for file in files if kind_of(file) and not file.name.endswith(_NO_DATA)])
    }
    if not by_split:
        raise PeagleError(
            f"The folder {folder} holds no data file, which would end in {', '.join(FILE_KINDS)}, perhaps with "
            f"{', '.join(COMPRESSIONS)}. Name another folder, or the file itself."
        )
    if wanted not in by_split:
        raise PeagleError(
            f"{folder} has no files of the split {wanted}, only of {', '.join(by_split)}. Name {folder}:SPLIT."
        )
    files = by_split.pop(wanted)
    names = [str(file.relative_to(folder)) for file in files[:NAMED_FILES]] + ["…"] * (len(files) > NAMED_FILES)
    others = f" Not read: the split {', '.join(by_split)}." if by_split else ""
    read = f"{number_of(len(files), 'file')} {'is' if len(files) == 1 else 'are'} read ({', '.join(names)})"
    logger.info("%s, split %s: %s.%s", folder, wanted, read, others)
    return files


def _splits_of_card(folder: Path, configuration: list[str]) -> dict[str, list[Path]] | None:
    """The files of each split as the dataset card of a hub dataset's folder names them; None without such a card."""
    from datasets import load_dataset_builder
    from huggingface_hub import metadata_load

    card, root = folder / "README.md", folder.resolve()
    try:
        if not card.is_file() or not (metadata_load(card) or {}).get("configs"):
            return None
        found = load_dataset_builder(str(root), *configuration).config.data_files or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PeagleError(
            f"{folder} can't be read as its README.md says: {' '.join(str(error).split())} Name "
            f"{folder}:CONFIGURATION:SPLIT if it has several configurations, or name the files themselves."
        ) from error
    return {str(split): [folder / os.path.relpath(file, root) for file in files] for split, files in found.items()}


def _split_by_name(file: Path) -> str:
    """The split of a file in a folder: the one that its path is named after, or else `train`.

    Hub datasets name their files as `data/train_sft-00000-of-00003.parquet`, of the split `train_sft`.
    """
    shard = _SHARD.match(file.name)
    if shard and (file.parent == Path("data") or _split_word(shard.group(1))):
        return shard.group(1)
    return _split_word(str(file)) or "train"


def _split_word(text: str) -> str | None:
    words = set(re.split(r"[^a-z]+", text.lower()))
    return next((name for name, those in _SPLIT_WORDS.items() if words & set(those.split())), None)
