"""The drafter's decoder layers: norms, projections, attention over slots, and the feed-forward part.

Shape letters: L positions, R slots, N slots that give an output, A auxiliary states, H hidden size, D size of an
attention head.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, rotate_half
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from .attention import Kept
from .compile import fuse_on_gpu
from .config import PeagleConfig
from .forward_slots import PassSlots

RECOMPUTED_SLOTS = 16384
"""Slots whose feed-forward part is recomputed at a time under activation checkpointing."""
OWN_LOGIT = 8.0
"""Initial attention logit of a slot for its own position, about."""


class RMSNorm(LlamaRMSNorm):
    """RMSNorm in float32 whose result has the input's dtype, also when the weight is float32."""

    @fuse_on_gpu(dynamic_dim=1)
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).to(hidden_states.dtype)


class StateNorms(nn.ModuleList):
    """An RMSNorm for each of the A verifier states that lie side by side, [..., A * H]."""

    def __init__(self, num_states: int, size: int, eps: float):
        super().__init__(RMSNorm(size, eps) for _ in range(num_states))

    def forward(self, hidden_states: Tensor) -> Tensor:
        parts = hidden_states.chunk(len(self), dim=-1)
        return torch.cat([norm(part) for norm, part in zip(self, parts, strict=True)], dim=-1)


class PeagleAttention(nn.Module):
    """The projections of grouped-query attention with rotary embedding.

    In a new drafter the query of a slot equals the key of its own position, so that each slot first attends mostly to
    itself: of all positions, its own knows most about the next token.
    """

    def __init__(self, config: PreTrainedConfig, input_size: int):
        super().__init__()
        self.head_dim = config.head_dim
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(input_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(input_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        has_norms = config.model_type == "qwen3"
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if has_norms else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if has_norms else nn.Identity()

    def look_at_own_position(self) -> None:
        """Copy the keys' weights to the queries, at the scale that gives `OWN_LOGIT` for inputs of unit norm."""
        query, key = self.q_proj, self.k_proj
        init.normal_(key.weight, std=math.sqrt(OWN_LOGIT / (key.in_features * math.sqrt(self.head_dim))))
        heads = key.weight.unflatten(0, (-1, self.head_dim))
        group = query.out_features // key.out_features
        init.copy_(query.weight, heads.repeat_interleave(group, dim=0).flatten(0, 1))

    def query(self, inputs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[1, R or L + 1, inputs] -> [1, heads, R, D]."""
        return rotate(spread(self.q_norm(self.heads(self.q_proj(inputs))), cos.shape[1]), cos, sin).transpose(1, 2)

    def key_value(self, inputs: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[1, R or L + 1, inputs] -> two [1, key heads, R, D]."""
        key = rotate(spread(self.k_norm(self.heads(self.k_proj(inputs))), cos.shape[1]), cos, sin)
        return key.transpose(1, 2), spread(self.heads(self.v_proj(inputs)), cos.shape[1]).transpose(1, 2)

    def heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim))


def spread(states: Tensor, num_slots: int) -> Tensor:
    """Repeat the mask input for every slot of a rollout: [1, L + 1, ...] (positions, then the mask) -> [1, R, ...]."""
    if states.shape[1] == num_slots:
        return states
    copies = num_slots - states.shape[1] + 1
    return torch.cat([states[:, :-1], states[:, -1:].expand(-1, copies, *states.shape[2:])], dim=1)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [1, R, heads, D] by cos and sin [1, R, D]."""
    return (states * cos.unsqueeze(2) + rotate_half(states) * sin.unsqueeze(2)).to(states.dtype)


class PeagleLayer(nn.Module):
    """A decoder layer; the first reads token embeddings beside the verifier's states (EAGLE-3, arXiv 2503.01840).

    Attributes:
        gradient_checkpointing: recompute the layer's activations in the backward pass instead of keeping them.
        keep_attention: with `gradient_checkpointing`, keep the output of attention, and recompute the feed-forward
            part in pieces of `RECOMPUTED_SLOTS` slots.
    """

    gradient_checkpointing = False
    keep_attention = True
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, config: PeagleConfig, layer_idx: int):
        super().__init__()
        layer_config = config.transformer_layer_config
        size, eps = layer_config.hidden_size, layer_config.rms_norm_eps
        self.layer_idx = layer_idx
        self.is_first, self.is_last = layer_idx == 0, layer_idx == layer_config.num_hidden_layers - 1
        layer_types = getattr(layer_config, "layer_types", None) or ["full_attention"] * layer_config.num_hidden_layers
        self.window = layer_config.sliding_window if layer_types[layer_idx] == "sliding_attention" else None
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = RMSNorm(size, eps)
        if self.is_first:
            self.hidden_norm = RMSNorm(size, eps)
        self.self_attn = PeagleAttention(layer_config, 2 * size if self.is_first else size)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = Qwen3MLP(layer_config) if layer_config.model_type == "qwen3" else LlamaMLP(layer_config)

    def forward(self, states: Tensor, slots: PassSlots, embeds: Tensor | None = None) -> Tensor:
        """[1, R, H] -> [1, R, H] ([1, N, H] in the last layer); the first layer takes [1, L + 1, H] and embeddings."""
        if not (self.gradient_checkpointing and self.training):
            return self._whole(states, embeds, slots)
        recomputed = self._gradient_checkpointing_func
        if not self.keep_attention:
            return recomputed(self._whole, states, embeds, slots)
        residual, attended = recomputed(self.attention, states, embeds, slots, {})
        pieces = zip(residual.split(RECOMPUTED_SLOTS, dim=1), attended.split(RECOMPUTED_SLOTS, dim=1), strict=True)
        return torch.cat([recomputed(self.feed_forward, *piece) for piece in pieces], dim=1)

    def _whole(self, states: Tensor, embeds: Tensor | None, slots: PassSlots) -> Tensor:
        return self.feed_forward(*self.attention(states, embeds, slots, None))

    def attention(self, states: Tensor, embeds: Tensor | None, slots: PassSlots, kept: Kept) -> tuple[Tensor, Tensor]:
        """The residual and the output of attention before `o_proj`; in the last layer of the selected slots alone."""
        if embeds is not None:
            residual, query, key, value = self.first_inputs(states, embeds, *slots.rotary)
            if self.is_last:
                residual, query = slots.select(residual), slots.select(query.transpose(1, 2)).transpose(1, 2)
        else:
            residual = slots.select(states) if self.is_last else states
            query = self.query(residual, *(slots.selected_rotary if self.is_last else slots.rotary))
            key, value = self.key_value(states, *slots.rotary)
        output = slots.attend(self)(query, key, value, kept)
        return residual, output.transpose(1, 2).flatten(2)

    @fuse_on_gpu(dynamic_dim=1)
    def first_inputs(self, states: Tensor, embeds: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        normed = self.hidden_norm(states)
        residual = spread(normed if self.norm_before_residual else states, cos.shape[1])
        inputs = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        return residual, self.self_attn.query(inputs, cos, sin), *self.self_attn.key_value(inputs, cos, sin)

    @fuse_on_gpu(dynamic_dim=1)
    def query(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.self_attn.query(self.input_layernorm(states), cos, sin)

    @fuse_on_gpu(dynamic_dim=1)
    def key_value(self, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.self_attn.key_value(self.input_layernorm(states), cos, sin)

    @fuse_on_gpu(dynamic_dim=1)
    def feed_forward(self, residual: Tensor, attended: Tensor) -> Tensor:
        states = residual + self.self_attn.o_proj(attended)
        return states + self.mlp(self.post_attention_layernorm(states))
