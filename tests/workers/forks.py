"""Runs pipelines in forks of one process that has imported everything, and kills them where it is told.

Each line of standard input is a JSON object `{"folder": ..., "seconds": ..., "rename": ...}`: run the folder's
pipeline.yaml there, and kill it (SIGKILL) after so many seconds, or just before its rename of this number. The answer
is a line `{"status": ..., "seconds": ..., "renames": ...}`; a status of -9 means killed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import datasets  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from peagle_hf import cli

for command in ("regenerate", "prepare", "extract", "train", "run"):
    cli.COMMANDS[command].load()

LOG, RENAMES = "log.txt", "renames.txt"


def run(folder: Path, number: int | None) -> None:
    """In a fork: run the pipeline, and die before the rename of this number."""
    os.chdir(folder)
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    done = 0

    def counted(rename):
        def wrapped(*args, **kwargs):
            nonlocal done
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return rename(*args, **kwargs)

        return wrapped

    for name in ("replace", "rename", "link", "symlink"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        cli.main(["run", "pipeline.yaml"])
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    Path(RENAMES).write_text(str(done))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def answer(folder: Path, seconds: float | None, number: int | None) -> dict:
    (folder / RENAMES).unlink(missing_ok=True)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            run(folder, number)
        finally:
            os._exit(99)
    if seconds is not None:
        while (
            time.monotonic() < started + seconds
            and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)  # a child that has ended is there until it is waited for
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    renames = folder / RENAMES
    return {
        "status": status,
        "seconds": time.monotonic() - started,
        "renames": int(renames.read_text()) if renames.exists() else None,
    }


print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps(answer(Path(job["folder"]), job.get("seconds"), job.get("rename"))), flush=True)
