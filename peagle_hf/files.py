"""Writing files so that a reader never sees half of one."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import PeagleError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`, a file or a folder, that takes its place when the block ends well.

    The temporary name starts with a dot and ends at random, so that two writers do not meet, on whichever machines, and
    is removed when the block fails. A folder replaces an older folder of the same name.

    Raises:
        PeagleError: no space is left, or the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException as error:
        _remove(temporary)
        # safetensors and torch wrap the operating system's error in one of their own, so its text is looked at too.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise PeagleError(
                f"No space is left on the disk of {path}; nothing of it was written. "
                "Free some space, or name an output folder on another disk, and run the same command again."
            ) from error
        if isinstance(error, PermissionError):
            raise PeagleError(
                f"{path} can't be written: {error.strerror}. Change the folder's permissions or name another one."
            ) from error
        raise


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
