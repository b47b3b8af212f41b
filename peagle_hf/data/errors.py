"""Errors of vLLM servers and of samples whose hidden states can't be had, alike in every command and process."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.utils.data import get_worker_info

from ..errors import PeagleError
from ..processes import are_several, cpu_group, gather, lost_process_explained

Result = TypeVar("Result")


class EndpointError(PeagleError):
    """A request that a server failed, retries included. Other requests or other servers may succeed.

    Args:
        reason: what happened, a clause without a full stop.
        advice: what to do about it, a clause that begins with a verb; empty if the reason says it.
        url: the server, or several separated by commas.
    """

    def __init__(self, reason: str, advice: str = "", url: str | None = None):
        self.reason, self.advice, self.url = reason, advice, url
        super().__init__(f"{f'{url}: ' if url else ''}{reason}{f'; {advice}' if advice else ''}")


class RefusedEndpointError(EndpointError):
    """The servers refuse this request and would refuse it again: HTTP status 400, 413 or 422."""


class WrongServerEndpointError(EndpointError):
    """The server isn't the one that is needed, so other requests would fail too."""


class RowError(PeagleError):
    """A sample whose hidden states can't be had, from a server or from the cache; names its row.

    PyTorch passes only the text of an exception from a loader worker to the main process. So within a worker the text
    is JSON of all attributes, and in the main process the constructor reads them from that text.

    Args:
        row: of the sample in the prepared dataset; None if a loader worker ended before it could say. Or, instead of
            all arguments, the text of a worker's exception, whose last line holds them.
        data_path: the prepared dataset.
        url: the server or servers that were asked; None if the error is of a file or of this process.
        reason: what happened, a clause without a full stop.
        advice: what to do about it, a clause that begins with a verb; may be empty.
        outcome: what became of the training that the error ended, a clause; empty if there was none.
    """

    FIELDS = ("row", "data_path", "url", "reason", "advice", "outcome")

    def __init__(
        self,
        row: int | str | None,
        data_path: str = "",
        url: str | None = None,
        reason: str = "",
        advice: str = "",
        outcome: str = "",
    ):
        self.row = row
        self.data_path, self.url, self.reason, self.advice, self.outcome = data_path, url, reason, advice, outcome
        if isinstance(row, str):
            vars(self).update(json.loads(row.strip().splitlines()[-1].partition(f"{type(self).__name__}: ")[2]))
        super().__init__(self._text())

    @classmethod
    def of(cls, row: int, data_path: Path, error: Exception) -> "RowError":
        """The error of a row that was caused by a server, a file or the operating system."""
        if not isinstance(error, EndpointError):
            return cls(row, str(data_path), None, " ".join(str(error).split()).removesuffix("."))
        advice = [error.advice] if error.advice else []
        if not isinstance(error, WrongServerEndpointError):
            advice.append(f"if this row fails every time, leave it out with --skip-rows {row}")
        return cls(row, str(data_path), error.url, error.reason, "; ".join(advice))

    def ended(self, outcome: str) -> "RowError":
        """The same error with an outcome: what became of the training that it ended."""
        return RowError(self.row, self.data_path, self.url, self.reason, self.advice, outcome)

    def _text(self) -> str:
        row = "a loader worker" if self.row is None else f"row {self.row} of {self.data_path}"
        text = f"{row}: {f'{self.url}: ' if self.url else ''}{self.reason}."
        if self.outcome:
            text = f"{self.outcome}. {_sentence(text)}"
        return f"{text} {_sentence(self.advice)}." if self.advice else text

    def __str__(self) -> str:
        if get_worker_info() is None:
            return self._text()
        return json.dumps({name: getattr(self, name) for name in self.FIELDS})

    def __reduce__(self) -> tuple[Any, ...]:
        return RowError, tuple(getattr(self, name) for name in self.FIELDS)


@contextmanager
def row_errors(row: int, data_path: Path) -> Iterator[None]:
    """Turn errors of a server, a file or the operating system within the block into a `RowError` that names the row."""
    try:
        yield
    except RowError:
        raise
    except (PeagleError, OSError) as error:
        raise RowError.of(row, data_path, error) from error


def on_all_processes(fetch: Callable[[], Result]) -> Result:
    """Call a function that loads samples; if it fails on one process, raise on all of them.

    All processes must call this at the same point. Without it, the others would wait for the failed one in the next
    collective operation.

    Raises:
        RowError: that of the first process that failed, on every process.
    """
    result: Result | None = None
    failure: RowError | None = None
    try:
        result = fetch()
    except RowError as error:
        failure = error
    except RuntimeError as error:
        # PyTorch's message names the DataLoader if a worker was killed or took too long.
        if "DataLoader" not in str(error):
            raise
        failure = RowError(
            None,
            reason=" ".join(str(error).split()).removesuffix("."),
            advice="look whether memory or /dev/shm is full, and lower --dataloader-num-workers",
        )
    if are_several():
        num_failed = torch.tensor([int(failure is not None)])
        with lost_process_explained():
            # A group of the GPUs would wait here for the previous step, so this uses one of the CPUs.
            distributed.all_reduce(num_failed, group=cpu_group())
        if num_failed.item():
            failure = next(one for _, one in gather(failure) if one is not None)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
