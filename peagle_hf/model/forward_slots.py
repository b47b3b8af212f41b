"""The slots of one forward pass: which positions they stand at, which give an output, and what each may attend to.

Shape letters: L positions, R slots, N trained slots, B sequences, K tokens of a draft, D size of an attention head.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from .attention import ATTENTION, BLOCK, Attend, Kept
from .slots import Spans, find_spans

if TYPE_CHECKING:
    from .layers import PeagleLayer


class PackedSlots:
    """The slots of one training pass: their positions, what each may attend to, and which of them are trained on.

    FlexAttention works on whole blocks, so there slots and trained slots are padded by repeating the last one, to two
    blocks at least: the compiler takes a size of 1 for a constant, and would compile its kernels again for a batch with
    a single block. `num_slots` and `num_trained` count slots without the padding.

    Args:
        anchors: int64 [R].
        depths: int64 [R].
        document_ids: int64 [L], -1 for padding.
        trained: int64 [N], numbers of the slots whose states are wanted; None wants all of them.
        max_length: positions of the longest sample.
        attention: name of an entry of `ATTENTION`.
    """

    def __init__(
        self,
        anchors: Tensor,
        depths: Tensor,
        document_ids: Tensor,
        trained: Tensor | None,
        max_length: int,
        attention: str,
    ):
        self.in_blocks = attention == "flex_attention"
        self.attention = ATTENTION[attention]
        self.num_slots = anchors.numel()
        self.padding = self.num_padding(self.num_slots)
        self.anchors, self.depths, self.document_ids, self.max_length = anchors, depths, document_ids, max_length
        self.documents = self.pad(document_ids[anchors])
        self.trained = self.num_trained = None
        if trained is not None:
            self.num_trained = trained.numel()
            last = trained[-1:] if self.num_trained else trained.new_zeros(1)
            self.trained = torch.cat([trained, last.expand(self.num_padding(self.num_trained))])
        self._attend: dict[tuple[int | None, bool], Attend] = {}

    def num_padding(self, count: int) -> int:
        """How many slots are added to `count`, so that there is one at least, or two whole blocks."""
        if not self.in_blocks:
            return 0 if count else 1
        return max(-count % BLOCK, 2 * BLOCK - count)

    def pad(self, slots: Tensor) -> Tensor:
        """[..., R before padding] -> [..., R]."""
        return torch.cat([slots, slots[..., -1:].expand(*slots.shape[:-1], self.padding)], dim=-1)

    def set_rotary(self, rotary: tuple[Tensor, Tensor]) -> None:
        """Set the rotary embedding of the slots, cos and sin [1, R, D]."""
        self.rotary = rotary
        self.selected_rotary = (self.select(rotary[0]), self.select(rotary[1]))

    def select(self, states: Tensor) -> Tensor:
        """[1, R, ...] -> the trained slots, [1, N, ...], or all of them if none were named."""
        return states if self.trained is None else states.index_select(1, self.trained)

    def trim(self, states: Tensor) -> Tensor:
        """Cut the padding off the last layer's output."""
        return states[:, : self.num_slots if self.num_trained is None else self.num_trained]

    def attend(self, layer: "PeagleLayer") -> Attend:
        """A layer's attention of all slots, in the last layer of the selected ones, to all slots."""
        kind = layer.window, layer.is_last
        if kind not in self._attend:
            bounds = torch.stack(find_spans(self.anchors, self.depths, self.document_ids, layer.window))
            bounds, documents = self.pad(bounds), self.documents
            if layer.is_last and self.trained is not None:
                bounds, documents = bounds[:, self.trained], documents[self.trained]
            self._attend[kind] = self.attention(Spans(*bounds), documents, self.documents, self.max_length)
        return self._attend[kind]


class DraftSlots:
    """The slots of one draft of B sequences: their S_new new positions, then the rollout of each sequence's anchor.

    Keys and values of the positions stay in the cache for later drafts. `finish` removes those of the rollout.

    Args:
        mask: bool [B, S], which positions are real, those that are cached and then the new ones.
        anchors: int64 [B], the place among the S positions of each sequence's last real one.
        num_depths: K.
        cache: the drafter's keys and values of the positions before the new ones.
    """

    def __init__(self, mask: Tensor, anchors: Tensor, num_depths: int, cache: DynamicCache):
        self.cache, self.anchors, self.num_rollout = cache, anchors[:, None], num_depths - 1
        self.mask = F.pad(mask, (0, self.num_rollout), value=True)
        num_positions, self.start = mask.shape[1], cache.get_seq_length()
        self.places = mask.cumsum(1) - 1
        rollout = torch.arange(1, num_depths, device=mask.device)
        self.places = torch.cat([self.places, self.places.gather(1, self.anchors) + rollout], dim=1).clamp(min=0)
        self.asked = torch.cat([self.anchors, (num_positions - 1 + rollout).expand(len(mask), -1)], dim=1)

    @property
    def position_ids(self) -> Tensor:
        """int64 [B, R], place in its sequence of each slot."""
        return self.places[:, self.start :]

    def set_rotary(self, rotary: tuple[Tensor, Tensor]) -> None:
        """Set the rotary embedding of the slots, cos and sin [B, R, D]."""
        self.rotary = rotary
        self.selected_rotary = (self.select(rotary[0]), self.select(rotary[1]))

    def select(self, states: Tensor) -> Tensor:
        """[B, R, ...] -> the slots that propose a token, [B, K, ...]."""
        return states[torch.arange(len(states), device=states.device)[:, None], self.asked - self.start]

    def trim(self, states: Tensor) -> Tensor:
        return states

    def attend(self, layer: "PeagleLayer") -> Attend:
        """A layer's attention of all slots, in the last layer of the proposing ones, to the cache and all slots."""
        keys = torch.arange(self.mask.shape[1], device=self.mask.device)
        queries = self.asked[:, :, None] if layer.is_last else keys[None, self.start :, None]
        visible = self.mask[:, None] & (keys <= queries)
        if layer.window is not None:
            places = self.places.gather(1, queries.flatten(1).expand(len(self.mask), -1))
            near = self.places[:, None] > places[:, :, None] - layer.window
            visible &= near | (keys >= self.anchors[:, :, None])
        # A padded position attends to itself: a softmax over no key would be NaN.
        visible |= keys == queries

        def attend(query: Tensor, key: Tensor, value: Tensor, kept: Kept = None) -> Tensor:
            key, value = self.cache.update(key, value, layer.layer_idx)
            is_grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None], enable_gqa=is_grouped)

        return attend

    def finish(self) -> None:
        """Remove the rollout's keys and values from the cache."""
        if self.num_rollout:
            self.cache.crop(-self.num_rollout)


PassSlots = PackedSlots | DraftSlots
