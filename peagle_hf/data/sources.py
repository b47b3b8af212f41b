"""Sources of data: files (JSON, Parquet, CSV, compressed), folders and hub datasets, read row by row."""

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import logging
import lzma
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from ..errors import PeagleError
from .chats import wrong_value
from .folders import COMPRESSIONS, FILE_KINDS, files_in, files_of_split, kind_of
from .prepared_dataset import PREPARE_RECORD

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

BUILT_IN_DATASETS = {
    "sharegpt": "Aeala/ShareGPT_Vicuna_unfiltered:train",
    "ultrachat": "HuggingFaceH4/ultrachat_200k:train_sft",
}
_CHUNK_CHARACTERS = 1 << 20
_MOST_CHARACTERS = 100 << 20
"""Longest object of a JSON file, in characters: one that has no end within these is malformed."""
_BETWEEN_ITEMS = re.compile(r"[\s,]*")
_NO_SPACE = re.compile(r"\S")


@dataclass(frozen=True)
class Source:
    """The rows of files or of a hub dataset, in their order, read from disk one at a time.

    Args:
        name: as the user gave it.
        rows: a hub dataset, or the rows of files as JSON text with the number of their file and their number in it.
        files: path and unit ("line", "item" or "row") of each file; None for a hub dataset.
    """

    name: str
    rows: "datasets.Dataset"
    files: list[tuple[str, str]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[str, dict[str, Any]]:
        """The place of a row, for messages, and the row."""
        row = self.rows[index]
        if self.files is None:
            return f"{self.name}, row {index}", _without_filler(row)
        path, unit = self.files[row["file"]]
        return f"{path}, {unit} {row['number']}", json.loads(row["json"])


def source_name(data: "str | datasets.Dataset") -> str:
    """Name of a source in messages and records; of a `datasets.Dataset` in memory its fingerprint.

    Raises:
        PeagleError: the source is neither text nor a `datasets.Dataset`.
    """
    if isinstance(data, str):
        return data
    from datasets import Dataset

    if not isinstance(data, Dataset):
        raise PeagleError(
            f"A source of data must be a name, a path or a datasets.Dataset, but one is a {type(data).__name__}. Make "
            "a Dataset of it, such as with Dataset.from_list, or name one split of a DatasetDict."
        )
    return f"datasets.Dataset {data._fingerprint}"


def open_source(data: "str | datasets.Dataset", folder: Path) -> Source:
    """Open a source of rows: a built-in name, a file, a folder, a hub dataset, or a `datasets.Dataset` in memory.

    A file holds rows as JSON (an object a line, objects over several lines, or one array of objects), as Parquet or as
    CSV, and may be compressed; its ending says which (`FILE_KINDS`, `COMPRESSIONS`, in any case). A folder holds such
    files, or what `datasets` saved. What exists on this machine is never looked for on the hub. A hub dataset is
    `org/name`, `org/name:split` or `org/name:configuration:split`, and so is a folder with the files of one; the split
    is `train` if none is named.

    Files are checked from end to end and copied into `folder`, from which rows are read without holding all of them
    in memory.

    Raises:
        PeagleError: the file or the dataset can't be read, a row is not an object, or there is no row.
    """
    if not isinstance(data, str):
        name = source_name(data)
        if data.format["type"] == "custom":
            raise PeagleError(f"{name} has a transform, which would not be applied. Apply it with Dataset.map first.")
        source = Source(name, _as_stored(data))
    elif is_local_file(data):
        source = _open_local(data, folder)
    elif "/" in (name := BUILT_IN_DATASETS.get(data, data)):
        source = _open_hub_dataset(name)
    else:
        raise PeagleError(
            f"{data} is neither a built-in dataset ({', '.join(BUILT_IN_DATASETS)}), nor a file or folder of this "
            "machine, nor a hub dataset written org/name. Name one of these."
        )
    if not len(source):
        raise PeagleError(f"{source_name(data)} is empty: it holds no conversation. Name a dataset that has some.")
    return source


def is_local_file(data: "str | datasets.Dataset") -> bool:
    """Whether a source is a file or folder of this machine, or looks like the path of one; else it is a dataset."""
    if not isinstance(data, str):
        return False
    path, _ = _parts_of(data)
    return path.exists() or kind_of(path) is not None or data.startswith(("/", "./", "../", "~"))


def data_sha256(data: "str | datasets.Dataset") -> str | None:
    """SHA-256 of a file's content, or of a folder's content and names and the split that is named; None for a dataset
    that is no local file.

    Raises:
        PeagleError: the file or folder can't be read.
    """
    if not isinstance(data, str) or not is_local_file(data):
        return None
    path, parts = _parts_of(data)
    if path.is_file():
        return _file_sha256(path)
    _check_exists(data, path)
    names = [(str(file.relative_to(path)), _file_sha256(file)) for file in files_in(path)]
    split = [] if parts == ["train"] else parts  # which is read if none is named
    return hashlib.sha256(json.dumps([*names, *split]).encode()).hexdigest()


def _open_local(data: str, folder: Path) -> Source:
    """Open a file, a folder of files, or a dataset saved by `datasets`; files are copied into `folder` as Arrow."""
    from datasets import Dataset, DatasetDict, Features, Value, load_from_disk
    from datasets.arrow_writer import ArrowWriter

    path, parts = _parts_of(data)
    if (path / PREPARE_RECORD).exists():
        raise PeagleError(
            f"{path} is a prepared dataset already. Go on with it as it is, with peagle-hf extract, or name the "
            "conversations that it was made from."
        )
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        try:
            saved = load_from_disk(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise PeagleError(
                f"{path} can't be read as what Dataset.save_to_disk wrote ({error}). It is damaged or not complete: "
                "save or copy it again."
            ) from error
        if isinstance(saved, DatasetDict):
            split = ":".join(parts) or "train"
            if split not in saved:
                raise PeagleError(f"{path} has no split {split}, only {', '.join(saved)}. Name {path}:SPLIT.")
            saved = saved[split]
        return Source(data, _as_stored(saved))
    _check_exists(data, path)
    files = [path] if path.is_file() else files_of_split(path, parts)

    # Rows are kept as text, because Arrow wants the same fields and types in every row, and tool calls differ.
    copy = folder / f"{len(list(folder.iterdir()))}.arrow"
    features = Features({"file": Value("int32"), "number": Value("int64"), "json": Value("large_string")})
    units = []
    with ArrowWriter(path=str(copy), features=features) as writer:
        for index, file in enumerate(files):
            unit, items = _items(file)
            units.append((str(file), unit))
            for number, item in items:
                if not isinstance(item, dict):
                    raise wrong_value(f"{file}, {unit} {number}", "the row", "a JSON object", item)
                writer.write({"file": index, "number": number, "json": json.dumps(item, default=_described)})
        writer.finalize()
    return Source(data, Dataset.from_file(str(copy)), units)


def _as_stored(rows: "datasets.Dataset") -> "datasets.Dataset":
    """The rows without a format and with pictures and sounds undecoded: that takes other packages, and time."""
    for name, feature in rows.features.items():
        media = getattr(feature, "feature", feature)
        if type(media).__name__ in ("Audio", "Image", "Pdf", "Video"):
            stored = replace(media, decode=False)
            rows = rows.cast_column(name, stored if media is feature else replace(feature, feature=stored))
    return rows.with_format(None)


def _check_exists(data: str, path: Path) -> None:
    if not path.exists():
        raise PeagleError(f"{data} can't be read: there is no such file or folder. Check the path, or name a dataset.")


def _parts_of(data: str) -> tuple[Path, list[str]]:
    """The path of a local source, and what is named behind it: `PATH`, `PATH:SPLIT` or `PATH:CONFIGURATION:SPLIT`."""
    path = Path(data).expanduser()
    for number in (1, 2):
        before, *parts = data.rsplit(":", number)
        if parts and not path.exists() and Path(before).expanduser().is_dir():
            return Path(before).expanduser(), parts
    return path, []


def _items(path: Path) -> tuple[str, Iterator[tuple[int, Any]]]:
    """What a file's rows are called in messages (line, item or row), and the rows with their numbers."""
    kind = kind_of(path)
    if kind == ".parquet":
        return "row", _parquet_items(path)
    if kind in (".csv", ".tsv"):
        return "line", _csv_items(path, "\t" if kind == ".tsv" else ",")
    with _reading(path), _opened(path) as file:
        start = file.read(_CHUNK_CHARACTERS)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[:4].count(0) >= 2:
        raise PeagleError(f"{path} is text in UTF-16, and JSON files must be in UTF-8. Save it as UTF-8.")
    if kind is None and start.startswith(b"PAR1"):
        return "row", _parquet_items(path)
    if kind is None and not start.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"{", b"[")):
        raise PeagleError(
            f"{path} is no JSON, and its ending is none of {', '.join(FILE_KINDS)}, perhaps with "
            f"{', '.join(COMPRESSIONS)}. Rename, unpack or convert it."
        )
    is_array = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    return ("item", _array_items(path)) if is_array else ("line", _line_items(path))


def _opened(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed by its ending."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if ending == ".bz2":
        return bz2.open(path)
    if ending == ".xz":
        return lzma.open(path)
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


class _reading:
    """Turns an error of reading a file into a `PeagleError` that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, EOFError | OSError | lzma.LZMAError) and not isinstance(error, FileNotFoundError):
            raise PeagleError(
                f"{self.path} can't be read to its end ({error}). It is damaged, not complete or not what its ending "
                "says: create or download it again."
            ) from error


def _line_items(path: Path) -> Iterator[tuple[int, Any]]:
    """Decode one object a line, or objects over several lines; an object's number is that of its first line."""
    with _reading(path), _opened(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not (isinstance(error, json.JSONDecodeError) and _is_incomplete(error)):
                    raise _malformed(f"{path}, line {number}", error) from error
                rest = io.TextIOWrapper(file, encoding="utf-8", newline="")
                yield from _streamed_items(path, rest, line.decode(), number)
                return
            yield number, item


def _array_items(path: Path) -> Iterator[tuple[int, Any]]:
    """Decode the items of a JSON array, which is never held whole; they are numbered from 1."""
    with _reading(path), _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            while not (start := text.read(_CHUNK_CHARACTERS)).strip():
                pass
        except ValueError as error:
            raise _malformed(f"{path}, item 1", error) from error
        yield from _streamed_items(path, text, start.lstrip()[1:], None)


def _streamed_items(path: Path, file: IO[str], text: str, line: int | None) -> Iterator[tuple[int, Any]]:
    """Decode values one after the other from a text and the rest of a file.

    Args:
        line: the number of the line where the text begins; None for the items of an array, whose bracket is read.
    """
    decoder = json.JSONDecoder()
    number, start = line or 1, 0
    try:
        while True:
            begin = start
            start = _BETWEEN_ITEMS.match(text, begin).end()  # type: ignore[union-attr]
            number += text.count("\n", begin, start) if line else 0
            if start == len(text):
                text, start = file.read(_CHUNK_CHARACTERS), 0
                if text:
                    continue
                if line:
                    return
                raise _malformed(f"{path}, item {number}", "the array has no end")
            if not line and text[start] == "]":
                _check_nothing_follows(path, text[start + 1 :], file)
                return
            try:
                item, end = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:
                more = ""
                if _is_incomplete(error) and len(text) - start < _MOST_CHARACTERS:
                    more = file.read(max(_CHUNK_CHARACTERS, len(text) - start))
                if not more:
                    found = text[max(start, error.pos - 30) : error.pos + 10]
                    place = f"{path}, {'line' if line else 'item'} {number}"
                    raise _malformed(place, f"{error.msg} at {found!r}") from error
                text, start = text[start:] + more, 0
                continue
            yield number, item
            number += text.count("\n", start, end) if line else 1
            start = end
    except (UnicodeDecodeError, RecursionError) as error:
        raise _malformed(f"{path}, {'line' if line else 'item'} {number}", error) from error


def _check_nothing_follows(path: Path, text: str, file: IO[str]) -> None:
    while True:
        if found := _NO_SPACE.search(text):
            raise PeagleError(
                f"{path}: the array ends, but something follows it: {text[found.start() : found.start() + 40]!r}. Put "
                "all rows into one array, or write one object a line."
            )
        if not (text := file.read(_CHUNK_CHARACTERS)):
            return


def _is_incomplete(error: json.JSONDecodeError) -> bool:
    """Whether a text that isn't valid JSON may only be incomplete."""
    return "Unterminated" in error.msg or error.pos >= len(error.doc.rstrip()) - 10


def _malformed(place: str, error: Exception | str) -> PeagleError:
    return PeagleError(f"{place}: this is not valid JSON ({error}). Correct it or take it out, and run again.")


def _parquet_items(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with _opened(path) as file, parquet.ParquetFile(file) as content:
            types = {field.name: field.type for field in content.schema_arrow if "arrow.json" in str(field.type)}
            rows = (row for batch in content.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, row in enumerate(rows):
                row |= {name: _from_json(row[name], type_) for name, type_ in types.items()}
                yield number, _without_filler(row)
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        raise PeagleError(
            f"{path} can't be read as a Parquet file ({error}). It is damaged or not complete: create or download "
            "it again."
        ) from error


def _from_json(value: Any, type_: Any) -> Any:
    """Decode what Arrow holds as JSON text, as `datasets` writes fields whose type differs from row to row."""
    from pyarrow import types

    if value is None:
        return None
    if types.is_struct(type_):
        return {field.name: _from_json(value[field.name], field.type) for field in type_}
    if types.is_list(type_) or types.is_large_list(type_):
        return [_from_json(item, type_.value_type) for item in value]
    return json.loads(value) if str(type_).startswith("extension<arrow.json") else value


def _csv_items(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Rows of a CSV file with a header; empty cells are absent. A row's number is that of its last line."""
    csv.field_size_limit(sys.maxsize)
    with _reading(path), _opened(path) as file:
        reader = csv.DictReader(
            io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True
        )
        try:
            if repeated := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]:
                raise PeagleError(
                    f"{path}: its header has the column {repeated[0]!r} more than once, and which one is meant isn't "
                    "known. Rename or remove one of them."
                )
            for row in reader:
                if None in row or None in row.values():
                    raise PeagleError(
                        f"{path}, line {reader.line_num}: this row has {'more' if None in row else 'fewer'} cells than "
                        f"the header, which has {len(reader.fieldnames or ())}. Correct it or take it out."
                    )
                yield reader.line_num, {name: value for name, value in row.items() if value}
        except (csv.Error, UnicodeDecodeError) as error:
            raise PeagleError(
                f"{path}, line {reader.line_num + 1}: this is no valid CSV in UTF-8 ({error})."
            ) from error


def _without_filler(row: dict[str, Any]) -> dict[str, Any]:
    """Remove the nulls that Arrow adds to tool calls and schemas for fields that only other rows have."""
    row = dict(row)
    for name, value in row.items():
        if name in ("tools", "functions"):
            row[name] = _without_nulls(value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            row[name] = [
                {
                    key: _without_nulls(item) if key in ("tool_calls", "function_call") else item
                    for key, item in m.items()
                }
                if isinstance(m, dict)
                else m
                for m in value
            ]
    return row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _described(value: Any) -> str | dict[str, int]:
    """A value of Parquet that JSON can't hold: bytes as the text that they are, or their number; others as text."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"bytes": len(value)}


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise PeagleError(f"{path} can't be read: {error.strerror}. Name an existing file or folder.") from error
    return digest.hexdigest()


def _open_hub_dataset(name: str) -> Source:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path, *rest = name.split(":")
    if len(rest) > 2:
        raise PeagleError(f"{name}: write org/name, org/name:split or org/name:configuration:split.")
    split = rest.pop() if rest else "train"
    try:
        rows = load_dataset(path, *rest, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise PeagleError(
            f"The dataset {path} (split {split}) can't be loaded: {' '.join(str(error).split())} Check its name and "
            "split and the network, or name a local file."
        ) from error
    return Source(name, _as_stored(rows))
