"""Prepares a drafter for training as the arguments say: precision, attention, and the objective."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import PeagleError
from ..model.drafter import PeagleForSpeculation, PeagleLayer
from ..verifier.head import VerifierHead
from .adapters import check_adapted_head
from .arguments import PeagleTrainingArguments
from .objective import Objective, load_head


def configure_drafter(model: nn.Module, args: PeagleTrainingArguments) -> None:
    """Set up a drafter, and what is around it, as the arguments say; may be called again with others."""
    if is_deepspeed_zero3_enabled():
        from deepspeed.utils import set_z3_leaf_modules

        # ZeRO-3 then gathers the shards layer by layer. Its hooks on the modules within a layer would disturb the
        # compiler.
        set_z3_leaf_modules(model, [PeagleLayer])
    for module in model.modules():
        if isinstance(module, PeagleForSpeculation) and args.device.type == "cuda":
            module.set_attn_implementation("flex_attention")
        if isinstance(module, PeagleLayer):
            module.keep_attention = args.keep_attention
    train_in_float32(model)


def build_objective(
    model: nn.Module, args: PeagleTrainingArguments, head: VerifierHead | None, earlier: Objective | None = None
) -> Objective:
    """The objective that the arguments describe.

    Args:
        model: the drafter, maybe within an adapter, before it is wrapped or sharded.
        head: of the drafter's verifier; default: read from the folder or hub name in the drafter's configuration.
        earlier: is configured again and returned if it is of the same drafter, which may be sharded by now.

    Raises:
        PeagleError: the drafter isn't ready to be trained, its verifier can't be read, or an adapter is on its head.
    """
    drafter: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    check_adapted_head(drafter)
    dpace_alpha = args.dpace_alpha if args.per_position_loss_weight == "dpace" else None
    if earlier is not None and earlier.drafter is drafter:
        earlier.configure(args.loss_fn, args.depth_loss_decay, dpace_alpha)
        return earlier
    if not drafter.is_ready_to_train:
        raise PeagleError(
            "The drafter doesn't know its verifier yet: which of its weights are trained isn't set. Call "
            "drafter.load_verifier(name_or_path) before training."
        )
    if head is None:
        head = load_head(drafter, head_dtype(args), args.verifier_revision, args.trust_remote_code)
    return Objective(drafter, head, args.loss_fn, args.depth_loss_decay, dpace_alpha)


def head_dtype(args: PeagleTrainingArguments) -> torch.dtype:
    """The precision of the verifier's head in a training."""
    return torch.bfloat16 if args.bf16 else torch.float32


def train_in_float32(model: nn.Module) -> None:
    """Convert trained weights of 16 bits, such as those of a served checkpoint: small steps would round to nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def in_float32(model_init: Callable[..., Any]) -> Callable[..., Any]:
    """A `model_init` whose models are in float32 before the Trainer loads a checkpoint into them."""

    @wraps(model_init)
    def made(*trial: Any) -> Any:
        model = model_init(*trial)
        if isinstance(model, nn.Module):
            train_in_float32(model)
        return model

    return made
