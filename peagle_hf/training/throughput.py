"""Throughput of training: positions per second, share of time waiting for data, peak memory."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .memory import GIB


class Throughput:
    """Measures a process's training from one log to the next; only `take` waits for the GPU.

    Attributes:
        positions: trained on since the last log; the training loop counts them up.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._restart()

    def _restart(self) -> None:
        self.positions = 0
        self._waited = 0.0
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._started = time.perf_counter()

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the loading of data. On a GPU its idle time counts: data loaded while it computes cost nothing."""
        if self._on_gpu:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            yield
            after.record()
            self._waits.append((before, after))
            # Finished waits are added up now, because without logging they would pile up.
            while self._waits and self._waits[0][1].query():
                self._waited += elapsed(*self._waits.popleft())
        else:
            started = time.perf_counter()
            yield
            self._waited += time.perf_counter() - started

    def take(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The measurements since the last call, over all processes.

        `tokens_per_second`: positions trained on over wall time, validation and saving included, summed.
        `loader_wait`: the share of that time, 0 to 1, that went by waiting for data, on average. `memory_gib`: the most
        that tensors of a process have taken of its GPU so far, by PyTorch's statistics, which aren't reset, as others
        may measure by them too; there is none on a CPU.

        Args:
            gather: puts the tensors of all processes together, as `Accelerator.gather` does.
        """
        peak = 0.0
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device) / GIB
        waited = self._waited + sum(elapsed(before, after) for before, after in self._waits)
        seconds = time.perf_counter() - self._started
        measured = torch.tensor([[self.positions / seconds, waited / seconds, peak]], device=self._device)
        speed, wait, memory = gather(measured).unbind(1)
        self._restart()
        metrics = {"tokens_per_second": speed.sum().item(), "loader_wait": wait.mean().item()}
        return metrics | {"memory_gib": memory.max().item()} if self._on_gpu else metrics


def elapsed(before: torch.cuda.Event, after: torch.cuda.Event) -> float:
    """Seconds between two events that the GPU has reached."""
    return before.elapsed_time(after) / 1000
