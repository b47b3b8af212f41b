"""Two ways to attend within `slots.Spans`: document by document with SDPA (any device), or FlexAttention (GPU).

For FlexAttention the block mask is written from the least and greatest bounds of each block of slots, and the large
rectangles that need no mask (many slots that all see a long stretch of their document) go to a faster kernel.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .compile import fuse_on_gpu
from .slots import Spans

Kept = dict[str, Tensor] | None
"""What attention keeps for a second call with the same arguments (activation checkpointing), or None."""

Attend = Callable[[Tensor, Tensor, Tensor, Kept], Tensor]
"""(query [1, heads, Q, D], key and value [1, key heads, R, D], what is kept) -> [1, heads, Q, D]."""

BLOCK = 128
"""Rows in a block of the block mask; `block_attention` wants whole blocks."""
STRIPE = 2048
"""Query slots of a rectangle."""
KEY_UNIT = 512
"""The keys of a rectangle are a multiple of this, so that the kernel meets few shapes."""


# The rectangles depend on the documents, so the compiler would stop here with a warning.
@torch.compiler.disable
def document_attention(spans: Spans, query_documents: Tensor, key_documents: Tensor, max_length: int) -> Attend:
    """Attention as two dense SDPAs a document, so that the cost grows with a document's slots, not with the batch's.

    One is for its positions, which see no rollout, the other for its rollouts.

    Args:
        spans: of the Q query slots.
        query_documents: integer [Q], -1 for padding, whose slots give zeros.
        key_documents: integer [R].
        max_length: positions of the longest document, or more.
    """
    query_groups = 2 * query_documents + (spans.own_start < spans.own_stop)
    query_order, key_order = query_groups.argsort(stable=True), key_documents.argsort(stable=True)
    num_documents = int(key_documents.max()) + 1
    query_counts = torch.bincount(query_groups + 2, minlength=2 * num_documents + 2).tolist()
    key_counts = torch.bincount(key_documents + 1, minlength=num_documents + 1).tolist()
    keys_of_document = key_order.split(key_counts)[1:]
    masks = []
    for group, slots in enumerate(query_order.split(query_counts)[2:]):
        sees = Spans(*(bound[slots, None] for bound in spans)).sees(keys_of_document[group // 2])
        last_seen = sees.any(0).nonzero().amax().item() if slots.numel() else -1
        masks.append(sees[:, : last_seen + 1])
    num_padding = sum(query_counts[:2])
    inverse = query_order.argsort()

    def attend(query: Tensor, key: Tensor, value: Tensor, kept: Kept = None) -> Tensor:
        padding, *queries = query.index_select(2, query_order).split([num_padding, *query_counts[2:]], dim=2)
        keys, values = (states.index_select(2, key_order).split(key_counts, dim=2)[1:] for states in (key, value))
        outputs = [torch.zeros_like(padding)]
        for group, (slots, mask) in enumerate(zip(queries, masks, strict=True)):
            if mask.numel():
                seen_keys, seen_values = (states[group // 2][:, :, : mask.shape[1]] for states in (keys, values))
                is_grouped = query.shape[1] != key.shape[1]
                outputs.append(
                    F.scaled_dot_product_attention(slots, seen_keys, seen_values, attn_mask=mask, enable_gqa=is_grouped)
                )
        return torch.cat(outputs, dim=2).index_select(2, inverse)

    return attend


def block_attention(spans: Spans, query_documents: Tensor, key_documents: Tensor, max_length: int) -> Attend:
    """FlexAttention under a block mask, with the rectangles that need no mask taken out of it.

    Queries and keys are whole blocks (pad by repeating the last slot). On a CPU FlexAttention is uncompiled, slow, and
    has no backward pass.
    """
    num_keys = key_documents.numel()

    @cache
    def plan(with_rectangles: bool) -> tuple[list[Rectangle], BlockMask]:
        rectangles = find_rectangles(spans) if with_rectangles else []
        return rectangles, block_mask(spans, num_keys, rectangles)

    def attend(query: Tensor, key: Tensor, value: Tensor, kept: Kept = None) -> Tensor:
        rectangles, mask = plan(max_length >= 2 * STRIPE and _has_rectangle_kernel(query))
        near, near_norm = _flex_attention(query, key, value, mask)
        if not rectangles:
            return near
        return RectangleAttention.apply(query, key, value, near, near_norm, rectangles, kept)

    return attend


ATTENTION = {"sdpa": document_attention, "flex_attention": block_attention}


class Rectangle(NamedTuple):
    """Rows that all see all of some keys."""

    queries: slice
    keys: slice


def find_rectangles(spans: Spans) -> list[Rectangle]:
    """For every `STRIPE` query slots of growing context the part that all of them see, if it is as long as a stripe."""
    starts, stops = (bound.view(-1, BLOCK) for bound in spans[:2])
    bounds = torch.stack([starts.amax(1), stops.amin(1)], dim=1).tolist()
    rectangles = []
    last = len(bounds)
    # Going backwards leaves the odd block of each run at its beginning, where the context is short.
    while last > 0:
        first = last - 1
        while first > 0 and last - first < STRIPE // BLOCK:
            (start_before, stop_before), (start, stop) = bounds[first - 1], bounds[first]
            if start_before != start or stop_before > stop:
                break
            first -= 1
        start, stop = bounds[first]
        start = -(-start // BLOCK) * BLOCK
        length = (stop - start) // KEY_UNIT * KEY_UNIT
        if last - first == STRIPE // BLOCK and length >= STRIPE:
            rectangles.append(Rectangle(slice(first * BLOCK, last * BLOCK), slice(start, start + length)))
        last = first
    return rectangles


def block_mask(spans: Spans, num_keys: int, rectangles: list[Rectangle]) -> BlockMask:
    """The mask of the spans without the rectangles, from the least and greatest bounds of each block of slots.

    A pair of blocks is left out only if nothing in it is visible, and goes without a mask only if everything is.
    """
    blocks = torch.stack(spans).unflatten(1, (-1, BLOCK))
    least, most = Spans(*blocks.amin(2, keepdim=True)), Spans(*blocks.amax(2, keepdim=True))
    first_key = torch.arange(0, num_keys, BLOCK, device=spans.context_start.device)
    end_key = first_key + BLOCK
    visible = (least.context_start < end_key) & (first_key < most.context_stop)
    visible |= (least.own_start < end_key) & (first_key < most.own_stop)
    whole = (most.context_start <= first_key) & (end_key <= least.context_stop)
    for slots, keys in rectangles:
        visible[slots.start // BLOCK : slots.stop // BLOCK, keys.start // BLOCK : keys.stop // BLOCK] = False

    def sees(_batch: Tensor, _head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return Spans(*(bound[query_index] for bound in spans)).sees(key_index)

    masked, whole = visible & ~whole, visible & whole
    return BlockMask(
        (spans.context_start.numel(), num_keys),
        *_ordered(masked),
        *_ordered(whole),
        *_ordered(masked.T.contiguous()),
        *_ordered(whole.T.contiguous()),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries visits, and which."""
    indices = blocks.byte().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], indices.int()[None, None]


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
    """FlexAttention's output and the log-sum-exp of its scores [1, heads, Q]; minus infinity where nothing is seen."""
    run: Any = flex_attention
    if query.is_cuda:
        run = _compiled_flex_attention()
        for states in (query, key, value):
            for dim in (0, 1, 3):
                torch._dynamo.mark_static(states, dim)
    # One compilation serves both as many queries as keys and fewer of them.
    with symbolic_shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        output, auxiliary = run(
            query,
            key,
            value,
            block_mask=mask,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
            kernel_options={"IS_DIVISIBLE": True},
        )
    return output, auxiliary.lse


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


class RectangleAttention(torch.autograd.Function):
    """Attention of which a part, `near`, is there already: add the rectangles and merge by log-sum-exp.

    With the outputs `o_i` of disjoint sets of keys and the log-sum-exp `l_i` of their scores, attention over all
    keys is `Σ_i exp(l_i - l) o_i`, with `l = log Σ_i exp(l_i)` (as in ring attention, arXiv 2310.01889). A
    rectangle's own backward pass gives the exact gradient when it is handed the merged output and `l`.
    """

    @staticmethod
    def forward(ctx, query, key, value, near, near_norm, rectangles, kept):  # type: ignore[no-untyped-def]
        if kept:
            output, norm = kept["output"], kept["norm"]
        else:
            output, norm = _merge_rectangles(query, key, value, near, near_norm, rectangles)
        if kept is not None:
            kept |= {"output": output, "norm": norm}
        ctx.save_for_backward(query, key, value, near, near_norm, output, norm)
        ctx.rectangles = rectangles
        return output.detach()

    @staticmethod
    def backward(ctx, output_grad):  # type: ignore[no-untyped-def]
        query, key, value, near, near_norm, output, norm = ctx.saved_tensors
        query_grad = torch.zeros_like(query)
        key_grad, value_grad = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
        for slots, keys in ctx.rectangles:
            query_grad[:, :, slots], key_part, value_part = KERNELS[query.device.type].backward(
                _part(output_grad, slots),
                _part(query, slots),
                _part(key, keys),
                _part(value, keys),
                _part(output, slots),
                norm[:, :, slots].contiguous(),
            )
            key_grad[:, :, keys] += key_part
            value_grad[:, :, keys] += value_part
        near_grad, near_norm_grad = _near_gradients(output_grad, near, near_norm, output, norm)
        return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype), near_grad, near_norm_grad, None, None


def _merge_rectangles(
    query: Tensor, key: Tensor, value: Tensor, near: Tensor, near_norm: Tensor, rectangles: list[Rectangle]
) -> tuple[Tensor, Tensor]:
    output, norm = near.clone(), near_norm.clone()
    for slots, keys in rectangles:
        part, part_norm = KERNELS[query.device.type].forward(_part(query, slots), _part(key, keys), _part(value, keys))
        output[:, :, slots], norm[:, :, slots] = _merge(near[:, :, slots], near_norm[:, :, slots], part, part_norm)
    return output, norm


def _part(states: Tensor, slots: slice) -> Tensor:
    """Some slots of [1, heads, R, D], with strides that don't tell R, since kernels are chosen by strides too."""
    return states[0, :, slots].unsqueeze(0)


@fuse_on_gpu(dynamic_dim=2)
def _merge(output: Tensor, norm: Tensor, part: Tensor, part_norm: Tensor) -> tuple[Tensor, Tensor]:
    merged_norm = torch.logaddexp(norm, part_norm)
    weight, part_weight = (torch.exp(each - merged_norm).unsqueeze(-1) for each in (norm, part_norm))
    return (output * weight + part * part_weight).to(output.dtype), merged_norm


@fuse_on_gpu(dynamic_dim=2)
def _near_gradients(
    output_grad: Tensor, near: Tensor, near_norm: Tensor, output: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    # For padding, which sees no key, both norms are -inf, and the weight is 0.
    weight = torch.exp(near_norm - norm).masked_fill(near_norm.isneginf(), 0)
    norm_grad = weight * (output_grad.float() * (near.float() - output.float())).sum(-1)
    return (output_grad * weight.unsqueeze(-1)).to(near.dtype), norm_grad


class _CudnnKernel:
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        output, norm, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
        return output, norm.view(norm.shape[:3])

    @staticmethod
    def backward(
        output_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, norm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        nothing = torch.empty((), device=query.device, dtype=torch.int64)
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            output_grad,
            query,
            key,
            value,
            output,
            norm.unsqueeze(-1),
            nothing,
            nothing,
            None,
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            False,
        )


class _CpuKernel:
    """For tests: the same arithmetic in any precision."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)

    @staticmethod
    def backward(
        output_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, norm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            output_grad, query, key, value, output, norm, 0.0, False
        )


KERNELS: dict[str, Any] = {"cuda": _CudnnKernel, "cpu": _CpuKernel}


def _has_rectangle_kernel(states: Tensor) -> bool:
    """Whether cuDNN's attention is there and faster than FlexAttention: in half precision, from Hopper on."""
    return (
        states.is_cuda
        and states.dtype in (torch.bfloat16, torch.float16)
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(states.device) >= (9, 0)
    )
