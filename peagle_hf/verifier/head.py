"""The verifier's final norm, LM head and token embeddings, read one by one from a checkpoint of any size.

Shape letters: H hidden size, V verifier vocabulary, Vd draft vocabulary.
"""

import logging
import os
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..cpu import linear
from ..errors import PeagleError
from .loading import load_verifier_config, verifier_without_weights
from .parts import parts_with_head, recorded_streams, verifier_embeddings, verifier_parts
from .weights import VerifierWeights, known_keys

logger = logging.getLogger(__name__)


class VerifierHead(nn.Module):
    """The verifier's final norm and LM head, frozen: they turn its last residual stream into logits.

    All tensors are non-persistent buffers, so that none of them enters a state dict.

    Args:
        norm: the verifier's own final norm module.
        weight: [V, H].
        bias: [V].
        softcap: bound of the logits, which become softcap * tanh(logits / softcap); None for none.
        scale: factor of the logits, before the softcap.
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
        """Read only the norm and the head of a local or hub verifier.

        Args:
            dtype: of the weights; None keeps the checkpoint's.

        Raises:
            PeagleError: the verifier can't be read, has no safetensors, or its norm or head isn't found in them.
        """
        model = verifier_without_weights(name_or_path, revision, trust_remote_code)
        weights = VerifierWeights(name_or_path, revision, model, dtype)
        parts = parts_with_head(model)
        norm, head, embedding = parts.final_norm, parts.head, verifier_embeddings(model)
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
        """The head of a loaded verifier, which isn't changed; the weight is shared with it."""
        parts = parts_with_head(model)
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
        """The head for the tokens `token_ids` only, int64 [Vd]; the norm is shared with this one."""
        bias = None if self.bias is None else self.bias[token_ids]
        return VerifierHead(self.norm, self.weight[token_ids], bias, self.softcap, self.scale)

    def normalize(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to the last residual stream [..., H], in the head's dtype."""
        return self.norm(hidden.to(self.weight.dtype))

    def logits(self, normed: Tensor) -> Tensor:
        """The verifier's own logits [..., V] of normed states [..., H]."""
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
    """Read only the verifier's token embeddings [V, H]; None as dtype keeps the checkpoint's.

    Raises:
        PeagleError: as `VerifierHead.from_pretrained`.
    """
    model = verifier_without_weights(name_or_path, revision, trust_remote_code)
    return VerifierWeights(name_or_path, revision, model, dtype).read(verifier_embeddings(model), "weight")


def check_trainable(
    name_or_path: str | os.PathLike[str], revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Make sure, before hours of work, that training will be able to read the verifier's norm, head and embeddings.

    That is cheap: no weights are read or downloaded. Where it isn't known which ones there are, nothing is refused.

    Returns:
        The verifier's configuration, see `load_verifier_config`.

    Raises:
        PeagleError: they won't be readable, or the verifier isn't supported.
    """
    config = load_verifier_config(name_or_path, revision, trust_remote_code)
    model = verifier_without_weights(name_or_path, revision, trust_remote_code)
    parts, embeddings = parts_with_head(model), verifier_embeddings(model)
    if (keys := known_keys(name_or_path, revision)) is None:
        return config
    weights = VerifierWeights(name_or_path, revision, model, None, keys)
    is_tied: Any = parts.head.weight is embeddings.weight and not weights.of(parts.head)
    has_norm = any(True for _ in parts.final_norm.parameters(recurse=False))
    for module in [parts.final_norm] * has_norm + [embeddings] + [parts.head] * (not is_tied):
        weights.check(module)
    return config


def warn_if_untrainable(name_or_path: str, trust_remote_code: bool = False) -> None:
    """Say at an early step, which itself doesn't need it, that training will refuse a verifier."""
    try:
        load_verifier_config(name_or_path, None, trust_remote_code)
    except PeagleError:  # only a tokenizer, perhaps; the verifier may have another place
        return
    try:
        check_trainable(name_or_path, None, trust_remote_code)
    except PeagleError as error:
        logger.warning("peagle-hf extract and train will refuse this verifier. %s", error)


CHECKED_TOKENS = 16
"""Tokens on which the verifier's logits are compared with those of `VerifierHead`."""


@torch.inference_mode()
def check_logits(model: PreTrainedModel) -> None:
    """Make sure that each layer has a residual stream, of the last of which `VerifierHead` gives the verifier's logits.

    Raises:
        PeagleError: the architecture has other layers, or computes logits in a way that `VerifierHead` doesn't know.
    """
    config, num_layers = model.config.get_text_config(decoder=True), len(verifier_parts(model).layers)
    ids_BT = torch.arange(CHECKED_TOKENS, device=model.device)[None] % config.vocab_size
    with recorded_streams(model, range(num_layers + 1), model.dtype) as streams:
        own = model(input_ids=ids_BT, use_cache=False).logits.float()
    shapes = [tuple(streams[layer_id].shape) for layer_id in range(num_layers + 1)]
    wanted = [(*ids_BT.shape, config.hidden_size)] * (config.num_hidden_layers + 1)
    if shapes != wanted:
        raise PeagleError(
            f"{type(model).__name__} can't be a verifier: for {CHECKED_TOKENS} tokens its {config.num_hidden_layers} "
            f"layers and its final norm should each read one residual stream of shape {wanted[0]}, but its "
            f"{num_layers} layers and the norm read {', '.join(map(str, dict.fromkeys(shapes)))}. Choose another model."
        )
    head = VerifierHead.of(model)
    found = head.logits(head.normalize(streams[num_layers])).float()
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps) * own.abs().max()
    if found.shape != own.shape or (found - own).abs().max() > tolerance:
        raise PeagleError(
            f"The logits of {type(model).__name__} are not what its final norm, head, logit scale {head.scale} and "
            f"softcap {head.softcap} give, so a drafter would learn something else. Register how they are computed "
            "with peagle_hf.register_verifier, as docs/how-to/verifiers.md shows."
        )
