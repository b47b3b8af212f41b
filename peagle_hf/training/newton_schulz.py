"""Orthogonalises stacks of matrices for Muon by Newton-Schulz on Gram matrices, with symmetric products halved.

The polynomial is PyTorch's (`torch.optim.Muon`): five times x -> a x + b x^3 + c x^5 of each singular value x, after
division by the matrix's Frobenius norm. For X of m x n with m <= n, that is Q X, where Q and the Gram matrix R = X X^T
are m x m and symmetric, and commute: P = a + b R + c R^2, Q <- Q P, R <- R P^2 (Gram Newton-Schulz, Dao-AILab 2026).
Rounding gives R negative eigenvalues, which the polynomial enlarges; so after `RESTART` steps X <- Q X and its Gram
matrix begin anew.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

STEPS = ((3.4445, -4.7750, 2.0315),) * 5
"""a, b and c of each step."""
RESTART = 2
"""The number of steps after which the Gram matrix is computed anew."""
SCALE = 8.0
"""The Frobenius norm that a matrix is given first, so that float16 holds the small entries of its Gram matrix."""
EPSILON = 1e-7
"""The least Frobenius norm that a matrix is divided by, as of `torch.optim.Muon`."""
PANELS = 4
"""How many panels of rows a symmetric product is computed in. Each panel begins at its first row's diagonal element."""
MIN_PANEL = 512
"""The fewest rows of a panel: smaller products start more kernels than they save work."""


def working_dtype(device: torch.device) -> torch.dtype:
    """float16 on accelerators, whose rounding is an eighth of bfloat16's at the same speed; float32 on CPUs."""
    return torch.float32 if device.type == "cpu" else torch.float16


def orthogonalize(
    stack: Tensor,
    dtype: torch.dtype,
    steps: Sequence[tuple[float, float, float]] = STEPS,
    restart: int = RESTART,
    panels: int = PANELS,
) -> Tensor:
    """The matrices of a stack with their singular values moved towards 1, each by the same polynomial.

    Args:
        stack: [B, m, n], of a floating dtype.
        dtype: for the work and the result; matrix products accumulate in float32 at least.
        restart: 0 for never.

    Returns:
        [B, m, n], of `dtype`.
    """
    norms = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True, dtype=torch.promote_types(dtype, torch.float32))
    scaled = torch.empty_like(stack, dtype=dtype)
    torch.mul(stack, SCALE / norms.clamp(min=EPSILON), out=scaled)
    is_wide = stack.shape[1] <= stack.shape[2]
    scale, factor = SCALE, None
    gram = _gram(scaled, is_wide, panels)
    for number, (a, b, c) in enumerate(steps):
        if number == restart and factor is not None:
            scaled = _times(factor.mul_(1 / scale), scaled, is_wide)
            scale, factor = 1.0, None
            gram = _gram(scaled, is_wide, panels)
        polynomial = symmetric_product(gram, gram, panels, c / scale**4, gram, b / scale**2)
        if number + 1 not in (restart, len(steps)):
            for _ in range(2):
                gram = symmetric_product(gram, polynomial, panels, 1.0, gram, a)
        if factor is None:
            factor = polynomial
            factor.diagonal(dim1=1, dim2=2).add_(a)
        else:
            factor = symmetric_product(factor, polynomial, panels, 1.0, factor, a)
    assert factor is not None
    return _times(factor.mul_(1 / scale), scaled, is_wide)


def _gram(stack: Tensor, is_wide: bool, panels: int) -> Tensor:
    return symmetric_product(stack, stack.mT, panels) if is_wide else symmetric_product(stack.mT, stack, panels)


def _times(factor: Tensor, stack: Tensor, is_wide: bool) -> Tensor:
    return torch.bmm(factor, stack) if is_wide else torch.bmm(stack, factor)


def symmetric_product(
    left: Tensor,
    right: Tensor,
    panels: int = PANELS,
    alpha: float = 1.0,
    added: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """alpha left @ right + beta added, of [B, m, n], [B, n, m] and [B, m, m], where it and `added` are symmetric.

    Each panel of rows is computed from the diagonal on, and mirrored.
    """
    size = left.shape[1]
    product = left.new_empty(left.shape[0], size, size)
    panels = max(1, min(panels, size // MIN_PANEL))
    edges = [size * number // panels for number in range(panels + 1)]
    for start, end in pairwise(edges):
        panel = product[:, start:end, start:]
        before = panel if added is None else added[:, start:end, start:]
        torch.baddbmm(before, left[:, start:end], right[:, :, start:], alpha=alpha, beta=beta, out=panel)
        product[:, end:, start:end].copy_(panel[:, :, end - start :].mT)
    return product


def multiplications(rows: int, columns: int) -> int:
    """Multiplications of `orthogonalize` for one matrix, with symmetric products counted as half."""
    small, large = sorted((rows, columns))
    square, between = small**3, small**2 * large
    num_gram_products = 4 * len(STEPS) - 3 - 3 * (RESTART > 0)
    return num_gram_products * square // 2 + (1 + (RESTART > 0)) * (between + between // 2)


def orthogonalize_elements(num_matrices: int, rows: int, columns: int) -> int:
    """The most elements that `orthogonalize` holds at once: the stack, two scaled ones, the result; four m x m ones."""
    return num_matrices * (3 * rows * columns + 4 * min(rows, columns) ** 2)
