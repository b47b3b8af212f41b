"""Weights and optimizer states of a model that FSDP2 has divided among processes, whole as one process has them.

So checkpoints have the same files however they were trained, and any number of processes goes on from them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer


def sharding_of(trainer_state: Any, processes: int) -> str:
    """How weights and optimizer states are divided: "none", "FSDP1", "FSDP2", or "ZeRO-2 of 4 processes".

    Args:
        trainer_state: accelerate's, once the trainer is made.
    """
    fsdp = getattr(trainer_state, "fsdp_plugin", None)
    if fsdp is not None:
        return f"FSDP{fsdp.fsdp_version}"
    deepspeed = getattr(trainer_state, "deepspeed_plugin", None)
    if deepspeed is not None:
        return f"ZeRO-{deepspeed.zero_stage} of {processes} processes"
    return "none"


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


def scatter_weights(model: nn.Module, weights: Path) -> None:
    """Load a file of whole weights, which only the first process reads; all processes must call it."""
    whole: dict[str, Any] = load_file(weights) if distributed.get_rank() == 0 else {}
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
