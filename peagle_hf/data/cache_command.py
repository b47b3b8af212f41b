"""`peagle-hf cache`: describe, verify or convert a folder of cached hidden states."""

import logging
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..arguments import Arguments
from ..console import number_of, progress_bar
from ..errors import PeagleError
from ..files import locked_file, read_json, write_json
from ..fingerprint import has_weights
from ..model.slots import target_tokens
from .cache_manifest import MANIFEST, Manifest, origin_of
from .cache_storage import (
    FP8_STORAGES,
    LEARNT_STORAGES,
    STORAGES,
    Storage,
    UnusableFile,
    cached_rows,
    failed_rows,
    file_layout,
    read_states,
    row_path,
    save_states,
)
from .prepared_dataset import DATASET_INFO, column, load_prepared

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

CONVERSION_RECORD = "conversion.json"
"""In the folder of an unfinished conversion: its source and the kind to convert to."""


@dataclass
class CacheArguments(Arguments):
    """Arguments of `peagle-hf cache ACTION FOLDER [DESTINATION]`."""

    action: Literal["info", "verify", "convert"] = field(
        metadata={
            "help": "info: look at every file's header; verify: read everything, and end with status 1 if something "
            "is missing or can't be used; convert: write the states as another kind of files."
        }
    )
    folder: str = field(metadata={"help": "Folder of hidden states."})
    destination: str | None = field(default=None, metadata={"help": "New folder for what is converted."})
    storage: Storage | None = field(
        default=None, metadata={"help": "The kind to convert to, as of `peagle-hf extract --storage`."}
    )
    preprocessed_data: str | None = field(
        default=None,
        metadata={
            "aliases": ["--data-path"],
            "help": "Folder of `peagle-hf prepare` (default: the one that the folder lies in, if any).",
        },
    )

    GROUPS: ClassVar = {
        "Input and output": ("action", "folder", "destination", "storage", "preprocessed_data"),
    }


@dataclass(frozen=True)
class CacheReport:
    """What a folder of hidden states holds.

    Args:
        folder: its path.
        manifest: its manifest, None if it has none.
        storages: number of usable files of each storage kind.
        dtypes: number of usable files of each dtype, as stored.
        num_rows: number of usable files; each holds one sample.
        num_tokens: tokens in the usable files.
        num_bytes: size of the usable files.
        missing: rows of prepared samples without a file; None if the prepared dataset isn't known.
        failed: of the missing rows those that a server failed, and why.
        unusable: rows whose file can't be used, and why.
        verifier_changed: the verifier's folder has other weights now; False if that isn't known.
    """

    folder: str
    manifest: Manifest | None
    storages: dict[str, int]
    dtypes: dict[str, int]
    num_rows: int
    num_tokens: int
    num_bytes: int
    missing: list[int] | None
    failed: dict[int, str]
    unusable: dict[int, str]
    verifier_changed: bool = False


def cache(arguments: CacheArguments) -> CacheReport | None:
    """Describe, verify or convert a folder of hidden states.

    Raises:
        PeagleError: there is no such folder, `verify` found a file that is missing or can't be used, or the folder
            can't be converted.
    """
    if not Path(arguments.folder).is_dir():
        raise PeagleError(f"There is no folder {arguments.folder}. Name one that peagle-hf extract has written.")
    converts = arguments.action == "convert"
    if any((value is not None) != converts for value in (arguments.destination, arguments.storage)):
        raise PeagleError(
            "Write peagle-hf cache info FOLDER, cache verify FOLDER, or cache convert FOLDER NEW_FOLDER --storage KIND."
        )
    if arguments.destination is not None and arguments.storage is not None:
        convert(arguments.folder, arguments.destination, arguments.storage, arguments.preprocessed_data)
        return None
    if not cached_rows(arguments.folder) and Manifest.read(arguments.folder) is None:
        inside = Path(arguments.folder) / "hidden_states"
        raise PeagleError(
            f"{arguments.folder} holds no hidden states. Name a folder that peagle-hf extract has written"
            f"{f', such as {inside}' if inside.is_dir() else ''}."
        )
    report = inspect(arguments.folder, arguments.preprocessed_data, read_values=arguments.action == "verify")
    print(table(report))
    if arguments.action == "verify" and report.verifier_changed:
        assert report.manifest is not None
        raise PeagleError(
            f"{arguments.folder} holds the states of other weights than those in {report.manifest.verifier} now: the "
            "verifier was changed since (trained further, or saved anew in another dtype). Put its old weights back, "
            "or extract into another folder."
        )
    if arguments.action == "verify" and (report.missing or report.unusable):
        raise PeagleError(
            f"In {arguments.folder} {number_of(len(report.unusable), 'file')} can't be used, and "
            f"{number_of(len(report.missing or ()), 'sample has', 'samples have')} no file. Run peagle-hf extract with "
            "--validate-outputs, which extracts only those."
        )
    return report


def inspect(folder: str, preprocessed_data: str | None = None, read_values: bool = False) -> CacheReport:
    """Check every file of a folder.

    Args:
        preprocessed_data: the prepared dataset; default: the one that the folder lies in.
        read_values: read all values, instead of the headers alone.
    """
    manifest = Manifest.read(folder)
    data = _prepared(folder, preprocessed_data)
    lengths = None if data is None else column(data, "seq_len")
    rows = cached_rows(folder)
    num_layers, size = (len(manifest.aux_layer_ids) + 1, manifest.hidden_size) if manifest else (None, None)
    unusable: dict[int, str] = {}
    storages: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    num_tokens = num_bytes = 0
    for row in progress_bar(sorted(rows), desc="Reading" if read_values else "Looking", unit="row"):
        if lengths is not None and row >= len(lengths):
            unusable[row] = f"the prepared dataset has {len(lengths)} rows only"
            continue
        token_ids, is_target = _content(data, row)
        length = None if lengths is None else lengths[row]
        try:
            path, shape = row_path(folder, row), (length, num_layers, size)
            layout = file_layout(path, shape, token_ids, is_target, origin_of(manifest), read_values)
        except UnusableFile as error:
            unusable[row] = str(error)
            continue
        # Without a manifest all files should be like the first one.
        num_layers, size = layout.shape[1:]
        storages[layout.storage] += 1
        dtypes[layout.dtype] += 1
        num_tokens += layout.shape[0]
        num_bytes += row_path(folder, row).stat().st_size
    missing = None if lengths is None else sorted(set(range(len(lengths))) - rows)
    failed = {row: reason for row, reason in failed_rows(folder).items() if row not in rows}
    return CacheReport(
        str(folder),
        manifest,
        dict(storages),
        dict(dtypes),
        storages.total(),
        num_tokens,
        num_bytes,
        missing,
        failed,
        unusable,
        manifest is not None and _is_changed(manifest),
    )


def _is_changed(manifest: Manifest) -> bool:
    """Whether the verifier is a folder here whose weights have changed since the states were extracted."""
    try:
        return os.path.isdir(manifest.verifier) and has_weights(manifest.revision, manifest.verifier) is False
    except PeagleError as error:
        logger.warning("The weights of the verifier aren't compared: %s", error)
        return False


def table(report: CacheReport) -> str:
    """The report as text for a terminal, with every row that is missing or can't be used."""
    manifest = report.manifest
    kinds = ", ".join(f"{name} ({count})" for name, count in report.storages.items())
    dtypes = ", ".join(report.dtypes)
    now = ", which has other weights now" if report.verifier_changed else ""
    lines = {
        "Folder": report.folder,
        "Verifier": f"{manifest.verifier} ({manifest.architecture}){now}" if manifest else f"not known: no {MANIFEST}",
        "Layers": f"{manifest.aux_layer_ids} and the last, of {manifest.num_layers}" if manifest else "not known",
        "Storage": f"{kinds} in {dtypes}" if report.num_rows else "no file",
        "Rows": f"{report.num_rows}",
        "Tokens": f"{report.num_tokens}",
        "Bytes": f"{report.num_bytes}, {report.num_bytes / max(1, report.num_tokens):.0f} a token",
        "Missing": "not known: name the --preprocessed-data" if report.missing is None else _ranges(report.missing),
        "Unusable": f"{len(report.unusable)}",
    }
    return "\n".join(
        [f"{name:<10}{text}" for name, text in lines.items()]
        + [f"  {row_path('', row)}: {reason}" for row, reason in sorted((report.failed | report.unusable).items())]
    )


def _ranges(rows: list[int]) -> str:
    """Row numbers as text: `3 rows: 4, 7-8`."""
    bounds: list[list[int]] = []
    for row in rows:
        if bounds and bounds[-1][1] == row - 1:
            bounds[-1][1] = row
        else:
            bounds.append([row, row])
    named = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in bounds)
    return f"{number_of(len(rows), 'row')}: {named}" if rows else "none"


def convert(
    folder: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    storage: Storage,
    preprocessed_data: str | None = None,
) -> None:
    """Write a folder's states as another storage kind into a new folder.

    The new folder appears when it is complete. Until then the files are in a hidden folder beside it, and the same
    command continues there if it was interrupted.

    Args:
        preprocessed_data: the prepared dataset, whose loss masks the learnt kinds need; default: the one that the
            folder lies in.

    Raises:
        PeagleError: there is no such kind, the files lack states that it needs, one can't be read or has values that
            aren't finite, or the destination isn't empty.
    """
    if storage not in STORAGES:
        raise PeagleError(f"There is no storage kind {storage!r}: name one of {', '.join(STORAGES)}.")
    with locked_file(destination, "Wait until it has ended, or name another folder to convert to."):
        _convert(Path(folder), Path(destination), storage, preprocessed_data)


def _convert(folder: Path, destination: Path, storage: Storage, preprocessed_data: str | None) -> None:
    manifest, rows = Manifest.read(folder), sorted(cached_rows(folder))
    data = _prepared(folder, preprocessed_data) if storage in LEARNT_STORAGES else None
    if not rows:
        raise PeagleError(f"{folder} holds no hidden states. Name a folder that peagle-hf extract has written.")
    if destination.exists() and not destination.is_dir():
        raise PeagleError(f"{destination} is a file. Name a new folder to convert to.")
    if destination.is_dir() and any(destination.iterdir()):
        raise PeagleError(f"{destination} is not empty. Name a new folder to convert to, or remove this one.")
    working = destination.absolute().with_name(f".{destination.name}.converting")
    record = working / CONVERSION_RECORD
    described = {"source": str(folder.resolve()), "manifest": manifest and asdict(manifest), "storage": storage}
    remedy = f"Remove the folder {working}, and run the same command again."
    if record.exists() and read_json(record, remedy) != described:
        raise PeagleError(
            f"{working} holds a conversion to {destination} of something else that isn't finished. Remove it, or name "
            "another folder to convert to."
        )
    done = cached_rows(working)
    for row in progress_bar([row for row in rows if row not in done], desc="Converting", unit="row"):
        token_ids, is_target = _content(data, row)
        try:
            path, any_shape = row_path(folder, row), (None, None, None)
            layout = file_layout(path, any_shape, token_ids, is_target, origin_of(manifest), read_values=True)
        except UnusableFile as error:
            raise PeagleError(
                f"{row_path(folder, row)} can't be converted: {error}. Run peagle-hf extract with --validate-outputs, "
                "which extracts such samples again, or remove it."
            ) from error
        if storage in LEARNT_STORAGES and layout.storage not in LEARNT_STORAGES and is_target is None:
            raise PeagleError(
                f"Files of the kind {storage} need the loss mask of row {row}, which isn't known. Name the prepared "
                "dataset with --preprocessed-data."
            )
        try:
            converted = read_states(folder, row).stored_as(storage, is_target)
        except PeagleError as error:
            raise PeagleError(f"{row_path(folder, row)} can't be converted to {storage}. {error}") from error
        # The record is written only now, so that a conversion that can't begin leaves nothing behind.
        if not record.exists():
            write_json(record, described)
        save_states(row_path(working, row), replace(converted, origin=origin_of(manifest)))
    if manifest is not None:
        dtype = "bfloat16" if {storage, manifest.storage} & {*FP8_STORAGES} else manifest.dtype
        replace(manifest, storage=storage, dtype=dtype).write(working)
    os.rename(working, destination)
    # Until the folder has its name, this record says what is in `working`.
    (destination / CONVERSION_RECORD).unlink(missing_ok=True)
    logger.info("Converted %s to %s in %s.", number_of(len(rows), "sample"), storage, destination)


def _content(data: "datasets.Dataset | None", row: int) -> tuple[Tensor | None, Tensor | None]:
    """Token ids int64 [T] of a sample and which of them are targets, bool [T]; None and None if not known."""
    if data is None or row >= len(data):
        return None, None
    sample = data[row]
    return torch.tensor(sample["input_ids"]).long(), target_tokens(torch.tensor(sample["loss_mask"]).bool())


def _prepared(folder: str | os.PathLike[str], preprocessed_data: str | None) -> "datasets.Dataset | None":
    parent = Path(folder).absolute().parent
    if preprocessed_data is None and not (parent / DATASET_INFO).exists():
        return None
    return load_prepared(preprocessed_data or parent).with_format(None)
