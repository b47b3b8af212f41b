"""Checks of `PeagleTrainer` before the first step: parameters, data sets, model and metric."""

import copy
import logging
import math
from collections.abc import Mapping, Sized
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import Trainer

from ..data.collator import CODDataCollator
from ..data.dataset import HiddenStatesDataset
from ..errors import PeagleError
from ..model.drafter import PeagleForSpeculation
from .adapters import check_adapter
from .argument_rules import REFUSED_PARAMETERS
from .arguments import PeagleTrainingArguments
from .metrics import is_metric, metric_names

logger = logging.getLogger(__name__)

_NOT_CALLED = {
    "create_optimizer_and_scheduler": "transformers 5 calls create_optimizer and create_scheduler instead",
    "_get_train_sampler": "packed sequences are drawn by data_seed, from the data set's own plan",
}
"""Methods of the Trainer that a subclass would override in vain, and what is done in their place."""


def check_made(trainer: Trainer, others: Mapping[str, Any]) -> None:
    """Refuse parameters that `PeagleTrainer` doesn't have, and a subclass with a method that is never called.

    Raises:
        PeagleError: there is one; the message says why.
    """
    for name in others:
        reason = REFUSED_PARAMETERS.get(name, "neither this trainer nor the Trainer has it")
        raise PeagleError(f"PeagleTrainer can't be given {name}: {reason}.")
    for name, instead in _NOT_CALLED.items():
        if getattr(type(trainer), name) is not getattr(Trainer, name):
            raise PeagleError(f"{type(trainer).__name__} overrides {name}, which is never called: {instead}.")


def check_dataset(dataset: Any, may_lack: bool = True) -> None:
    """Refuse a data set that a trainer can't ask for packed sequences.

    Args:
        may_lack: None is no error.

    Raises:
        PeagleError: it is such a data set; the message says what to give instead.
    """
    if not isinstance(dataset, HiddenStatesDataset) and not (may_lack and dataset is None):
        raise PeagleError(
            f"A {type(dataset).__name__} can't be trained or measured on: packed sequences are asked for with their "
            "epoch. Give a HiddenStatesDataset; its argument rows chooses from the prepared ones, and "
            "build_datasets(args) splits by train_data_ratio."
        )


def check_drafter(model: Any) -> None:
    """Refuse a model that is no drafter and holds none, and one with an adapter that can't be saved.

    Raises:
        PeagleError: the model is no drafter, and the message names its class; or its adapter can't be saved or merged.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    drafters = [module for module in modules if isinstance(module, PeagleForSpeculation)]
    if not drafters:
        raise PeagleError(
            f"PeagleTrainer trains a PeagleForSpeculation, not a {type(model).__name__}. Make one with build_drafter, "
            "or load one with PeagleForSpeculation.from_pretrained and its load_verifier."
        )
    if isinstance(model, PeftModel):
        check_adapter(model)
    elif getattr(drafters[0], "_hf_peft_config_loaded", False):
        raise PeagleError(
            "The drafter has an adapter that transformers has put into it, which can't be merged into the checkpoints. "
            "Take peagle_hf.add_adapter for a new adapter, and peagle_hf.load_adapter for one that "
            "peagle_hf.save_adapter wrote."
        )


def check_given(args: Any, model: Any, optimizers: tuple[Any, Any], processing_class: Any) -> None:
    """Refuse arguments of `PeagleTrainer` that would fail later, or with which nothing would be trained.

    Raises:
        PeagleError: says which, and what to give instead.
    """
    if args is not None and not isinstance(args, PeagleTrainingArguments):
        raise PeagleError(
            f"PeagleTrainer takes PeagleTrainingArguments, not {type(args).__name__}. They have the fields of "
            "TrainingArguments too, with defaults that suit a drafter."
        )
    if model is not None:
        check_drafter(model)
    if processing_class is not None and not hasattr(processing_class, "save_pretrained"):
        raise PeagleError(
            f"processing_class is {processing_class!r}, which can't be saved. Give a tokenizer, such as that of "
            "AutoTokenizer.from_pretrained, or leave it out: training needs none."
        )
    optimizer, schedule = optimizers
    bare = getattr(optimizer, "optimizer", optimizer)
    if schedule is not None and getattr(schedule, "optimizer", bare) not in (optimizer, bare):
        raise PeagleError(
            "The schedule in optimizers=(optimizer, schedule) sets the rates of another optimizer than the one beside "
            "it, so it would change nothing. Give it together with its own optimizer."
        )
    if optimizer is not None and model is not None:
        weights = {id(parameter) for parameter in model.parameters()}
        if not any(id(one) in weights for group in optimizer.param_groups for one in group["params"]):
            raise PeagleError(
                "The optimizer in optimizers=(optimizer, schedule) has none of the weights of the model, so nothing "
                "would be trained. Make it from the parameters of the model that the trainer is given."
            )


def check_collator(collator: Any, num_depths: int) -> None:
    """Refuse a collator that draws slots of more depths than the drafter has.

    Raises:
        PeagleError: names both numbers.
    """
    if isinstance(collator, CODDataCollator) and collator.num_depths > num_depths:
        raise PeagleError(
            f"The data_collator draws {collator.num_depths} depths, but the drafter has num_depths {num_depths}. Make "
            "it with CODDataCollator.from_config(drafter.config), or leave it out."
        )


def check_named(name: Any, validations: Any) -> None:
    """Refuse the name of a data set to evaluate on that isn't among those of the trainer.

    Raises:
        PeagleError: says which there are.
    """
    if isinstance(name, str) and (not isinstance(validations, Mapping) or name not in validations):
        names = ", ".join(validations) if isinstance(validations, Mapping) else "none, as eval_dataset is no dict"
        raise PeagleError(f"There is no eval_dataset called {name!r}. Names that there are: {names}.")


def name_metric(args: PeagleTrainingArguments, validations: Any) -> PeagleTrainingArguments:
    """The arguments with `metric_for_best_model` under the name of the first of several validations.

    Args:
        validations: the data set to validate on, several by name, or None. Only with several, and if the metric names
            none of them, are the arguments others than those that are given.
    """
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if not isinstance(validations, dict) or not validations or not is_metric(metric):
        return args
    # The arguments that the user passed stay as they are.
    args = copy.copy(args)
    args.metric_for_best_model = f"{next(iter(validations))}_{metric}"
    logger.info("The best checkpoint is that with the best eval_%s.", args.metric_for_best_model)
    return args


def check_metric(args: PeagleTrainingArguments, num_depths: int, validations: Any) -> None:
    """Refuse a `metric_for_best_model` that no validation gives.

    Args:
        validations: the data set to validate on, several by name, or None.

    Raises:
        PeagleError: no validation gives the metric, or there is nothing to validate on; the message names the metrics
            that can be chosen.
    """
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    known = metric_names(num_depths)
    if isinstance(validations, dict):
        known = [f"{name}_{one}" for name in validations for one in known]
    if validations == {} and args.eval_strategy != "no":
        raise PeagleError('eval_dataset holds no data set to validate on. Give one, or pass eval_strategy="no".')
    if metric and metric not in known and validations:
        raise PeagleError(
            f"--metric-for-best-model is {metric!r}, which no validation gives. Take one of {', '.join(known)}."
        )


def check_there_is_a_step(args: PeagleTrainingArguments, dataset: Any) -> None:
    """Refuse a training of no steps.

    Raises:
        PeagleError: the training has no steps; the message says what to change.
    """
    size = len(dataset) if isinstance(dataset, Sized) else math.inf
    if size == 0:
        raise PeagleError("The training dataset has no packed sequence, so no step would be taken. Prepare more data.")
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and size < batch:
        raise PeagleError(
            f"There are {size} packed sequences, but a batch on all processes takes {batch}, and "
            "--dataloader-drop-last leaves out a smaller one: no step would be taken. Leave that flag out, lower "
            "--per-device-train-batch-size or --total-seq-len, or prepare more data."
        )
