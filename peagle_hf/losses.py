"""The distillation loss straight from hidden states: logits live one chunk at a time.

Shape letters: N learnt rows, U different target positions (U <= N), H hidden size, V draft vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 1 << 22
"""At most so many logits (rows x vocabulary) are alive at once, times a small constant."""


def kl_divergence(
    student_NH: Tensor,
    head_VH: Tensor,
    teacher_UH: Tensor,
    teacher_logits: Callable[[Tensor], Tensor],
    target_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Sum over rows of \(\mathrm{KL}(p \| q)\), p the verifier's and q the drafter's distribution.

    Softmaxes are float32 whatever the inputs are. With gradients on, the gradients are formed in the same pass and no
    logits are kept for the backward pass.

    Args:
        student_NH: the drafter's normed hidden states of the learnt rows, sorted by target position.
        head_VH: the drafter's head.
        teacher_UH: what `teacher_logits` turns into the verifier's logits, one row a target position.
        teacher_logits: [u, H] -> [u, V].
        target_N: int64, the row of `teacher_UH` that each row learns from, ascending.

    Returns:
        the sum (float32 scalar), the drafter's argmax [N] and the verifier's [U], int64 draft token numbers.
    """
    return _KlDivergence.apply(student_NH, head_VH, teacher_UH, teacher_logits, target_N)


def chunks(target_N: Tensor, num_targets: int, vocab_size: int) -> Iterator[tuple[slice, slice]]:
    """Cut the target positions so that a chunk's rows x vocabulary stays near `CHUNK_ELEMENTS`: (targets, rows)."""
    rows = target_N.numel()
    targets_a_chunk = max(1, int(num_targets * CHUNK_ELEMENTS / max(1, rows * vocab_size)))
    bounds = [*range(0, num_targets, targets_a_chunk), num_targets]
    row_bounds = torch.searchsorted(target_N, torch.tensor(bounds, device=target_N.device)).tolist()
    for index in range(len(bounds) - 1):
        yield slice(bounds[index], bounds[index + 1]), slice(row_bounds[index], row_bounds[index + 1])


class _KlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, student_NH, head_VH, teacher_UH, teacher_logits, target_N
    ):
        student_needed, head_needed = ctx.needs_input_grad[:2]
        loss = student_NH.new_zeros((), dtype=torch.float32)
        student_top_N = torch.empty_like(target_N)
        teacher_top_U = target_N.new_empty(teacher_UH.shape[0])
        student_grad = torch.empty_like(student_NH) if student_needed else None
        head_grad = torch.zeros_like(head_VH, dtype=torch.float32) if head_needed else None
        head = head_VH.to(student_NH.dtype)
        for targets, rows in chunks(target_N, teacher_UH.shape[0], head.shape[0]):
            target_n = target_N[rows] - targets.start
            log_p_uV = F.log_softmax(teacher_logits(teacher_UH[targets]).float(), dim=-1)
            log_q_nV = F.log_softmax(F.linear(student_NH[rows], head).float(), dim=-1)
            student_top_N[rows] = log_q_nV.argmax(-1)
            teacher_top_U[targets] = log_p_uV.argmax(-1)
            p_nV = log_p_uV.exp()[target_n]
            # Not the difference of entropy and cross-entropy, which cancel where the two distributions are close.
            loss += (p_nV * (log_p_uV[target_n] - log_q_nV)).sum()
            if student_needed or head_needed:
                logits_grad = (log_q_nV.exp_() - p_nV).to(head.dtype)
                if student_grad is not None:
                    student_grad[rows] = logits_grad @ head
                if head_grad is not None:
                    head_grad += (logits_grad.T @ student_NH[rows]).float()
        ctx.save_for_backward(student_grad, None if head_grad is None else head_grad.to(head_VH.dtype))
        ctx.mark_non_differentiable(student_top_N, teacher_top_U)
        return loss, student_top_N, teacher_top_U

    @staticmethod
    def backward(ctx, loss_grad, *_):  # type: ignore[no-untyped-def]
        student_grad, head_grad = ctx.saved_tensors
        return (
            None if student_grad is None else student_grad * loss_grad.to(student_grad.dtype),
            None if head_grad is None else head_grad * loss_grad.to(head_grad.dtype),
            None,
            None,
            None,
        )
