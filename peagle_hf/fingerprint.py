"""Fingerprints of model weights and files: hashes of blocks sampled from their content, quick to compute.

A fingerprint depends on contents alone. A folder that was copied, moved or downloaded again keeps it, and a file that
was changed in place gets another one, even if its size and its time of modification stay as they were.
"""

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .errors import PeagleError

BLOCKS, BLOCK_BYTES = 8, 4096
"""Number and size of the blocks that are read of each tensor, spread evenly from its first byte to its last."""
PIECE_BYTES, SMALL_BYTES = 1 << 20, 1 << 22
"""A file whose tensors can't be told apart is sampled in pieces of `PIECE_BYTES`, as if each were a tensor. A file of
at most `SMALL_BYTES` is read as a whole."""
READERS = 16
"""Blocks that are read at the same time: on a network disk most of the time is latency."""
NOT_OF_THE_WEIGHTS = ("_name_or_path", "transformers_version")
"""Fields of config.json that say where a model came from, not what it computes, and aren't compared."""


class _Piece(NamedTuple):
    """A part of a file that is sampled on its own, usually a tensor.

    Args:
        name: its name in the fingerprint.
        path: of the file.
        start: offset of its first byte.
        size: in bytes.
    """

    name: str
    path: Path
    start: int
    size: int


def weights_of(name_or_path: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """Identify a model's weights: by a fingerprint for a folder, by the commit for a model of the hub.

    A fingerprint is `config <16 hex digits> weights <16 hex digits>`. The first part hashes config.json (and the
    model's own code if config.json names some), the second every tensor's name, dtype, shape and values, of which
    `BLOCKS` blocks a tensor are read: some 10 MB of a model of 16 GB. It doesn't depend on how the tensors are
    distributed over files.

    Returns:
        The fingerprint or the commit; None if a model of the hub isn't in the hub's cache.

    Raises:
        PeagleError: a file of the folder can't be read.
    """
    folder = _folder(name_or_path, revision)
    if folder is None:
        return None
    return _fingerprint(folder) if Path(name_or_path).is_dir() else folder.name


def has_weights(
    recorded: str | None,
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    made_by: str | None = None,
) -> bool | None:
    """Whether a model has the weights that `weights_of` recorded.

    A commit of the hub is compared with another commit, or a folder, by fingerprints if both are on this machine.

    Args:
        recorded: what `weights_of` returned then.
        made_by: the name of the model whose weights were recorded.

    Returns:
        None if the weights weren't known then, or aren't all on this machine now.
    """
    folder = _folder(name_or_path, revision)
    if not isinstance(recorded, str):  # not known, or damaged
        return None
    if recorded.startswith("config "):
        if folder is None or not (Path(name_or_path).is_dir() or _is_whole(folder)):
            return None
        return recorded == _fingerprint(folder)
    if folder is None:
        return None if revision is None else recorded == revision
    if folder.name == recorded:
        return True
    then = _folder(made_by, recorded) if made_by else None
    if then is not None and _is_whole(then) and _is_whole(folder):
        return _fingerprint(then) == _fingerprint(folder)
    return None if Path(name_or_path).is_dir() else False


def _is_whole(folder: Path) -> bool:
    """Whether all files of a model's weights exist: the hub's cache may hold only the configuration or some shards."""
    files = _weight_files(folder)
    return bool(files) and all(file.exists() for file in files)


def _folder(name_or_path: str | os.PathLike[str], revision: str | None) -> Path | None:
    """A model's folder, or that of its commit in the hub's cache; None if it isn't on this machine."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        cached = try_to_load_from_cache(str(name_or_path), CONFIG_NAME, revision=revision)
    except HFValidationError:  # the name is a path, perhaps on another machine
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _fingerprint(folder: Path) -> str:
    try:
        config, files = _config_of(folder), _weight_files(folder)
        pieces = [piece for file in files for piece in _pieces(file)]
        return f"config {_digest(config)} weights {_digest(_samples(pieces))}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, zipfile.BadZipFile) as error:
        raise PeagleError(
            f"The weights in {folder} can't be read ({type(error).__name__}: {error}). Download or save the model "
            "again, or name another one."
        ) from error


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """Fingerprint of a file's content: its size and a digest of sampled blocks, or of all of it if it is small.

    Raises:
        OSError: the file can't be read.
    """
    size = os.path.getsize(path)
    return f"{size} bytes, {_digest(_samples(_equal_pieces(Path(path), size)))}"


def _digest(content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _config_of(folder: Path) -> list[Any]:
    """The fields of config.json that a model's results depend on, and digests of the model's own code."""
    path = folder / CONFIG_NAME
    config = json.loads(path.read_bytes()) if path.exists() else {}
    code = sorted(folder.glob("*.py")) if "auto_map" in config else []
    fields = {name: value for name, value in config.items() if name not in NOT_OF_THE_WEIGHTS}
    return [fields, *((file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in code)]


def _weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers would load, in its order of preference; else all with their endings."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = folder / name
        if path.exists() and path.suffix == ".json":
            return [folder / file for file in sorted(set(json.loads(path.read_bytes())["weight_map"].values()))]
        if path.exists():
            return [path]
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def _pieces(path: Path) -> list[_Piece]:
    """The tensors of a safetensors file or of torch's zip format; of other files pieces of equal size."""
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        return [
            _Piece(f"{name} {tensor['dtype']} {tensor['shape']}", path, 8 + length + start, end - start)
            for name, tensor in tensors.items()
            for start, end in [tensor["data_offsets"]]
        ]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # The checksums of the archive cover all values, unless they were switched off when the file was saved.
            return [
                _Piece(f"{entry.filename} {entry.CRC}", path, entry.header_offset, entry.compress_size)
                for entry in archive.infolist()
            ]
    return _equal_pieces(path, size)


def _equal_pieces(path: Path, size: int) -> list[_Piece]:
    step = PIECE_BYTES if size > SMALL_BYTES else BLOCKS * BLOCK_BYTES
    return [_Piece(str(start), path, start, min(step, size - start)) for start in range(0, size, step)]


def _samples(pieces: Iterable[_Piece]) -> list[tuple[str, str]]:
    """Name and digest of the blocks of each piece, sorted by name."""
    pieces = sorted(pieces, key=lambda piece: piece.name)
    descriptors: dict[Path, int] = {}
    try:
        for piece in pieces:
            if piece.path not in descriptors:
                descriptors[piece.path] = os.open(piece.path, os.O_RDONLY)
                # Without this advice the kernel would read ahead after each block.
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptors[piece.path], 0, 0, os.POSIX_FADV_RANDOM)
        with ThreadPoolExecutor(READERS) as pool:
            digests = pool.map(lambda piece: _sample(descriptors[piece.path], piece), pieces)
            return [(piece.name, digest) for piece, digest in zip(pieces, digests, strict=True)]
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _sample(descriptor: int, piece: _Piece) -> str:
    digest = hashlib.sha256()
    last = piece.size - BLOCK_BYTES
    if last <= BLOCK_BYTES * (BLOCKS - 1):
        digest.update(_read(descriptor, piece.start, piece.size))
        return digest.hexdigest()
    for number in range(BLOCKS):
        digest.update(_read(descriptor, piece.start + number * last // (BLOCKS - 1), BLOCK_BYTES))
    return digest.hexdigest()


def _read(descriptor: int, start: int, size: int) -> bytes:
    content = os.pread(descriptor, size, start)
    if len(content) < size:
        raise ValueError("a file of weights is shorter than its header says")
    return content
