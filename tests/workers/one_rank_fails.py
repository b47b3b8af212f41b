"""`peagle-hf train` where something fails on the second process only: `one_rank_fails.py FAULT train --flags`."""

import os
import sys
import time
from pathlib import Path

from peagle_hf import PeagleError, PeagleTrainer
from peagle_hf.cli import main
from peagle_hf.training import run as training

fault, *argv = sys.argv[1:]


def fail(*args, **kwargs):
    raise PeagleError("the disk of this machine is gone")


def fail_without_a_word(*args, **kwargs):
    os._exit(7)


def hang(*args, **kwargs):
    time.sleep(600)


is_dir = Path.is_dir


def is_seen(path, **options):
    return "checkpoints" not in path.parts and is_dir(path, **options)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        if fault == "data":
            training.build_datasets = fail
        elif fault == "checkpoint":
            Path.is_dir = is_seen
        elif fault == "step":
            PeagleTrainer.training_step = fail
        elif fault == "ends":
            PeagleTrainer.training_step = fail_without_a_word
        elif fault == "hangs":
            PeagleTrainer.training_step = hang
    main(argv)
