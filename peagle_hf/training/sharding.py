"""How weights and optimizer states are divided among processes, and those of FSDP2 whole, as one process has them.

So checkpoints have the same files however they were trained, and any number of processes goes on from them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ..errors import PeagleError
from .optimizer import MUON

if TYPE_CHECKING:
    from .trainer import PeagleTrainer


def sharding_of(trainer: "PeagleTrainer") -> str:
    """How weights and optimizer states are divided: "none", "FSDP1", "FSDP2", or "ZeRO-2 of 4 processes"."""
    state: Any = trainer.accelerator.state
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None:
        return f"FSDP{fsdp.fsdp_version}"
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if deepspeed is not None:
        return f"ZeRO-{deepspeed.zero_stage} of {trainer.args.world_size} processes"
    return "none"


def is_fsdp2(trainer: "PeagleTrainer") -> bool:
    return trainer.is_fsdp_enabled and sharding_of(trainer) == "FSDP2"


def is_fsdp1(trainer: "PeagleTrainer") -> bool:
    return trainer.is_fsdp_enabled and not is_fsdp2(trainer)


def require_whole_weights(trainer: "PeagleTrainer") -> None:
    """Refuse settings under which checkpoints would hold no whole weights, and adapters and Muon on shards.

    Raises:
        PeagleError: a setting leads to that; the message names it.
    """
    state: Any = trainer.accelerator.state
    saves_shards, has_shards = False, trainer.is_fsdp_enabled
    if trainer.is_fsdp_enabled:
        saves_shards = "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type)
    elif trainer.is_deepspeed_enabled:
        config = state.deepspeed_plugin.hf_ds_config
        gathers = config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save")
        has_shards = config.is_zero3()
        saves_shards = has_shards and not gathers
    if saves_shards:
        raise PeagleError(
            "Checkpoints would hold shards of the weights, which neither vLLM nor a resume on other processes can "
            "read. Save whole weights: with FSDP set fsdp_state_dict_type to FULL_STATE_DICT, with ZeRO-3 "
            "zero3_save_16bit_model (stage3_gather_16bit_weights_on_model_save) to true."
        )
    if has_shards and trainer.args.save_on_each_node:
        raise PeagleError(
            "With FSDP and ZeRO-3 only the first process gets the whole weights, so --save-on-each-node would save "
            "empty ones on the other machines. Leave the flag out and name an output folder that all machines share, "
            "or train with DDP or ZeRO-2."
        )
    if is_fsdp1(trainer) and trainer.args.optim == MUON and trainer.own_optimizer is None:
        raise PeagleError(
            "FSDP1 makes vectors of the matrices that Muon needs. Set fsdp_version to 2, as "
            "examples/accelerate/fsdp2.yaml does, or take --optim adamw_torch_fused."
        )
    if isinstance(trainer.model, PeftModel) and trainer.is_sharded:
        raise PeagleError("An adapter can't be merged out of shards. Train it with DDP instead of FSDP or ZeRO.")


def bare_optimizer(trainer: "PeagleTrainer") -> Any:
    """The optimizer without accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def gradient_norm(trainer: "PeagleTrainer", model: Any) -> Any:
    """The norm of the gradient of all parameters, after the backward pass: a tensor, a DTensor under FSDP2.

    All processes get the same one, so that they end together if it isn't finite.
    """
    # DeepSpeed's engine takes its step within the backward pass and keeps the norm.
    if hasattr(model, "get_global_grad_norm"):
        return model.get_global_grad_norm()
    norm = torch.nn.utils.get_total_norm([one.grad for one in model.parameters() if one.grad is not None])
    # Under FSDP1 each process has only the gradients of its shard.
    if is_fsdp1(trainer):
        squared = norm.square()
        distributed.all_reduce(squared)
        norm = squared.sqrt()
    return norm


def gather_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What `optimizer.state_dict()` is on one process, on the CPU; all processes must call it."""
    named: Any = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if distributed.get_rank() != 0:
        return {}
    numbers: dict[str, int] = {}
    groups = []
    for group in named["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    return {"state": {numbers[name]: state for name, state in named["state"].items()}, "param_groups": groups}


def scatter_optimizer_state(model: nn.Module, optimizer: Optimizer, whole: Mapping[str, Any]) -> None:
    """Load what `optimizer.state_dict()` was on one process; all processes must call it.

    Args:
        whole: only read on the first process.
    """
    named: dict[str, Any] = {}
    if distributed.get_rank() == 0:
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        order = [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        named = {
            "state": {order[number]: state for number, state in whole["state"].items()},
            "param_groups": [
                {**group, "params": [order[number] for number in group["params"]]} for group in whole["param_groups"]
            ],
        }
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, named, options=options)
