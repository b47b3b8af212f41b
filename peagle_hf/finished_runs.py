"""Finished runs of an evaluation on disk, so that a killed evaluation goes on where it stopped."""

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .client import Run
from .errors import PeagleError
from .files import atomic_path, writing

logger = logging.getLogger(__name__)


class FinishedRuns:
    """A file of runs, each under a name that says which one it is.

    The first line holds the settings of all runs, each later line one run. A line that a crash has cut off is dropped.
    A file with other settings is replaced, and the log says which settings changed.

    Args:
        path: the file; its folder must exist.
        settings: everything that decides what a run of a certain name measures, as JSON values.

    Raises:
        PeagleError: the file is damaged or can't be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self._runs: dict[str, tuple[Run, dict[str, Any]]] = {}
        settings = json.loads(json.dumps(settings))
        with writing(path):
            content = path.read_bytes() if path.exists() else b""
        complete, newline, _ = content.rpartition(b"\n")
        found: dict[str, Any] | None = None
        try:
            if newline:
                header, *lines = [json.loads(line) for line in complete.split(b"\n")]
                found = dict(header["settings"])
                for line in lines:
                    self._runs[line["name"]] = Run.of(line["run"]), dict(line["measured_on"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PeagleError(
                f"{path}, which holds the finished runs of an evaluation that was interrupted, is damaged "
                f"({type(error).__name__}: {error}). Remove it and run the same command again: all is measured anew."
            ) from error
        if found != settings:
            if found is not None:
                logger.warning(
                    "%d finished runs in %s are discarded and all is measured anew, because %s.",
                    len(self._runs),
                    path,
                    "; ".join(_changes(found, settings)),
                )
            self._runs = {}
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        elif len(complete) + 1 < len(content):
            with writing(path):
                os.truncate(path, len(complete) + 1)
        if self._runs:
            logger.info("%d runs were finished earlier and are taken from %s.", len(self._runs), path)

    def __contains__(self, name: str) -> bool:
        return name in self._runs

    def __getitem__(self, name: str) -> tuple[Run, dict[str, Any]]:
        """A finished run, and what it was measured on."""
        return self._runs[name]

    def add(self, name: str, run: Run, measured_on: dict[str, Any]) -> None:
        """Keep a run: after a crash it is there, or (while this method writes) it isn't."""
        self._runs[name] = run, measured_on
        line = json.dumps({"name": name, "run": asdict(run), "measured_on": measured_on})
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the file, once the report holds all that it says."""
        self.path.unlink(missing_ok=True)


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {now.get(name)} and was {then.get(name)}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
