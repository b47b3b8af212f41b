"""`PeagleForSpeculation`: the drafter, over rows that `cod.sample_rows` laid out.

Shape letters: L positions, R rows, N learnt rows, U target positions, A auxiliary states, H hidden, V verifier
vocabulary, Vd draft vocabulary. A batch of `forward` is one packed sequence, so every tensor has a first dimension of
1; `draft` takes B sequences side by side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.utils import ModelOutput

from ..errors import PeagleError
from ..training.losses import CHUNK_ELEMENTS, distillation_loss, parse_loss, survival_weights
from ..training.metrics import count_by_depth, follow_rollouts, outcomes_by_anchor
from ..verifier.parts import VerifierHead, hub_verifier, load_embedding
from .attention import ATTENTION, BLOCK, Attend, Kept
from .compile import fuse_on_gpu
from .config import PeagleConfig
from .slots import Spans, find_spans

HUB_TAGS = ("speculative-decoding", "speculators", "eagle3", "p-eagle", "vllm")
RECOMPUTED_ROWS = 16384
"""How many rows' feed-forward part is recomputed at a time under activation checkpointing."""
OWN_LOGIT = 8.0
"""What attention scores a row's own position with in a new drafter, about."""


@dataclass
class PeagleOutput(ModelOutput):
    """What `PeagleForSpeculation` returns.

    Args:
        loss: float32 scalar: the sum over learnt rows divided by `num_items_in_batch` (default: the learnt rows).
        logits: [1, R, Vd], only without labels: every row's scores over the draft vocabulary.
        counters: int64 [4, K], only with labels: see `metrics.count_by_depth`.
        outcomes: int64 [4, learnt anchors], only with labels in evaluation: see `metrics.outcomes_by_anchor`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    counters: Tensor | None = None
    outcomes: Tensor | None = None


class Rows:
    """The rows of one forward pass: where they stand, what they may attend to, and which of them are learnt.

    On the GPU's path rows and learnt rows are padded to whole blocks by repeating the last one; `num_rows` and
    `num_learnt` count them without the padding.
    """

    def __init__(
        self,
        anchors: Tensor,
        depths: Tensor,
        document_ids: Tensor,
        learnt_rows: Tensor | None,
        max_length: int,
        attention: str,
    ):
        block = BLOCK if attention == "flex_attention" else 1
        self.attention = ATTENTION[attention]
        self.num_rows = anchors.numel()
        self.padding = -self.num_rows % block
        self.anchors, self.depths, self.document_ids, self.max_length = anchors, depths, document_ids, max_length
        self.documents = self.pad(document_ids[anchors])
        self.learnt = self.num_learnt = None
        if learnt_rows is not None:
            self.num_learnt = learnt_rows.numel()
            num_queries = max(1, math.ceil(self.num_learnt / block)) * block
            padding = num_queries - self.num_learnt
            last = learnt_rows[-1:] if self.num_learnt else learnt_rows.new_zeros(1)
            self.learnt = torch.cat([learnt_rows, last.expand(padding)])
        self._attend: dict[tuple[int | None, bool], Attend] = {}

    def pad(self, rows: Tensor) -> Tensor:
        """[..., R before padding] -> [..., R]."""
        return torch.cat([rows, rows[..., -1:].expand(*rows.shape[:-1], self.padding)], dim=-1)

    def place(self, rotary: tuple[Tensor, Tensor]) -> None:
        """Take the rotary embedding of the rows, cos and sin [1, R, D]."""
        self.rotary = rotary
        self.learnt_rotary = (self.select(rotary[0]), self.select(rotary[1]))

    def select(self, states: Tensor) -> Tensor:
        """[1, R, ...] -> the rows that are learnt, [1, N, ...], or all of them when nothing is learnt here."""
        return states if self.learnt is None else states.index_select(1, self.learnt)

    def trim(self, states: Tensor) -> Tensor:
        """Cut the padding off what the last layer gives."""
        return states[:, : self.num_rows if self.num_learnt is None else self.num_learnt]

    def attend(self, layer: "PeagleLayer") -> Attend:
        """A layer's attention of all rows, or in the last layer of those that are learnt, to all rows."""
        kind = layer.window, layer.is_last
        if kind not in self._attend:
            bounds = torch.stack(find_spans(self.anchors, self.depths, self.document_ids, layer.window))
            bounds, documents = self.pad(bounds), self.documents
            if layer.is_last and self.learnt is not None:
                bounds, documents = bounds[:, self.learnt], documents[self.learnt]
            self._attend[kind] = self.attention(Spans(*bounds), documents, self.documents, self.max_length)
        return self._attend[kind]


class DraftRows:
    """The rows of one draft of B sequences: their S_new new positions, then the rollout of each one's anchor.

    Keys and values of positions stay in the cache for the drafts to come, those of the rollout are taken out again.

    Args:
        mask: bool [B, S], which positions are real, those that are cached and then the new ones.
        anchors: int64 [B], the place among the S positions of each sequence's last real one.
        num_depths: K.
        cache: the drafter's keys and values of the positions before the new ones.
    """

    def __init__(self, mask: Tensor, anchors: Tensor, num_depths: int, cache: DynamicCache):
        self.cache, self.anchors, self.num_rollout = cache, anchors[:, None], num_depths - 1
        self.mask = F.pad(mask, (0, self.num_rollout), value=True)
        num_positions, self.start = mask.shape[1], cache.get_seq_length()
        self.places = mask.cumsum(1) - 1
        rollout = torch.arange(1, num_depths, device=mask.device)
        self.places = torch.cat([self.places, self.places.gather(1, self.anchors) + rollout], dim=1).clamp(min=0)
        self.asked = torch.cat([self.anchors, (num_positions - 1 + rollout).expand(len(mask), -1)], dim=1)

    @property
    def position_ids(self) -> Tensor:
        """int64 [B, R], place in the sequence of each row."""
        return self.places[:, self.start :]

    def place(self, rotary: tuple[Tensor, Tensor]) -> None:
        """Take the rotary embedding of the rows, cos and sin [B, R, D]."""
        self.rotary = rotary
        self.learnt_rotary = (self.select(rotary[0]), self.select(rotary[1]))

    def select(self, states: Tensor) -> Tensor:
        """[B, R, ...] -> the rows that propose a token, [B, K, ...]."""
        return states[torch.arange(len(states), device=states.device)[:, None], self.asked - self.start]

    def trim(self, states: Tensor) -> Tensor:
        return states

    def attend(self, layer: "PeagleLayer") -> Attend:
        """A layer's attention of all rows, or in the last layer of those that propose, to the cache and all rows."""
        keys = torch.arange(self.mask.shape[1], device=self.mask.device)
        queries = self.asked[:, :, None] if layer.is_last else keys[None, self.start :, None]
        visible = self.mask[:, None] & (keys <= queries)
        if layer.window is not None:
            places = self.places.gather(1, queries.flatten(1).expand(len(self.mask), -1))
            near = self.places[:, None] > places[:, :, None] - layer.window
            visible &= near | (keys >= self.anchors[:, :, None])
        visible |= keys == queries  # padding sees itself, so that its softmax is one of something

        def attend(query: Tensor, key: Tensor, value: Tensor, kept: Kept = None) -> Tensor:
            key, value = self.cache.update(key, value, layer.layer_idx)
            is_grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None], enable_gqa=is_grouped)

        return attend

    def finish(self) -> None:
        """Take the rollout out of the cache."""
        if self.num_rollout:
            self.cache.crop(-self.num_rollout)


AnyRows = Rows | DraftRows


class RMSNorm(LlamaRMSNorm):
    """RMSNorm in float32 whose result has the input's dtype, also when the weight is float32."""

    @fuse_on_gpu(rows_dim=1)
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).to(hidden_states.dtype)


class PeagleAttention(nn.Module):
    """The projections of grouped-query attention, with rotary embedding; the first layer's see each input once.

    In a new drafter a query is the key of its own position, so that attention starts out there: of all positions a
    row's own knows most about the next token.
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
        """Initialise the queries' weights as the keys', at a scale for normed inputs."""
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


def spread(states: Tensor, num_rows: int) -> Tensor:
    """[1, L + 1, ...] (the positions, then the mask row) -> [1, R, ...], as every rollout row is the mask row."""
    if states.shape[1] == num_rows:
        return states
    copies = num_rows - states.shape[1] + 1
    return torch.cat([states[:, :-1], states[:, -1:].expand(-1, copies, *states.shape[2:])], dim=1)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [1, rows, heads, D] by cos and sin [1, rows, D]."""
    return (states * cos.unsqueeze(2) + rotate_half(states) * sin.unsqueeze(2)).to(states.dtype)


class PeagleLayer(nn.Module):
    """A decoder layer; the first reads token embeddings beside the verifier's states (EAGLE-3, arXiv 2503.01840).

    Attributes:
        gradient_checkpointing: recompute in the backward pass what is between the layer's input and its output.
        keep_attention: but keep what attention gave, and recompute the feed-forward part by `RECOMPUTED_ROWS`.
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

    def forward(self, states: Tensor, rows: AnyRows, embeds: Tensor | None = None) -> Tensor:
        """[1, R, H] -> [1, R, H] ([1, N, H] in the last layer); the first layer takes [1, L + 1, H] and embeddings."""
        if not (self.gradient_checkpointing and self.training):
            return self.feed_forward(*self.attention(states, embeds, rows, None))
        recomputed = self._gradient_checkpointing_func
        if not self.keep_attention:
            return recomputed(self._whole, states, embeds, rows)
        residual, attended = recomputed(self.attention, states, embeds, rows, {})
        pieces = zip(residual.split(RECOMPUTED_ROWS, dim=1), attended.split(RECOMPUTED_ROWS, dim=1), strict=True)
        return torch.cat([recomputed(self.feed_forward, *piece) for piece in pieces], dim=1)

    def _whole(self, states: Tensor, embeds: Tensor | None, rows: AnyRows) -> Tensor:
        return self.feed_forward(*self.attention(states, embeds, rows, None))

    def attention(self, states: Tensor, embeds: Tensor | None, rows: AnyRows, kept: Kept) -> tuple[Tensor, Tensor]:
        """The residual and what attention gives before `o_proj`, of all rows or, in the last layer, the learnt ones."""
        if embeds is not None:
            residual, query, key, value = self.first_inputs(states, embeds, *rows.rotary)
            if self.is_last:
                residual, query = rows.select(residual), rows.select(query.transpose(1, 2)).transpose(1, 2)
        else:
            residual = rows.select(states) if self.is_last else states
            query = self.query(residual, *(rows.learnt_rotary if self.is_last else rows.rotary))
            key, value = self.key_value(states, *rows.rotary)
        output = rows.attend(self)(query, key, value, kept)
        return residual, output.transpose(1, 2).flatten(2)

    @fuse_on_gpu(rows_dim=1)
    def first_inputs(self, states: Tensor, embeds: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        normed = self.hidden_norm(states)
        residual = spread(normed if self.norm_before_residual else states, cos.shape[1])
        inputs = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        return residual, self.self_attn.query(inputs, cos, sin), *self.self_attn.key_value(inputs, cos, sin)

    @fuse_on_gpu(rows_dim=1)
    def query(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.self_attn.query(self.input_layernorm(states), cos, sin)

    @fuse_on_gpu(rows_dim=1)
    def key_value(self, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.self_attn.key_value(self.input_layernorm(states), cos, sin)

    @fuse_on_gpu(rows_dim=1)
    def feed_forward(self, residual: Tensor, attended: Tensor) -> Tensor:
        states = residual + self.self_attn.o_proj(attended)
        return states + self.mlp(self.post_attention_layernorm(states))


class DraftHead(nn.Linear):
    """The drafter's head. All use of its weight is within `forward`, for which FSDP and ZeRO gather its shards."""

    def forward(self, states: Tensor, loss_of: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Logits [..., Vd] of states [..., H]; or what `loss_of` makes of the states and the weight [Vd, H]."""
        return super().forward(states) if loss_of is None else loss_of(states, self.weight)


class PeagleForSpeculation(PreTrainedModel):
    """A P-EAGLE drafter: K tokens in one forward pass from the verifier's hidden states (arXiv 2602.01469).

    `save_pretrained` writes what vLLM serves. The verifier's head, which training needs for its targets, is attached by
    `attach_verifier` and is never part of a checkpoint.

    Attributes:
        loss_weights: what the loss is made of, see `losses.parse_loss`.
        depth_loss_decay: in training a row of depth d counts this to the power d.
        dpace_alpha: and as much as `losses.survival_weights` says with this alpha; None: all alike.
    """

    config_class = PeagleConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["PeagleLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True

    config: PeagleConfig
    d2t: Tensor | None
    t2d: Tensor | None
    verifier_head: VerifierHead | None
    draft_head: VerifierHead | None
    heads_are_one: bool

    def __init__(self, config: PeagleConfig):
        super().__init__(config)
        layer_config = config.transformer_layer_config
        size, eps, states_size = layer_config.hidden_size, layer_config.rms_norm_eps, config.num_aux_hidden_states
        self.embed_tokens = nn.Embedding(layer_config.vocab_size, size)
        self.mask_hidden = nn.Parameter(torch.empty(1, 1, states_size * size))
        self.input_norm = RMSNorm(states_size * size, eps) if config.norm_before_fc else nn.Identity()
        self.fc = nn.Linear(states_size * size, size, bias=False)
        self.layers = nn.ModuleList(PeagleLayer(config, index) for index in range(layer_config.num_hidden_layers))
        self.norm = RMSNorm(size, eps)
        self.rotary_emb = LlamaRotaryEmbedding(layer_config)
        self.lm_head = DraftHead(size, config.draft_vocab_size, bias=False)
        if config.draft_vocab_size < layer_config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(layer_config.vocab_size, dtype=torch.bool))
        else:
            self.d2t = self.t2d = None
        self.__dict__["verifier_head"] = self.__dict__["draft_head"] = None
        self.loss_weights = parse_loss("kl_div")
        self.depth_loss_decay = 1.0
        self.dpace_alpha: float | None = None
        self.model_tags = list(HUB_TAGS)
        self._check_attention()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PeagleForSpeculation):
            init.normal_(module.mask_hidden)
            for attention in module.modules():
                if isinstance(attention, PeagleAttention):
                    attention.look_at_own_position()
            if module.d2t is not None and module.t2d is not None:
                ids = torch.arange(module.config.vocab_size, device=module.d2t.device)
                init.zeros_(module.d2t)
                init.copy_(module.t2d, ids < module.config.draft_vocab_size)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.set_attn_implementation`.

        Raises:
            PeagleError: a drafter has no such attention.
        """
        super().set_attn_implementation(*args, **kwargs)
        self._check_attention()

    def _check_attention(self) -> None:
        name = self.config._attn_implementation
        if name not in ATTENTION:
            raise PeagleError(f"A drafter has no attention called {name!r}. Take one of {', '.join(ATTENTION)}.")

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        """As `PreTrainedModel.push_to_hub`, for a verifier that is on the hub; `peagle-hf push` also writes the card.

        Raises:
            PeagleError: the verifier is a local path.
        """
        hub_verifier(self.config.verifier_name_or_path)
        return super().push_to_hub(*args, **kwargs)

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
        train_head: bool = False,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Read what training needs of the verifier, its final norm and head, and attach it; no other weight is read.

        Args:
            initialize: also start the drafter's token embeddings and head from the verifier's.
            train_head: see `attach_verifier`.
            dtype: of the verifier's head; default: as saved.
        """
        head = VerifierHead.from_pretrained(name_or_path, dtype, revision, trust_remote_code)
        self._check_head(head)
        if initialize:
            with torch.no_grad():
                self.embed_tokens.weight.copy_(load_embedding(name_or_path, None, revision, trust_remote_code))
                self.lm_head.weight.copy_(self._restricted(head).weight)
        self.attach_verifier(head, train_head)

    def attach_verifier(self, head: VerifierHead, train_head: bool = False) -> None:
        """Make the drafter ready to be trained: the verifier's head gives the targets.

        What isn't trained takes the dtype of `head`, and a frozen head that is the verifier's is one tensor with it.

        Args:
            train_head: also train the drafter's own head.

        Raises:
            PeagleError: the head's sizes are not those of this drafter's verifier.
        """
        self._check_head(head)
        self.embed_tokens.weight.requires_grad_(self.config.embed_requires_grad)
        self.lm_head.weight.requires_grad_(train_head)
        for module in (self.embed_tokens, self.lm_head):
            if not module.weight.requires_grad:
                module.to(head.weight.dtype)
        draft_head = self._restricted(head)
        # Set around nn.Module, so that the heads are no part of the state dict, of DDP's buffers or of FSDP's shards.
        self.__dict__["verifier_head"], self.__dict__["draft_head"] = head, draft_head
        same = not train_head and torch.equal(draft_head.weight, self.lm_head.weight.to(draft_head.weight.device))
        self.__dict__["heads_are_one"] = same

    def _restricted(self, head: VerifierHead) -> VerifierHead:
        """The verifier's head over the draft vocabulary."""
        token_ids = self.draft_token_ids
        return head if token_ids is None else head.restrict(token_ids.to(head.weight.device))

    def _check_head(self, head: VerifierHead) -> None:
        expected = (self.config.vocab_size, self.config.hidden_size)
        if tuple(head.weight.shape) != expected:
            raise PeagleError(
                f"The verifier's head is {tuple(head.weight.shape)}, this drafter was made for {expected} "
                f"({self.config.verifier_name_or_path}). Name the verifier that the drafter belongs to."
            )

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
        max_length: int | None = None,
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
            max_length: positions of the longest document, known without asking the device; default: L.
            num_items_in_batch: what the summed loss is divided by.
        """
        device = input_ids.device
        anchor, depth = anchors[0], depths[0]
        rows = Rows(
            anchor,
            depth,
            document_ids[0],
            None if learnt_rows is None else learnt_rows[0],
            document_ids.numel() if max_length is None else max_length,
            self.config._attn_implementation,
        )
        states = self._run(rows, input_ids, hidden_states, rows.pad(position_ids[0])[None])
        if labels is None:
            return PeagleOutput(logits=self.lm_head(states))

        assert learnt_rows is not None
        assert target_states is not None
        assert target_index is not None
        if self.verifier_head is None or self.draft_head is None:
            raise PeagleError("The loss needs the verifier's head: call load_verifier(name_or_path) before training.")
        draft_head = self.draft_head.to(device)
        with torch.no_grad():
            teacher = draft_head.normalize(target_states[0])

        def weights_by_chance(chance: Tensor) -> Tensor:
            anchors_N, depths_N = anchor[learnt_rows[0]], depth[learnt_rows[0]]
            row_weight = self.depth_loss_decay ** depths_N.to(chance.dtype)
            if self.dpace_alpha is None:
                return row_weight
            sizes = document_ids.numel(), self.config.num_depths
            return row_weight * survival_weights(chance, anchors_N, depths_N, *sizes, self.dpace_alpha)

        def loss_of(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if self.heads_are_one and not weight.requires_grad:
                draft_head.weight = weight.detach()
            index = target_index[0]
            is_weighted = self.training and (self.depth_loss_decay != 1 or self.dpace_alpha is not None)
            row_weights = weights_by_chance if is_weighted else None
            return distillation_loss(states, weight, teacher, draft_head.logits, index, self.loss_weights, row_weights)

        loss, student_N, teacher_U = self.lm_head(states[0], loss_of)
        token_ids = self.draft_token_ids
        if token_ids is not None:
            student_N = token_ids[student_N]
            if self.training:
                teacher_U = token_ids[teacher_U]
            else:
                # Over the whole vocabulary: a token that the drafter doesn't have is one that it can't match.
                verifier = self.verifier_head.to(device)
                chunks = teacher.split(max(1, CHUNK_ELEMENTS[device.type] // self.config.vocab_size))
                with torch.no_grad():
                    teacher_U = torch.cat([verifier.logits(chunk).argmax(-1) for chunk in chunks])
        teacher_N = teacher_U[target_index[0]]
        learnt_R = labels[0] != -100
        correct_R, follows_R = torch.zeros_like(learnt_R), torch.zeros_like(learnt_R)
        correct_R[learnt_rows[0]] = student_N == teacher_N
        follows_R[learnt_rows[0]] = labels[0, learnt_rows[0]] == teacher_N
        num_depths = self.config.num_depths
        reached_R = follow_rollouts(correct_R, follows_R, learnt_R, anchor, depth, num_depths)
        counters = count_by_depth(correct_R, learnt_R, reached_R, depth, num_depths)
        outcomes = None
        if not self.training:
            outcomes = outcomes_by_anchor(correct_R, reached_R, anchor, document_ids[0], position_ids[0])
        divisor = student_N.numel() if num_items_in_batch is None else num_items_in_batch
        return PeagleOutput(loss=loss / torch.as_tensor(divisor).clamp(min=1), counters=counters, outcomes=outcomes)

    @torch.no_grad()
    def draft(
        self, input_ids: Tensor, hidden_states: Tensor, mask: Tensor, num_depths: int, cache: DynamicCache
    ) -> Tensor:
        """Propose K tokens after each of B sequences, as rows of depth 0 .. K-1 at its last position.

        Args:
            input_ids: int64 [B, S_new], the token that each new position sees: the one after its own.
            hidden_states: [B, S_new, A * H], the verifier's auxiliary states of each new position.
            mask: bool [B, S], which positions are real, those of earlier calls first; at least one new one is.
            num_depths: K, which may be another than in training.
            cache: keys and values of earlier calls' positions; it takes those of the new ones.

        Returns:
            [B, K, Vd], scores over the draft vocabulary.
        """
        places = torch.arange(mask.shape[1], device=mask.device)
        rows = DraftRows(mask, torch.where(mask, places, 0).amax(1), num_depths, cache)
        states = self._run(rows, input_ids, hidden_states, rows.position_ids)
        rows.finish()
        return self.lm_head(states)

    def _run(self, rows: AnyRows, input_ids: Tensor, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        """The normed states after the last layer of the rows that are asked for."""
        device, num_sequences = input_ids.device.type, len(input_ids)
        mixed_precision = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed_precision else self.fc.weight.dtype
        mask_token = input_ids.new_full((num_sequences, 1), self.config.mask_token_id)
        embeds = self.embed_tokens(torch.cat([input_ids, mask_token], dim=1)).to(dtype)
        parts = (hidden_states.to(dtype), self.mask_hidden.to(dtype).expand(num_sequences, -1, -1))
        states = torch.cat([self.fc(self.input_norm(part)) for part in parts], dim=1)
        rows.place(self.rotary_emb(states, position_ids))
        states = self.layers[0](states, rows, embeds)
        for layer in self.layers[1:]:
            states = layer(states, rows)
        return rows.trim(self.norm(states))


AutoModel.register(PeagleConfig, PeagleForSpeculation)
