"""Run a program and end it, with all processes that it has started, on a signal or when the supervisor has died.

`python peagle_guard.py DESCRIPTOR GRACE_SECONDS COMMAND...` leads a session of its own (see
`peagle_hf.serving.supervisor`).
DESCRIPTOR is the reading end of a pipe whose other end only the supervisor holds: it is closed when the supervisor ends
the program or has died, even by SIGKILL. SIGINT, SIGTERM and SIGHUP are passed on to the program. It then has
GRACE_SECONDS to end; what is left of the session is killed. The exit status is the program's, or 128 + n if signal n
ended it.
"""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

KILL_SECONDS = 10.0
"""Seconds to wait for processes to disappear after SIGKILL."""


def run(supervisor: int, grace_seconds: float, command: list[str]) -> int:
    """Run the program to its end; returns the exit status."""
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    passed_on = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in (*passed_on, signal.SIGCHLD):
        signal.signal(number, lambda number, frame: None)
    try:
        program = subprocess.Popen(command)
    except OSError as error:
        print(f"{command[0]} can't be run: {error.strerror}", file=sys.stderr)
        return 127
    sources, deadline = [woken, supervisor], float("inf")
    while program.poll() is None and time.monotonic() < deadline:
        left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(sources, [], [], left)
        numbers = [number for number in os.read(woken, 64) if number in passed_on] if woken in ready else []
        if supervisor in ready:
            sources.remove(supervisor)
            numbers.append(signal.SIGTERM)
        if numbers:
            program.send_signal(numbers[0])
            deadline = min(deadline, time.monotonic() + grace_seconds)
    end_session(os.getpid())
    status = program.wait()
    return status if status >= 0 else 128 - status


def end_session(session: int) -> None:
    """Kill all processes of a session except this one, and their descendants in other sessions."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        members = [process for process in psutil.process_iter() if _is_member(process, session)]
        for process in [*members, *(child for member in members for child in _descendants(member))]:
            with suppress(psutil.Error):
                process.kill()
        if not members:
            return
        time.sleep(0.01)


def _is_member(process: psutil.Process, session: int) -> bool:
    with suppress(psutil.Error, OSError):
        is_alive = process.status() != psutil.STATUS_ZOMBIE
        return is_alive and process.pid != os.getpid() and os.getsid(process.pid) == session
    return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
