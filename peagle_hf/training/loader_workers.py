"""How many processes read samples ahead for a training that doesn't say so itself."""

import logging
import os
import sys
from multiprocessing import get_all_start_methods, get_start_method
from pathlib import Path
from shutil import disk_usage
from typing import Any

from ..cpu import available_cores
from .memory import GIB

logger = logging.getLogger(__name__)

MOST_WORKERS = 4
"""Reading a packed sequence may take longer than training on it, but not four times as long."""
LARGEST_STATES = 4 * 8192 * 2
"""Bytes of hidden states for a position, of a verifier of 70 billion weights."""
SHARED_MEMORY = Path("/dev/shm")
"""Through which workers hand over what they have read."""


def choose_workers(args: Any) -> None:
    """Set how many loader workers a training has, unless it is given, and how they are started.

    Args:
        args: the `PeagleTrainingArguments`, whose `use_cpu` is decided.
    """
    if args.dataloader_num_workers is None:
        args.dataloader_num_workers = loader_workers(args)
    if args.dataloader_num_workers and start_method(args) != get_all_start_methods()[0]:
        args.dataloader_multiprocessing_context = start_method(args)


def loader_workers(args: Any) -> int:
    """The number of loader workers for each process of a training: 0, or as many as there are cores for.

    A training on a GPU would wait for its samples if it read them itself, and one that asks a server for them would
    wait for the server. On a CPU training needs all cores itself. Where workers aren't forked (see `start_method`),
    each epoch and validation would wait for them, and a script would need a guard against running again in each.

    Args:
        args: the `PeagleTrainingArguments`, whose `use_cpu` is decided.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_workers = min(MOST_WORKERS, max(1, available_cores() // processes))
    if args.asks_servers:
        return num_workers
    if args.use_cpu or start_method(args) != "fork":
        return 0
    # During a validation the workers of the training wait, and each still holds its batches.
    rows = args.per_device_train_batch_size
    rows += 0 if args.eval_strategy == "no" else args.per_device_eval_batch_size
    batch = rows * args.total_seq_len * LARGEST_STATES
    # Each worker has two finished batches that wait, and makes a third one.
    needed = 3 * num_workers * processes * batch
    free = disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else needed
    if free < needed:
        logger.warning(
            "Training reads its samples in its own process, one after another, since %s has only %.1f GiB free and "
            "loader workers could need %.1f. Give a container more with docker run --shm-size, or choose with "
            "--dataloader-num-workers.",
            *(SHARED_MEMORY, free / GIB, needed / GIB),
        )
        return 0
    return num_workers


def start_method(args: Any) -> str:
    """How a training starts its loader workers: as the user has chosen, else as Python does, but on Linux by a fork.

    From Python 3.14 on they would import everything anew there too, which takes seconds in each epoch and validation.
    Python's default is not a choice of the user's, even once some library has made it the method of the process.

    Args:
        args: the `PeagleTrainingArguments`.
    """
    default = get_all_start_methods()[0]
    method: str = args.dataloader_multiprocessing_context or get_start_method(allow_none=True) or default
    is_chosen = args.dataloader_multiprocessing_context is not None or method != default
    return method if is_chosen or sys.platform != "linux" else "fork"
