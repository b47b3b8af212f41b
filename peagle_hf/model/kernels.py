"""A Triton kernel where compiled PyTorch is measurably slower (see docs/performance.md); imported on a GPU only."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def row_statistics(logits_nV: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp (float32 [n]) and the first argmax (int64 [n]) of each row, reading the logits once.

    Args:
        logits_nV: bfloat16, float16 or float32, rows contiguous.
    """
    rows, size = logits_nV.shape
    norm = torch.empty(rows, dtype=torch.float32, device=logits_nV.device)
    top = torch.empty(rows, dtype=torch.int64, device=logits_nV.device)
    if rows:
        _row_statistics[(rows,)](logits_nV, norm, top, logits_nV.stride(0), size, BLOCK=4096, num_warps=8)
    return norm, top


@triton.jit
def _row_statistics(logits, norm, top, row_stride, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    # Each lane keeps the greatest logit that it has met, its place, and its share of the sum relative to that logit.
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        column = start + lane
        value = tl.load(logits + row * row_stride + column, mask=column < size, other=float("-inf")).to(tl.float32)
        place = tl.where(value > greatest, column, place)
        new_greatest = tl.maximum(greatest, value)
        reference = tl.where(new_greatest == float("-inf"), 0.0, new_greatest)
        total = total * tl.exp(greatest - reference) + tl.exp(value - reference)
        greatest = new_greatest
    maximum = tl.max(greatest, axis=0)
    tl.store(norm + row, maximum + tl.log(tl.sum(total * tl.exp(greatest - maximum), axis=0)))
    tl.store(top + row, tl.min(tl.where(greatest == maximum, place, size), axis=0).to(tl.int64))
