"""`PeagleConfig`: what a drafter checkpoint's `config.json` says, and nothing else."""

import logging
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

from huggingface_hub.dataclasses import strict
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..errors import PeagleError
from ..verifier.loading import default_aux_layer_ids, load_verifier_config, load_verifier_tokenizer

logger = logging.getLogger(__name__)

DRAFT_MODEL_TYPES = ("llama", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding that transformers and vLLM compute alike, whatever the length of a text."""
SPECULATORS_VERSION = "0.9.0"
VLLM_AUX_HIDDEN_STATES = 3
"""How many verifier states vLLM expects unless `num_aux_hidden_states` in the layer configuration says otherwise."""
T = TypeVar("T")
UNSET: Any = None
# A field that may be left out is None until the configuration is made, so `strict` needs `Optional`. mypy sees the type
# that the field has from then on.
if TYPE_CHECKING:
    Filled = Annotated[T, "may be left out, and is never None once the configuration is made"]
else:
    Filled = Optional
REQUIRED = ("transformer_layer_config", "speculators_config", "mask_token_id", "eagle_aux_hidden_state_layer_ids")
"""Fields that a saved configuration must have; no default could be right for its drafter."""
NOT_OF_A_DRAFTER = (
    "This is the configuration of a {} model, not of a drafter. Name a folder that training wrote, such as "
    "checkpoints/checkpoint_best; the verifier is known from there."
)


@strict
class PeagleConfig(PreTrainedConfig):
    r"""Configuration of a P-EAGLE drafter, in the format that vLLM reads (`speculators_model_type` "peagle").

    Every field is written to `config.json`, defaults too, because vLLM's own defaults differ. A `config.json` that
    vLLM's speculators 0.9.0 wrote loads as it is. The defaults describe a drafter of four Llama layers for a verifier
    of `LlamaConfig`'s default sizes; `from_verifier` gives one that fits a verifier.

    Attributes:
        transformer_layer_config: the draft decoder's own configuration (Llama or Qwen3), or its fields as a dict with
            `model_type`. Its `hidden_size` and `vocab_size` are the verifier's, its `num_hidden_layers` the drafter's.
            With `fc_norm` true in it each verifier state passes an RMSNorm of its own before `fc` (`has_fc_norm`).
        speculators_config: algorithm, proposal method and verifier (`name_or_path`, `architectures`). Only the verifier
            is read; the rest is written when the configuration is saved. Serving and export need the verifier's name.
        draft_vocab_size: rows of the drafter's head, V_d; None means the verifier's whole vocabulary.
        mask_token_id: the token that stands at depths >= 1, where the real token is not known yet.
        eagle_aux_hidden_state_layer_ids: the verifier's residual streams that the drafter reads, by number of layers
            passed (0 = embeddings, l = after layer l).
        norm_before_residual: whether layer 0's residual is the normed verifier state (True) or the raw one.
        norm_before_fc: whether the concatenated verifier states pass one RMSNorm before `fc`; not with `has_fc_norm`.
        embed_requires_grad: whether the token embeddings are trained.
        num_depths: K, the tokens proposed in one forward pass (depths 0 .. K-1).
        down_sample_ratio: r of COD sampling; depth d keeps the fraction max(r^d, r_min) of the learnt positions.
        down_sample_ratio_min: r_min of COD sampling.
        max_anchors: the most positions of a document that rollouts start from; None means all.

    Raises:
        PeagleError: a field has a value that no drafter of this format can have; the message names the field.
    """

    model_type = "speculators"
    # Without this, transformers would leave fields with their default values out of config.json.
    has_no_defaults_at_init = True

    speculators_model_type: str = "peagle"
    speculators_version: str = SPECULATORS_VERSION
    speculators_config: Filled[dict[str, Any]] = UNSET
    transformer_layer_config: Any = None
    draft_vocab_size: Filled[int] = UNSET
    mask_token_id: Filled[int] = 0
    eagle_aux_hidden_state_layer_ids: Filled[list[int]] = UNSET
    norm_before_residual: bool = True
    norm_before_fc: bool = False
    embed_requires_grad: bool = True
    fc_norm: bool = False
    norm_output: bool = False
    target_hidden_size: int | None = None
    num_depths: Filled[int] = UNSET
    down_sample_ratio: float = 0.7
    down_sample_ratio_min: float = 0.2
    max_anchors: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.speculators_model_type != "peagle":
            raise PeagleError(
                f"speculators_model_type is {self.speculators_model_type!r}; peagle_hf reads and trains 'peagle' "
                "drafters only. Use the library that made this checkpoint."
            )
        if self.mask_token_id is None:
            raise PeagleError("The drafter's configuration has no mask_token_id. Name the token that masks the rest.")
        layer_config = self.transformer_layer_config
        if layer_config is None:
            layer_config = LlamaConfig(num_hidden_layers=4)
        if isinstance(layer_config, dict):
            model_type = layer_config.get("model_type", "llama")
            _check_draft_model_type(model_type)
            fields = {key: value for key, value in layer_config.items() if key != "model_type"}
            layer_config = CONFIG_MAPPING[model_type](**fields)
        _check_draft_model_type(layer_config.model_type)
        self.transformer_layer_config = layer_config

        if self.draft_vocab_size is None:
            self.draft_vocab_size = layer_config.vocab_size
        if self.eagle_aux_hidden_state_layer_ids is None:
            self.eagle_aux_hidden_state_layer_ids = default_aux_layer_ids(LlamaConfig().num_hidden_layers)
        given = self.speculators_config or {}
        if self.num_depths is None:
            methods = given.get("proposal_methods") or [{}]
            self.num_depths = methods[0].get("speculative_tokens", 8)
        self.speculators_config = {
            "algorithm": "peagle",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": self.num_depths}],
            "default_proposal_method": "greedy",
            "verifier": given.get("verifier") or {"name_or_path": None, "architectures": []},
        }
        super().__post_init__(**kwargs)
        self._check_values()

    @classmethod
    def from_verifier(
        cls,
        verifier: str,
        *,
        num_layers: int = 4,
        num_depths: int = 8,
        draft_arch: str | None = None,
        draft_vocab_size: int | None = None,
        mask_token_id: int | None = None,
        target_layer_ids: list[int] | None = None,
        norm_before_residual: bool = True,
        norm_before_fc: bool = False,
        fc_norm: bool = False,
        embed_requires_grad: bool = True,
        sliding_window: int | None = None,
        down_sample_ratio: float = 0.7,
        down_sample_ratio_min: float = 0.2,
        max_anchors: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "PeagleConfig":
        """The configuration of a new drafter, its decoder layers sized like the verifier's own.

        Args:
            verifier: hub name or folder of the verifier.
            draft_arch: "llama" or "qwen3", the kind of the draft layers, not of the verifier; default: qwen3.
            mask_token_id: default: see `choose_mask_token`; which one is logged.
            target_layer_ids: default: see `verifier.loading.default_aux_layer_ids`.
            fc_norm: whether each verifier state passes an RMSNorm of its own before `fc`.
            sliding_window: of every draft layer, in tokens; None means full attention.
        """
        target = load_verifier_config(verifier, revision=revision, trust_remote_code=trust_remote_code)
        # The layers of Gemma 4 differ in size; the drafter may take the sizes of any of them.
        target.allow_global_per_layer_attribute_access = True
        layer_ids = target_layer_ids or default_aux_layer_ids(target.num_hidden_layers)
        if mask_token_id is None:
            tokenizer = load_verifier_tokenizer(verifier, revision, trust_remote_code)
            mask_token_id, reason = choose_mask_token(tokenizer, target.vocab_size)
            logger.info("Mask token: %d, %s.", mask_token_id, reason)
        layer_config = _layer_config(target, draft_arch or "qwen3", num_layers, sliding_window)
        if len(layer_ids) != VLLM_AUX_HIDDEN_STATES:
            layer_config.num_aux_hidden_states = len(layer_ids)
        if fc_norm:
            layer_config.fc_norm = True
        return cls(
            transformer_layer_config=layer_config,
            speculators_config={"verifier": {"name_or_path": verifier, "architectures": target.architectures or []}},
            draft_vocab_size=target.vocab_size if draft_vocab_size is None else draft_vocab_size,
            mask_token_id=mask_token_id,
            eagle_aux_hidden_state_layer_ids=layer_ids,
            norm_before_residual=norm_before_residual,
            norm_before_fc=norm_before_fc,
            embed_requires_grad=embed_requires_grad,
            num_depths=num_depths,
            down_sample_ratio=down_sample_ratio,
            down_sample_ratio_min=down_sample_ratio_min,
            max_anchors=max_anchors,
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like `PreTrainedConfig.from_dict`, for the fields of a saved configuration.

        Raises:
            PeagleError: a field is missing without which the drafter can't be what it was; names it.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise PeagleError(NOT_OF_A_DRAFTER.format(model_type))
        missing = [name for name in REQUIRED if config_dict.get(name) is None]
        if missing:
            raise PeagleError(f"The drafter's config.json lacks {', '.join(missing)}. Export the drafter again.")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields; `speculators_config` proposes `num_depths` tokens, also if that was changed since."""
        fields = super().to_dict()
        fields["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = self.num_depths
        return fields

    def differences(self, other: "PeagleConfig") -> dict[str, tuple[Any, Any]]:
        """The fields in which a run with `other` would be another run: (value here, value there) by name."""
        ours, theirs = (flatten(config.to_dict()) for config in (self, other))
        names = sorted(ours.keys() | theirs.keys())
        return {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}

    def _check_values(self) -> None:
        vocab_size, hidden_size = self.transformer_layer_config.vocab_size, self.transformer_layer_config.hidden_size
        rotated = (self.transformer_layer_config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        layer_ids = self.eagle_aux_hidden_state_layer_ids
        wrong = []
        if not 1 <= self.draft_vocab_size <= vocab_size:
            wrong.append(
                f"draft_vocab_size {self.draft_vocab_size} is not in 1..{vocab_size}, the verifier's vocabulary"
            )
        if not 0 <= self.mask_token_id < vocab_size:
            wrong.append(f"mask_token_id {self.mask_token_id} is outside the vocabulary of {vocab_size}")
        if not layer_ids or min(layer_ids) < 0 or len(set(layer_ids)) != len(layer_ids):
            wrong.append(f"eagle_aux_hidden_state_layer_ids {layer_ids} must be distinct ids >= 0")
        if self.fc_norm:
            wrong.append("fc_norm belongs into transformer_layer_config: vLLM ignores it elsewhere for P-EAGLE")
        if self.norm_output:
            wrong.append("norm_output is not supported: vLLM ignores it for P-EAGLE drafters")
        if self.norm_before_fc and self.has_fc_norm:
            wrong.append("norm_before_fc and fc_norm are both set, but the states need one of these norms only")
        if self.target_hidden_size not in (None, hidden_size):
            wrong.append(f"target_hidden_size {self.target_hidden_size} differs from the drafter's {hidden_size}")
        if rotated != 1.0:
            wrong.append(f"partial_rotary_factor {rotated} is not supported: drafters rotate whole heads")
        wrong += wrong_sampling(self)
        if wrong:
            raise PeagleError(
                f"The drafter's configuration can't be used: {'; '.join(wrong)}. Correct it and try again."
            )

    @property
    def hidden_size(self) -> int:
        return self.transformer_layer_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.transformer_layer_config.vocab_size

    @property
    def num_aux_hidden_states(self) -> int:
        """A, the number of verifier states that the drafter reads."""
        return len(self.eagle_aux_hidden_state_layer_ids)

    @property
    def has_fc_norm(self) -> bool:
        """Whether each verifier state passes an RMSNorm of its own before `fc`."""
        return bool(getattr(self.transformer_layer_config, "fc_norm", False))

    @property
    def verifier_name_or_path(self) -> str | None:
        return self.speculators_config["verifier"].get("name_or_path")


def wrong_sampling(of: Any) -> list[str]:
    """What is wrong with the settings of COD sampling of a configuration or a collator, as parts of a sentence."""
    wrong = []
    if of.num_depths < 1:
        wrong.append(f"num_depths {of.num_depths} must be at least 1")
    if not 0 < of.down_sample_ratio <= 1:
        wrong.append(f"down_sample_ratio {of.down_sample_ratio} is not in (0, 1]")
    if not 0 <= of.down_sample_ratio_min <= 1:
        wrong.append(f"down_sample_ratio_min {of.down_sample_ratio_min} is not in [0, 1]")
    if of.max_anchors is not None and of.max_anchors < 1:
        wrong.append(f"max_anchors {of.max_anchors} must be at least 1")
    return wrong


UNRELATED_TO_TRAINING = {
    "_name_or_path",
    "architectures",
    "dtype",
    "speculators_version",
    "transformers_version",
    "use_cache",
}


def flatten(fields: dict[str, Any]) -> dict[str, Any]:
    """Nested fields by dotted names, without those that change nothing in training."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": content for inner, content in flatten(value).items()}
        elif name not in UNRELATED_TO_TRAINING:
            found[name] = value
    return found


def choose_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[int, str]:
    """The token that stands where the real one is not known yet, and why this one.

    The tokenizer's own mask token; else an id that no token has (models often have more embeddings than tokens); else
    the padding or end-of-text token.

    Raises:
        PeagleError: the tokenizer has none of them.
    """
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id, "the tokenizer's mask token"
    first_free = max(tokenizer.get_vocab().values()) + 1
    if first_free < vocab_size:
        return first_free, "an id that the tokenizer doesn't use"
    for kind in ("pad", "eos"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if token_id is not None:
            return token_id, f"the tokenizer's {kind} token"
    raise PeagleError("The tokenizer has no mask, unused, pad or eos token. Pass --mask-token-id with one to use.")


def _layer_config(
    target: PreTrainedConfig, draft_arch: str, num_layers: int, sliding_window: int | None
) -> PreTrainedConfig:
    """The configuration of draft layers that have the sizes of the verifier's own layers."""
    _check_draft_model_type(draft_arch)
    layer_class: Any = CONFIG_MAPPING[draft_arch]
    layer_config: PreTrainedConfig = layer_class(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=getattr(target, "intermediate_size", None) or 4 * target.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=getattr(target, "num_key_value_heads", None) or target.num_attention_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=getattr(target, "rms_norm_eps", None) or 1e-6,
        rope_parameters=_rope_parameters(target),
        tie_word_embeddings=False,
        **_window_fields(draft_arch, sliding_window, num_layers),
    )
    return layer_config


def _rope_parameters(target: PreTrainedConfig) -> dict[str, Any]:
    """The verifier's rotary embedding; of a verifier with one a layer type, that of full attention.

    Always of whole heads and of places in a text: what is for places in an image is left out. Only the base is taken
    where a part of a head is rotated, and of a kind that depends on the length of the text ("longrope", "dynamic") or
    that not every decoder knows: vLLM would rotate otherwise than training did.
    """
    parameters = getattr(target, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    is_usual = parameters.get("rope_type", "default") in ROPE_TYPES and "rope_theta" in parameters
    if not is_usual or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return {"rope_type": "default", "rope_theta": parameters.get("rope_theta", 10000.0)}
    left_out = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
    return {name: value for name, value in parameters.items() if name not in left_out}


def _window_fields(model_type: str, sliding_window: int | None, num_layers: int) -> dict[str, Any]:
    if sliding_window is None:
        return {}
    fields = {"sliding_window": sliding_window, "layer_types": ["sliding_attention"] * num_layers}
    return fields | ({"use_sliding_window": True} if model_type == "qwen3" else {})


def _check_draft_model_type(model_type: str) -> None:
    if model_type not in DRAFT_MODEL_TYPES:
        raise PeagleError(
            f"transformer_layer_config.model_type is {model_type!r}; vLLM loads P-EAGLE drafters made of "
            f"{' or '.join(DRAFT_MODEL_TYPES)} layers only. Choose one of them."
        )


AutoConfig.register(PeagleConfig.model_type, PeagleConfig)
