"""Packing of samples into sequences by their lengths, and the order in which an epoch visits the sequences."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


class SequenceRequest(NamedTuple):
    """A packed sequence to load, and the epoch it is loaded for.

    `EpochSampler` yields these instead of plain numbers, because the slots of a sequence are sampled anew each epoch
    and loader workers, which live through all epochs, aren't told otherwise which epoch it is.

    Attributes:
        epoch: for the seed of the sampling.
        number: of the sequence in the dataset.
        is_filler: load it without tokens to train on: it only gives all processes equally many sequences.
    """

    epoch: int
    number: int
    is_filler: bool = False


class EpochSampler(Sampler[SequenceRequest]):
    """Yields a `SequenceRequest` for each packed sequence once an epoch, then fillers up to a multiple of `multiple`.

    Args:
        size: packed sequences of the dataset.
        seed: of the shuffle, together with the epoch.
        multiple: sequences that all processes together take at a time.
        shuffle: whether the order is random; otherwise it is that of the dataset.
    """

    def __init__(self, size: int, seed: int, multiple: int = 1, shuffle: bool = True):
        self.size, self.seed, self.shuffle, self.epoch = size, seed, shuffle, 0
        self.num_fillers = -size % multiple

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size + self.num_fillers

    def __iter__(self) -> Iterator[SequenceRequest]:
        epoch, order = self.epoch, list(range(self.size))
        if self.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        yield from (SequenceRequest(epoch, number) for number in order)
        yield from (SequenceRequest(epoch, order[0], is_filler=True) for _ in range(self.num_fillers))


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each item, in order, into the first bin that has room; returns the items' indices for each bin.

    A tree over the bins says in O(log n) where the first room is: `room[1]` is the root, and each node has the most
    room of any bin below it.
    """
    bins: list[list[int]] = []
    num_leaves = 1 << max(0, len(sizes) - 1).bit_length()
    room = [capacity] * (2 * num_leaves)
    for item, size in enumerate(sizes):
        node = 1
        while node < num_leaves:
            node *= 2
            node += room[node] < size
        if node - num_leaves == len(bins):
            bins.append([])
        bins[node - num_leaves].append(item)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
