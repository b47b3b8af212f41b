"""Sequence partitions of `PeagleTrainer`: a batch is run in parts, so that a step fits into the device's memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..data.partition import partition, partition_by_slots, partition_every_slot, without_labels
from ..errors import PeagleError
from ..model.config import PeagleConfig
from .arguments import PeagleTrainingArguments
from .memory import slots_that_fit


class Partitioner:
    """Cuts batches into parts as `sequence_partitions` says.

    Args:
        config: of the drafter that is trained.
        is_sharded: each process holds only a part of the weights, so that every pass is one of all processes.
    """

    def __init__(self, args: PeagleTrainingArguments, config: PeagleConfig, accelerator: Accelerator, is_sharded: bool):
        self._args, self._config, self._accelerator, self._is_sharded = args, config, accelerator, is_sharded

    def parts(self, batch: dict[str, Any], is_training: bool) -> list[dict[str, Any]]:
        """The parts of a batch, whose losses and gradients add up to its own.

        Raises:
            PeagleError: the batch can't be cut so that each part fits into the memory.
        """
        if self._args.sequence_partitions == "auto":
            parts = partition_by_slots(batch, self._slots_that_fit)
        else:
            num_parts = int(self._args.sequence_partitions)
            parts = partition(batch, num_parts) if is_training else partition_every_slot(batch, num_parts)
        if self._is_sharded:
            # Every pass gathers the shards of all processes, so all processes must run equally many passes.
            counts = self._accelerator.gather(torch.tensor([len(parts)], device=self._args.device))
            parts = [without_labels(parts[0])] * (int(counts.max()) - len(parts)) + parts
        return parts

    @cached_property
    def _slots_that_fit(self) -> int:
        budget = self._args.usable_memory()
        if budget is None:
            raise PeagleError(
                "sequence_partitions is auto, but how much memory a CPU may use is for you to say: pass "
                "--memory-budget with a number of GiB."
            )
        return slots_that_fit(self._args.memory_plan(self._config), budget)


@contextmanager
def without_reduction(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Gradients stay on the process, as in all but the last step of gradient accumulation."""
    state = accelerator.gradient_state
    if not state.sync_gradients:
        yield
        return
    state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(True)
