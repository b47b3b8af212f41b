"""Files and folders: atomic writing, locks against other writers, JSON, and paths that survive a move."""

import errno
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from .errors import PeagleError

if TYPE_CHECKING:
    from torch import Tensor

_UMASK = os.umask(0)  # The umask can only be read by setting it; during the import no other thread runs.
os.umask(_UMASK)

_UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)
"""Errors of the operating system that are about the path itself, not about what is written."""

ANOTHER_OUTPUT = "Wait until it has ended, or name another --output."
"""What to do if another process writes the output of a command."""

_HELD: set[str] = set()
"""Real paths of the locks that this process holds (see `locked_file`)."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed to `path` if the block succeeds and removed if it fails.

    The block writes a file or a folder there. The temporary name starts with a dot and has a random part, so that two
    writers on any machines don't collide. A folder replaces an older folder of the same name, which is renamed first
    and removed last; a file never replaces a folder. Missing parent folders are made, and removed again if the block
    fails.

    Raises:
        PeagleError: no space is left, the folder can't be written to, or a file is to be written where a folder is.
    """
    path = Path(path)
    path = path if path.name else path.absolute()  # "." has no name of its own
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    replaced = None
    with writing(path), _folders_made(path.parent):
        try:
            yield temporary
            if path.is_dir() and not path.is_symlink():
                if temporary.is_file():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
                replaced = _set_aside(path)
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            if replaced and not path.exists():
                replaced.rename(path)
            raise
        if replaced:
            shutil.rmtree(replaced)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error of the block into a `PeagleError` about `path` if the disk is full or the path can't be written.

    Raises:
        PeagleError: no space is left, or the folder can't be written to.
    """
    try:
        yield
    except Exception as error:
        # On a full disk safetensors raises an error of its own with the system's message, and torch reports a wrong
        # file size.
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if is_full or "No space left" in str(error) or "unexpected pos" in str(error):
            raise PeagleError(
                f"No space is left on the disk of {path}; nothing of it was written, and what was written earlier is "
                "complete. Free some space, or name an output folder on another disk, and run the same command again."
            ) from error
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise PeagleError(
                f"{path} can't be written: {error.strerror}. Name another path, or change the permissions of this one."
            ) from error
        raise


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make sure that files can be written into `folder`, or that it can be made; nothing is left behind.

    Raises:
        PeagleError: they can't.
    """
    with suppress(_Tried), writing(folder), _folders_made(Path(folder)):
        tempfile.TemporaryFile(dir=folder).close()
        raise _Tried


class _Tried(Exception):
    """Ends `check_writable` so that the folders that it made are removed."""


@contextmanager
def _folders_made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents. If the block fails, those that were made here are removed if they are empty."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # another process has put something into it
            for one in made:
                one.rmdir()
        raise


@contextmanager
def locked_folder(folder: str | os.PathLike[str], remedy: str, share: str = "") -> Iterator[None]:
    """Make `folder` and lock it against other processes that write into it; see `locked_file`.

    Args:
        share: name of the part of the folder's content that is locked; other processes may lock other parts. Empty
            stands for the whole folder.
    """
    lock_path = Path(folder) / f".{share}.lock".replace("..", ".")
    with _folders_made(Path(folder)), _locked(lock_path, folder, remedy):
        yield


@contextmanager
def locked_file(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Lock `path` against other processes that write it, on all machines that see its disk, while the block runs.

    The operating system releases the lock when its process ends, however it ends. On a disk without such locks a file
    with host and process id is the lock; it is taken over if that process ran on the same host and has ended. A process
    may take a lock again that it holds.

    Args:
        remedy: what to do if another process holds the lock, as a sentence.

    Raises:
        PeagleError: another process holds the lock; names its host and process id.
    """
    path = Path(path)
    with _folders_made(path.parent), _locked(path.with_name(f".{path.name}.lock"), path, remedy):
        yield


@contextmanager
def _locked(lock_path: Path, written: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Hold the lock file while the block runs; a file beside it names the holder for other processes.

    Where this process can't write there is no lock: it can only find out that nothing is left to do, or fail.
    """
    key = os.path.realpath(lock_path)
    if key in _HELD or not os.access(lock_path.parent, os.W_OK):
        yield
        return
    holder = lock_path.with_name(f"{lock_path.name}.holder")
    with writing(lock_path):
        try:
            lock = _acquired(lock_path)
        except filelock.Timeout as error:
            # On a disk without locks a file that isn't empty stands for the lock. It stays when a process on another
            # machine dies.
            files = (lock_path.with_name(f"{lock_path.name}.soft"), lock_path)
            stands_for_a_lock = next((path for path in files if path.exists() and path.stat().st_size), None)
            ended = f" If that process has ended, remove {stands_for_a_lock}." if stands_for_a_lock else ""
            raise PeagleError(
                f"{written} is being written by another process{_described(holder)}. {remedy}{ended}"
            ) from error
        remove_leftovers(lock_path.parent, re.escape(holder.name))
        write_json(holder, {"host": socket.gethostname(), "process": os.getpid()})
    _HELD.add(key)
    try:
        yield
    finally:
        _HELD.discard(key)
        holder.unlink(missing_ok=True)
        lock_path.unlink(missing_ok=True)  # filelock notices it if another process has just opened the file
        lock.release()


def _acquired(lock_path: Path) -> filelock.BaseFileLock:
    """Take a lock of the operating system, or a lock file if the disk has no locks."""
    try:
        lock: filelock.BaseFileLock = filelock.FileLock(lock_path)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", None) not in (None, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        lock = filelock.SoftFileLock(lock_path.with_name(f"{lock_path.name}.soft"))
        # In filelock 3.24 to 4.0 a first attempt only removes the file of a process that has ended; a second takes it.
        lock.acquire(timeout=0.1)
    return lock


def _described(holder: Path) -> str:
    try:
        content = json.loads(holder.read_text(encoding="utf-8"))
        return f" (process {content['process']} on {content['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no partly removed folder is ever seen under its name."""
    shutil.rmtree(_set_aside(folder))


def remove_leftovers(folder: str | os.PathLike[str], names: str) -> None:
    """Remove temporary files and folders of killed processes.

    Args:
        names: regular expression of the names that the files were to get.
    """
    for path in Path(folder).glob(".*"):
        if re.fullmatch(rf"\.({names})\.[0-9a-f]+\.(tmp|old)", path.name):
            with suppress(OSError):  # the folder can only be read
                _remove(path)


def save_file(
    tensors: "dict[str, Tensor]", path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Like `safetensors.torch.save_file`, with the permissions of other new files (see `allow_as_umask`)."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)
    allow_as_umask(path)


def allow_as_umask(path: str | os.PathLike[str]) -> None:
    """Give a file the permissions of a new one: files of safetensors 0.8 are readable by their owner only.

    Servers and colleagues under other accounts shall read checkpoints and hidden states, if the umask allows it.
    """
    os.chmod(path, 0o666 & ~_UMASK)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        remedy: what to do about a file that can't be read, as sentences.

    Raises:
        PeagleError: the file is missing, can't be read or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PeagleError(f"{path} can't be read: {error.strerror}. {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise PeagleError(f"{path} is damaged: {error}. {remedy}") from error
    if not isinstance(content, dict):
        raise PeagleError(f"{path} is damaged: it holds no JSON object. {remedy}")
    return content


def add_relative_path(record: dict[str, Any], name: str, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Add `<name>_from_here` to a record whose field `name` is an existing folder: its path relative to `folder`.

    Args:
        folder: where the record will be written. If both folders move together, `resolve_relative_path` finds the
            other one again.
    """
    value = record.get(name)
    if not isinstance(value, str) or not os.path.isdir(value):
        return record
    place = os.path.realpath(value)
    return record | {name: place, f"{name}_from_here": os.path.relpath(place, os.path.realpath(folder))}


def resolve_relative_path(record: dict[str, Any], name: str, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Undo `add_relative_path`: remove `<name>_from_here`, and set the field `name` to the folder's path now.

    If the relative path exists from the record's own folder, it wins: both folders were moved together. Otherwise the
    absolute path stays.
    """
    record = dict(record)
    from_here = record.pop(f"{name}_from_here", None)
    if isinstance(from_here, str) and os.path.isdir(place := os.path.join(os.path.realpath(folder), from_here)):
        record[name] = os.path.realpath(place)
    return record


def _set_aside(folder: Path) -> Path:
    return folder.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old"))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def canonical_path(value: object) -> object:
    """Absolute path, links resolved, if the value is an existing folder; otherwise the value unchanged."""
    return os.path.realpath(value) if isinstance(value, str) and os.path.isdir(value) else value
