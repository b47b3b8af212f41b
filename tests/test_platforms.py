"""macOS and Windows, by simulation: what Linux alone has is taken away."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_cache, write_prepared

WORKER = Path(__file__).parent / "workers" / "other_platform.py"


@pytest.mark.fault(
    "The system has no fork, no flock and no symbolic links", "Preparing, training and pushing work all the same."
)
def test_prepare_train_and_push_need_nothing_that_only_linux_has(servable_verifier, tiny_verifier, tmp_path):
    data = write_cache(write_prepared(tmp_path / "data", [12 + index for index in range(10)]), tiny_verifier)
    chats = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]
    chats.write_text("".join(json.dumps({"conversations": chat}) + "\n" for _ in range(3)))
    command = [sys.executable, str(WORKER), str(tiny_verifier), str(servable_verifier), str(chats), str(data)]
    paths = os.pathsep.join([str(WORKER.parents[1]), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("all of it ran")
    assert "checkpoint_best is a copy of" in result.stderr
