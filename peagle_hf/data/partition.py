"""Sequence partitioning: cut a batch into smaller ones whose losses and gradients add up to its own.

Every rollout stays whole. Its part also has the depth-0 slots that it may attend to, from the beginning of its sample;
those that belong to an earlier part have no label (P-EAGLE, arXiv 2602.01469, Algorithm 1). So the parts are
independent of each other, and each needs memory for its own slots only.

Shape letters: L positions, R slots, N slots that are trained on.
"""

import math
from bisect import bisect_right
from itertools import pairwise
from typing import Any

import torch

from ..errors import PeagleError

SLOTS_PER_POSITION = 4
"""Approximate number of slots that COD keeps for each position."""


def partition(batch: dict[str, Any], num_parts: int) -> list[dict[str, Any]]:
    """Cut a batch of `CODDataCollator` into at most `num_parts` batches, with the largest as small as possible.

    Loss sums (with the whole batch's `num_items_in_batch`) and counters of the parts add up to the batch's.
    """
    if num_parts <= 1:
        return [batch]
    costs = _Costs(batch)
    least, most = 1, costs.total
    while least < most:
        middle = (least + most) // 2
        cuts = costs.cuts(middle)
        if cuts is not None and len(cuts) - 1 <= num_parts:
            most = middle
        else:
            least = middle + 1
    return _cut(batch, costs.cuts(most))


def partition_by_slots(batch: dict[str, Any], max_slots: int) -> list[dict[str, Any]]:
    """Cut a batch into batches of at most `max_slots` slots.

    Raises:
        PeagleError: a rollout and the positions before it in its sample have more slots than that.
    """
    costs = _Costs(batch)
    cuts = costs.cuts(max_slots)
    if cuts is None:
        raise PeagleError(
            f"{costs.num_positions} positions can't be partitioned into parts of {max_slots} slots: a part holds all "
            "positions of its sample up to its last anchor. Use a smaller --total-seq-len."
        )
    return _cut(batch, cuts)


def partition_every_slot(batch: dict[str, Any], num_parts: int = 1) -> list[dict[str, Any]]:
    """Cut a batch of evaluation, which has all slots, into parts about as large as those of a training batch.

    Args:
        num_parts: number of parts of a training batch.
    """
    num_positions, num_rows = batch["input_ids"].shape[1], batch["anchors"].shape[1]
    return partition(batch, num_parts * math.ceil(num_rows / (SLOTS_PER_POSITION * num_positions)))


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without labels, for a process that has fewer parts than another."""
    empty = {name: batch[name][:, :0] for name in ("trained_slots", "target_states", "target_index")}
    return {**batch, **empty, "labels": torch.full_like(batch["labels"], -100)}


class _Costs:
    """The number of slots of a part from one position to another."""

    def __init__(self, batch: dict[str, Any]):
        document_ids = batch["document_ids"][0]
        self.num_positions = document_ids.numel()
        _, lengths = document_ids.unique_consecutive(return_counts=True)
        self.document_start = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths).tolist()
        rollouts = batch["anchors"][0, self.num_positions :].contiguous()
        boundaries = torch.arange(self.num_positions + 1, device=rollouts.device)
        self.rollouts_before = torch.searchsorted(rollouts, boundaries).tolist()
        self.rows_before = [position + rollouts for position, rollouts in enumerate(self.rollouts_before)]
        self.total = self.rows_before[-1]

    def cuts(self, max_slots: int) -> list[int] | None:
        """The positions where parts of at most `max_slots` slots, each as long as possible, begin and end.

        None if one position alone needs more slots.
        """
        cuts = [0]
        while cuts[-1] < self.num_positions:
            start = cuts[-1]
            room = max_slots + self.document_start[start] + self.rollouts_before[start]
            stop = bisect_right(self.rows_before, room) - 1
            if stop <= start:
                return None
            cuts.append(stop)
        return cuts


def _cut(batch: dict[str, Any], cuts: list[int] | None) -> list[dict[str, Any]]:
    assert cuts is not None
    costs = _Costs(batch)
    return [
        _part(
            batch, costs.document_start[start], start, stop, costs.rollouts_before[start], costs.rollouts_before[stop]
        )
        for start, stop in pairwise(cuts)
    ]


def _part(
    batch: dict[str, Any], context: int, start: int, stop: int, first_rollout: int, last_rollout: int
) -> dict[str, Any]:
    """The slots of the anchors start .. stop - 1, and the positions context .. start - 1 for them to attend to."""
    num_positions, device = batch["input_ids"].shape[1], batch["input_ids"].device
    rows = torch.cat(
        [
            torch.arange(context, stop, device=device),
            torch.arange(num_positions + first_rollout, num_positions + last_rollout, device=device),
        ]
    )
    labels = batch["labels"][:, rows]
    labels[:, : start - context] = -100
    number_of_row = torch.full((batch["anchors"].shape[1],), -1, device=device)
    number_of_row[rows[start - context :]] = torch.arange(start - context, rows.numel(), device=device)
    trained_slots = number_of_row[batch["trained_slots"][0]]
    kept = trained_slots >= 0
    targets, target_index = batch["target_index"][0, kept].unique(return_inverse=True)
    return {
        "input_ids": batch["input_ids"][:, context:stop],
        "hidden_states": batch["hidden_states"][:, context:stop],
        "document_ids": batch["document_ids"][:, context:stop],
        "anchors": batch["anchors"][:, rows] - context,
        "depths": batch["depths"][:, rows],
        "position_ids": batch["position_ids"][:, rows],
        "labels": labels,
        "trained_slots": trained_slots[kept][None],
        "target_states": batch["target_states"][:, targets],
        "target_index": target_index[None],
        "max_length": batch["max_length"],
    }
