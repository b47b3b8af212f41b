"""Where a verifier's decoder layers, final norm and head are, by architecture, and its residual streams.

Shape letters: B sequences of a batch, T tokens, A auxiliary layers, H hidden size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PeagleError

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "norm_f", "embedding_norm")


@dataclass(frozen=True)
class VerifierParts:
    """The modules of a verifier that a drafter needs, and how its logits are computed.

    Its logits are softcap * tanh(z / softcap), or z without a softcap, with z = logit_scale * head(final_norm(stream)).

    Args:
        decoder: the module that runs all layers when called with `input_ids` and `use_cache`.
        layers: its layers in order; the input of layer l is the residual stream after l layers.
        final_norm: the norm whose input is the residual stream after the last layer.
        head: the linear layer from the normed stream to logits, with `weight` and perhaps `bias`.
        logit_scale: factor of the logits.
        logit_softcap: bound of the logits, None for none.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module
    head: nn.Module
    logit_scale: float = 1.0
    logit_softcap: float | None = None


_PARTS_OF: dict[str, Callable[[Any], VerifierParts]] = {}


def register_verifier(model_type: str, parts_of: Callable[[Any], VerifierParts]) -> None:
    """Support a verifier architecture whose modules have other names than the usual ones of transformers.

    Args:
        model_type: of its configuration; of a multimodal model that of the text part.
        parts_of: finds the parts in a model of this type, with or without weights.
    """
    _PARTS_OF[model_type] = parts_of


def verifier_parts(model: PreTrainedModel) -> VerifierParts:
    """Find a verifier's parts: by the function registered for its type, or by the usual names of transformers.

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


def parts_with_head(model: PreTrainedModel) -> VerifierParts:
    """A verifier's parts, as `verifier_parts`, where its head is needed.

    Raises:
        PeagleError: see `verifier_parts`, or it has no head.
    """
    parts = verifier_parts(model)
    if getattr(parts.head, "weight", None) is None:
        raise PeagleError(
            f"{type(model).__name__} can't be a verifier: it has no output head with a weight. Choose another model."
        )
    return parts


def verifier_embeddings(model: PreTrainedModel) -> nn.Module:
    """A verifier's token embeddings, with which a new drafter begins.

    Raises:
        PeagleError: they aren't found, or are other than one vector of the hidden size for each token.
    """
    config = model.config.get_text_config(decoder=True)
    wanted = (config.vocab_size, config.hidden_size)
    try:
        embeddings: Any = model.get_input_embeddings()
        found = tuple(embeddings.weight.shape)
    except (AttributeError, NotImplementedError) as error:
        raise PeagleError(
            f"{type(model).__name__} can't be a verifier: its token embeddings aren't found ({error}). Choose another "
            "model."
        ) from error
    if found != wanted:
        raise PeagleError(
            f"{type(model).__name__} can't be a verifier: its token embeddings have the shape {found}, but a drafter "
            f"takes one vector of the hidden size for each token of the vocabulary, {wanted}. Choose another model."
        )
    return cast(nn.Module, embeddings)


def _usual_parts(model: PreTrainedModel) -> VerifierParts:
    """The parts by the names that most decoders of transformers give them."""
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
    """Factor of the logits in this architecture; some divide by the field that others multiply by."""
    if config.model_type.startswith(("granite", "minicpm3")):
        return 1.0 / getattr(config, "logits_scaling", 1.0)
    fields = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
    return next((getattr(config, name) for name in fields if getattr(config, name, None) is not None), 1.0)


def rotary_border(config: PreTrainedConfig) -> float:
    """Tokens of the longest texts with the rotary embedding of short ones; longer ones have another from the start."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    by_layer_type = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    borders = [one["original_max_position_embeddings"] for one in by_layer_type if one.get("rope_type") == "longrope"]
    return min(borders, default=math.inf)


@contextmanager
def recorded_streams(
    model: PreTrainedModel, layer_ids: Iterable[int], dtype: torch.dtype
) -> Iterator[dict[int, Tensor]]:
    """Record residual streams [B, T, H], not normed, in every forward pass within the block.

    Args:
        layer_ids: numbers of layers passed: 0 is the embeddings, the number of all layers the final norm's input.

    Yields:
        The streams of the latest forward pass, by layer id.
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


def residual_streams(model: PreTrainedModel, layer_ids: Sequence[int], ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Run the decoder; returns the residual streams [B, T, A+1, H] after `layer_ids` layers and after the last one.

    None of them is normed, also not the one after the last layer.

    Args:
        layer_ids: numbers of layers passed; 0 is the embeddings.
        ids_BT: token ids, int64 [B, T], padded on the right.
        dtype: of the result.
    """
    parts = verifier_parts(model)
    all_ids = [*layer_ids, len(parts.layers)]
    with recorded_streams(model, all_ids, dtype) as streams:
        parts.decoder(input_ids=ids_BT.to(model.device), use_cache=False)
    return torch.stack([streams[layer_id] for layer_id in all_ids], dim=2)
