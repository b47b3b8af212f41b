"""Checks of `PeagleTrainer` before the first step: parameters, data sets, model and metric."""

import copy
import logging
import math
from collections.abc import Mapping, Sized
from typing import Any

from torch import nn

from ..data.dataset import HiddenStatesDataset
from ..errors import PeagleError
from ..model.drafter import PeagleForSpeculation
from .argument_rules import REFUSED_PARAMETERS
from .arguments import PeagleTrainingArguments
from .metrics import is_metric, metric_names

logger = logging.getLogger(__name__)


def check_parameters(others: Mapping[str, Any]) -> None:
    """Refuse parameters that `PeagleTrainer` doesn't have, with the reason where the Trainer has them.

    Raises:
        PeagleError: such a parameter is given.
    """
    for name in others:
        reason = REFUSED_PARAMETERS.get(name, "neither this trainer nor the Trainer has it")
        raise PeagleError(f"PeagleTrainer can't be given {name}: {reason}.")


def check_dataset(dataset: Any) -> None:
    """Refuse a data set that a trainer can't ask for packed sequences.

    Raises:
        PeagleError: it is such a data set; the message says what to give instead.
    """
    if dataset is not None and not isinstance(dataset, HiddenStatesDataset):
        raise PeagleError(
            f"A {type(dataset).__name__} can't be trained or measured on: packed sequences are asked for with their "
            "epoch. Give a HiddenStatesDataset; its argument rows chooses from the prepared ones, and "
            "build_datasets(args) splits by train_data_ratio."
        )


def check_drafter(model: nn.Module) -> None:
    """Refuse a model that is no drafter and holds none.

    Raises:
        PeagleError: the model is no drafter; the message names its class.
    """
    if not any(isinstance(module, PeagleForSpeculation) for module in model.modules()):
        raise PeagleError(f"PeagleTrainer trains a PeagleForSpeculation, not a {type(model).__name__}.")


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
