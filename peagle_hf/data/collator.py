"""`CODDataCollator`: documents in, one packed sequence of rows out."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.config import PeagleConfig
from ..model.slots import every_row, learnt_positions, sample_rows


@dataclass
class CODDataCollator:
    """Pack documents into one sequence, sample their rows by COD, and say what each row is to predict.

    A document's rows depend on nothing but (seed, epoch, sample id): not on packing, batch size, worker or rank.

    Args:
        num_depths: K.
        down_sample_ratio: r of `cod.sample_rows`.
        down_sample_ratio_min: r_min.
        max_anchors: see `cod.sample_rows`.
        seed: of the sampling.
        every_row: drop nothing, whatever the ratios say (see `cod.every_row`): for evaluation.

    Returns (from the call):
        the keyword arguments of `PeagleForSpeculation.forward`.

    Examples:
        >>> tokens, states = torch.arange(6), torch.zeros(6, 4)
        >>> document = {"sample_id": 0, "input_ids": tokens, "loss_mask": tokens > 1}
        >>> document |= {"hidden_states": states, "target_states": states[2:5]}
        >>> batch = CODDataCollator(num_depths=2, down_sample_ratio=1.0)([{"epoch": 0, "documents": [document]}])
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
    every_row: bool = False

    @classmethod
    def from_config(cls, config: PeagleConfig, seed: int = 0, every_row: bool = False) -> "CODDataCollator":
        """The collator that a drafter's configuration asks for."""
        return cls(
            num_depths=config.num_depths,
            down_sample_ratio=config.down_sample_ratio,
            down_sample_ratio_min=config.down_sample_ratio_min,
            max_anchors=config.max_anchors,
            seed=seed,
            every_row=every_row,
        )

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        documents = [
            self._rows(feature["epoch"], document) for feature in features for document in feature["documents"]
        ]
        lengths = [document["input_ids"].numel() for document in documents]
        offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()

        def pack(name: str, shift: bool = False) -> Tensor:
            """All documents' depth-0 rows, then all their rollouts."""
            parts = [
                document[name] + (offset if shift else 0) for document, offset in zip(documents, offsets, strict=False)
            ]
            return torch.cat(
                [part[:length] for part, length in zip(parts, lengths, strict=True)]
                + [part[length:] for part, length in zip(parts, lengths, strict=True)]
            )

        anchors, depths, labels = pack("anchors", shift=True), pack("depths"), pack("labels")
        positions = pack("anchors") + depths
        targets = anchors + depths
        learnt_rows = (labels != -100).nonzero().flatten()
        learnt_rows = learnt_rows[targets[learnt_rows].argsort(stable=True)]
        # Depth 0 has every learnt position, so the targets are just those.
        _, target_index = targets[learnt_rows].unique(return_inverse=True)
        document_ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(lengths))

        batch = {
            "input_ids": torch.cat([document["input_ids"] for document in documents]),
            "hidden_states": torch.cat([document["hidden_states"] for document in documents]),
            "document_ids": document_ids,
            "anchors": anchors,
            "depths": depths,
            "position_ids": positions,
            "labels": labels,
            "learnt_rows": learnt_rows,
            "target_states": torch.cat([document["target_states"] for document in documents]),
            "target_index": target_index,
        }
        return {name: tensor.unsqueeze(0) for name, tensor in batch.items()} | {"max_length": max(lengths)}

    def _rows(self, epoch: int, document: dict[str, Any]) -> dict[str, Tensor]:
        """One document in shifted positions: i sees x[i+1] and g[i] and predicts x[i+2] from y[i+1] (see `cod`)."""
        tokens, mask = document["input_ids"].long(), document["loss_mask"].bool()
        learnt = learnt_positions(mask)
        if self.every_row:
            anchors, depths = every_row(learnt, self.num_depths)
        else:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, document["sample_id"]))
            anchors, depths = sample_rows(
                learnt, self.num_depths, self.down_sample_ratio, self.down_sample_ratio_min, generator, self.max_anchors
            )
        targets = anchors + depths
        return {
            "input_ids": tokens[1:-1],
            "hidden_states": document["hidden_states"][:-2],
            "target_states": document["target_states"],
            "anchors": anchors,
            "depths": depths,
            "labels": torch.where(learnt[targets], tokens[targets + 2], -100),
        }


def sample_seed(seed: int, epoch: int, sample_id: int) -> int:
    """A 63-bit seed that depends on all three numbers and on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
