"""Memory, disk reads and processor time of a process and its children."""

import resource
import subprocess
import tempfile
import time
from dataclasses import dataclass

import psutil

MIB = 1 << 20


@dataclass
class ProcessTree:
    """The most that was seen.

    Args:
        rss: bytes resident in all processes together, pages of mapped files and shared ones counted for each.
        private: bytes of them that belong to one process alone, as no file's pages do.
        read: bytes that the processes have read from the disk; those of a process that has ended count as its parent's.
        processor: seconds for which processors worked for them. These hardly depend on what else the machine does
            meanwhile, unlike the time that passes.
    """

    rss: int = 0
    private: int = 0
    read: int = 0
    processor: float = 0.0

    def look(self, root: int) -> None:
        rss = private = read = 0
        try:
            process = psutil.Process(root)
            for member in (process, *process.children(recursive=True)):
                memory = member.memory_info()
                rss, private = rss + memory.rss, private + memory.rss - memory.shared
                read += member.io_counters().read_bytes
        except psutil.Error:  # a process may just have ended
            return
        self.rss, self.private, self.read = max(self.rss, rss), max(self.private, private), max(self.read, read)


def watch(command: list[str], every: float = 0.05) -> tuple[str, float, ProcessTree]:
    """Run a command to its end; gives what it printed, the seconds it took and what was seen of it."""
    seen, start, before = ProcessTree(), time.perf_counter(), _processor_seconds()
    with tempfile.TemporaryFile("w+") as log:  # a pipe that nobody empties would stop the command
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            seen.look(process.pid)
            time.sleep(every)
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    seen.processor = _processor_seconds() - before
    return output, time.perf_counter() - start, seen


def _processor_seconds() -> float:
    """Give the processor time of all child processes that have ended, in user and in system mode."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
