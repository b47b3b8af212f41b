"""Which share of the samples a process of `peagle-hf extract` takes, and on which device it runs the verifier."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..console import less_verbose
from ..errors import PeagleError
from ..processes import are_several, connect_on_cpu, is_launched, together

if TYPE_CHECKING:
    from .extract import ExtractArguments

logger = logging.getLogger(__name__)

LONGEST_WAIT = 7 * 24 * 3600.0
"""Seconds that a process which has finished its share waits for the others; one that ends is noticed at once."""


@dataclass(frozen=True)
class Share:
    """The samples whose row leaves the remainder `rank` when divided by `size`.

    Args:
        is_launched: torchrun or accelerate has started the processes of all shares, and they are connected.
    """

    rank: int = 0
    size: int = 1
    is_launched: bool = False

    @property
    def suffix(self) -> str:
        """Tells the files of this share from those of others: '' for the whole, else `_<rank>`."""
        return "" if self.size == 1 else f"_{self.rank}"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def of(self, lengths: dict[int, int]) -> dict[int, int]:
        """Those of the samples, by row, that belong to this share."""
        return {row: length for row, length in lengths.items() if row % self.size == self.rank}

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Within the block only the first of connected processes shows progress and log lines below warnings."""
        with less_verbose(self.is_launched and not self.is_first):
            yield


def share_of(arguments: "ExtractArguments") -> Share:
    """The share that `--rank` and `--world-size` name, or that a launcher of several processes gives this one.

    The launcher's processes are connected, so that all of them must come here.

    Raises:
        PeagleError: the rank is out of range, or flags and launcher contradict each other.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1) if is_launched() else 1
    if launched > 1:
        rank = int(os.environ["RANK"])
        connect_on_cpu(LONGEST_WAIT)
        # Without this, the processes whose flags are right would wait for the others for ever.
        with together():
            _check_flags(arguments, rank, launched)
        return Share(rank, launched, is_launched=True)
    rank, size = arguments.rank or 0, 1 if arguments.world_size is None else arguments.world_size
    if not 0 <= rank < size:
        raise PeagleError(f"--rank is {rank} but must be in 0 .. {size - 1} (--world-size).")
    return Share(rank, size)


@contextmanager
def whole_shares() -> Iterator[None]:
    """Let each connected process come to the end of the block, before all raise if one has failed in it.

    A launcher ends all processes once one has ended with an error. The failed one logs its error at once.

    Raises:
        PeagleError: the block failed on another process, which the message names.
    """
    with together():
        try:
            yield
        except Exception as error:
            if are_several():
                logger.error("This process has failed; the others still extract their shares. %s", error)
            raise


def _check_flags(arguments: "ExtractArguments", rank: int, size: int) -> None:
    for flag, given, variable, started_as in (
        ("--rank", arguments.rank, "RANK", rank),
        ("--world-size", arguments.world_size, "WORLD_SIZE", size),
    ):
        if given not in (None, started_as):
            raise PeagleError(
                f"{flag} is {given}, but the launcher (torchrun or accelerate) has started this process with "
                f"{variable} {started_as}. Leave {flag} out to share the samples among its processes, or start each "
                "share by itself, without the launcher."
            )


def device_of(given: str | None, share: Share) -> str:
    """The device that the verifier of this process runs on: the given one, else a GPU if there is one.

    Of several processes on a machine each takes the GPU of its `LOCAL_RANK`, unless a device with a number is given.

    Raises:
        PeagleError: the launcher has started more processes on this machine than there are GPUs.
    """
    device = given or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cuda" or not torch.cuda.is_available() or not share.is_launched:
        return device
    local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise PeagleError(
            f"The launcher has started process {local_rank} of this machine (LOCAL_RANK, from 0 on), but it has "
            f"{num_gpus} GPUs. Start one process for each GPU (torchrun --nproc-per-node {num_gpus}), or name the "
            "--device that all are to use."
        )
    return f"cuda:{local_rank}"
