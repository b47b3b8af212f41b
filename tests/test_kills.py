"""A pipeline that is killed, at any instant and before any rename, ends with the weights of one that ran through."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import FOLLOWERS
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "workers" / "forks.py"
KILLS = int(os.environ.get("PEAGLE_KILLS", "5"))
"""Random instants, and renames spread over all of them; PEAGLE_KILLS=1000 kills before every rename."""


class Forks:
    """The worker process; see its docstring."""

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, folder: Path, **kill) -> dict:
        self.process.stdin.write(json.dumps({"folder": str(folder), **kill}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def finish(self, folder: Path) -> None:
        ended = self.run(folder)
        assert ended["status"] == 0, (folder / "log.txt").read_text()[-3000:]


@pytest.fixture(scope="module")
def forks():
    worker = Forks()
    yield worker
    worker.process.stdin.close()
    worker.process.wait(30)


@pytest.fixture(scope="module")
def start(chain, tmp_path_factory) -> Path:
    """A folder with nothing but prompts and a pipeline from regenerate to train, two epochs of it."""
    folder = tmp_path_factory.mktemp("start")
    prompts = [{"messages": [{"role": "user", "content": f"w{token} w{token}"}]} for token in list(FOLLOWERS)[:8]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    pipeline = {
        "output": ".",
        "regenerate": {
            "model": str(chain),
            "prompts": "prompts.jsonl",
            "output": "chats.jsonl",
            "max_new_tokens": 12,
            "batch_size": 1,
            "temperature": 1.0,
        },
        "prepare": {"model": str(chain), "data": ["chats.jsonl"], "output": "data"},
        "extract": {"model": str(chain), "preprocessed_data": "data", "max_batch_tokens": 1},
        "train": {
            "verifier_name_or_path": str(chain),
            "data_path": "data",
            "save_path": "checkpoints",
            "num_layers": 1,
            "num_depths": 2,
            "epochs": 2,
            "total_seq_len": 32,
            "train_data_ratio": 0.75,
            "optim": "adamw_torch",
            "use_cpu": True,
            "bf16": False,
            "save_total_limit": 1,
            "report_to": "none",
        },
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    return folder


@pytest.fixture(scope="module")
def whole(forks, start, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run that went through, and how long it took with how many renames."""
    folder = copy(start, tmp_path_factory.mktemp("runs") / "whole")
    ended = forks.run(folder)
    assert ended["status"] == 0, (folder / "log.txt").read_text()[-3000:]
    return folder, ended


def copy(start: Path, folder: Path) -> Path:
    return Path(shutil.copytree(start, folder))


def check_same(folder: Path, whole: Path) -> None:
    """The same chats, hidden states and weights, bit for bit, and nothing half written.

    But for a hidden-state file: those of a killed process are removed when they are old enough not to be another's.
    """
    assert (folder / "chats.jsonl").read_bytes() == (whole / "chats.jsonl").read_bytes()
    for path in sorted(whole.glob("data/hidden_states/hs_*")):
        assert (folder / path.relative_to(whole)).read_bytes() == path.read_bytes(), path.name
    best = "checkpoints/checkpoint_best/model.safetensors"
    ours, theirs = (load_file(one / best) for one in (folder, whole))
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())
    numbers = [{path.name for path in (one / "checkpoints").iterdir()} for one in (folder, whole)]
    assert numbers[0] == numbers[1]
    left = [path for path in folder.rglob(".*") if path.suffix in (".tmp", ".old") and ".hs_" not in path.name]
    assert not left, left


@pytest.mark.fault(
    "kill -9 at a random instant of a pipeline, from regenerate to train", "a rerun ends with the same weights"
)
def test_killed_at_a_random_instant(forks, start, whole, tmp_path):
    draw = random.Random(KILLS)
    for number in range(KILLS):
        folder = copy(start, tmp_path / str(number))
        killed = forks.run(folder, seconds=draw.uniform(0, whole[1]["seconds"]))
        assert killed["status"] in (-9, 0)
        if number % 3 == 0:  # some are killed twice
            forks.run(folder, seconds=draw.uniform(0, whole[1]["seconds"]))
        forks.finish(folder)
        check_same(folder, whole[0])


@pytest.mark.fault(
    "kill -9 just before any rename of a pipeline, from regenerate to train", "a rerun ends with the same weights"
)
def test_killed_before_a_rename(forks, start, whole, tmp_path):
    total = whole[1]["renames"]
    for number in sorted({total * part // KILLS for part in range(KILLS)}):
        folder = copy(start, tmp_path / str(number))
        assert forks.run(folder, rename=number)["status"] == -9
        forks.finish(folder)
        check_same(folder, whole[0])
