"""Distillation losses straight from hidden states: logits live one chunk at a time.

Shape letters: N trained slots, U different target positions (U <= N), H hidden size, V draft vocabulary; n and u are
the slots and target positions of one chunk. p is the verifier's distribution, q the drafter's.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..cpu import linear
from ..errors import PeagleError
from ..model.compile import fuse_on_gpu

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 2048 * 151936}
"""Upper limit on the drafter's logits (slots x vocabulary) that are alive at once, by device type.

On a GPU 2,048 slots of Qwen3's vocabulary: the product that gives the gradient then has 256 tiles of 128 x 256, two
rounds over an H100's 132 multiprocessors.
"""

SCALED_SLOTS = 4096
"""Slots of a 16-bit gradient that are scaled in float32 at a time."""

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log p, log q), each [n, V] -> (the divergence of each slot [n], its gradient to q's logits [n, V])."""

SlotWeights = Callable[[Tensor], Tensor]
"""The drafter's probability of the verifier's most likely token, [N] -> how much each slot counts in the loss, [N]."""


def _kl_div(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    # Subtracting the entropy from the cross-entropy would lose precision where the two distributions are close.
    return (p * (log_p - log_q)).sum(-1), log_q.exp() - p


def _rkl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q, gap = log_q.exp(), log_q - log_p
    loss = (q * gap).sum(-1)
    return loss, q * (gap - loss[:, None])


def _jsd(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    loss = (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2
    return loss, _through_softmax(q, (log_q - log_m) / 2)


def _ce(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    top = log_p.argmax(-1, keepdim=True)
    is_top = torch.arange(log_p.shape[-1], device=log_p.device) == top
    q = log_q.exp()
    return -log_q.gather(-1, top).squeeze(-1), torch.where(is_top, q - 1, q)


def _tv(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    return 1 - torch.minimum(p, q).sum(-1), _through_softmax(q, -(q < p).to(q.dtype))


def _nla(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    distance, grad = _tv(log_p, log_q)
    acceptance = (1 - distance).clamp_min(1e-5)
    return -acceptance.log(), grad / acceptance[:, None]


def _lk_hybrid(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    (kl, kl_grad), (distance, distance_grad) = _kl_div(log_p, log_q), _tv(log_p, log_q)
    weight = torch.exp(-3 * (1 - distance))
    return weight * kl + (1 - weight) * distance, (weight[:, None] * kl_grad + (1 - weight[:, None]) * distance_grad)


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """The gradient to the logits from the one to q."""
    return q * (slope - (q * slope).sum(-1, keepdim=True))


DIVERGENCES: dict[str, Divergence] = {
    "kl_div": _kl_div,
    "rkl": _rkl,
    "jsd": _jsd,
    "ce": _ce,
    "tv": _tv,
    "nla": _nla,
    "lk_hybrid": _lk_hybrid,
}
_BUILT_IN = frozenset(DIVERGENCES)


def register_loss(name: str, divergence: Divergence) -> None:
    """Add a loss that `loss_fn` (`--loss-fn`) then finds by its name, alone or weighted with others.

    Call it before the training arguments are made: they check the name. Registering the same name again replaces the
    earlier divergence, except for the losses of this library.

    Args:
        name: letters, digits and underscores, not beginning with a digit.
        divergence: called with the logarithms of the verifier's and the drafter's probabilities, both float32 (or
            float64) of shape [n, V] for n slots and a draft vocabulary of V tokens. Returns the divergence of each
            slot, [n], and its gradient with respect to the drafter's logits, [n, V]. The gradient is asked for
            because it is formed chunk by chunk, without a graph of autograd. On a GPU the function is compiled by
            torch.compile, so it should consist of operations on tensors only.

    Raises:
        PeagleError: the name has other characters, or it is one of this library's own losses.
    """
    if not name.isidentifier():
        raise PeagleError(f"{name!r} can't name a loss. Use letters, digits and underscores, such as 'my_loss'.")
    if name in _BUILT_IN:
        raise PeagleError(f"The loss {name!r} comes with peagle_hf and can't be replaced. Register another name.")
    DIVERGENCES[name] = divergence


def parse_loss(loss_fn: str) -> dict[str, float]:
    """A loss's name, or JSON that weights several, as {name: weight}.

    `kl_div`: `KL(p ‖ q)`. `rkl`: `KL(q ‖ p)`. `jsd`: Jensen-Shannon. `ce`: cross-entropy with the verifier's most
    likely token. `tv`: total variation, `1 - alpha` with the chance of acceptance `alpha = Σ_v min(p_v, q_v)`. `nla`:
    `-log alpha`. `lk_hybrid`: `w KL + (1 - w) TV` with `w = exp(-3 alpha)`, through which no gradient flows (the last
    two: LK losses, arXiv 2602.23881).

    Raises:
        PeagleError: the text is neither of these, a weight is below 0, or no weight is above 0.
    """
    try:
        weights = {loss_fn: 1.0} if loss_fn in DIVERGENCES else json.loads(loss_fn)
        is_known = isinstance(weights, dict) and weights and weights.keys() <= DIVERGENCES.keys()
        found = {name: float(weight) for name, weight in weights.items()} if is_known else {}
    except (TypeError, ValueError):
        found = {}
    if not found:
        raise PeagleError(
            f"The loss {loss_fn!r} is not known. Use one of {', '.join(DIVERGENCES)}, or weights of several as JSON, "
            'such as {"kl_div": 0.5, "tv": 0.5}. A loss of your own is added with peagle_hf.register_loss.'
        )
    if not all(0 <= weight < math.inf for weight in found.values()) or not any(found.values()):
        raise PeagleError(f"The weights of the loss {loss_fn} must be 0 or above, and one of them above.")
    return found


def distillation_loss(
    student_NH: Tensor,
    head_VH: Tensor,
    teacher_UH: Tensor,
    teacher_logits: Callable[[Tensor], Tensor],
    target_N: Tensor,
    weights: Mapping[str, float],
    slot_weights: SlotWeights | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over slots of a weighted sum of divergences between the verifier's and the drafter's distributions.

    Softmaxes are float32 at least, whatever the inputs are. With gradients on, the gradients are formed in the same
    pass and no logits are kept for the backward pass. Weights of slots are constants to the gradient. The hidden
    states' gradient is multiplied by them after the pass. The gradient of a trained head is a sum over slots, which
    needs the weights before: if they depend on probabilities, a first pass computes these alone.

    Args:
        student_NH: the drafter's normed hidden states of the trained slots, sorted by target position.
        head_VH: the drafter's head.
        teacher_UH: what `teacher_logits` turns into the verifier's logits, one row for each target position.
        teacher_logits: [u, H] -> [u, V].
        target_N: int64, the row of `teacher_UH` that each slot learns from, ascending.
        weights: of `DIVERGENCES`, by name (see `parse_loss`).
        slot_weights: how much each slot counts: [N], or what gives it for the drafter's probabilities [N] of the
            verifier's most likely token. Default: all alike.

    Returns:
        the sum (float32 scalar at least), the drafter's argmax [N] and the verifier's [U], int64 draft token numbers.
    """
    # An autograd function can tell whether the head is trained, but not whether gradients are switched off.
    head = head_VH if torch.is_grad_enabled() else head_VH.detach()
    return _DistillationLoss.apply(student_NH, head, teacher_UH, teacher_logits, target_N, dict(weights), slot_weights)


def chunks(target_N: Tensor, num_targets: int, vocab_size: int) -> Iterator[tuple[slice, slice]]:
    """Cut the target positions so that a chunk has at most `CHUNK_ELEMENTS` logits if it can: (targets, slots)."""
    max_slots = CHUNK_ELEMENTS[target_N.device.type] // vocab_size
    boundaries = torch.arange(num_targets + 1, device=target_N.device)
    slot_of_target = torch.searchsorted(target_N, boundaries).tolist()
    start = 0
    while start < num_targets:
        stop = max(start + 1, bisect_right(slot_of_target, slot_of_target[start] + max_slots) - 1)
        yield slice(start, stop), slice(slot_of_target[start], slot_of_target[stop])
        start = stop


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, student_NH, head_VH, teacher_UH, teacher_logits, target_N, weights, slot_weights
    ):
        student_needed, head_needed = ctx.needs_input_grad[:2]
        precision = torch.promote_types(student_NH.dtype, torch.float32)
        loss_N, chance_N = student_NH.new_empty(2, student_NH.shape[0], dtype=precision)
        student_top_N = torch.empty_like(target_N)
        teacher_top_U = target_N.new_empty(teacher_UH.shape[0])
        student_grad = torch.empty_like(student_NH) if student_needed else None
        head_grad = torch.zeros_like(head_VH, dtype=precision) if head_needed else None
        head = head_VH.to(student_NH.dtype)
        slot_weight_N = slot_weights if isinstance(slot_weights, Tensor) else None
        if head_needed and slot_weights is not None and slot_weight_N is None:
            slot_weight_N = slot_weights(verifier_token_chances(student_NH, head, teacher_UH, teacher_logits, target_N))
        weighted_NH = student_NH
        if head_needed and slot_weight_N is not None:
            weighted_NH = (student_NH * slot_weight_N[:, None]).to(student_NH.dtype)
        for targets, slots in chunks(target_N, teacher_UH.shape[0], head.shape[0]):
            teacher_uV, student_nV = teacher_logits(teacher_UH[targets]), linear(student_NH[slots], head)
            target_n = target_N[slots] - targets.start
            teacher_norm_u, teacher_top_U[targets] = _normalizers(teacher_uV)
            student_norm_n, student_top_N[slots] = _normalizers(student_nV)
            chance_N[slots] = _chance_of(teacher_top_U[targets][target_n], student_nV, student_norm_n)
            loss_N[slots], logits_grad_nV = _divergence(
                student_nV, student_norm_n, teacher_uV, teacher_norm_u, target_n, weights
            )
            if student_grad is not None:
                student_grad[slots] = linear(logits_grad_nV, head.T)
            if head_grad is not None:
                head_grad += linear(logits_grad_nV.T, weighted_NH[slots].T).to(precision)
        if slot_weights is not None and slot_weight_N is None:
            slot_weight_N = slot_weights(chance_N)
        if slot_weight_N is not None:
            loss_N = loss_N * slot_weight_N
        ctx.save_for_backward(student_grad, None if head_grad is None else head_grad.to(head_VH.dtype), slot_weight_N)
        ctx.mark_non_differentiable(student_top_N, teacher_top_U)
        return loss_N.sum(), student_top_N, teacher_top_U

    @staticmethod
    def backward(ctx, loss_grad, *_):  # type: ignore[no-untyped-def]
        student_grad, head_grad, slot_weight_N = ctx.saved_tensors
        slot_scale = loss_grad if slot_weight_N is None else loss_grad * slot_weight_N[:, None]
        return (
            None if student_grad is None else _scaled(student_grad, slot_scale),
            None if head_grad is None else _scaled(head_grad, loss_grad),
            *[None] * 5,
        )


def _scaled(grad_NH: Tensor, scale: Tensor) -> Tensor:
    """A gradient times a scale that isn't rounded to the gradient's dtype: in bfloat16 1/N is off by up to 0.4 %.

    Args:
        scale: a scalar, or [N, 1].
    """
    if grad_NH.dtype == scale.dtype:
        return grad_NH * scale
    scaled_NH = torch.empty_like(grad_NH)
    parts = (tensor.split(SCALED_SLOTS) for tensor in (grad_NH, scale.expand(len(grad_NH), 1), scaled_NH))
    for part, factor, scaled in zip(*parts, strict=True):
        scaled.copy_(part.to(factor.dtype) * factor)
    return scaled_NH


@torch.no_grad()
def verifier_token_chances(
    student_NH: Tensor,
    head_VH: Tensor,
    teacher_UH: Tensor,
    teacher_logits: Callable[[Tensor], Tensor],
    target_N: Tensor,
) -> Tensor:
    """The drafter's probability of the verifier's most likely token, [N]; arguments as of `distillation_loss`."""
    chance_N = student_NH.new_empty(student_NH.shape[0], dtype=torch.promote_types(student_NH.dtype, torch.float32))
    for targets, slots in chunks(target_N, teacher_UH.shape[0], head_VH.shape[0]):
        _, teacher_top_u = _normalizers(teacher_logits(teacher_UH[targets]))
        student_nV = linear(student_NH[slots], head_VH)
        student_norm_n, _ = _normalizers(student_nV)
        chance_N[slots] = _chance_of(teacher_top_u[target_N[slots] - targets.start], student_nV, student_norm_n)
    return chance_N


def _chance_of(token_n: Tensor, logits_nV: Tensor, norm_n: Tensor) -> Tensor:
    """The probability [n] of one token for each slot."""
    return (logits_nV.gather(-1, token_n[:, None]).squeeze(-1).to(norm_n.dtype) - norm_n).exp()


def _normalizers(logits_nV: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the argmax of each slot."""
    if logits_nV.is_cuda and logits_nV.dtype != torch.float64:
        from ..model.kernels import row_statistics

        return row_statistics(logits_nV)
    return logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)).logsumexp(-1), logits_nV.argmax(-1)


@fuse_on_gpu(dynamic_dim=0)
def _divergence(
    student_nV: Tensor,
    student_norm_n: Tensor,
    teacher_uV: Tensor,
    teacher_norm_u: Tensor,
    target_n: Tensor,
    weights: dict[str, float],
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the divergences of each slot [n], and its gradient to the student's logits."""
    log_q = student_nV.to(student_norm_n.dtype) - student_norm_n[:, None]
    log_p = teacher_uV[target_n].to(teacher_norm_u.dtype) - teacher_norm_u[target_n][:, None]
    parts = [(weight, *DIVERGENCES[name](log_p, log_q)) for name, weight in weights.items()]
    loss_n = sum(weight * losses for weight, losses, _ in parts)
    grad = sum(weight * grads for weight, _, grads in parts)
    return loss_n, grad.to(student_nV.dtype)  # type: ignore[return-value, union-attr]


def survival_weights(
    chance_N: Tensor, anchors_N: Tensor, depths_N: Tensor, num_positions: int, num_depths: int, alpha: float
) -> Tensor:
    """Weight of each slot in the loss: what it adds to the expected accepted length of its rollout (D-PACE).

    With `q_i` the drafter's probability, at depth i, of the token of the draft vocabulary that is the verifier's most
    likely one, the slot at depth j weighs
    `w_j = Σ_{m≥j} Π_{i≤m} ((1 - alpha) q_i + alpha)`, over the trained slots of its rollout that COD
    kept: deep slots count where the drafter is likely to get there, and shallow ones as much as depends on them (after
    D-PACE's weights of the positions of a block). A rollout is never cut, so no weight depends on how a batch is cut.

    Args:
        chance_N: q of the trained slots.
        anchors_N: int64, below `num_positions`.
        depths_N: int64, below `num_depths`; a rollout has each at most once.
        alpha: in [0, 1]; 0 takes q as it is, 1 makes every chance 1.

    Returns:
        [N], in the dtype of `chance_N`.
    """
    survival = chance_N.new_ones(num_positions, num_depths)
    kept = torch.zeros_like(survival)
    survival[anchors_N, depths_N] = (1 - alpha) * chance_N + alpha
    kept[anchors_N, depths_N] = 1
    reached = survival.cumprod(1) * kept
    return reached.flip(1).cumsum(1).flip(1)[anchors_N, depths_N]
