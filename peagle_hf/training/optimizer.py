"""Muon for a drafter's matrices and AdamW for the rest, as one optimizer; new settings for a resumed optimizer."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from ..console import number_of
from ..errors import PeagleError
from .muon import Muon

MUON = "muon"
"""The value of `--optim` for `MuonWithAdamW`."""

MUON_WEIGHT_DECAY = 1.0
"""The weight decay of its matrices by default: what long trainings gained most from (docs/ablations.md)."""

_TABLES = {"embed_tokens", "lm_head"}


def default_weight_decay(optim: str, lora_r: int | None) -> float:
    """The weight decay of an optimizer of `--optim` where none is given; LoRA's factors must not shrink."""
    return MUON_WEIGHT_DECAY if optim == MUON and lora_r is None else 0.0


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices within the layers, PyTorch's AdamW for embeddings, head, norms and the shared state.

    Muon's step is scaled as AdamW's is (`match_rms_adamw`, arXiv 2502.16982), so that both take one learning rate.
    The parameter groups are the matrices, the tables (embeddings and head), and norms and vectors. Only the matrices
    are decayed: a row of a table whose token is rare would shrink with hardly a gradient to restore it.
    Where no matrix is trained, AdamW trains everything.

    Args:
        named_parameters: those of the model; what needs no gradient is left out.
        momentum: of Muon.
        betas: of AdamW, as `eps`.
        process_group: as of `Muon`.
        device_type: of the device that steps are taken on; by default that of the matrices. With FSDP the optimizer is
            made while they are still on the CPU.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        weight_decay: float = MUON_WEIGHT_DECAY,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        process_group: Any = None,
        device_type: str | None = None,
    ):
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                is_matrix = parameter.ndim == 2 and _TABLES.isdisjoint(name.split("."))
                (matrices if is_matrix else others).append(parameter)
        tables = [parameter for parameter in others if parameter.ndim == 2]
        vectors = [parameter for parameter in others if parameter.ndim != 2]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
            if (device_type or matrices[0].device.type) == "cpu":
                # On a CPU the bfloat16 products of PyTorch's Muon take half the time of the float32 ones of ours.
                self._parts.append(torch.optim.Muon(matrices, **settings, adjust_lr_fn="match_rms_adamw"))
            else:
                self._parts.append(Muon(matrices, **settings, process_group=process_group))
        self._parts += [
            torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, betas=betas, eps=eps, fused=True)
            for parameters in (tables, vectors)
            if parameters
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("No closure is evaluated here.")
        for part, group in zip(self._parts, self.param_groups, strict=True):
            # Both are set at every step, because loading a state dict replaces them.
            part.param_groups, part.state = [group], self.state
            part.step()
        return None


def make_muon(model: nn.Module, args: TrainingArguments) -> MuonWithAdamW:
    """The optimizer of a model with the arguments' settings, as the Trainer makes those that it knows.

    Raises:
        PeagleError: the model has nothing to train.
    """
    require_trained(model)
    return MuonWithAdamW(
        model.named_parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        process_group=distributed.group.WORLD if args.world_size > 1 else None,
        device_type=args.device.type,
    )


def describe_optimizer(optimizer: Any, num_processes: int, is_replaced: bool) -> str | None:
    """One sentence about what trains which weights, where Muon does or would by default.

    Args:
        is_replaced: no optimizer was chosen, and DeepSpeed keeps Muon from being the default.
    """
    if is_replaced:
        return "Muon isn't used: DeepSpeed cuts up the matrices that it needs whole."
    if not isinstance(optimizer, MuonWithAdamW) or not isinstance(optimizer._parts[0], torch.optim.Muon):
        return None
    counts = [sum(one.numel() for one in group["params"]) / 1e6 for group in optimizer.param_groups]
    number = len(optimizer.param_groups[0]["params"])
    is_shared = num_processes > 1 and isinstance(optimizer._parts[0], Muon)
    shared = f", each orthogonalised on one of {num_processes} processes," if is_shared else ""
    return (
        f"Muon trains {number_of(number, 'matrix', 'matrices')} of {counts[0]:.1f} million weights{shared} and AdamW "
        f"{sum(counts[1:]):.1f} million others."
    )


def require_trained(model: nn.Module) -> None:
    """Refuse a drafter of which nothing is trained.

    Raises:
        PeagleError: no weight requires a gradient.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PeagleError(
            "No weight of the drafter is to be trained: none has requires_grad. Set it on those that are."
        )


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each parameter group as JSON values, "lr" being the peak that the schedule scales."""
    groups = []
    for group in optimizer.param_groups:
        settings = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
        settings["lr"] = group.get("initial_lr", group["lr"])
        groups.append({name: value for name, value in _as_json(settings).items() if value is not None})
    return groups


def settings_of_schedule(schedule: Any) -> dict[str, Any]:
    """The class and the settings of a learning-rate schedule that hasn't begun, as JSON values."""
    state = _as_json({name: value for name, value in schedule.state_dict().items() if name not in _PLACES})
    return {"class": type(schedule).__name__, **{name: value for name, value in state.items() if value is not None}}


_PLACES = {"base_lrs", "_last_lr", "last_epoch", "_step_count", "lr_lambdas", "best", "num_bad_epochs"}
"""Entries of a schedule's state that hold its progress and rates, not its settings."""


def set_settings(optimizer: Any, before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> None:
    """Give a loaded optimizer those settings that differ between two `settings_of`, but for the rates.

    All others stay as loaded, since some optimizers keep counters beside their settings.
    """
    for group, old, new in zip(optimizer.param_groups, before, now, strict=True):
        for name in new.keys() & group.keys() - {"lr"}:
            if new[name] != old.get(name):
                group[name] = tuple(new[name]) if isinstance(new[name], list) else new[name]


def set_rates(
    optimizer: Any, schedule: Any, rates: Sequence[float], state: Mapping[str, Any], is_other: bool, step: int
) -> None:
    """Put a schedule at the place that was saved and give the optimizer the rates that it says there.

    A `LambdaLR`, which all schedules of transformers but reduce_lr_on_plateau and greedy are, goes by the number of its
    step alone, so that another kind, length or peak of the schedule holds from there on. Any other begins at `rates`.

    Args:
        schedule: new, with the settings that are wanted.
        rates: the peak of each parameter group.
        state: of the schedule that was saved.
        is_other: whether that schedule had other settings or rates.
        step: the number of optimizer steps so far.
    """
    if isinstance(schedule, LambdaLR):
        if not is_other:
            schedule.load_state_dict(dict(state))
        schedule.last_epoch = state["last_epoch"] if "lr_lambdas" in state else step
        schedule._step_count = schedule.last_epoch + 1
        schedule.base_lrs = list(rates)
        current = [rate * scale(schedule.last_epoch) for rate, scale in zip(rates, schedule.lr_lambdas, strict=True)]
        schedule._last_lr = list(current)
    elif is_other:
        current = list(rates)
    else:
        schedule.load_state_dict(dict(state))
        return
    for group, rate, now in zip(optimizer.param_groups, rates, current, strict=True):
        group["initial_lr"], group["lr"] = rate, now


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, strings and lists of them; None for anything else."""

    def value_of(value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, list | tuple):
            return [value_of(one) for one in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value if isinstance(value, str | bool | int | float) else None

    return dict(json.loads(json.dumps({name: value_of(value) for name, value in settings.items()})))
