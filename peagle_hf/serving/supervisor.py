"""Run a program, such as vLLM, and end all of its processes with this one."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ..errors import PeagleError
from .vllm_plugin.peagle_guard import KILL_SECONDS, end_session

GUARD = Path(__file__).parent / "vllm_plugin" / "peagle_guard.py"
GRACE_SECONDS = 15.0
"""Seconds that a program has to end after SIGTERM before it is killed."""


@contextmanager
def supervised(command: Sequence[str], environment: Mapping[str, str], **streams: Any) -> Iterator[subprocess.Popen]:
    """Run a program until the block ends; then no process of it is left.

    The program gets SIGTERM and `GRACE_SECONDS` to end, then its whole session is killed. This happens however the
    block ends. SIGTERM and SIGHUP to this process become `SystemExit` with status 128 + n, unless they are already
    handled. If this process is killed, a small process in between (`vllm_plugin/peagle_guard.py`) notices and ends the
    program.

    Args:
        streams: `stdin`, `stdout`, `stderr` and `text` of `subprocess.Popen`.

    Returns:
        The process in between. Its exit status is the program's, or 128 + n if signal n ended it.

    Raises:
        PeagleError: the system has no sessions of processes, like Windows.
    """
    if not hasattr(os, "setsid"):
        raise PeagleError(
            "vLLM can't be run on this system: it needs the process groups and signals of Linux. Use Linux, or WSL on "
            "Windows."
        )
    watched, held = os.pipe()
    guard = [sys.executable, str(GUARD), str(watched), str(GRACE_SECONDS), *command]
    process = None
    with _signals_end_this():
        try:
            process = subprocess.Popen(
                guard, env=dict(environment), start_new_session=True, pass_fds=[watched], **streams
            )
            yield process
        finally:
            os.close(watched)
            os.close(held)
            if process is not None:
                _end(process)


def _end(process: subprocess.Popen) -> None:
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS + KILL_SECONDS)
    # This also runs if the user interrupts again, or if the guard itself was killed.
    finally:
        end_session(process.pid)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def _signals_end_this() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `SystemExit`, so that `finally` blocks run."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    unhandled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in unhandled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in unhandled:
            signal.signal(number, signal.SIG_DFL)
