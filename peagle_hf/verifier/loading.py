"""Loading a verifier: its configuration, tokenizer, whole model or model without weights, and its default layers."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import patch_environment
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import cached_file
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from ..errors import PeagleError
from .quantization import (
    COMPRESSED_TENSORS,
    ask_for_dense_weights,
    check_loaded,
    check_quantization,
    finish_dense_layers,
    quantization_of,
)
from .weights import readable

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
"""What a verifier's configuration must have."""


def usable_device(flag: str, name: str) -> torch.device:
    """The device of a name, on which a tensor can be made.

    Args:
        flag: that gives the name, for the message.

    Raises:
        PeagleError: PyTorch doesn't have such a device here.
    """
    try:
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise PeagleError(
            f"{flag} {name} can't be used: {str(error).splitlines()[0].rstrip('.')}. Name a device that PyTorch has "
            "here, such as cpu or cuda:0, or leave the flag out."
        ) from error


def load_verifier_config(
    name_or_path: str | os.PathLike[str], revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Read the verifier's configuration; of a multimodal model the text part.

    Raises:
        PeagleError: there is no configuration, or it isn't a language model's.
    """
    config = _load_config(name_or_path, revision, trust_remote_code).get_text_config(decoder=True)
    lacking = [name for name in SIZES if not hasattr(config, name)]
    if lacking:
        raise PeagleError(
            f"The configuration of {name_or_path} (model type {config.model_type}) has no {', '.join(lacking)}: it "
            "isn't that of a decoder-only language model with attention, whose sizes a drafter takes. Name the chat "
            "model that the drafter is to speed up."
        )
    return config


def load_verifier_tokenizer(
    name_or_path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the verifier's tokenizer.

    A chat template that only the model's processor has, in chat_template.json as some multimodal models, counts too.

    Of a model with Mistral's own tokenizer file, tekken.json, it is the usual fast tokenizer too. transformers would
    take another class as soon as mistral-common is installed, as it is beside vLLM, and that has no chat template.

    Raises:
        PeagleError: there is none, or a file of it is damaged.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code, mistral_format=False
        )
        if tokenizer.chat_template is None and (file := _chat_template_file(name_or_path, revision)) is not None:
            tokenizer.chat_template = json.loads(Path(file).read_text(encoding="utf-8"))["chat_template"]
    except Exception as error:  # a damaged file may raise anything
        reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}."
        raise PeagleError(
            f"The tokenizer of {name_or_path} can't be loaded: {reason} Check the name, or the files of the folder, "
            "and the network."
        ) from error
    return tokenizer


def _chat_template_file(name_or_path: str, revision: str | None) -> str | None:
    return cached_file(
        name_or_path,
        LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def hub_verifier(name_or_path: str | None, hub_name: str | None = None) -> str:
    """The verifier's name on the hub: `hub_name` if given, otherwise the name that was trained with.

    Raises:
        PeagleError: that is a folder, or no valid name on the hub.
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
    """The default auxiliary layers, whose residual streams the drafter reads, by number of layers passed.

    [2, n // 2, n - 3] of n layers, as in speculators and vLLM; 0 would be the embeddings. For fewer than 7 layers these
    would not be distinct: then [1, (n + 1) // 2, n - 1] from 4 layers on, else the last three of 0 .. n.
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
        dtype: a dtype or its name; "auto" is the checkpoint's own.

    Raises:
        PeagleError: it can't be read, has no safetensors, lacks weights, or has a quantisation that can't be run here.
    """
    config = _load_config(name_or_path, revision, trust_remote_code)
    check_quantization(name_or_path, config)
    is_quantised = quantization_of(config) is not None
    ask_for_dense_weights(config)
    with readable(name_or_path), _whole_on_each_process():
        loaded: Any = _auto_class(config).from_pretrained(
            name_or_path,
            config=config,
            dtype=dtype,
            device_map=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below with a message
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


@contextmanager
def _whole_on_each_process() -> Iterator[None]:
    """Within the block transformers makes models as if neither ZeRO-3 nor FSDP were to divide them.

    With ZeRO-3 it would divide even a model without weights, and refuses a device for one with weights; with FSDP's
    loading that saves host memory all processes but one would get zeros.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        hf_deepspeed.unset_hf_deepspeed_config()
        try:
            yield
        finally:
            hf_deepspeed._hf_deepspeed_config_weak_ref = reference


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


def verifier_without_weights(
    name_or_path: str | os.PathLike[str], revision: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The verifier's modules without weights (on the meta device), for their names, types and tied parameters."""
    config = _load_config(name_or_path, revision, trust_remote_code)
    with readable(name_or_path), _whole_on_each_process(), torch.device("meta"):
        return _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)


def inference_memory(
    name_or_path: str | os.PathLike[str], num_states: int, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[int, int]:
    """Predict the bytes of a verifier in bfloat16 without its head, and those that it needs per token that it reads.

    Quantised layers are counted with their number of bits where the configuration names it: linear ones, with fp8 also
    experts, with mxfp4 experts alone.

    Args:
        num_states: auxiliary layers whose states are recorded.
    """
    model = verifier_without_weights(name_or_path, revision, trust_remote_code)
    settings = quantization_of(model.config) or {}
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") or settings.get("quant_method") == "mxfp4" else 8)
    method = settings.get("quant_method", COMPRESSED_TENSORS)  # loading makes weights of compressed-tensors dense

    def is_quantised(name: str, module: nn.Module) -> bool:
        is_linear = isinstance(module, nn.Linear) and method not in (COMPRESSED_TENSORS, "mxfp4")
        return is_linear or (name.endswith(".experts") and method in ("fp8", "mxfp4"))

    widths = {  # a head that is tied to the embeddings counts once, with them
        parameter: bits if is_quantised(name, module) else 16
        for name, module in model.named_modules()
        if module is not model.get_output_embeddings()
        for parameter in module.parameters(recurse=False)
    }
    total = sum(parameter.numel() * width for parameter, width in widths.items()) // 8
    config = model.config.get_text_config(decoder=True)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # These are the states within a layer, the recorded states and the stack of them, and the widest part of a layer:
    # the gate, its activation and the up projection.
    return total, 2 * ((2 * (num_states + 1) + 4) * config.hidden_size + 3 * inner)


def check_layer_ids(wanted: list[int] | None, config: PreTrainedConfig) -> list[int]:
    """The auxiliary layers to extract: `wanted`, or the default ones.

    Raises:
        PeagleError: the verifier has no such layers, or one is named twice.
    """
    num_layers = config.num_hidden_layers
    layer_ids = default_aux_layer_ids(num_layers) if wanted is None else wanted
    if not layer_ids or len(set(layer_ids)) < len(layer_ids) or not all(0 <= id_ <= num_layers for id_ in layer_ids):
        raise PeagleError(
            f"--target-layer-ids {layer_ids} must be distinct and in 0 .. {num_layers}, the number of the verifier's "
            "layers; 0 means the embeddings."
        )
    return layer_ids
