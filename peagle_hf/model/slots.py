"""COD (conditional drop) sampling, the order of the slots that it gives, and which slot may attend to which.

Positions are shifted. Of a sample's tokens x[0..T] and the verifier's states g (auxiliary) and y (last), position i
holds the token x[i+1] and the states g[i], and predicts x[i+2] from the target distribution at y[i+1].

A *slot* is a pair of an anchor a and a depth d. At depth 0 it holds the real token and states of position a. At depth
d >= 1 it holds the mask token and `mask_hidden`, and predicts what position a + d predicts, d tokens further on. The
slots of one anchor are its *rollout*: what the drafter proposes in one forward pass after the verifier has accepted
everything up to the anchor.

Shape letters: T positions of a sample, L positions of a packed sequence, R slots, Q query slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def trained_positions(loss_mask: Tensor) -> Tensor:
    """Which of a sample's positions are trained on, bool [T]: those that see and predict a token of the reply.

    Args:
        loss_mask: bool [T+2], of its tokens.
    """
    return loss_mask[1:-1] & loss_mask[2:]


def target_tokens(loss_mask: Tensor) -> Tensor:
    """The tokens whose last states are the targets of trained positions, bool, as many as in `loss_mask`."""
    return torch.nn.functional.pad(trained_positions(loss_mask), (1, 1))


def sample_slots(
    learnt_T: Tensor,
    num_depths: int,
    ratio: float,
    ratio_min: float,
    generator: torch.Generator,
    max_anchors: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the slots of one sample (P-EAGLE, arXiv 2602.01469, section on conditional drop).

    Depth 0 keeps every position. Depth d >= 1 keeps a random `int(max(0, |S| - d) * max(ratio^d, ratio_min))` of the
    positions that depth d - 1 leaves reachable, S being the trained positions; depths therefore nest, and every slot at
    depth d has the slots of depths 0 .. d-1 at the same anchor.

    Args:
        learnt_T: bool [T], the positions that are trained on.
        num_depths: K.
        ratio: r in (0, 1].
        ratio_min: r_min in [0, 1].
        generator: the only source of randomness.
        max_anchors: upper limit on S, which is first cut to random positions; None keeps all.

    Returns:
        anchors and depths, int64 [R]: the T slots of depth 0 in order, then the rollouts sorted by anchor and depth.

    Examples:
        >>> learnt = torch.tensor([False, True, True, True, True])
        >>> anchors, depths = sample_slots(learnt, 3, ratio=1.0, ratio_min=0.2, generator=torch.Generator())
        >>> list(zip(anchors.tolist(), depths.tolist()))[:5]
        [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]
        >>> list(zip(anchors.tolist(), depths.tolist()))[5:]
        [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
    """
    length = learnt_T.numel()
    seeds = learnt_T.nonzero().flatten()
    if max_anchors is not None and seeds.numel() > max_anchors:
        seeds = _draw(seeds, max_anchors, generator)
    reachable = torch.cat([learnt_T, learnt_T.new_zeros(1)])
    anchors, depths = [], []
    pool = seeds
    for depth in range(1, num_depths):
        count = int(max(0, seeds.numel() - depth) * max(ratio**depth, ratio_min))
        if count <= 0:
            break
        targets = _draw(pool, count, generator)
        started = targets[targets >= depth]
        anchors.append(started - depth)
        depths.append(torch.full_like(started, depth))
        pool = (targets + 1)[reachable[targets + 1]]
    rollout_anchors = torch.cat(anchors) if anchors else seeds.new_empty(0)
    rollout_depths = torch.cat(depths) if depths else seeds.new_empty(0)
    order = torch.argsort(rollout_anchors * num_depths + rollout_depths)
    positions = torch.arange(length)
    return torch.cat([positions, rollout_anchors[order]]), torch.cat(
        [torch.zeros_like(positions), rollout_depths[order]]
    )


def every_slot(learnt_T: Tensor, num_depths: int) -> tuple[Tensor, Tensor]:
    """The slots of one sample with nothing dropped: the rollouts of all trained positions, up to where training ends.

    Args:
        learnt_T: bool [T].
        num_depths: K.

    Returns:
        anchors and depths as `sample_slots`.

    Examples:
        >>> anchors, depths = every_slot(torch.tensor([False, True, True, True]), 3)
        >>> list(zip(anchors.tolist(), depths.tolist()))[4:]
        [(1, 1), (1, 2), (2, 1)]
    """
    positions = torch.arange(learnt_T.numel())
    seeds = learnt_T.nonzero().flatten()
    padded = torch.cat([learnt_T, learnt_T.new_zeros(num_depths)])
    is_inside = padded[seeds[:, None] + torch.arange(1, num_depths)].cumprod(dim=1)
    seed, depth = is_inside.nonzero(as_tuple=True)
    return torch.cat([positions, seeds[seed]]), torch.cat([torch.zeros_like(positions), depth + 1])


def _draw(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different elements of `pool`, or all of it, in ascending order."""
    if pool.numel() <= count:
        return pool
    return pool[torch.randperm(pool.numel(), generator=generator)[:count]].sort().values


class Spans(NamedTuple):
    """The slots that each of Q slots may attend to, as two half-open ranges of slot numbers, int32 [Q] each.

    A slot sees its context, the depth-0 slots of its sample up to its own anchor (within a window of its own place, if
    there is one), and the slots of its own rollout up to its own depth. As depth-0 slots come first and rollouts are
    sorted, both are ranges.

    Worked example, one sample of four positions, rollout slots (1,1), (1,2), (2,1); x = may be attended to:

        slot number    0    1    2    3    4    5    6
        query \\ key  0,0  1,0  2,0  3,0  1,1  1,2  2,1    context  own
        1,0            x    x                              0:2      4:4
        1,1            x    x              x               0:2      4:5
        1,2            x    x              x    x          0:2      4:6
        2,1            x    x    x                   x     0:3      6:7
    """

    context_start: Tensor
    context_stop: Tensor
    own_start: Tensor
    own_stop: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Spans":
        return Spans(*map(function, self))

    def sees(self, keys: Tensor) -> Tensor:
        """Whether each slot may attend to the slots with these numbers, which broadcast against the spans."""
        context = (self.context_start <= keys) & (keys < self.context_stop)
        return context | ((self.own_start <= keys) & (keys < self.own_stop))


def find_spans(anchors_R: Tensor, depths_R: Tensor, document_ids_L: Tensor, window: int | None = None) -> Spans:
    """Which slots each slot of a packed sequence may attend to.

    Args:
        anchors_R: slots in the order of `CODDataCollator`: the positions, then all rollouts by anchor and depth.
        depths_R: int64.
        document_ids_L: -1 for padding, which sees nothing and is seen by nothing.
        window: a slot sees positions after its own place (anchor + depth) - `window` only, and always its own anchor.
    """
    num_positions = document_ids_L.numel()
    positions = torch.arange(num_positions, device=document_ids_L.device)
    is_first = torch.ones_like(document_ids_L, dtype=torch.bool)
    is_first[1:] = document_ids_L[1:] != document_ids_L[:-1]
    context_start = torch.where(is_first, positions, 0).cummax(0).values[anchors_R]
    if window is not None:
        context_start = torch.maximum(context_start, anchors_R + depths_R - window + 1).minimum(anchors_R)
    own_start = num_positions + torch.searchsorted(anchors_R[num_positions:].contiguous(), anchors_R)
    spans = Spans(context_start, anchors_R + 1, own_start, own_start + depths_R)
    is_real = document_ids_L[anchors_R] >= 0
    return spans.map(lambda bound: torch.where(is_real, bound, 0).int())
