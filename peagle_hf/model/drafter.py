"""`PeagleForSpeculation`: the drafter. Slots in (see `slots`), states or logits out.

Shape letters: L positions, R slots, N slots that give an output, A auxiliary states, H hidden size, V verifier
vocabulary, Vd draft vocabulary. A batch of `forward` is one packed sequence, so every tensor has a first dimension of
1; `draft` takes B sequences side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import ModelOutput

from ..cpu import use_onednn
from ..errors import PeagleError
from ..verifier.head import VerifierHead, load_embedding
from ..verifier.loading import hub_verifier
from .attention import ATTENTION
from .config import PeagleConfig
from .forward_slots import DraftSlots, PackedSlots, PassSlots
from .layers import PeagleAttention, PeagleLayer, RMSNorm, StateNorms

HUB_TAGS = ("speculative-decoding", "speculators", "eagle3", "p-eagle", "vllm")

HeadFunction = Callable[[Tensor, Tensor], Any]
"""(normed states [N, H], the head's weight [Vd, H]) -> anything, such as a loss that never holds all logits."""


@dataclass
class PeagleOutput(ModelOutput):
    """Logits of a drafter.

    Args:
        logits: [1, N, Vd], scores over the draft vocabulary.
    """

    logits: Tensor | None = None


class DraftHead(nn.Linear):
    """The drafter's head. Its weight is used only within `forward`, for which FSDP and ZeRO gather the shards."""

    def forward(self, states: Tensor, head_function: HeadFunction | None = None) -> Any:
        """Logits [..., Vd] of states [..., H], or the result of `head_function(states, weight [Vd, H])`."""
        return super().forward(states) if head_function is None else head_function(states, self.weight)


class PeagleForSpeculation(PreTrainedModel):
    """A P-EAGLE drafter: K tokens in one forward pass from the verifier's hidden states (arXiv 2602.01469).

    `forward` runs the slots of a packed sequence, `draft` proposes the next K tokens. The loss is that of
    `peagle_hf.training.objective`. `save_pretrained` writes what vLLM serves.

    Attributes:
        is_ready_to_train: whether `load_verifier` or `set_trained` has been called.
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
    if TYPE_CHECKING:  # the decorator of the inherited one hides its arguments

        def to(self, *args: Any, **kwargs: Any) -> "PeagleForSpeculation": ...  # type: ignore[override]

    def __init__(self, config: PeagleConfig):
        super().__init__(config)
        layer_config = config.transformer_layer_config
        size, eps, states_size = layer_config.hidden_size, layer_config.rms_norm_eps, config.num_aux_hidden_states
        self.embed_tokens = nn.Embedding(layer_config.vocab_size, size)
        self.mask_hidden = nn.Parameter(torch.empty(1, 1, states_size * size))
        self.input_norm = RMSNorm(states_size * size, eps) if config.norm_before_fc else nn.Identity()
        self.fc_norm = StateNorms(states_size, size, eps) if config.has_fc_norm else nn.Identity()
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
        use_onednn(self)
        self.is_ready_to_train = False
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
        """Choose how attention is computed, as `PreTrainedModel.set_attn_implementation` does.

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

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
    ) -> nn.Embedding:
        """The token embeddings, whose number is the verifier's.

        Raises:
            PeagleError: another number is asked for.
        """
        if new_num_tokens not in (None, self.config.vocab_size) or pad_to_multiple_of is not None:
            raise PeagleError(
                f"A drafter has the vocabulary of its verifier, {self.config.vocab_size} tokens, and can't be resized. "
                "Train a new drafter for the verifier with other tokens; --draft-vocab-size makes its head smaller."
            )
        return self.embed_tokens

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        """Push a drafter whose verifier is on the hub, as `PreTrainedModel.push_to_hub` does.

        `peagle-hf push` writes the model card as well.

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
        """Set the vocabulary maps, d2t int64 [Vd] and t2d bool [V] (see `verifier.draft_vocabulary`)."""
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
    ) -> VerifierHead:
        """Read the verifier's final norm and head, and make the drafter ready to be trained for them.

        Args:
            initialize: also start the drafter's token embeddings and head from the verifier's.
            train_head: see `set_trained`.
            dtype: of the verifier's head and of what is frozen; default: as saved.

        Returns:
            the verifier's head, which `training.objective.Objective` takes.

        Raises:
            PeagleError: the verifier can't be read, or its sizes are not those of this drafter's verifier.
        """
        head = VerifierHead.from_pretrained(name_or_path, dtype, revision, trust_remote_code)
        self.check_head(head)
        if initialize:
            with torch.no_grad():
                self.embed_tokens.weight.copy_(load_embedding(name_or_path, None, revision, trust_remote_code))
                self.lm_head.weight.copy_(self.restricted(head).weight)
        self.set_trained(train_head, head.weight.dtype)
        return head

    def set_trained(self, train_head: bool, dtype: torch.dtype) -> None:
        """Set whether the drafter's head is trained; embeddings are if the configuration says so.

        Args:
            dtype: what isn't trained takes it.
        """
        self.embed_tokens.weight.requires_grad_(self.config.embed_requires_grad)
        self.lm_head.weight.requires_grad_(train_head)
        for module in (self.embed_tokens, self.lm_head):
            if not module.weight.requires_grad:
                module.to(dtype)
        self.is_ready_to_train = True

    def restricted(self, head: VerifierHead) -> VerifierHead:
        """The verifier's head over the draft vocabulary."""
        token_ids = self.draft_token_ids
        return head if token_ids is None else head.restrict(token_ids.to(head.weight.device))

    def check_head(self, head: VerifierHead) -> None:
        """Refuse a verifier's head of other sizes than this drafter was made for.

        Raises:
            PeagleError: the head has other sizes; the message names both.
        """
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
        trained_slots: Tensor | None = None,
        max_length: int | None = None,
        head_function: HeadFunction | None = None,
    ) -> Any:
        """Run the slots of one packed sequence.

        Args:
            input_ids: int64 [1, L], the token that each position sees.
            hidden_states: [1, L, A * H], the verifier's auxiliary states of each position.
            anchors: int64 [1, R], as positions of this batch; the first L slots are the positions themselves.
            depths: int64 [1, R].
            document_ids: int64 [1, L], -1 for padding.
            position_ids: int64 [1, R], place in the sample, anchor + depth.
            trained_slots: int64 [1, N], numbers of the slots to compute in the last layer; default: all R.
            max_length: positions of the longest sample, known without asking the device; default: L.
            head_function: given the normed states [N, H] and the head's weight [Vd, H]; its result is returned.

        Returns:
            `PeagleOutput` with the logits, or the result of `head_function`.
        """
        slots = PackedSlots(
            anchors[0],
            depths[0],
            document_ids[0],
            None if trained_slots is None else trained_slots[0],
            document_ids.numel() if max_length is None else max_length,
            self.config._attn_implementation,
        )
        states = self._run(slots, input_ids, hidden_states, slots.pad(position_ids[0])[None])
        if head_function is not None:
            return self.lm_head(states[0], head_function)
        return PeagleOutput(logits=self.lm_head(states))

    @torch.no_grad()
    def draft(
        self, input_ids: Tensor, hidden_states: Tensor, mask: Tensor, num_depths: int, cache: DynamicCache
    ) -> Tensor:
        """Propose K tokens after each of B sequences, by the slots of depth 0 .. K-1 at its last position.

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
        slots = DraftSlots(mask, torch.where(mask, places, 0).amax(1), num_depths, cache)
        states = self._run(slots, input_ids, hidden_states, slots.position_ids)
        slots.finish()
        return self.lm_head(states)

    def _run(self, slots: PassSlots, input_ids: Tensor, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        """The normed states after the last layer, of the slots that give an output."""
        device, num_sequences = input_ids.device.type, len(input_ids)
        mixed_precision = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed_precision else self.fc.weight.dtype
        mask_token = input_ids.new_full((num_sequences, 1), self.config.mask_token_id)
        embeds = self.embed_tokens(torch.cat([input_ids, mask_token], dim=1)).to(dtype)
        parts = (hidden_states.to(dtype), self.mask_hidden.to(dtype).expand(num_sequences, -1, -1))
        states = torch.cat([self.fc(self.fc_norm(self.input_norm(part))) for part in parts], dim=1)
        slots.set_rotary(self.rotary_emb(states, position_ids))
        states = self.layers[0](states, slots, embeds)
        for layer in self.layers[1:]:
            states = layer(states, slots)
        return slots.trim(self.norm(states))


AutoModel.register(PeagleConfig, PeagleForSpeculation)
