"""Agreement among the processes of one run, so that none waits for another that has failed."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from torch import distributed

from .errors import PeagleError

Result = TypeVar("Result")

_SIGNS_OF_A_LOST_PROCESS = ("gloo", "nccl", "connection closed", "connection reset", "timed out")


def is_launched() -> bool:
    """Whether torchrun or accelerate has started this process, alone or with others."""
    return "LOCAL_RANK" in os.environ and "RANK" in os.environ


def connect_on_cpu(timeout: float) -> None:
    """Connect the processes of a run on CPUs, with our own time-out instead of that of transformers.

    Args:
        timeout: seconds that a process waits for the others.
    """
    if distributed.is_available() and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def are_several() -> bool:
    """Whether this process is one of several connected processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def cpu_group() -> Any:
    """A process group for tensors on the CPU; the first call must be made by all processes at the same point."""
    return distributed.group.WORLD if distributed.get_backend() == "gloo" else _gloo_beside(distributed.group.WORLD)


@cache
def _gloo_beside(world: Any) -> Any:
    return distributed.new_group(backend="gloo")


def on_first(work: Callable[[], Result]) -> Result:
    """Run `work` on the first process only; return its result, or raise its error, on all of them.

    Raises:
        PeagleError: `work` failed, or a process has ended; raised on all processes.
    """
    if not are_several():
        return work()
    result: Any = None
    failure: BaseException | None = None
    if distributed.get_rank() == 0:
        try:
            result = work()
        except Exception as error:
            failure = error
    answer = [(result, None if failure is None else _reason(failure))]
    with lost_process_explained():
        distributed.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    result, reason = answer[0]
    if reason is not None:
        raise PeagleError(reason)
    return result


@contextmanager
def together() -> Iterator[None]:
    """Run the block on all processes; if it fails on one of them, raise on all of them instead of waiting for it.

    Raises:
        PeagleError: it failed on another process, which the message names.
    """
    if not are_several():
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    reasons = gather(None if failure is None else _reason(failure))
    if failure is not None:
        raise failure
    for rank, (host, reason) in enumerate(reasons):
        if reason is not None:
            raise PeagleError(f"Process {rank} on {host} has failed, so that all processes end: {reason}")


def require_same(value: Any, what: str, remedy: str) -> None:
    """Make sure that a value is the same on all processes.

    Args:
        what: the value's name, as the beginning of a sentence.
        remedy: what to do if they differ, as a sentence.

    Raises:
        PeagleError: the values differ; raised on all processes.
    """
    if not are_several():
        return
    found = gather(value)
    for rank, (host, other) in enumerate(found):
        if other != found[0][1]:
            raise PeagleError(
                f"{what} {other!r} on {host} (process {rank}) and {found[0][1]!r} on {found[0][0]} (process 0), but "
                f"must be the same on all processes. {remedy}"
            )


def gather(value: Any) -> list[tuple[str, Any]]:
    """Host and value of each process, in the order of their ranks."""
    found: list[Any] = [None] * distributed.get_world_size()
    with lost_process_explained():
        distributed.all_gather_object(found, (socket.gethostname(), value))
    return found


@contextmanager
def lost_process_explained() -> Iterator[None]:
    """Turn an error of the block into a `PeagleError` if its cause is another process that has ended or hangs.

    Raises:
        PeagleError: another process has ended or doesn't answer.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        is_lost = isinstance(error, distributed.DistError) or any(sign in text for sign in _SIGNS_OF_A_LOST_PROCESS)
        if not are_several() or not is_lost:
            raise
        raise PeagleError(
            "Another process of this run has ended, or didn't answer within the time that is allowed (in training "
            "--ddp-timeout, in seconds). What it said is above, or in the output of its machine; run the same command "
            "again, which goes on from the newest checkpoint, or from the files that are there. "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PeagleError) else f"{type(error).__name__}: {text}"
