"""A journal of answers on disk, each under a key of all that it depends on, so that none is asked for twice."""

import json
import threading
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import PeagleError
from ..files import writing

_LINE_STARTS = (b'{"settings":', b'{"key":')


class Journal:
    """An append-only file of answers as token ids, each under a key.

    A line is either `{"settings": {...}}`, which tells people how the answers after it were made, or
    `{"key": ..., "ids": [...], "left": n}`, where n more answers of the same call of `add` follow. After a crash either
    all answers of a call are there or none. Memory holds only the keys and the positions of their answers in the file.
    Threads may share a journal, processes may not.

    Args:
        path: the file, which is made with its folder if it isn't there.

    Attributes:
        settings: of the latest `{"settings": ...}` line, or None.

    Raises:
        PeagleError: the file is damaged or can't be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.settings: dict[str, Any] | None = None
        self._offsets: dict[str, int] = {}
        self._end = 0
        self._lock = threading.Lock()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = open(path, "ab", buffering=0)  # noqa: SIM115 (`close` does)
        self._reader = open(path, "rb")  # noqa: SIM115
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def begin(self, settings: dict[str, Any]) -> None:
        """Write the settings with which the following answers are made, if they differ from the latest ones."""
        if settings != self.settings:
            self._append([{"settings": settings}])
            self.settings = settings

    def close(self) -> None:
        with self._lock:
            self._writer.close()
            self._reader.close()

    def get(self, key: str) -> list[int]:
        """The answer of a key, which must be in the journal."""
        with self._lock:
            self._reader.seek(self._offsets[key])
            return list(json.loads(self._reader.readline())["ids"])

    def add(self, answers: dict[str, list[int]]) -> None:
        """Write answers, all of them or none; a key that is there already keeps its answer."""
        with self._lock:
            new = {key: ids for key, ids in answers.items() if key not in self._offsets}
            lines = [
                {"key": key, "ids": ids, "left": left}
                for left, (key, ids) in zip(reversed(range(len(new))), new.items(), strict=True)
            ]
            self._offsets |= zip(new, self._append(lines), strict=True)

    def _append(self, lines: list[dict[str, Any]]) -> list[int]:
        """Write lines at the end of the file; returns the offset of each."""
        encoded = [json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines]
        *offsets, end = accumulate(map(len, encoded), initial=self._end)
        rest = memoryview(b"".join(encoded))
        with writing(self.path):
            try:
                while rest:
                    rest = rest[self._writer.write(rest) :]
            except BaseException:
                self._writer.truncate(self._end)
                raise
        self._end = end
        return offsets

    def _read(self) -> None:
        """Index the answers; a line or a call that a crash has cut off is removed from the file."""
        offset = 0
        unfinished: dict[str, int] = {}
        for number, line in enumerate(self._reader, 1):
            if not line.endswith(b"\n") and any(start.startswith(line[: len(start)]) for start in _LINE_STARTS):
                break
            try:
                entry = json.loads(line)
                if "settings" in entry:
                    self.settings, left = dict(entry["settings"]), 0
                else:
                    unfinished[entry["key"]], left = offset, entry["left"]
                    if not all(type(token_id) is int for token_id in entry["ids"]):
                        raise ValueError("the answer is no list of token ids")
            except (ValueError, KeyError, TypeError) as error:
                raise PeagleError(
                    f"{self.path}, line {number} is damaged, or of another version ({type(error).__name__}: {error}). "
                    "Remove the line to keep the other answers, or the file to have all prompts answered again."
                ) from error
            offset += len(line)
            if left == 0:
                self._offsets |= unfinished
                unfinished = {}
                self._end = offset
        self._writer.truncate(self._end)
