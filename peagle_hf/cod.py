"""COD (conditional drop) sampling, the layout of rows that it gives, and which row may attend to which.

Shifted positions: of a document's tokens x[0..T] and verifier states g, y, position i holds the token x[i+1] and the
states g[i], and predicts x[i+2] from the target distribution at y[i+1]. A *row* is a pair (anchor a, depth d): at depth
0 it has the real token and states of position a; at depth d >= 1 it has the mask token and `mask_hidden` and predicts
what position a + d predicts, d tokens further on. The rows of one anchor are its *rollout*: what the drafter proposes
in one forward pass after the verifier has accepted everything up to the anchor.

Shape letters: T positions of a document, L positions of a packed row, R rows, Q query rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def sample_rows(
    learnt_T: Tensor,
    num_depths: int,
    ratio: float,
    ratio_min: float,
    generator: torch.Generator,
    max_anchors: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample the rows of one document (P-EAGLE, arXiv 2602.01469, section on conditional drop).

    Depth 0 keeps every position. Depth d >= 1 keeps a random `int(max(0, |S| - d) * max(ratio^d, ratio_min))` of the
    positions that depth d - 1 leaves reachable, S being the learnt positions; depths therefore nest, and every row at
    depth d has the rows of depths 0 .. d-1 at the same anchor.

    Args:
        learnt_T: bool [T], the positions whose prediction is learnt.
        num_depths: K.
        ratio: r in (0, 1].
        ratio_min: r_min in [0, 1].
        generator: the only source of randomness.
        max_anchors: S is first cut to so many random positions; None keeps all.

    Returns:
        anchors and depths, int64 [R]: the T rows of depth 0 in order, then the rollouts sorted by anchor and depth.

    Examples:
        >>> learnt = torch.tensor([False, True, True, True, True])
        >>> anchors, depths = sample_rows(learnt, 3, ratio=1.0, ratio_min=0.2, generator=torch.Generator())
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


def _draw(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different elements of `pool`, or all of it, in ascending order."""
    if pool.numel() <= count:
        return pool
    return pool[torch.randperm(pool.numel(), generator=generator)[:count]].sort().values


def visible(
    query: tuple[Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor, Tensor], window: int | None = None
) -> Tensor:
    """Whether a query row may attend to a key row; each is (anchor, depth, document), broadcast against each other.

    A row sees the depth-0 rows of its document up to its own anchor (within `window` positions of its own place, if
    given) and the rows of its own rollout up to its own depth. Padding belongs to document -1 and sees nothing.

    Worked example, one document of four positions, rollout rows (1,1), (1,2), (2,1); x = visible:

        query \\ key  0,0  1,0  2,0  3,0  1,1  1,2  2,1
        1,0            x    x
        1,1            x    x              x
        1,2            x    x              x    x
        2,1            x    x    x                   x
    """
    (anchor_q, depth_q, document_q), (anchor_k, depth_k, document_k) = query, key
    context = (depth_k == 0) & (anchor_k <= anchor_q)
    if window is not None:
        context = context & (anchor_k > anchor_q + depth_q - window)
    rollout = (anchor_k == anchor_q) & (depth_k <= depth_q)
    return (document_q == document_k) & (document_q >= 0) & (context | rollout)


def mask_function(
    query: tuple[Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor, Tensor], window: int | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`visible` in the form that FlexAttention wants: (batch, head, query index, key index) -> bool."""

    def mask_mod(_batch: Tensor, _head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return visible(
            tuple(part[query_index] for part in query),  # type: ignore[arg-type]
            tuple(part[key_index] for part in key),  # type: ignore[arg-type]
            window,
        )

    return mask_mod


def dense_mask(
    query: tuple[Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor, Tensor], window: int | None = None
) -> Tensor:
    """The whole mask, bool [Q, R]: the reference that every faster form is tested against."""
    return visible(
        tuple(part[:, None] for part in query),  # type: ignore[arg-type]
        tuple(part[None, :] for part in key),  # type: ignore[arg-type]
        window,
    )
