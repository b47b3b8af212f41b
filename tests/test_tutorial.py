"""Every command of the tutorial of vLLM's speculators, with only the program's name changed, on small models."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HIDDEN, THINKING_LAYERS, VllmServer
from datasets import load_from_disk
from fake_vllm import FakeVllm
from test_docs import ROOT, first_lines, run
from test_trainer import run as train_tiny

from peagle_hf import PeagleTrainingArguments, cli, train
from peagle_hf.data.endpoint_folder import SERVER_RECORD, write_server_record
from peagle_hf.verifier.loading import default_aux_layer_ids

NAME = "output/peagle_qwen3_8b_sharegpt"
PREPARE = """
peagle-hf prepare \
--model Qwen/Qwen3-8B \
--data sharegpt \
--output ./output/peagle_qwen3_8b_sharegpt \
--max-samples 5000 \
--seq-length 4096
"""
LAUNCH = """
CUDA_VISIBLE_DEVICES=0,1 peagle-hf launch-vllm Qwen/Qwen3-8B \
--hidden-states-path ./output/peagle_qwen3_8b_sharegpt/hidden_states \
-- --data-parallel-size 2 --port 8000
"""
EXTRACT_AGAIN = """
peagle-hf extract \
--preprocessed-data ./output/peagle_qwen3_8b_sharegpt \
--endpoint http://localhost:8000/v1 \
--output ./output/peagle_qwen3_8b_sharegpt/hidden_states \
--max-samples 5000 \
--concurrency 32
"""
EXTRACT = f"{EXTRACT_AGAIN.rstrip()} --validate-outputs"
TRAIN_FLAGS = """\
--verifier-name-or-path Qwen/Qwen3-8B \
--data-path ./output/peagle_qwen3_8b_sharegpt \
--hidden-states-path ./output/peagle_qwen3_8b_sharegpt/hidden_states \
--save-path ./output/peagle_qwen3_8b_sharegpt/checkpoints \
--speculator-type peagle \
--num-layers 4 \
--num-depths 4 \
--down-sample-ratio 0.7 \
--down-sample-ratio-min 0.2 \
--no-norm-before-residual \
--scheduler-type cosine \
--epochs 5 \
--lr 6e-4 \
--total-seq-len 4096 \
--on-missing raise
"""
TRAIN = f"peagle-hf train {TRAIN_FLAGS}"
TORCHRUN = f"CUDA_VISIBLE_DEVICES=0,1 torchrun --standalone --nproc_per_node 2 -m peagle_hf train {TRAIN_FLAGS}"
SHORTER = "peagle-hf train --total-seq-len 2048 ..."
SMALLER = "peagle-hf train --num-layers 2 --num-depths 2"
FURTHER = "peagle-hf train --from-pretrained ./output/peagle_qwen3_8b_sharegpt/checkpoints/checkpoint_best"
SERVE = "peagle-hf serve ./output/peagle_qwen3_8b_sharegpt/checkpoints/checkpoint_best"


WORDS = ["the", "rain", "in", "the", "river", "runs", "under", "a", "green", "stone"]
CHATS = [[" ".join([*WORDS[turn:], str(number)]) for turn in range(2 + 2 * (number % 3))] for number in range(40)]
CHATS[3][1] = f"<think>\nwhy?\n</think>\n\n{CHATS[3][1]}"
CHATS.append(["no answer"])


def share_gpt(chats: list[list[str]]) -> list[dict]:
    return [
        {
            "id": f"chat_{number}",
            "conversations": [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)],
        }
        for number, texts in enumerate(chats)
    ]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory; `fill(verifier, chats)` puts there what the tutorial's names stand for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def fill(verifier: Path, chats: list[list[str]]) -> Path:
        (tmp_path / "Qwen").mkdir()
        (tmp_path / "Qwen" / "Qwen3-8B").symlink_to(verifier)
        folder = tmp_path / "Aeala" / "ShareGPT_Vicuna_unfiltered"
        folder.mkdir(parents=True)
        (folder / "ShareGPT.json").write_text(json.dumps(share_gpt(chats)))
        return tmp_path

    return fill


SMALL = {"5000": "27", "4096": "512", "2048": "256", "--epochs 5": "--epochs 2"}


def words(command: str, substitutes: dict[str, str]) -> list[str]:
    for written, used in substitutes.items():
        command = command.replace(written, used)
    return shlex.split(command)


def peagle_hf(command: str, substitutes: dict[str, str] | None = None) -> None:
    """Run a command in this process."""
    program, *arguments = words(command, substitutes or SMALL)
    assert program == "peagle-hf"
    cli.main(arguments)


def completed(command: str, folder: str) -> str:
    """A command that the tutorial shows without what stays the same, for one epoch, with checkpoints in `folder`."""
    flags = TRAIN_FLAGS.replace("--epochs 5", "--epochs 1").replace(f"{NAME}/checkpoints", f"{NAME}/{folder}")
    for flag in re.findall(r"--\S+", command):
        flags = re.sub(rf"{flag} \S+", "", flags)
    return f"{command.removesuffix(' ...')} {flags}"


def test_every_command_with_a_template_that_rewrites_earlier_answers(
    place, thinking_verifier, monkeypatch, capsys, caplog
):
    """Forty chats of one to three answers, each of which is a row; the tutorial's 5000 rows are 27 of these."""
    folder = place(thinking_verifier, CHATS)
    prepared = folder / NAME
    states, checkpoints = prepared / "hidden_states", prepared / "checkpoints"
    caplog.set_level("INFO")

    peagle_hf(PREPARE)
    assert {path.name for path in prepared.iterdir()} > {"dataset_info.json", "state.json", "token_freq.pt"}
    rows = load_from_disk(prepared)
    assert len(rows) == 27
    assert len(set(rows["conversation_id"][:].tolist())) < 20

    _, *launch = words(LAUNCH, SMALL)
    capsys.readouterr()
    cli.main([*launch[1 : launch.index("--")], "--dry-run", *launch[launch.index("--") :]])
    assert capsys.readouterr().out.rstrip().endswith("--data-parallel-size 2 --port 8000")

    states.mkdir(exist_ok=True)
    slots = [*default_aux_layer_ids(THINKING_LAYERS), THINKING_LAYERS]
    with FakeVllm(states, "Qwen/Qwen3-8B", slots, HIDDEN) as server:
        url = SMALL | {"http://localhost:8000/v1": server.url}
        write_server_record(states, "Qwen/Qwen3-8B", slots)  # as launch-vllm does once its server answers
        peagle_hf(EXTRACT, url)
        assert {path.name for path in states.glob("hs_*")} == {f"hs_{row}.safetensors" for row in range(27)}
        num_asked = len(server.asked)
        peagle_hf(EXTRACT_AGAIN, url)
        assert len(server.asked) == num_asked

    peagle_hf(TRAIN)
    assert {path.name for path in checkpoints.iterdir()} > {"0", "1", "checkpoint_best"}
    for name in ("config.json", "model.safetensors", "optimizer_state_dict.pt", "scheduler_state_dict.pt"):
        assert (checkpoints / "1" / name).exists()
    best = (checkpoints / "checkpoint_best").readlink()
    assert f"checkpoint_best -> {best}, the checkpoint with the highest eval_acceptance_length" in caplog.text
    assert "With --metric-for-best-model loss the lowest validation loss chooses" in caplog.text
    peagle_hf(f"{SERVE} --dry-run")

    for number, command in enumerate((SHORTER, SMALLER, FURTHER)):
        peagle_hf(completed(command, f"others_{number}"))
        assert (prepared / f"others_{number}" / "checkpoint_best" / "model.safetensors").exists()


@pytest.mark.slow
def test_torchrun_without_a_gpu_connects_its_processes(place, thinking_verifier):
    folder = place(thinking_verifier, CHATS)
    peagle_hf(PREPARE)
    peagle_hf(f"peagle-hf extract --model Qwen/Qwen3-8B --preprocessed-data ./{NAME} --max-samples 5000")
    run(["bash", "-c", shlex.join(words(TORCHRUN, SMALL))], folder)
    record = json.loads((folder / NAME / "checkpoints" / "1" / "training.json").read_text())
    assert record["processes"] == 2


@pytest.mark.slow
@pytest.mark.vllm
def test_every_command_with_smollm2_and_real_vllm(place, smollm2):
    """Without the data parallelism, which needs two GPUs; six chats, rows of 256 tokens, one epoch."""
    chats = []
    for line in first_lines(ROOT / "examples/data/train_chats.jsonl", 6).splitlines():
        chats.append([message["content"] for message in json.loads(line)["messages"] if message["role"] != "system"])
    folder = place(smollm2, chats)
    small = {"5000": "6", "4096": "256", "--epochs 5": "--epochs 1"}
    peagle_hf(PREPARE, small)
    _, _, *launch = words(LAUNCH, {})
    launch = launch[: launch.index("--") + 1]
    flags = ["--dtype", "float32", "--max-model-len", "300"]
    with VllmServer(["peagle_hf", *launch], flags, folder / "launch.log") as server:
        while not (folder / NAME / "hidden_states" / SERVER_RECORD).exists():  # launch-vllm sees within a second
            time.sleep(0.1)
        peagle_hf(EXTRACT, small | {"http://localhost:8000/v1": server.url})
        peagle_hf(EXTRACT_AGAIN, small | {"http://localhost:8000/v1": server.url})
    assert len(list((folder / NAME / "hidden_states").glob("hs_*.safetensors"))) == 6
    peagle_hf(TRAIN, small)
    peagle_hf(completed(SMALLER, "smaller"), small)
    peagle_hf(completed(FURTHER, "further"), small)
    two = words(TORCHRUN.replace(f"{NAME}/checkpoints", f"{NAME}/two"), small)
    run(["bash", "-c", shlex.join(two)], folder)
    with VllmServer(["peagle_hf", *words(SERVE, {})[1:], "--"], flags, folder / "serve.log") as server:
        answered = subprocess.run(
            [sys.executable, "-m", "peagle_hf", "chat", "--endpoint", server.url, "--max-tokens", "20"],
            input="Name a colour.\n",
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert answered.returncode == 0, answered.stderr
    assert "acceptance length" in answered.stdout


def test_the_best_checkpoint_goes_by_acceptance_or_by_the_tutorials_rule(train_flags, caplog):
    """Two rules, two links in the same run, each said in the log."""
    caplog.set_level("INFO")
    changes = {"num_train_epochs": 5, "learning_rate": 3e-3}
    trainer = train_tiny(train_flags, **changes)
    folder = Path(train_flags["output_dir"])
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    lowest = min(range(5), key=lambda epoch: entries[epoch]["eval_loss"])
    longest = max(range(5), key=lambda epoch: entries[epoch]["eval_acceptance_length"])
    assert lowest != longest
    assert (folder / "checkpoint_best").readlink() == Path(str(longest))
    assert f"checkpoint_best -> {longest}, the checkpoint with the highest eval_acceptance_length" in caplog.text
    train(PeagleTrainingArguments(**{**train_flags, **changes}, metric_for_best_model="loss"))
    assert (folder / "checkpoint_best").readlink() == Path(str(lowest))
    assert f"checkpoint_best -> {lowest}, the checkpoint with the lowest eval_loss" in caplog.text
