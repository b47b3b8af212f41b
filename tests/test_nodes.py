"""Two agents of a launcher on this machine, for two machines, train as one, by the commands of docs/training.md."""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from test_distributed import free_port, history, launch
from test_trainer import ROOT, full_weights

from peagle_hf.cli.parsing import flags

pytestmark = pytest.mark.slow
SECTION = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("### Several machines")[2]
COMMANDS = {
    "torchrun": re.search(r"^torchrun (.*?)-m peagle_hf train", SECTION, re.M | re.S)[1],
    "accelerate": re.search(r"^accelerate launch (.*?)examples/train.py", SECTION, re.M | re.S)[1],
    "slurm": re.search(r"^srun torchrun (.*?)-m peagle_hf train", SECTION, re.M | re.S)[1],
}
MODULES = {
    "torchrun": "torch.distributed.run",
    "slurm": "torch.distributed.run",
    "accelerate": "accelerate.commands.launch",
}


def command(kind: str, node: int, port: int) -> list[str]:
    """The documented command of a node, with one process on it, this host's address, and DDP as FSDP2 needs GPUs."""
    given = COMMANDS[kind].replace("\\\n", " ").replace("node0", "127.0.0.1").replace("29500", str(port))
    given = given.replace('"$SLURM_NNODES"', "2").replace('"$head_node:', '"127.0.0.1:').replace('"$SLURM_JOB_ID"', "7")
    given = given.replace("--nproc-per-node 8", "--nproc-per-node 1").replace("--num_processes 16", "--num_processes 2")
    given = given.replace("--machine_rank 0", f"--machine_rank {node}").replace("fsdp2.yaml", "ddp.yaml")
    program = ["examples/train.py"] if kind == "accelerate" else ["-m", "peagle_hf", "train"]
    return [sys.executable, "-m", MODULES[kind], *given.replace('"', "").split(), *program]


def start(kind: str, train_flags: dict, folders: list[Path]) -> list[subprocess.Popen]:
    """An agent on each node, whose working directory is its disk."""
    port = free_port()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    agents = []
    for node, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        if not (folder / "examples").exists():
            (folder / "examples").symlink_to(ROOT / "examples")
        given = flags({**train_flags, "use_cpu": None})
        with open(folder / f"node {node}.log", "a") as log:
            agents.append(
                subprocess.Popen(
                    [*command(kind, node, port), *given],
                    env=environment,
                    cwd=folder,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
    return agents


def train(kind: str, train_flags: dict, folders: list[Path]) -> None:
    for node, agent in enumerate(start(kind, train_flags, folders)):
        assert agent.wait(300) == 0, (folders[node] / f"node {node}.log").read_text()[-4000:]


def assert_equal(folder: Path, other: Path) -> None:
    assert history(folder, "loss") == history(other, "loss")
    expected, found = full_weights(other), full_weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def one_node(train_flags, tmp_path) -> tuple[dict, Path]:
    """The flags of a run, and the last checkpoint of two processes of one node."""
    common = {**train_flags, "output_dir": "checkpoints"}
    launch("ddp", {**common, "output_dir": str(tmp_path / "one")})
    return common, tmp_path / "one" / "1"


@pytest.mark.fault("One of two machines is lost while they train.", "The other one ends, and a rerun resumes.")
def test_two_nodes_with_one_folder_are_one_node(one_node, tmp_path):
    common, wanted = one_node
    shared = [tmp_path / "shared"] * 2
    steps = {"save_strategy": "steps", "save_steps": 1}
    agents = start("torchrun", {**common, **steps}, shared)
    while not list((shared[0] / "checkpoints").glob("checkpoint-1")):
        assert all(agent.poll() is None for agent in agents), (shared[0] / "node 0.log").read_text()[-4000:]
        time.sleep(0.05)
    # Its processes, in sessions of their own, are listed while it lives: afterwards they have another parent.
    lost = [psutil.Process(agents[1].pid), *psutil.Process(agents[1].pid).children(recursive=True)]
    for process in lost:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert agents[1].wait(60) != 0
    assert agents[0].wait(240) != 0
    train("torchrun", {**common, **steps}, shared)
    assert "Resuming from" in (shared[0] / "node 0.log").read_text()
    assert_equal(shared[0] / "checkpoints" / "1", wanted)


@pytest.mark.parametrize("kind", ["slurm", "accelerate"])
def test_two_nodes_with_a_folder_each_are_one_node(one_node, tmp_path, kind):
    """With --save-on-each-node either folder is whole, and both are resumed from."""
    common, wanted = one_node
    nodes = [tmp_path / "node 0", tmp_path / "node 1"]
    if kind == "accelerate":
        common = {**common, "bf16": False}
    train(kind, {**common, "save_on_each_node": True}, nodes)
    for node in nodes:
        assert_equal(node / "checkpoints" / "1", wanted)
        assert (node / "checkpoints" / "checkpoint_best" / "model.safetensors").exists()
        shutil.rmtree(node / "checkpoints" / "1")
    train(kind, {**common, "save_on_each_node": True}, nodes)
    for node in nodes:
        assert_equal(node / "checkpoints" / "1", wanted)
        assert not list((node / "checkpoints").glob(".*"))
