"""PEFT adapters on a drafter: to adapt it to another domain, or to a fine-tuned verifier, in a few megabytes.

Beside what `peft` trains, the drafter's `mask_hidden` is trained and saved: a bare parameter, which `modules_to_save`
can't name. `peft.PeftModel.from_pretrained` restores it as well.
"""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file

from ..cpu import use_onednn
from ..errors import PeagleError
from ..files import atomic_path, save_file
from ..model.config import PeagleConfig
from ..model.drafter import DraftHead, PeagleForSpeculation

WEIGHTS = "adapter_model.safetensors"
MASK_HIDDEN = "base_model.model.mask_hidden"


def add_adapter(drafter: PeagleForSpeculation, config: PeftConfig) -> PeftModel:
    """Freeze the drafter but for `mask_hidden`, and add an adapter; train the result with `PeagleTrainer`.

    Load the verifier's head before (`PeagleForSpeculation.load_verifier`).

    Raises:
        PeagleError: the adapter puts layers on the drafter's head, or virtual tokens before its input, its
            `modules_to_save` names what the drafter doesn't have, it has a `task_type`, or see `check_adapter`.
    """
    if config.is_prompt_learning:
        raise PeagleError(
            f"A drafter can't be adapted by {type(config).__name__}: it has no prompt that virtual tokens could "
            "precede. Take an adapter of its layers, such as LoraConfig."
        )
    if config.task_type is not None:
        raise PeagleError(
            f"{type(config).__name__} has task_type {config.task_type!r}, for which PEFT would call the drafter as a "
            "language model. Leave task_type out."
        )
    _check_modules_to_save(drafter, getattr(config, "modules_to_save", None) or ())
    model = cast(PeftModel, get_peft_model(drafter, config))
    check_adapter(model)
    check_adapted_head(drafter)
    use_onednn(model)
    drafter.mask_hidden.requires_grad_(True)
    return model


def _check_modules_to_save(drafter: PeagleForSpeculation, wanted: Iterable[str]) -> None:
    """Refuse names that no module with weights has: PEFT would train nothing there, and not say so."""
    names = [name for name, module in drafter.named_modules() if any(True for _ in module.parameters())]
    unknown = [one for one in wanted if not any(name.endswith(one) for name in names)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdecimal()} - {""})
        raise PeagleError(
            f"--lora-modules-to-save names {', '.join(unknown)}, which this drafter doesn't have. Take from "
            f"{', '.join(known)}; mask_hidden is always trained."
        )


def check_adapted_head(drafter: PeagleForSpeculation) -> None:
    """Refuse an adapter that computes with the output of `lm_head`, which in training is the loss and no tensor.

    Raises:
        PeagleError: it is such an adapter; the message says how to train the head.
    """
    head = drafter.lm_head
    # PEFT wraps a head whose weight is one of `target_parameters` in a layer that has this attribute.
    changes_weight = hasattr(head, "parameter_name")
    if not isinstance(head, DraftHead | ModulesToSaveWrapper) and not changes_weight:
        raise PeagleError(
            "The adapter targets lm_head, which computes the loss in training, so an adapter can't add to its output. "
            "Take lm_head out of target_modules (and trainable_token_indices); to train it name it in modules_to_save, "
            "which trains it whole."
        )


def check_adapter(model: PeftModel) -> None:
    """Refuse an adapter that couldn't be trained, saved or merged.

    Raises:
        PeagleError: PEFT wraps the drafter as a model of some task, there are several adapters or one of another name
            than PEFT's default, or it is AdaLoRA, which wants to be told of each step.
    """
    names = list(model.peft_config)
    if type(model) is not PeftModel:
        raise PeagleError(
            f"The drafter is wrapped as {type(model).__name__}, which calls it with other arguments than it has. Leave "
            "task_type out of the adapter's configuration."
        )
    if names != ["default"]:
        raise PeagleError(
            f"The drafter has the adapters {', '.join(names)}, but one of the name default is saved and merged. Make "
            "it with peagle_hf.add_adapter; merge an earlier one into the drafter before (peagle_hf.merge_adapter)."
        )
    if model.peft_config["default"].peft_type == PeftType.ADALORA:
        raise PeagleError(
            "AdaLoRA needs update_and_allocate after each step, which the Trainer doesn't call. Take LoraConfig."
        )


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Save the adapter with `mask_hidden` in the layout of PEFT.

    Raises:
        PeagleError: see `check_adapter`.
    """
    check_adapter(model)
    model.save_pretrained(str(folder))
    add_mask_hidden(model, folder)


def add_mask_hidden(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Add `mask_hidden` to the weights of an adapter that `peft` has saved into a folder."""
    path = Path(folder) / WEIGHTS
    mask_hidden = cast(PeagleForSpeculation, model.get_base_model()).mask_hidden
    tensors = {**load_file(path), MASK_HIDDEN: mask_hidden.detach().cpu().contiguous()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def load_adapter(
    drafter: PeagleForSpeculation, folder: str | os.PathLike[str], is_trainable: bool = False
) -> PeftModel:
    """Put a saved adapter on its drafter.

    Args:
        is_trainable: whether the adapter and `mask_hidden` are trained further; else they are frozen, for use or to be
            merged. To train, call `drafter.load_verifier(name, initialize=False)` before.

    Raises:
        PeagleError: the folder holds no adapter, or one whose tensors don't fit this drafter.
    """
    path = Path(folder) / WEIGHTS
    if not path.exists():
        raise PeagleError(f"{folder} holds no {WEIGHTS}. Name a folder that save_adapter wrote.")
    try:
        model = PeftModel.from_pretrained(drafter, str(folder), is_trainable=is_trainable)
        fitting = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
        fitting[MASK_HIDDEN] = drafter.mask_hidden.shape
        found = {name: tensor.shape for name, tensor in load_file(path).items()}
        wrong = [name for name in found.keys() | fitting.keys() if found.get(name) != fitting.get(name)]
        problem = ", ".join(sorted(wrong)[:5])
    except (RuntimeError, ValueError) as error:
        problem = str(error).splitlines()[0]
    if problem:
        raise PeagleError(
            f"The adapter in {folder} is not one for this drafter: {problem}. Load it onto the drafter that it was "
            "trained from."
        )
    drafter.mask_hidden.requires_grad_(is_trainable)
    use_onednn(model)
    return model


def merge_adapter(model: PeftModel) -> PeagleForSpeculation:
    """A plain drafter on the CPU with the adapter worked into its weights; `model` stays as it is.

    The drafter and the adapter are made anew, with random weights that are replaced at once; the random numbers that
    training draws afterwards, for dropout, stay the same.
    """
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    # PEFT would warn if the name differs, for example because one of the two is a link to the same drafter.
    config.base_model_name_or_path = None
    with torch.random.fork_rng(devices=[]):
        drafter = PeagleForSpeculation(cast(PeagleConfig, model.get_base_model().config))
        merged = get_peft_model(drafter, config, adapter_name=model.active_adapter)
    merged.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    return cast(PeagleForSpeculation, merged.merge_and_unload())
