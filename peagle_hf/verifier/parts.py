"""What is needed of the verifier: its configuration, final norm, head, embeddings, and the draft vocabulary.

Shape letters: H hidden size, V verifier vocabulary, Vd draft vocabulary.
"""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import set_zero3_state

from ..cpu import linear
from ..errors import PeagleError
from ..fingerprint import has_weights, weights_of  # noqa: F401 (they are imported from here too)
from .quantization import ask_for_dense_weights, check_loaded, check_quantization, finish_dense_layers, quantization_of
from .weights import VerifierWeights, readable

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm")


def load_verifier_config(
    name_or_path: str | os.PathLike[str], revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Read the verifier's configuration, of a multimodal model the part for text.

    Raises:
        PeagleError: there is none, or it isn't a language model's.
    """
    config = _load_config(name_or_path, revision, trust_remote_code).get_text_config(decoder=True)
    lacking = [name for name in ("hidden_size", "num_hidden_layers", "vocab_size") if not hasattr(config, name)]
    if lacking:
        raise PeagleError(
            f"The configuration of {name_or_path} (model type {config.model_type}) has no {', '.join(lacking)}: it "
            "isn't a decoder-only language model's. Name the chat model that the drafter is to speed up."
        )
    return config


def hub_verifier(name_or_path: str | None, hub_name: str | None = None) -> str:
    """The name by which others find a verifier on the hub: `hub_name`, or else the one that was trained with.

    Raises:
        PeagleError: it is a folder, or can't be a name on the hub.
    """
    verifier = str(hub_name or name_or_path)
    try:
        validate_repo_id(verifier)
        is_on_hub = bool(hub_name) or not os.path.isdir(verifier)
    except HFValidationError:
        is_on_hub = False
    if not is_on_hub:
        raise PeagleError(
            f"The verifier {verifier} is no name on the hub but a path, where nobody else would find it to serve the "
            "drafter with. Pass --verifier-name with the verifier's name on the hub, such as Qwen/Qwen3-8B."
        )
    return verifier


def default_aux_layer_ids(num_layers: int) -> list[int]:
    """Choose the residual streams that the drafter reads, by number of layers passed (0 = embeddings).

    [2, n // 2, n - 3] as speculators and vLLM do. A verifier of fewer than 7 layers gets distinct ids all the same:
    [1, (n + 1) // 2, n - 1] from 4 layers on, else the last three of 0 .. n (two of them if there is only one layer).
    """
    if num_layers >= 7:
        return [2, num_layers // 2, num_layers - 3]
    if num_layers >= 4:
        return [1, (num_layers + 1) // 2, num_layers - 1]
    return list(range(num_layers + 1))[-3:]


def load_verifier(
    name_or_path: str | os.PathLike[str],
    dtype: torch.dtype | str,
    device: str | torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the whole verifier, in evaluation mode.

    Args:
        dtype: or its name; "auto" is the checkpoint's own.

    Raises:
        PeagleError: it can't be read, has no safetensors, lacks weights, or is quantised in a way that can't be run.
    """
    config = _load_config(name_or_path, revision, trust_remote_code)
    check_quantization(name_or_path, config)
    is_quantised = quantization_of(config) is not None
    ask_for_dense_weights(config)
    with readable(name_or_path):
        loaded: Any = _auto_class(config).from_pretrained(
            name_or_path,
            config=config,
            dtype=dtype,
            device_map=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are refused below, in words
        )
    model, found = loaded
    if mismatched := sorted(found["mismatched_keys"]):
        key, stored, wanted = mismatched[0]
        raise PeagleError(
            f"{key} of {name_or_path} has the shape {tuple(stored)}, but by its config.json it should have "
            f"{tuple(wanted)} ({len(mismatched)} weights differ so). Put the configuration and the weights of one "
            "model together."
        )
    if missing := sorted(found["missing_keys"]):
        raise PeagleError(
            f"The checkpoint {name_or_path} lacks {len(missing)} of the weights that its configuration needs: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. With random numbers in their place its "
            "hidden states would be worthless. Download or save it again."
        )
    if is_quantised:
        wanted = getattr(torch, str(dtype).removeprefix("torch."), None)  # None for "auto"
        finish_dense_layers(model, wanted)
    else:
        check_loaded(name_or_path, found["unexpected_keys"])
    return cast(PreTrainedModel, model)


@dataclass(frozen=True)
class VerifierParts:
    """Where in a verifier the things are that a drafter needs.

    Its logits are softcap * tanh(z / softcap), or z without a softcap, with z = logit_scale * head(final_norm(stream)).

    Args:
        decoder: the module that runs all layers when called with `input_ids` and `use_cache`.
        layers: its layers in order; what enters layer l is the residual stream after l layers.
        final_norm: what the residual stream enters after the last layer.
        head: the linear map from there to logits, with `weight` and perhaps `bias`.
        logit_scale: what logits are multiplied by.
        logit_softcap: what they are bounded by.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module
    head: nn.Module
    logit_scale: float = 1.0
    logit_softcap: float | None = None


_PARTS_OF: dict[str, Callable[[Any], VerifierParts]] = {}


def register_verifier(model_type: str, parts_of: Callable[[Any], VerifierParts]) -> None:
    """Make an architecture usable as a verifier whose decoder has other names than transformers' usual ones.

    Args:
        model_type: of its configuration, of a multimodal model that of the part for text.
        parts_of: finds the parts of a model of this type, loaded or still without weights.
    """
    _PARTS_OF[model_type] = parts_of


def verifier_parts(model: PreTrainedModel) -> VerifierParts:
    """Find a verifier's parts, as `register_verifier` was told or by transformers' usual names.

    Raises:
        PeagleError: the architecture has other names and isn't registered, or what is registered doesn't fit it.
    """
    model_type = model.config.get_text_config(decoder=True).model_type
    try:
        return _PARTS_OF.get(model_type, _usual_parts)(model)
    except AttributeError as error:
        raise PeagleError(
            f"{type(model).__name__} is not supported as a verifier as it is: {error}. Say where its layers, final "
            f"norm and head are with peagle_hf.register_verifier({model_type!r}, …), as docs/how-to/verifiers.md shows."
        ) from error


def _usual_parts(model: PreTrainedModel) -> VerifierParts:
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers"):
        decoder = getattr(decoder, "model", decoder)
    norms = [getattr(decoder, name) for name in FINAL_NORMS if isinstance(getattr(decoder, name, None), nn.Module)]
    if not norms:
        raise AttributeError(f"{type(decoder).__name__!r} object has none of {', '.join(FINAL_NORMS)}")
    config = model.config.get_text_config(decoder=True)
    return VerifierParts(
        decoder=decoder,
        layers=decoder.layers,
        final_norm=norms[0],
        head=model.get_output_embeddings(),
        logit_scale=_logit_scale(config),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _logit_scale(config: PreTrainedConfig) -> float:
    """What the architecture multiplies its logits by; some divide by a field that others multiply by."""
    if config.model_type.startswith(("granite", "minicpm3")):
        return 1.0 / getattr(config, "logits_scaling", 1.0)
    fields = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
    return next((getattr(config, name) for name in fields if getattr(config, name, None) is not None), 1.0)


@contextmanager
def recorded_streams(
    model: PreTrainedModel, layer_ids: Iterable[int], dtype: torch.dtype
) -> Iterator[dict[int, Tensor]]:
    """Record the residual streams [B, T, H] after so many layers, none of them normed, at every forward pass.

    Args:
        layer_ids: 0 means the embeddings, the number of layers the input of the final norm.

    Yields:
        The streams of the latest pass by layer id.
    """
    parts = verifier_parts(model)
    readers = [*parts.layers, parts.final_norm]
    streams: dict[int, Tensor] = {}

    def keep(layer_id: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            streams[layer_id] = (args[0] if args else kwargs["hidden_states"]).to(dtype, copy=True)

        return hook

    handles = [readers[id_].register_forward_pre_hook(keep(id_), with_kwargs=True) for id_ in set(layer_ids)]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


class VerifierHead(nn.Module):
    """The verifier's final norm and LM head, frozen: what turns its last residual stream into logits.

    Everything is a non-persistent buffer, so that nothing of it enters a state dict.

    Args:
        norm: the verifier's own final norm module.
        weight: [V, H].
        bias: [V].
        softcap: logits become softcap * tanh(logits / softcap).
        scale: what the logits are multiplied by.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        norm: nn.Module,
        weight: Tensor,
        bias: Tensor | None = None,
        softcap: float | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        for name, parameter in list(norm.named_parameters(recurse=False)):
            delattr(norm, name)
            norm.register_buffer(name, parameter.detach(), persistent=False)
        self.norm = norm
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.softcap, self.scale = softcap, scale

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "VerifierHead":
        """Read the norm and the head, and no other weight, of a local or hub verifier.

        Args:
            dtype: of the weights; None keeps the checkpoint's.

        Raises:
            PeagleError: the verifier can't be read, has no safetensors, or its norm or head isn't found in them.
        """
        model = _skeleton(name_or_path, revision, trust_remote_code)
        weights = VerifierWeights(name_or_path, revision, model, dtype)
        parts = verifier_parts(model)
        norm, head, embedding = parts.final_norm, parts.head, model.get_input_embeddings()
        for name, _ in list(norm.named_parameters(recurse=False)):
            setattr(norm, name, nn.Parameter(weights.read(norm, name), requires_grad=False))
        tied = head.weight is embedding.weight and not weights.of(head)
        has_bias = getattr(head, "bias", None) is not None
        return cls(
            norm,
            weights.read(embedding if tied else head, "weight"),
            weights.read(head, "bias") if has_bias else None,
            parts.logit_softcap,
            parts.logit_scale,
        )

    @classmethod
    def of(cls, model: PreTrainedModel) -> "VerifierHead":
        """The head of a loaded verifier, which stays as it is; the weight is shared."""
        parts = verifier_parts(model)
        weight, bias = (getattr(parts.head, name, None) for name in ("weight", "bias"))
        assert weight is not None
        return cls(
            deepcopy(parts.final_norm),
            weight.detach(),
            None if bias is None else bias.detach(),
            parts.logit_softcap,
            parts.logit_scale,
        )

    def restrict(self, token_ids: Tensor) -> "VerifierHead":
        """The same head for some tokens only, int64 [Vd]; its norm is shared with this one."""
        bias = None if self.bias is None else self.bias[token_ids]
        return VerifierHead(self.norm, self.weight[token_ids], bias, self.softcap, self.scale)

    def normalize(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to the last residual stream [..., H], in the head's dtype."""
        return self.norm(hidden.to(self.weight.dtype))

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [..., V] of normed states [..., H], as the verifier itself gives them."""
        logits = linear(normed, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def load_embedding(
    name_or_path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Tensor:
    """Read the verifier's token embeddings [V, H], and no other weight; None as dtype keeps the checkpoint's.

    Raises:
        PeagleError: as `VerifierHead.from_pretrained`.
    """
    model = _skeleton(name_or_path, revision, trust_remote_code)
    return VerifierWeights(name_or_path, revision, model, dtype).read(model.get_input_embeddings(), "weight")


def load_token_freq(path: str | os.PathLike[str]) -> Tensor | dict[int, int]:
    """Read `token_freq.pt`: how often each token id is learnt, a tensor indexed by id or a dict.

    Raises:
        PeagleError: there is no such file, or it holds something else.
    """
    try:
        token_freq = torch.load(path, weights_only=True) if zipfile.is_zipfile(path) else None
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise PeagleError(f"The token counts {path} can't be read: {error} Run peagle-hf prepare again.") from error
    if isinstance(token_freq, Tensor) and token_freq.ndim == 1:
        return token_freq
    if isinstance(token_freq, dict) and all(type(id_) is type(n) is int and id_ >= 0 for id_, n in token_freq.items()):
        return token_freq
    raise PeagleError(f"{path} is no file of token counts, or a damaged one. Run peagle-hf prepare again.")


def draft_vocabulary(token_freq: Tensor | Mapping[int, int], size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Choose the `size` most frequent tokens, the lower id first among equals, and map them.

    Where fewer tokens were seen, the lowest unused ids fill up.

    Returns:
        d2t int64 [Vd], the verifier's id of draft token i minus i, ids ascending; t2d bool [V], the drafted ids.

    Raises:
        PeagleError: `size` is not in 1 .. `vocab_size`, or a counted id is outside the vocabulary.
    """
    if not 1 <= size <= vocab_size:
        raise PeagleError(
            f"draft_vocab_size is {size}, but the verifier's vocabulary has {vocab_size} tokens. "
            f"Choose a size in 1 .. {vocab_size}, or leave it out to draft the whole vocabulary."
        )
    pairs = enumerate(token_freq.tolist()) if isinstance(token_freq, Tensor) else token_freq.items()
    seen = {token_id: count for token_id, count in pairs if count}
    outside = [token_id for token_id in seen if not 0 <= token_id < vocab_size]
    if outside:
        raise PeagleError(
            f"The token counts name token id {outside[0]}, but the verifier's vocabulary has {vocab_size} tokens: they "
            "belong to another tokenizer. Run peagle-hf prepare with this verifier."
        )
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    counts[list(seen)] = torch.tensor(list(seen.values()), dtype=torch.int64)
    token_ids = counts.argsort(descending=True, stable=True)[:size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[token_ids] = True
    return token_ids - torch.arange(size), t2d


def _load_config(
    name_or_path: str | os.PathLike[str], revision: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    with readable(name_or_path):
        return AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)


def _auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if multimodal and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _skeleton(name_or_path: str | os.PathLike[str], revision: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """The verifier without its weights (on the meta device): module names, norm class, tied or not."""
    config = _load_config(name_or_path, revision, trust_remote_code)
    # Under ZeRO-3 transformers would cut even a model without weights into shards, unless told that this is done.
    with readable(name_or_path), set_zero3_state(), torch.device("meta"):
        return _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
