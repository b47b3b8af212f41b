"""Two ways to attend under `cod.visible`: document by document with SDPA (any device), or FlexAttention (GPU)."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .cod import dense_mask, mask_function

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [1, heads, Q, D], key and value [1, key heads, R, D]) -> [1, heads, Q, D]."""

RowTags = tuple[Tensor, Tensor, Tensor]
"""(anchor, depth, document) of each row, int64."""


def document_attention(query: RowTags, key: RowTags, window: int | None) -> Attend:
    """Attention as one dense SDPA a document, so that the cost grows with a document's rows, not with the batch's.

    Rows of padding (document -1) give zeros.
    """
    documents = key[2].unique()
    pieces = []
    for document in documents[documents >= 0].tolist():
        query_rows = (query[2] == document).nonzero().flatten()
        key_rows = (key[2] == document).nonzero().flatten()
        if query_rows.numel():
            mask = dense_mask(
                (query[0][query_rows], query[1][query_rows], query[2][query_rows]),
                (key[0][key_rows], key[1][key_rows], key[2][key_rows]),
                window,
            )
            pieces.append((query_rows, key_rows, mask))
    padding_rows = (query[2] < 0).nonzero().flatten()
    order = torch.cat([rows for rows, _, _ in pieces] + [padding_rows])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)

    def attend(query_states: Tensor, key_states: Tensor, value_states: Tensor) -> Tensor:
        outputs = [
            F.scaled_dot_product_attention(
                query_states[:, :, query_rows],
                key_states[:, :, key_rows],
                value_states[:, :, key_rows],
                attn_mask=mask,
                enable_gqa=query_states.shape[1] != key_states.shape[1],
            )
            for query_rows, key_rows, mask in pieces
        ]
        outputs.append(torch.zeros_like(query_states[:, :, padding_rows]))
        return torch.cat(outputs, dim=2)[:, :, inverse]

    return attend


def block_attention(query: RowTags, key: RowTags, window: int | None) -> Attend:
    """FlexAttention under a block mask; on a CPU it is uncompiled, slow, and has no backward pass."""
    block_mask = create_block_mask(
        mask_function(query, key, window),
        B=None,
        H=None,
        Q_LEN=query[0].numel(),
        KV_LEN=key[0].numel(),
        device=str(key[0].device),
    )

    def attend(query_states: Tensor, key_states: Tensor, value_states: Tensor) -> Tensor:
        attention: Any = _compiled_flex_attention() if query_states.is_cuda else flex_attention
        return attention(
            query_states,
            key_states,
            value_states,
            block_mask=block_mask,
            enable_gqa=query_states.shape[1] != key_states.shape[1],
        )

    return attend


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


ATTENTION = {"sdpa": document_attention, "flex_attention": block_attention}
