"""`peagle-hf train` that kills itself in the middle of writing: `killed.py POINT SIGNAL STEP train --flags`."""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerState

from peagle_hf import PeagleTrainer
from peagle_hf.cli import main
from peagle_hf.training import checkpoints

point, signal_name, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
current = {"step": 0}


def die():
    os.kill(os.getpid(), getattr(signal, signal_name))
    signal.pause()


def note_step(save):
    def wrapped(self, *args, **kwargs):
        current["step"] = self.state.global_step
        return save(self, *args, **kwargs)

    return wrapped


def half(write, path_of):
    """Let `write` do its work, cut what it wrote in two, and die."""

    def wrapped(*args, **kwargs):
        write(*args, **kwargs)
        path = Path(path_of(*args))
        if current["step"] == step and path.name in ("optimizer.pt", "trainer_state.json", "model.safetensors"):
            os.truncate(path, path.stat().st_size // 2)
            die()

    return wrapped


def half_removed(remove, is_the_one):
    def wrapped(path, *args, **kwargs):
        if current["step"] == step and is_the_one(Path(path).name):
            next(Path(path).rglob("model.safetensors")).unlink()
            die()
        remove(path, *args, **kwargs)

    return wrapped


if __name__ == "__main__":
    PeagleTrainer._save_checkpoint = note_step(PeagleTrainer._save_checkpoint)
    if point == "optimizer":
        torch.save = half(torch.save, lambda content, path: path)
    elif point == "state":
        TrainerState.save_to_json = half(TrainerState.save_to_json, lambda state, path: path)
    elif point == "served weights":
        checkpoints.save_file = half(checkpoints.save_file, lambda tensors, path, metadata: path)
    elif point == "removing a checkpoint":
        shutil.rmtree = half_removed(shutil.rmtree, lambda name: name.startswith("."))
    main(sys.argv[4:])
