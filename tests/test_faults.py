"""Training that is killed, runs out of disk, or may not write: the last whole checkpoint stays, and is gone on from."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from test_trainer import losses, run, weights
from transformers import TrainerState
from transformers.modeling_utils import safe_save_file

from peagle_hf import PeagleError, PeagleTrainingArguments
from peagle_hf.cli.parsing import flags
from peagle_hf.files import atomic_path, check_writable, write_json
from peagle_hf.model.served_checkpoint import check_checkpoint
from peagle_hf.training.checkpoints import checkpoints_by_step
from peagle_hf.training.run import train

WORKER = Path(__file__).parent / "workers" / "killed.py"


def start(*command):
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.fault(
    "Training is killed with SIGTERM or SIGKILL while it saves, exports or removes a checkpoint",
    "A rerun ends with the same weights as a run that was never killed.",
)
@pytest.mark.parametrize(
    ("point", "killer", "newest"),
    [
        ("optimizer", "SIGTERM", 10),
        *(
            pytest.param(point, "SIGKILL", newest, marks=pytest.mark.slow)
            for point, newest in {
                "state": 10,
                "served weights": 10,
                "removing a checkpoint": 15,
            }.items()
        ),
    ],
)
def test_killed_in_the_middle_of_a_save(train_flags, tmp_path, point, killer, newest):
    """At step 15, the end of the third epoch of four: what a rerun gives is bit-equal to a run never killed."""
    flags_of_both = {**train_flags, "num_train_epochs": 4, "save_total_limit": 2, "learning_rate": 3e-3}
    whole = run(flags_of_both)
    folder = tmp_path / "killed"
    cut = {**flags_of_both, "output_dir": str(folder)}
    process = start(str(WORKER), point, killer, "15", "train", *flags(cut))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == (143 if killer == "SIGTERM" else -signal.SIGKILL), output[-3000:]
    leftovers = [name for name in os.listdir(folder) if name.startswith(".")]
    assert bool(leftovers) is (killer == "SIGKILL")  # SIGTERM lets the process clean up
    assert max(checkpoints_by_step(folder)) == newest
    assert check_checkpoint(folder / "checkpoint_best")
    resumed = train(PeagleTrainingArguments(**cut))
    assert resumed.state.global_step == 20
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(resumed).items())
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    assert set(os.listdir(folder)) >= {"3", "checkpoint_best"}


@pytest.mark.fault(
    "SIGTERM to a training with the Trainer's enable_jit_checkpoint",
    "It saves and ends, and a rerun goes on from there.",
)
@pytest.mark.slow
def test_sigterm_with_a_jit_checkpoint_saves_and_ends(train_flags, tmp_path):
    """The Trainer's own `enable_jit_checkpoint`: it saves three seconds after SIGTERM and ends in order.

    If they are over at the end of a step, it saves before that step's loss is in the log.
    """
    endless = {**train_flags, "num_train_epochs": 1000, "lr_scheduler_type": "constant", "eval_strategy": "no"}
    endless |= {"save_strategy": "no", "output_dir": str(tmp_path / "ended")}
    process = start("-m", "peagle_hf", "train", *flags({**endless, "enable_jit_checkpoint": True}))
    while "'loss'" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output[-3000:]
    newest = max(checkpoints_by_step(tmp_path / "ended"))
    resumed = run({**endless, "max_steps": newest + 7}, resume=True)
    whole = run({**endless, "output_dir": str(tmp_path / "whole"), "max_steps": newest + 7})
    assert resumed.state.global_step == newest + 7
    found, expected = (
        {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        for trainer in (resumed, whole)
    )
    assert found == {step: loss for step, loss in expected.items() if step in found}
    assert expected.keys() - found.keys() <= {newest}
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(resumed).items())


FULL = {
    "model.safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "optimizer.pt": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "trainer_state.json": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.fault(
    "The disk fills up while a checkpoint is saved", "An error names the file, and the checkpoint before is whole."
)
@pytest.mark.parametrize("file", FULL)
def test_a_full_disk_keeps_the_checkpoint_before(train_flags, tmp_path, monkeypatch, file):
    """The errors are those that the libraries raise on a full disk, after half of the file is written."""
    whole = run(train_flags)

    def full(write, path_of):
        def wrapped(*args, **kwargs):
            path = Path(path_of(*args))
            if path.name == file and ".1." in str(path):
                path.write_bytes(b"{ half")
                raise FULL[file]
            return write(*args, **kwargs)

        return wrapped

    cut = {**train_flags, "output_dir": str(tmp_path / "full")}
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.modeling_utils.safe_save_file", full(safe_save_file, lambda tensors, path, **_: path)
        )
        patch.setattr("torch.save", full(torch.save, lambda content, path: path))
        patch.setattr(TrainerState, "save_to_json", full(TrainerState.save_to_json, lambda state, path: path))
        with pytest.raises(PeagleError, match=r"No space is left on the disk of .*/1; .*earlier is complete"):
            run(cut)
    assert {"0", "checkpoint_best"} <= set(os.listdir(tmp_path / "full"))
    assert not [name for name in os.listdir(tmp_path / "full") if "1" in name]
    assert losses(train(PeagleTrainingArguments(**cut))) == losses(whole)


@pytest.mark.fault("The output folder can't be written to", "An error names it before the first step.")
def test_a_folder_that_can_not_be_written_is_named_before_training(train_flags, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(PeagleError, match=f"{folder} can't be written: "):
            train(PeagleTrainingArguments(**{**train_flags, "output_dir": str(folder)}))


@pytest.mark.fault("A folder has no permission to write", "An error names the folder.")
def test_a_folder_without_permission_is_named(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PeagleError, match=f"{folder} can't be written: Permission denied"):
            check_writable(folder)
    finally:
        os.seteuid(user)


def test_a_folder_takes_an_older_ones_place(tmp_path):
    for content in ("first", "second"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "folder"):
        pass
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["second"]


def test_a_file_does_not_take_a_folders_place(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(PeagleError, match=r"notes can't be written: Is a directory"):
        write_json(tmp_path / "notes", {})
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
