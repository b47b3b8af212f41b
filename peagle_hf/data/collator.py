"""`CODDataCollator`: draws the slots (anchor, depth) of samples and packs them into one sequence.

Shape letters: T tokens of a sample.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import PeagleError
from ..model.config import PeagleConfig, wrong_sampling
from ..model.slots import every_slot, sample_slots, target_tokens, trained_positions

TO_GENERATE = "to_generate"
"""Key of a batch for its `StatesRequest`s; there, `hidden_states` and `target_states` are lists by sample."""


class StatesRequest(NamedTuple):
    """A sample of a batch whose states are lacking; its arrays stay on the CPU, wherever the batch goes.

    Attributes:
        place: of the sample in the batch.
        row: of the sample in the prepared dataset.
        token_ids: int64 [T'], all that the verifier is to read; T' >= T.
        is_target: bool [T'], those of them whose last states a learnt kind of storage keeps.
        wanted: bool [T], the targets of the T tokens that are trained on.
    """

    place: int
    row: int
    token_ids: np.ndarray
    is_target: np.ndarray
    wanted: np.ndarray


@dataclass
class CODDataCollator:
    """Pack samples into one sequence, draw their slots by COD, and label each slot with the token that it predicts.

    The slots of a sample depend only on (seed, epoch, sample id), not on packing, batch size, worker or rank.

    Args:
        num_depths: K.
        down_sample_ratio: `ratio` of `model.slots.sample_slots`.
        down_sample_ratio_min: its `ratio_min`.
        max_anchors: see `model.slots.sample_slots`.
        seed: of the drawing.
        every_slot: keep all slots and ignore the ratios (see `model.slots.every_slot`), for evaluation.

    Raises:
        PeagleError: a number is out of its range.

    Returns (from the call):
        A batch for `training.objective.Objective`: the keyword arguments of `PeagleForSpeculation.forward`, and labels
        and targets. If the states of a sample are still to be computed, `HiddenStatesDataset.completed` adds them.

    Examples:
        >>> tokens, states = torch.arange(6), torch.zeros(6, 4)
        >>> sample = {"sample_id": 0, "input_ids": tokens, "loss_mask": tokens > 1}
        >>> sample |= {"hidden_states": states, "target_states": states[2:5]}
        >>> batch = CODDataCollator(num_depths=2, down_sample_ratio=1.0)([{"epoch": 0, "documents": [sample]}])
        >>> batch["input_ids"]
        tensor([[1, 2, 3, 4]])
        >>> batch["depths"]
        tensor([[0, 0, 0, 0, 1, 1]])
        >>> batch["labels"]
        tensor([[-100,    3,    4,    5,    3,    4]])
    """

    num_depths: int = 8
    down_sample_ratio: float = 0.7
    down_sample_ratio_min: float = 0.2
    max_anchors: int | None = None
    seed: int = 0
    every_slot: bool = False

    def __post_init__(self) -> None:
        if wrong := wrong_sampling(self):
            raise PeagleError(f"CODDataCollator can't draw with these settings: {'; '.join(wrong)}. Correct them.")

    @classmethod
    def from_config(cls, config: PeagleConfig, seed: int = 0, every_slot: bool = False) -> "CODDataCollator":
        """A collator with the settings of a drafter's configuration."""
        return cls(
            num_depths=config.num_depths,
            down_sample_ratio=config.down_sample_ratio,
            down_sample_ratio_min=config.down_sample_ratio_min,
            max_anchors=config.max_anchors,
            seed=seed,
            every_slot=every_slot,
        )

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        samples = [self._slots(feature["epoch"], sample) for feature in features for sample in feature["documents"]]
        lengths = [sample["input_ids"].numel() for sample in samples]
        offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()

        def pack(name: str, shift: bool = False) -> Tensor:
            """Concatenate the depth-0 slots of all samples, then their slots of greater depths.

            Args:
                shift: add to each sample's values the position where it begins in the sequence.
            """
            parts = [sample[name] + (offset if shift else 0) for sample, offset in zip(samples, offsets, strict=False)]
            return torch.cat(
                [part[:length] for part, length in zip(parts, lengths, strict=True)]
                + [part[length:] for part, length in zip(parts, lengths, strict=True)]
            )

        anchors, depths, labels = pack("anchors", shift=True), pack("depths"), pack("labels")
        positions = pack("anchors") + depths
        targets = anchors + depths
        trained_slots = (labels != -100).nonzero().flatten()
        trained_slots = trained_slots[targets[trained_slots].argsort(stable=True)]
        # Every position that is trained on has a slot of depth 0, so the targets are exactly these positions.
        _, target_index = targets[trained_slots].unique(return_inverse=True)
        document_ids = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths))

        batch = {
            "input_ids": torch.cat([sample["input_ids"] for sample in samples]),
            "document_ids": document_ids,
            "anchors": anchors,
            "depths": depths,
            "position_ids": positions,
            "labels": labels,
            "trained_slots": trained_slots,
            "target_index": target_index,
        }
        packed = {name: tensor.unsqueeze(0) for name, tensor in batch.items()} | {"max_length": max(lengths)}
        return packed | _states([sample for feature in features for sample in feature["documents"]])

    def _slots(self, epoch: int, sample: dict[str, Any]) -> dict[str, Tensor]:
        """The slots of a sample, in shifted positions: i sees x[i+1] and g[i] and predicts x[i+2] from y[i+1].

        See `model.slots` for the letters.
        """
        tokens, mask = sample["input_ids"].long(), sample["loss_mask"].bool()
        learnt = trained_positions(mask)
        if self.every_slot:
            anchors, depths = every_slot(learnt, self.num_depths)
        else:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, sample["sample_id"]))
            anchors, depths = sample_slots(
                learnt, self.num_depths, self.down_sample_ratio, self.down_sample_ratio_min, generator, self.max_anchors
            )
        targets = anchors + depths
        return {
            "input_ids": tokens[1:-1],
            "anchors": anchors,
            "depths": depths,
            "labels": torch.where(learnt[targets], tokens[targets + 2], -100),
        }


def _states(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The states of a batch's samples; if a verifier is still to compute some, by sample, and the requests for them."""
    requests = [
        StatesRequest(
            place,
            sample["sample_id"],
            sample["to_generate"][0].numpy(),
            sample["to_generate"][1].numpy(),
            target_tokens(sample["loss_mask"]).numpy(),
        )
        for place, sample in enumerate(samples)
        if "to_generate" in sample
    ]
    states = {
        "hidden_states": [None if "to_generate" in sample else sample["hidden_states"][:-2] for sample in samples],
        "target_states": [sample.get("target_states") for sample in samples],
    }
    if requests:
        return {**states, TO_GENERATE: requests}
    return {name: torch.cat(parts).unsqueeze(0) for name, parts in states.items()}  # type: ignore[arg-type]


def sample_seed(seed: int, epoch: int, sample_id: int) -> int:
    """A seed of 63 bits from the three numbers."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
