"""Finds the step whose loss or gradient is NaN or infinite, without waiting for the device at each step."""

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..data.dataset import HiddenStatesDataset
from ..data.packing import EpochSampler
from .arguments import PeagleTrainingArguments

MOST_NAMED = 20
"""Upper limit on the samples that a message names."""


class Value(NamedTuple):
    """A loss or a gradient's norm of one step.

    Attributes:
        step: number of the optimizer step, from 1.
        batch: which of the step's batches on this process the loss is of; None for the gradient of all.
    """

    step: int
    batch: int | None


class NanCheck:
    """Collects on the device whether losses and gradients are finite; `first_bad` reads the flags."""

    MOST = 1000
    """Upper limit on flags: then they are checked, so that they don't pile up where nothing is logged or saved."""

    def __init__(self) -> None:
        self._values: list[Value] = []
        self._flags: list[Tensor] = []
        self._batches = Value(0, -1)

    def note_loss(self, step: int, loss: Tensor) -> None:
        """Note the loss of the next batch of a step."""
        batch = (self._batches.batch or 0) + 1 if self._batches.step == step else 0
        self._batches = Value(step, batch)
        self._note(self._batches, loss)

    def note_gradient(self, step: int, norm: Tensor | float | None) -> None:
        """Note the norm of a step's whole gradient; None, where it isn't known, is left out."""
        # Under FSDP2 the norm is distributed, and all processes make this call together.
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if norm is not None:
            self._note(Value(step, None), torch.as_tensor(norm))

    def _note(self, value: Value, tensor: Tensor) -> None:
        self._values.append(value)
        self._flags.append(torch.isfinite(tensor.detach()).all())

    @property
    def is_full(self) -> bool:
        return len(self._flags) >= self.MOST

    def first_bad(self) -> Value | None:
        """The first value since the last call that wasn't finite. Waits for the device."""
        values, flags = self._values, self._flags
        self._values, self._flags = [], []
        if not flags:
            return None
        are_finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
        return next((value for value, is_finite in zip(values, are_finite, strict=True) if not is_finite), None)


def rows_of(
    value: Value, dataset: HiddenStatesDataset, sampler: EpochSampler, args: PeagleTrainingArguments
) -> list[int]:
    """The samples, by number, that a value was made from: of one batch of this process, or of a step of all processes.

    Args:
        sampler: that of the training.
    """
    sampler, size = copy(sampler), args.train_batch_size
    num_batches = len(sampler) // size if args.dataloader_drop_last else -(-len(sampler) // size)
    a_step = args.gradient_accumulation_steps * args.world_size
    epoch, step = divmod(value.step - 1, -(-num_batches // a_step))
    batches = range(step * a_step, (step + 1) * a_step)
    if value.batch is not None:
        batches = batches[value.batch * args.world_size + args.process_index :][:1]
    sampler.set_epoch(epoch)
    requests = list(sampler)
    wanted = [request for batch in batches for request in requests[batch * size : (batch + 1) * size]]
    rows = [row for request in wanted if not request.is_filler for row in dataset.plan[request.number]]
    return [row for row in rows if row not in dataset.skip_rows]


def listed(rows: Sequence[int]) -> str:
    """Numbers of samples for a message, `MOST_NAMED` at most."""
    more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
    return ", ".join(map(str, rows[:MOST_NAMED])) + more
