"""`--from-pretrained`: training continues from a drafter's weights; which settings may change, and which may not."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import PeagleError
from ..model.config import PeagleConfig
from ..model.drafter import PeagleForSpeculation
from ..verifier.loading import load_verifier_config
from .arguments import PeagleTrainingArguments

logger = logging.getLogger(__name__)

SAMPLING = ("num_depths", "down_sample_ratio", "down_sample_ratio_min", "max_anchors", "embed_requires_grad")
"""Arguments that a continued drafter takes where they are given; only its verifier may change besides."""


def continued_config(args: PeagleTrainingArguments, drafter: str, verifier: str) -> PeagleConfig:
    """The configuration of `drafter`, with the arguments' sampling, for `verifier`.

    Raises:
        PeagleError: the drafter can't be read, the arguments ask for another drafter, or the verifier has other sizes.
    """
    saved = saved_config(drafter)
    _check_arguments(args, drafter, saved)
    target = load_verifier_config(verifier, args.verifier_revision, args.trust_remote_code)
    wrong = [
        f"{name} {getattr(target, name)} instead of {getattr(saved, name)}"
        for name in ("hidden_size", "vocab_size")
        if getattr(target, name) != getattr(saved, name)
    ]
    last = max(saved.eagle_aux_hidden_state_layer_ids)
    if target.num_hidden_layers < last:
        wrong.append(f"{target.num_hidden_layers} layers where the drafter reads the states after layer {last}")
    if wrong:
        raise PeagleError(
            f"The drafter {drafter} can't be continued for {verifier}, which has {', '.join(wrong)}. Name a verifier "
            "of the sizes that the drafter was made for, or train a new drafter without --from-pretrained."
        )
    changes = {
        **sampling(args),
        "speculators_config": {"verifier": {"name_or_path": verifier, "architectures": target.architectures or []}},
    }
    return PeagleConfig.from_dict({**saved.to_dict(), **changes})


def sampling(args: PeagleTrainingArguments) -> dict[str, Any]:
    """The arguments of `SAMPLING` that are given."""
    return {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}


def load_drafter(name_or_path: str, config: PeagleConfig) -> PeagleForSpeculation:
    """Load a trained drafter under its continued configuration, and log what is reused and what is new.

    Raises:
        PeagleError: the drafter can't be read, or has other tensors than its configuration says.
    """
    load: Any = PeagleForSpeculation.from_pretrained
    with _readable(name_or_path):
        drafter, report = load(
            name_or_path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise PeagleError(
            f"The weights of {name_or_path} are not those of its config.json: {len(wrong)} tensors are missing or too "
            f"many, such as {wrong[0]}. Name a folder that save_pretrained, or vLLM's speculators, wrote."
        )
    changes = config.differences(saved_config(name_or_path))
    changed = [f"{name} {changes[name][1]} -> {changes[name][0]}" for name in SAMPLING if name in changes]
    new, old = changes.get("speculators_config.verifier.name_or_path", (None, None))
    parts = [f"Reused: all {len(drafter.state_dict())} tensors of {name_or_path}"]
    parts += [f"sampling changed: {', '.join(changed)}"] if changed else []
    parts += [f"verifier changed: {old} -> {new}"] if new else []
    logger.info("%s; new: optimizer, schedule and step count.", "; ".join(parts))
    return drafter


def configuration_changes(folder: Path, config: PeagleConfig, is_verifier_known: bool) -> list[str]:
    """The settings of a drafter and its sampling that differ from a checkpoint's, as phrases.

    Args:
        is_verifier_known: the verifiers are compared by their weights, so that their names and paths may differ.
    """
    differences = config.differences(PeagleConfig.from_pretrained(folder))
    if is_verifier_known:
        differences.pop("speculators_config.verifier.name_or_path", None)
    return [f"{name} (there {theirs!r}, here {ours!r})" for name, (ours, theirs) in differences.items()]


def saved_config(name_or_path: str) -> PeagleConfig:
    """The configuration of a trained drafter.

    Raises:
        PeagleError: it can't be read.
    """
    with _readable(name_or_path):
        return PeagleConfig.from_pretrained(name_or_path)


def _check_arguments(args: PeagleTrainingArguments, drafter: str, saved: PeagleConfig) -> None:
    """Refuse arguments that are given, and describe another drafter than the saved one."""
    layer_config = saved.transformer_layer_config
    windowed = "sliding_attention" in (getattr(layer_config, "layer_types", None) or [])
    kept = {
        "num_layers": layer_config.num_hidden_layers,
        "draft_arch": layer_config.model_type,
        "draft_vocab_size": saved.draft_vocab_size,
        "token_freq_path": "its own vocabulary",
        "mask_token_id": saved.mask_token_id,
        "target_layer_ids": saved.eagle_aux_hidden_state_layer_ids,
        "norm_before_residual": saved.norm_before_residual,
        "norm_before_fc": saved.norm_before_fc,
        "fc_norm": saved.has_fc_norm,
        "sliding_window": layer_config.sliding_window if windowed else None,
    }
    wrong = [
        f"{name} {getattr(args, name)} (the drafter has {value})"
        for name, value in kept.items()
        if getattr(args, name) not in (args.__dataclass_fields__[name].default, value)
    ]
    if wrong:
        raise PeagleError(
            f"{drafter} can't be continued as another drafter: {', '.join(wrong)}. Leave these arguments out, or "
            "train a new drafter without --from-pretrained."
        )


@contextmanager
def _readable(name_or_path: str) -> Iterator[None]:
    try:
        yield
    except PeagleError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise PeagleError(
            f"The drafter {name_or_path} can't be read: {str(error).strip().splitlines()[0]} Name a folder that holds "
            "a drafter's config.json and model.safetensors, or a model of the hub that this machine can reach."
        ) from error
