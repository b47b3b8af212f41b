"""Verifiers with quantised weights: the supported methods, and reading single tensors as dense ones."""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PeagleError

COMPRESSED_TENSORS = "compressed-tensors"
METHODS: dict[str, tuple[str, ...]] = {
    COMPRESSED_TENSORS: ("compressed_tensors",),
    "fp8": (),
    "mxfp4": (),
    "awq": ("gptqmodel",),
    "gptq": ("gptqmodel", "optimum"),
    "bitsandbytes": ("bitsandbytes",),
}
"""Supported values of `quant_method`, and the Python modules that transformers needs for each."""
_OF_QUANTISED_WEIGHTS = re.compile(
    r"(weight|proj)_(packed|scale|scale_inv|zero_point|blocks|scales)$|^(qweight|qzeros)$"
)
"""Last parts of tensor names that only quantised checkpoints have."""


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The quantisation settings in a verifier's configuration, with a `quant_method`; None if it isn't quantised."""
    for one in (config, config.get_text_config(decoder=True)):
        settings: dict[str, Any] | None = getattr(one, "quantization_config", None)
        if settings:
            is_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
            return settings | {"quant_method": "bitsandbytes"} if is_bitsandbytes else settings
    return None


def check_quantization(name: object, config: PreTrainedConfig) -> None:
    """Make sure, before a verifier is loaded, that its quantised weights can be run in this process.

    Raises:
        PeagleError: its method isn't one of `METHODS`, or needs a package that isn't installed.
    """
    settings = quantization_of(config)
    if settings is None:
        return
    method = str(settings.get("quant_method"))
    served = (
        "Or let vLLM run it: start peagle-hf launch-vllm, and extract with --endpoint; vllm serve and regenerate with "
        "--endpoint."
    )
    if method not in METHODS:
        raise PeagleError(
            f"The verifier {name} is quantised with {method}, which can't be run in this process. Supported are "
            f"{', '.join(METHODS)}. Name the model that it was made from, or a copy with such a quantisation. {served}"
        )
    if missing := [module for module in METHODS[method] if find_spec(module) is None]:
        raise PeagleError(
            f"The verifier {name} is quantised with {method}, for which transformers needs {' and '.join(missing)}. "
            f"Install {'it' if len(missing) == 1 else 'them'}: pip install {' '.join(missing).replace('_', '-')}. "
            f"{served}"
        )


def ask_for_dense_weights(config: PreTrainedConfig) -> None:
    """Set a configuration so that the verifier is loaded with dense weights, if its method allows that.

    compressed-tensors would make them dense only when the whole model runs, but extraction runs its decoder alone.
    """
    settings = quantization_of(config)
    if settings is not None and settings.get("quant_method") == COMPRESSED_TENSORS:
        settings["dequantize"] = True


def check_loaded(name: object, unexpected_keys: Iterable[str]) -> None:
    """Make sure that a checkpoint without quantisation settings was not quantised all the same.

    Raises:
        PeagleError: it holds scales or packed weights, but its configuration doesn't say how they are quantised.
    """
    found = sorted(key for key in unexpected_keys if _OF_QUANTISED_WEIGHTS.search(key.rpartition(".")[2]))
    if found:
        raise PeagleError(
            f"The checkpoint {name} holds quantised weights (such as {found[0]}), but its config.json has no "
            "quantization_config, without which they can't be read. Download the model again, with its config.json."
        )


def finish_dense_layers(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Restore the ordinary forward of layers whose weights became dense while loading.

    Linear layers of compressed-tensors that also round their inputs keep doing so, as when the verifier is served.
    Weights that were loaded as bfloat16, whatever was asked for, are converted to `dtype`.
    """
    is_dense = not getattr(model, "is_quantized", False)
    for parameter in model.parameters():
        if is_dense and dtype is not None and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and not scheme.input_activations and not scheme.output_activations:
            vars(module).pop("forward", None)
            del module.quantization_scheme


def check_decompressible(name: object, model: PreTrainedModel, path: str, tensors: Iterable[str]) -> None:
    """Make sure that the weight of one module of a quantised verifier can be decompressed.

    Args:
        name: of the verifier, for messages.
        path: of the module in `model`.
        tensors: last parts of the names of its tensors in the checkpoint.

    Raises:
        PeagleError: its quantisation isn't compressed-tensors.
    """
    settings = quantization_of(model.config) or {}
    if settings.get("quant_method") != COMPRESSED_TENSORS or find_spec("compressed_tensors") is None:
        raise PeagleError(
            f"{path} of the verifier {name} is quantised ({settings.get('quant_method', 'by an unknown method')}: "
            f"{', '.join(sorted(tensors))}), and the drafter needs its values. Only with compressed-tensors, if that "
            "package is installed, can they be read. Train with a copy of the verifier whose head and embeddings are "
            "not quantised."
        )


def dense_weight(name: object, model: PreTrainedModel, module: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """Decompress the weight of one module of a quantised verifier.

    Args:
        name: of the verifier, for messages.
        model: the verifier, with or without weights.
        module: the module of `model`.
        tensors: the checkpoint's tensors of the module, by the last part of their name.

    Raises:
        PeagleError: its quantisation isn't compressed-tensors.
    """
    settings = quantization_of(model.config) or {}
    path = next(path for path, one in model.named_modules() if one is module)
    check_decompressible(name, model, path, tensors)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    apply_quantization_config(model, QuantizationConfig.model_validate(settings))
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        raise PeagleError(
            f"{path} of the verifier {name} is quantised ({', '.join(sorted(tensors))}), but by the "
            "quantization_config of its config.json it isn't. Download the model again."
        )
    kind = scheme.format or settings.get("format") or infer_module_format(type(module), scheme)
    compressor = BaseCompressor.get_value_from_registry(getattr(kind, "value", kind))
    dense: Tensor = compressor.decompress(tensors, scheme)["weight"]
    return dense
