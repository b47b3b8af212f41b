"""Validation: sums of losses and counts over the batches of a data set, and the metrics made from them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.errors import on_all_processes
from .metrics import COUNTERS, count_drafts, summarize


class FailingTogether:
    """A data loader, but if reading fails on one process, all processes raise its `RowError` (`on_all_processes`)."""

    def __init__(self, dataloader: DataLoader):
        self._dataloader = dataloader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataloader, name)

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = self._dataloader.dataset.completed(self._dataloader)  # type: ignore[attr-defined]
        while (batch := on_all_processes(lambda: next(batches, None))) is not None:
            yield batch


class Validation:
    """The sums of one validation on this process.

    Args:
        num_depths: K of the drafter.
        device: of the batches.

    Attributes:
        loss: float64 [2], the summed loss of all slots that are trained on, and their number.
    """

    def __init__(self, num_depths: int, device: torch.device):
        self._num_depths = num_depths
        self._counters = torch.zeros(len(COUNTERS), num_depths, dtype=torch.long, device=device)
        self._drafts = torch.zeros(2, num_depths, dtype=torch.long, device=device)
        self.loss = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, parts: list[Any]) -> Tensor:
        """Add one batch and give its mean loss.

        Args:
            parts: the drafter's output (`loss`, `counters`, `outcomes`) for each part of the batch.
        """
        sums = torch.zeros_like(self.loss)
        for part in parts:
            learnt = part.counters[COUNTERS.index("learnt")].sum()
            self._counters += part.counters
            sums += torch.stack([part.loss.double() * learnt, learnt.double()])
        self.loss += sums
        self._drafts += count_drafts(torch.cat([part.outcomes for part in parts], dim=1), self._num_depths)
        return sums[0] / sums[1].clamp(min=1)

    def metrics(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Loss, accuracies and acceptance of all processes, by names without a prefix.

        Args:
            add_up: adds the tensors of all processes.
        """
        loss, learnt = add_up(self.loss).tolist()
        counters, drafts = add_up(self._counters), add_up(self._drafts)
        metrics = {"loss": loss / max(learnt, 1.0), **summarize(torch.cat([counters[:2], drafts]))}
        metrics["anchor_acceptance_length"] = summarize(counters)["acceptance_length"]
        return metrics
