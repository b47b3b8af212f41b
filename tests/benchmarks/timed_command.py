"""Runs a command up to a deadline, notes when each line came, and watches memory of the GPUs and of the processes."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from process_tree import ProcessTree

PATIENCE = 20
"""Seconds that a command has to end after SIGTERM."""


@dataclass
class Timed:
    """What was seen of a command.

    Args:
        lines: what it printed, with the seconds after its start.
        cut: it was stopped at the deadline, or because enough had been seen.
        gpu_mib: the most memory in use on each GPU, by nvidia-smi.
    """

    seconds: float = 0.0
    returncode: int | None = None
    cut: bool = False
    lines: list[tuple[float, str]] = field(default_factory=list)
    tree: ProcessTree = field(default_factory=ProcessTree)
    gpu_mib: dict[str, int] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Seconds, and the peak memory in GiB of the fullest GPU and of all processes together."""
        found: dict[str, Any] = {"seconds": round(self.seconds, 1), "cut": self.cut}
        found["host_gib"] = round(self.tree.private / 2**30, 2)
        if self.gpu_mib:
            found["gpu_gib"] = round(max(self.gpu_mib.values()) / 1024, 1)
        return found


def run_together(
    commands: Sequence[tuple[list[str], dict[str, str]]],
    log: Path,
    deadline: float | None,
    is_enough: Callable[[Timed], bool] = lambda timed: False,
) -> Timed:
    """Run commands side by side to their end, or until `deadline` (of `time.monotonic`), or until enough was seen.

    Args:
        commands: each with the environment variables that it has besides ours.
        log: where their output goes too.
        is_enough: asked after every line.
    """
    timed, start = Timed(), time.monotonic()
    lock = threading.Lock()
    with open(log, "a") as file, tempfile.TemporaryFile("w+") as gpus:
        monitor = _gpu_monitor(gpus)
        processes = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
                start_new_session=True,
            )
            for command, environment in commands
        ]
        enough = threading.Event()

        def read(process: subprocess.Popen[str]) -> None:
            for line in process.stdout or ():
                with lock:
                    timed.lines.append((time.monotonic() - start, line.rstrip("\n")))
                    file.write(f"{timed.lines[-1][0]:8.1f} {line}")
                    file.flush()
                    if is_enough(timed):
                        enough.set()

        readers = [threading.Thread(target=read, args=(process,), daemon=True) for process in processes]
        for reader in readers:
            reader.start()
        try:
            while any(process.poll() is None for process in processes):
                timed.tree.look(os.getpid())
                if enough.is_set() or (deadline is not None and time.monotonic() > deadline):
                    timed.cut = True
                    break
                time.sleep(0.5)
        finally:
            _end(processes, at_once=enough.is_set())
            if monitor is not None:
                monitor.kill()
                monitor.wait()
        for reader in readers:
            reader.join(timeout=5)
        gpus.seek(0)
        for line in gpus:
            index, _, used = line.partition(",")
            if used.strip().isdecimal():
                timed.gpu_mib[index] = max(timed.gpu_mib.get(index, 0), int(used))
    timed.seconds = time.monotonic() - start
    timed.returncode = max((process.returncode or 0 for process in processes), key=abs)
    if timed.returncode and not timed.cut:
        last = "\n".join(line for _, line in timed.lines[-30:])
        print(f"{' '.join(commands[0][0])} ended with {timed.returncode}:\n{last}", file=sys.stderr)
    return timed


def _gpu_monitor(output: Any) -> subprocess.Popen[str] | None:
    command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits", "-lms", "500"]
    with suppress(FileNotFoundError):
        return subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, text=True)
    return None


def _end(processes: list[subprocess.Popen[str]], at_once: bool) -> None:
    """Stop the processes and their children: with SIGTERM, after which finished work is kept, or at once."""
    family = []
    for process in processes:
        with suppress(psutil.Error):
            family += psutil.Process(process.pid).children(recursive=True)
    if not at_once:
        for process in processes:
            process.terminate()
        stop = time.monotonic() + PATIENCE
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, stop - time.monotonic()))
    for one in family:  # torchrun gives its workers sessions of their own
        with suppress(psutil.Error):
            one.kill()
    for process in processes:
        process.kill()
        process.wait()
