"""`PeagleForSpeculation`: the drafter, over rows that `cod.sample_rows` laid out.

Shape letters: L positions, R rows, N learnt rows, U target positions, A auxiliary states, H hidden, V verifier
vocabulary, Vd draft vocabulary. A batch is one packed sequence, so every tensor has a first dimension of 1.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.utils import ModelOutput

from .attention import ATTENTION, Attend, RowTags
from .configuration_peagle import PeagleConfig
from .errors import PeagleError
from .losses import CHUNK_ELEMENTS, kl_divergence
from .metrics import count_by_depth
from .target import VerifierHead, load_embedding


@dataclass
class PeagleOutput(ModelOutput):
    """What `PeagleForSpeculation` returns.

    Args:
        loss: float32 scalar: the sum over learnt rows divided by `num_items_in_batch` (default: the learnt rows).
        logits: [1, R, Vd], only without labels: every row's scores over the draft vocabulary.
        counters: int64 [4, K], only with labels: see `metrics.count_by_depth`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    counters: Tensor | None = None


class Rows:
    """The rows of one forward pass: who they are, where they stand, and what they may attend to."""

    def __init__(self, keys: RowTags, num_positions: int, query_index: Tensor | None, attention: str):
        self.keys = keys
        self.num_positions = num_positions
        self.query_index = query_index
        self.attention = attention
        self._attend: dict[tuple[int | None, bool], Attend] = {}

    @cached_property
    def queries(self) -> RowTags:
        anchor, depth, document = self.keys
        index = self.query_index
        return self.keys if index is None else (anchor[index], depth[index], document[index])

    def spread(self, states: Tensor) -> Tensor:
        """[1, L + 1, ...] (the positions, then the mask row) -> [1, R, ...]: every rollout row is the mask row."""
        positions, mask_row = states[:, : self.num_positions], states[:, self.num_positions :]
        return torch.cat([positions, mask_row.expand(-1, self.keys[0].numel() - self.num_positions, -1)], dim=1)

    def select(self, states: Tensor) -> Tensor:
        """[1, R, ...] -> the rows that are learnt, [1, N, ...], or all of them when nothing is learnt here."""
        return states if self.query_index is None else states[:, self.query_index]

    def attend(self, window: int | None, selected: bool) -> Attend:
        if (window, selected) not in self._attend:
            queries = self.queries if selected else self.keys
            self._attend[window, selected] = ATTENTION[self.attention](queries, self.keys, window)
        return self._attend[window, selected]


class PeagleAttention(nn.Module):
    """Grouped-query attention over rows; layer 0 projects each distinct input once, the last layer asks learnt rows."""

    def __init__(self, config: PreTrainedConfig, input_size: int, window: int | None, is_first: bool, is_last: bool):
        super().__init__()
        self.window, self.is_first, self.is_last = window, is_first, is_last
        self.head_dim = config.head_dim
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(input_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(input_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        has_norms = config.model_type == "qwen3"
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if has_norms else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if has_norms else nn.Identity()

    def forward(self, states: Tensor, rows: Rows, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self.is_first:
            query, key, value = (rows.spread(project(states)) for project in (self.q_proj, self.k_proj, self.v_proj))
            query = rows.select(query) if self.is_last else query
        else:
            query = self.q_proj(rows.select(states) if self.is_last else states)
            key, value = self.k_proj(states), self.v_proj(states)
        query_rotary = tuple(rows.select(part) for part in rotary) if self.is_last else rotary
        output = rows.attend(self.window, selected=self.is_last)(
            rotate(self.q_norm(self.heads(query)), query_rotary).transpose(1, 2),
            rotate(self.k_norm(self.heads(key)), rotary).transpose(1, 2),
            self.heads(value).transpose(1, 2),
        )
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim))


def rotate(states: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
    """Rotary embedding of [1, rows, heads, D] by cos and sin [1, rows, D]."""
    cos, sin = (part.unsqueeze(2) for part in rotary)
    return (states * cos + rotate_half(states) * sin).to(states.dtype)


class PeagleLayer(GradientCheckpointingLayer):
    """A decoder layer; the first reads token embeddings beside the verifier's states (EAGLE-3, arXiv 2503.01840)."""

    def __init__(self, config: PeagleConfig, layer_idx: int):
        super().__init__()
        layer_config = config.transformer_layer_config
        size, eps = layer_config.hidden_size, layer_config.rms_norm_eps
        is_first, is_last = layer_idx == 0, layer_idx == layer_config.num_hidden_layers - 1
        layer_types = getattr(layer_config, "layer_types", None) or ["full_attention"] * layer_config.num_hidden_layers
        window = layer_config.sliding_window if layer_types[layer_idx] == "sliding_attention" else None
        self.is_last = is_last
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = LlamaRMSNorm(size, eps)
        if is_first:
            self.hidden_norm = LlamaRMSNorm(size, eps)
        self.self_attn = PeagleAttention(layer_config, 2 * size if is_first else size, window, is_first, is_last)
        self.post_attention_layernorm = LlamaRMSNorm(size, eps)
        self.mlp = Qwen3MLP(layer_config) if layer_config.model_type == "qwen3" else LlamaMLP(layer_config)

    def forward(
        self, states: Tensor, rows: Rows, rotary: tuple[Tensor, Tensor], embeds: Tensor | None = None
    ) -> Tensor:
        """[1, R, H] -> [1, R, H] ([1, N, H] in the last layer); the first layer takes [1, L + 1, H] and embeddings."""
        if embeds is None:
            residual, inputs = states, self.input_layernorm(states)
        else:
            normed = self.hidden_norm(states)
            residual = rows.spread(normed if self.norm_before_residual else states)
            inputs = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        residual = rows.select(residual) if self.is_last else residual
        states = residual + self.self_attn(inputs, rows, rotary)
        return states + self.mlp(self.post_attention_layernorm(states))


class PeagleForSpeculation(PreTrainedModel):
    """A P-EAGLE drafter: K tokens in one forward pass from the verifier's hidden states (arXiv 2602.01469).

    `save_pretrained` writes what vLLM serves. The verifier's head, which training needs for its targets, is attached by
    `attach_verifier` and is never part of a checkpoint.
    """

    config_class = PeagleConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["PeagleLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True

    d2t: Tensor | None
    t2d: Tensor | None
    verifier_head: VerifierHead | None
    draft_head: VerifierHead | None

    def __init__(self, config: PeagleConfig):
        super().__init__(config)
        layer_config = config.transformer_layer_config
        size, eps, states_size = layer_config.hidden_size, layer_config.rms_norm_eps, config.num_aux_hidden_states
        self.embed_tokens = nn.Embedding(layer_config.vocab_size, size)
        self.mask_hidden = nn.Parameter(torch.empty(1, 1, states_size * size))
        self.input_norm = LlamaRMSNorm(states_size * size, eps) if config.norm_before_fc else nn.Identity()
        self.fc = nn.Linear(states_size * size, size, bias=False)
        self.layers = nn.ModuleList(PeagleLayer(config, index) for index in range(layer_config.num_hidden_layers))
        self.norm = LlamaRMSNorm(size, eps)
        self.rotary_emb = LlamaRotaryEmbedding(layer_config)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        if config.draft_vocab_size < layer_config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(layer_config.vocab_size, dtype=torch.bool))
        else:
            self.d2t = self.t2d = None
        self.__dict__["verifier_head"] = self.__dict__["draft_head"] = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PeagleForSpeculation):
            init.normal_(module.mask_hidden)
            if module.d2t is not None and module.t2d is not None:
                ids = torch.arange(module.config.vocab_size, device=module.d2t.device)
                init.zeros_(module.d2t)
                init.copy_(module.t2d, ids < module.config.draft_vocab_size)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    @property
    def draft_token_ids(self) -> Tensor | None:
        """int64 [Vd], the verifier's id of each draft token, ascending; None with the whole vocabulary."""
        return None if self.d2t is None else torch.arange(self.d2t.numel(), device=self.d2t.device) + self.d2t

    def set_draft_vocabulary(self, d2t: Tensor, t2d: Tensor) -> None:
        """Set the vocabulary maps, d2t int64 [Vd] and t2d bool [V] (see `target.draft_vocabulary`)."""
        sizes = (self.config.draft_vocab_size, self.config.vocab_size)
        if self.d2t is None or self.t2d is None or (d2t.numel(), t2d.numel()) != sizes:
            raise PeagleError(
                f"Maps for {d2t.numel()} draft tokens of {t2d.numel()} don't fit this drafter, which has "
                f"draft_vocab_size {self.config.draft_vocab_size} of {self.config.vocab_size}."
            )
        self.d2t.copy_(d2t)
        self.t2d.copy_(t2d)

    def load_verifier(
        self,
        name_or_path: str,
        initialize: bool = True,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Read what training needs of the verifier, its final norm and head, and attach it; no other weight is read.

        Args:
            initialize: also start the drafter's token embeddings and head from the verifier's.
            dtype: of the verifier's head; default: as saved.
        """
        head = VerifierHead.from_pretrained(name_or_path, dtype, revision, trust_remote_code)
        self.attach_verifier(head)
        if initialize:
            with torch.no_grad():
                self.embed_tokens.weight.copy_(load_embedding(name_or_path, None, revision, trust_remote_code))
                token_ids = self.draft_token_ids
                self.lm_head.weight.copy_(head.weight if token_ids is None else head.weight[token_ids])

    def attach_verifier(self, head: VerifierHead) -> None:
        """Make the drafter ready to be trained: the verifier's head gives the targets; the drafter's own is frozen.

        Raises:
            PeagleError: the head's sizes are not those of this drafter's verifier.
        """
        expected = (self.config.vocab_size, self.config.hidden_size)
        if tuple(head.weight.shape) != expected:
            raise PeagleError(
                f"The verifier's head is {tuple(head.weight.shape)}, this drafter was made for {expected} "
                f"({self.config.verifier_name_or_path}). Name the verifier that the drafter belongs to."
            )
        self.embed_tokens.weight.requires_grad_(self.config.embed_requires_grad)
        self.lm_head.weight.requires_grad_(False)
        # Set around nn.Module, so that the head is no part of the state dict, of DDP's buffers or of FSDP's shards.
        self.__dict__["verifier_head"] = head
        token_ids = self.draft_token_ids
        self.__dict__["draft_head"] = head if token_ids is None else head.restrict(token_ids)

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        anchors: Tensor,
        depths: Tensor,
        document_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        learnt_rows: Tensor | None = None,
        target_states: Tensor | None = None,
        target_index: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> PeagleOutput:
        """Run the rows; with labels give the loss and the counters, without them the logits.

        Args:
            input_ids: int64 [1, L], the token that each position sees.
            hidden_states: [1, L, A * H], the verifier's auxiliary states of each position.
            anchors: int64 [1, R], as positions of this batch; the first L rows are the positions themselves.
            depths: int64 [1, R].
            document_ids: int64 [1, L], -1 for padding.
            position_ids: int64 [1, R], place in the document, anchor + depth.
            labels: int64 [1, R], the token that a row is to predict, -100 where nothing is learnt.
            learnt_rows: int64 [1, N], the rows with a label, sorted by target position.
            target_states: [1, U, H], the verifier's last states, before its final norm, of the target positions.
            target_index: int64 [1, N], which target position each of `learnt_rows` has, ascending.
            num_items_in_batch: what the summed loss is divided by.
        """
        device, num_positions = input_ids.device, input_ids.shape[1]
        mixed_precision = torch.is_autocast_enabled(device.type)
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device.type) if mixed_precision else self.dtype)
        anchor, depth = anchors[0], depths[0]
        rows = Rows(
            keys=(anchor, depth, document_ids[0][anchor]),
            num_positions=num_positions,
            query_index=None if learnt_rows is None else learnt_rows[0],
            attention=self.config._attn_implementation,
        )
        mask_token = input_ids.new_full((1, 1), self.config.mask_token_id)
        embeds = self.embed_tokens(torch.cat([input_ids, mask_token], dim=1)).to(hidden_states.dtype)
        states = torch.cat([hidden_states, self.mask_hidden.to(hidden_states.dtype)], dim=1)
        states = self.fc(self.input_norm(states))
        rotary = self.rotary_emb(states, position_ids)
        states = self.layers[0](states, rows, rotary, embeds=embeds)
        for layer in self.layers[1:]:
            states = layer(states, rows, rotary)
        states = self.norm(states)
        if labels is None:
            return PeagleOutput(logits=self.lm_head(states))

        assert learnt_rows is not None
        assert target_states is not None
        assert target_index is not None
        if self.verifier_head is None or self.draft_head is None:
            raise PeagleError("The loss needs the verifier's head: call load_verifier(name_or_path) before training.")
        verifier, draft_head = self.verifier_head.to(device), self.draft_head.to(device)
        with torch.no_grad():
            teacher = verifier.normalize(target_states[0].to(verifier.weight.dtype))
        loss, student_N, teacher_U = kl_divergence(
            states[0], self.lm_head.weight, teacher, draft_head.logits, target_index[0]
        )
        token_ids = self.draft_token_ids
        if token_ids is not None and not self.training:
            # Over the whole vocabulary: a token that the drafter doesn't have is one that it can't match.
            chunks = teacher.split(max(1, CHUNK_ELEMENTS // self.config.vocab_size))
            with torch.no_grad():
                teacher_U = torch.cat([verifier.logits(chunk).argmax(-1) for chunk in chunks])
            student_N = token_ids[student_N]
        learnt_R = labels[0] != -100
        correct_R = torch.zeros_like(learnt_R)
        correct_R[learnt_rows[0]] = student_N == teacher_U[target_index[0]]
        counters = count_by_depth(correct_R, learnt_R, anchor, depth, self.config.num_depths)
        divisor = max(student_N.numel(), 1) if num_items_in_batch is None else num_items_in_batch
        return PeagleOutput(loss=loss / divisor, counters=counters)
