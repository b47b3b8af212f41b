"""Runs of an evaluation (the answers to all prompts at one concurrency) and the file that keeps finished ones."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..console import number_of
from ..data.prompts import Prompt
from ..errors import PeagleError
from ..files import atomic_path, writing
from ..serving.client import Answer

logger = logging.getLogger(__name__)

BY_DRAFT, BY_REQUEST, BY_CATEGORY = "by draft", "by request", "by category"
"""How finely drafts are counted: each one, those of each request, or vLLM's totals. These are read after each category,
in a pass that isn't timed."""
DRAFTED, NOT_DRAFTED = "with a drafter", "without"
"""The names in a report of the two kinds of runs, for vLLM's `model_runner` in each."""
COUNTS_REQUESTS_FROM = 0, 29
"""The first vLLM that can count the drafts of each request."""


class Condition(NamedTuple):
    """How a run is made: the temperature, and the number of chats at a time."""

    temperature: float
    concurrency: int


@dataclass(frozen=True)
class Run:
    """The answers to all prompts, `concurrency` chats at a time.

    Args:
        chats: for each prompt, its answers by turn.
        seconds: wall time of the whole run.
        counters: the server's total counts (see `Counters.drafting`) by category of prompts, if answers have no counts
            of their own.
    """

    concurrency: int
    chats: list[list[Answer]]
    seconds: float
    counters: dict[str, list[int]] | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Run":
        """The inverse of `dataclasses.asdict`."""
        chats = [[Answer(**answer) for answer in chat] for chat in fields["chats"]]
        return cls(**{**fields, "chats": chats})

    @property
    def texts(self) -> list[list[str]]:
        return [[answer.text for answer in chat] for chat in self.chats]

    @property
    def drafting(self) -> list[list[int]] | None:
        """The counts of each prompt (see `Counters.drafting`), all turns together; None if vLLM doesn't count per
        request."""
        counts = [[answer.drafting for answer in chat if answer.drafting is not None] for chat in self.chats]
        if any(len(chat) < len(answers) for chat, answers in zip(counts, self.chats, strict=True)):
            return None
        return [np.sum(chat, axis=0).tolist() for chat in counts]

    def latency(self) -> dict[str, dict[str, float] | None]:
        """Mean, median and p99 in seconds of `request`, `first_token` and, after it, `output_token`."""
        answers = [answer for chat in self.chats for answer in chat]
        values = {
            "request": [answer.seconds for answer in answers],
            "first_token": [answer.first_token_seconds for answer in answers],
            "output_token": [
                (answer.seconds - answer.first_token_seconds) / (len(answer.token_ids) - 1)
                for answer in answers
                if len(answer.token_ids) > 1
            ],
        }
        return {name: _distribution(seconds) if seconds else None for name, seconds in values.items()}


def grouped(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """The numbers of the prompts of each category."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt.category, []).append(index)
    return groups


def coarse_counts(counts: str, version: str, is_server: bool) -> str:
    """What isn't known because vLLM doesn't count each draft, and what to do about it; "" if it does.

    Args:
        counts: `BY_DRAFT`, `BY_REQUEST` or `BY_CATEGORY`.
        version: of vLLM.
    """
    if counts == BY_DRAFT:
        return ""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    can_count = not numbers or tuple(map(int, numbers.groups())) >= COUNTS_REQUESTS_FROM
    remedy = (
        "Start it with peagle-hf serve, or with --per-request-spec-decode-metrics detailed."
        if can_count and is_server
        else f"vLLM {'.'.join(map(str, COUNTS_REQUESTS_FROM))} and newer count each draft."
    )
    if counts == BY_REQUEST:
        return (
            "Acceptance isn't known by segment or by position in the context, because the server counts per request, "
            f"not per draft. {remedy}"
        )
    return (
        "Acceptance has no intervals and isn't known by segment or by position in the context, because "
        f"{'the server' if is_server else 'vLLM'} ({version}) counts drafts in total only. {remedy}"
    )


def runners_row(report: Mapping[str, Any]) -> list[list[str]]:
    """The row of a report's table that names vLLM's model runner in each kind of runs; none for servers."""
    runners = report.get("model_runner")
    if not runners:
        return []
    return [["vLLM's model runner", ", ".join(f"the {number} {kind}" for kind, number in runners.items())]]


def check_counts(answers: Sequence[Answer], counted: Sequence[int]) -> None:
    """Make sure that vLLM's counts per request add up to its total counters.

    Raises:
        PeagleError: they don't.
    """
    added = np.sum([answer.drafting for answer in answers if answer.drafting is not None], axis=0).tolist()
    if added != list(counted):
        raise PeagleError(
            f"The speculative-decoding counters of this vLLM don't add up: its counts per request sum to {added} "
            "(drafts, drafted tokens, accepted tokens, and these by position), its total counters say "
            f"{list(counted)}. Use vLLM 0.29 to 0.33."
        )


class FinishedRuns:
    """A file of finished runs, each under its name (see `task.name_of_run`).

    The first line holds the settings of all runs, each later line one run. A last line that a crash has cut off is
    dropped. A file with other settings is replaced, and the log says which settings changed.

    Args:
        path: the file; its folder must exist.
        settings: everything but a run's name that determines its figures, as JSON values.

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
                f"{path}, which holds the finished runs of a command that was interrupted, is damaged "
                f"({type(error).__name__}: {error}). Remove it and run the same command again to measure everything "
                "again."
            ) from error
        if found != settings:
            if self._runs and found is not None:
                logger.warning(
                    "Everything is measured again, without %s of an interrupted command in %s, because %s.",
                    number_of(len(self._runs), "finished run"),
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
            logger.info("Read %s of an interrupted command from %s.", number_of(len(self._runs), "finished run"), path)

    def __contains__(self, name: str) -> bool:
        return name in self._runs

    def __getitem__(self, name: str) -> tuple[Run, dict[str, Any]]:
        """A finished run, and the device and versions on which it was measured."""
        return self._runs[name]

    def add(self, name: str, run: Run, measured_on: dict[str, Any]) -> None:
        """Append a run; it is on disk when this returns, and a crash meanwhile leaves the earlier runs."""
        self._runs[name] = run, measured_on
        line = json.dumps({"name": name, "run": asdict(run), "measured_on": measured_on})
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the file, once the report is written."""
        self.path.unlink(missing_ok=True)


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {now.get(name)} and was {then.get(name)}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]


def _distribution(values: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "p99": float(np.percentile(values, 99)),
    }
