"""The benchmark of the training step runs and fills its table; its times at these sizes mean nothing."""

import argparse
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_prepared
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peagle_hf.model.served_checkpoint import check_checkpoint

BENCHMARKS = Path(__file__).parent / "benchmarks"
BENCHMARK = BENCHMARKS / "training_step.py"


@pytest.mark.slow
def test_small_benchmark_reports_every_case(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--small", "--long", "--ours-only", "--steps", "1"]
    command += ["--output", str(tmp_path / "results.json")]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    results = json.loads((tmp_path / "results.json").read_text())
    labels = ["128, K 4, Vd 512", "128, K 3, Vd 100", "128, K 4, Vd 512, checkpointed"]
    assert [result["case"] for result in results] == labels
    for result in results:
        assert {"first_step_s", "step_ms", "forward_backward_ms", "tokens_per_s", "flops"} <= result.keys()
        assert f"| {result['case']} | ours | {result['step_ms']} |" in run.stdout
        assert result["rows"] > 128
        assert result["loss"] > 0


def test_a_peer_that_fails_is_a_line_of_the_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "speculators").mkdir()
    (tmp_path / "speculators" / "__init__.py").write_text("raise RuntimeError('two | three\\nfour')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import training_step

    options = SimpleNamespace(steps=1, small=True, profile=False)
    results = training_step.run_child("speculators", [training_step.Case(128, 64, 4, 512)], options)
    failed = "failed: RuntimeError: two / three"
    assert results == [{"implementation": "speculators", "case": "128, K 4, Vd 512", "failed": failed}]
    training_step.print_table([*results, {"implementation": "ours", "case": "128, K 4, Vd 512", "step_ms": 2}], "CPU")
    assert f"| 128, K 4, Vd 512 | speculators | {failed} |" in capsys.readouterr().out


@pytest.mark.slow
def test_small_tutorial_goes_on_where_it_was_stopped(tmp_path):
    def run(*arguments: str) -> tuple[dict, str]:
        command = [sys.executable, str(BENCHMARKS / "tutorial_size.py"), *arguments, "--results", str(tmp_path)]
        command += ["--tiny", "--folder", str(tmp_path / "work"), "--conversations", "12"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500).stdout
        return json.loads((tmp_path / "results.json").read_text()), printed

    results, _ = run("model")
    made = results["model"]
    results, printed = run("all", "--minutes", "0.001")
    assert "No time is left" in printed
    assert results["model"] == made
    assert "prepare" not in results
    results, printed = run("all", "--max-steps", "4")
    assert results["model"] == made
    prepared = results["prepare"]
    assert prepared["samples"] == 12
    assert 0.5 < prepared["learnt"] / prepared["tokens"] < 1
    extracted, trained = results["extract, 1 GPUs"], results["train, 1 GPUs"]
    assert extracted["tokens"] == extracted["of_tokens"] == prepared["tokens"]
    assert trained["complete"]
    assert trained["attempts"][-1]["logged_steps"] == 4
    assert trained["step_s"] > 0
    assert trained["flops_a_step"] > 1e6
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    found = {row[0]: row[2] for row in rows}
    assert re.fullmatch(r"[\d.]+", found["extract"])
    assert re.fullmatch(r"\*[\d.]+\*", found["train: 5 epochs"])  # in italics, since only 4 steps were run
    assert re.fullmatch(r"\*[\d.]+\*", found["everything"])
    results, _ = run("all", "--max-steps", "6")
    assert results["prepare"] == prepared
    assert [one["logged_steps"] for one in results["train, 1 GPUs"]["attempts"]] == [4, 2]


def attempt(steps: int, **facts: float) -> dict:
    return {"logged_steps": steps, "step_s": 0.6, "start_s": 60.0, "seconds": 900.0, "loader_wait": 0.0} | facts


@pytest.mark.parametrize(
    ("attempts", "complete", "epoch", "all_epochs"),
    [
        ([attempt(200)], False, "*1.0*", "*6.0*"),  # two epochs were whole, but their ends weren't logged
        ([attempt(230, epoch_s=90.0), attempt(30)], False, "1.5", "*8.5*"),
        ([attempt(250, epoch_s=90.0), attempt(250, epoch_s=90.0)], True, "1.5", "*8.5*"),
        ([attempt(30), attempt(500, epoch_s=90.0)], True, "1.5", "15.0"),
    ],
)
def test_what_the_tutorials_report_calculates_is_in_italics(monkeypatch, attempts, complete, epoch, all_epochs):
    """Attempts that were cut don't add up: the next one begins at a checkpoint."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from tutorial_report import report

    train = {"gpus": 2, "steps_an_epoch": 100, "attempts": attempts, "complete": complete, "generated": False}
    server = {"storage": "plain", "samples": 5, "of_samples": 10, "tokens": 50, "of_tokens": 100}
    server |= {"seconds": 60, "tokens_per_s": 0.5}
    results = {"device": "2 x H200", "versions": {"torch": "2", "transformers": "5"}, "prepare": {"seconds": 60}}
    results["prepare"] |= {"samples": 10, "tokens": 100}
    printed = report([results | {"train, 2 GPUs": train, "extract, 2 GPUs, vLLM server": server}])
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    found = {row[0]: row[2] for row in rows}
    assert (found["train: start"], found["train: an epoch"]) == ("*1.0*", epoch)
    assert found["train: 5 epochs"] == all_epochs
    assert found["extract, vLLM server"] == "*2.7*"
    assert found["everything"] == f"*{float(all_epochs.strip('*')) + 1 + 160 / 60:.1f}*"


def test_the_tutorial_goes_on_from_folders_of_other_runs(tmp_path, monkeypatch, capsys):
    """New results with the old folder of large files, extraction from a server, and steps saved within an epoch."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tutorial_size
    from tutorial_inputs import TINY

    class Asked(tutorial_size.Benchmark):
        def run(self, step, commands, **_):
            asked[step] = commands[0][0]
            return tutorial_size.Timed(seconds=1.0, returncode=0, lines=[(1.0, "")])

    asked: dict[str, list[str]] = {}
    write_prepared(tmp_path / "data", [20] * 10)
    config = AutoConfig.for_model("qwen3", **TINY)
    weights = AutoModelForCausalLM.from_config(config)
    weights.save_pretrained(tmp_path / "verifier", max_shard_size="1MB")
    options = {"folder": tmp_path, "results": tmp_path / "new", "minutes": 60, "hidden_states": None, "tiny": True}
    options |= {"gpus": 2, "endpoint": "http://server/v1", "storage": "plain", "max_samples": None, "epochs": 1}
    options |= {"conversations": 10, "tokenizer": None, "max_steps": None, "extra": []}
    alone = Asked(SimpleNamespace(**options | {"results": tmp_path / "train alone"}))
    alone.train()
    assert "MFU" in tutorial_size.report([alone.results])
    benchmark = Asked(SimpleNamespace(**options))
    benchmark.model()
    assert benchmark.results["model"]["weights"] == sum(one.numel() for one in weights.parameters())
    benchmark.extract()
    assert asked["extract"][:3] == [sys.executable, "-m", "peagle_hf"]
    assert asked["extract"][-2:] == ["--endpoint", "http://server/v1"]
    assert "extract, 2 GPUs, vLLM server" in benchmark.results
    benchmark.train()
    assert "--save-strategy steps --save-steps 2" in " ".join(asked["train"])
    assert not benchmark.is_complete("train"), "no checkpoints are there"
    (tmp_path / "checkpoints-2").mkdir()
    assert benchmark.is_complete("train")
    assert not Asked(SimpleNamespace(**options | {"epochs": 2})).is_complete("train")
    for place in ("folder", "results"):
        other = {"folder": tmp_path / "empty", "results": tmp_path / "empty"} | {place: options[place]}
        with pytest.raises(SystemExit, match="was made with conversations 10, and now conversations is 20"):
            Asked(SimpleNamespace(**options | other | {"conversations": 20}))

    run, started = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda *args, **flags: started.append(args) or run(*args, **flags))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=-1))
    assert benchmark.storage_that_fits() == ("fp8-learnt", False)
    assert capsys.readouterr().out.count("GiB can be used") == 2
    assert len(started) == 1, "the dry run of the first kind names the size of the other"


@pytest.mark.slow
def test_drafter_is_trained_for_the_comparison_with_the_peer(tmp_path, tiny_verifier, tiny_data):
    command = [sys.executable, str(BENCHMARKS / "against_peer.py"), "train", "ours", "--steps", "3", "--seed", "1"]
    command += ["--verifier", str(tiny_verifier), "--data", str(tiny_data), "--output", str(tmp_path)]
    command += ["--", "--num-depths", "3", "--draft-vocab-size", "64", "--total-seq-len", "64"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    result = json.loads(run.stdout)
    assert result == json.loads((tmp_path / "ours-1" / "training.json").read_text())
    assert (result["implementation"], result["seed"], result["steps"]) == ("ours", 1, 3)
    assert 0 < result["loop_seconds"] < result["seconds"]
    assert 64 < result["tokens"] <= 3 * 64
    assert min(result["train_loss"], result["validation_loss"]) > 0
    assert check_checkpoint(tmp_path / "ours-1" / "checkpoints" / "checkpoint_best").num_depths == 3


def test_drafters_of_the_comparison_are_measured_without_vllm(tmp_path, chain, drafter):
    folder = tmp_path / "ours-0"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint_best").symlink_to(drafter)
    (folder / "training.json").write_text("{}")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["w5", "w20"]}\n')
    command = [sys.executable, str(BENCHMARKS / "against_peer.py"), "generate", str(tmp_path), "--max-tokens", "8"]
    command += ["--verifier", str(chain), "--prompts", str(prompts)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    figures = json.loads((folder / "evaluation.json").read_text())
    # w6 w7 w5 w6 w7 w5 w6 w7 with w5 drafted each time: after the first, five drafts, and two begin at a w5.
    assert figures["acceptance_length"] == pytest.approx(1.4)
    assert figures["per_position_acceptance"] == [0.4, 0, 0]
    assert figures["text_identical"] is True


def test_comparison_with_the_peer_has_the_ratio_of_gains_and_intervals(tmp_path):
    rates = {("ours", 0): [0.3, 0.01], ("ours", 1): [0.32, 0.02], ("peer", 0): [0.2, 0.01], ("peer", 1): [0.22, 0.02]}
    for (implementation, seed), positions in rates.items():
        folder = tmp_path / f"{implementation}-{seed}"
        folder.mkdir()
        training = {"implementation": implementation, "seed": seed, "device": "CPU, 2 threads"}
        training |= {"steps": 9, "loop_seconds": 4.0, "seconds": 7.0, "step_ms": 444.0, "tokens": 9000}
        (folder / "training.json").write_text(json.dumps(training))
        evaluation = {"prompts": "p.jsonl", "num_prompts": 8, "max_tokens": 16, "dtype": "float32", "device": "CPU"}
        evaluation |= {"acceptance_length": 1 + sum(positions), "per_position_acceptance": positions}
        evaluation |= {"num_speculative_tokens": 2, "text_identical": True, "seed": 0}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    command = [sys.executable, str(BENCHMARKS / "against_peer.py"), "table", str(tmp_path)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    result = json.loads((tmp_path / "table.json").read_text())
    ratio = 0.325 / 0.225
    assert result["gain_ratio"]["mean"] == pytest.approx(ratio)
    # With two seeds half of the difference of the residuals, 0.03 (1 - ratio), is the error of the mean.
    half = 12.706 * 0.03 * (ratio - 1) / 2 / 0.225
    assert result["gain_ratio"]["high"] - ratio == pytest.approx(half)
    assert "| 1 | 31.00% | 21.00% | +10.00 | +10.00 to +10.00 | above |" in run.stdout
    assert "| 2 | 1.50% | 1.50% | +0.00 | +0.00 to +0.00 |  |" in run.stdout
    assert f"gain (acceptance length - 1) to speculators': {ratio:.2f}, 95 % interval" in run.stdout


def table(script: str, *arguments: str) -> list[list[str]]:
    """The rows of the table that a benchmark prints, its head first."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500)
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    return rows


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


@pytest.mark.slow
def test_small_cache_benchmark_reads_every_kind(tmp_path):
    sizes = ["--rows", "30", "--hidden-size", "64", "--longest", "512", "--total-seq-len", "256", "--workers", "0", "1"]
    head, *rows = table("cache_reading.py", str(tmp_path), *sizes)
    assert [tuple(row[:3]) for row in rows] == [
        (storage, reader, workers)
        for storage, reader in [
            ("plain", "peagle_hf"),
            ("plain", "whole files"),
            ("fp8", "peagle_hf"),
            ("learnt", "peagle_hf"),
            ("fp8-learnt", "peagle_hf"),
        ]
        for workers in "01"
    ]
    assert all(number(row[head.index("tokens/s")]) > 0 for row in rows)
    assert all(number(row[head.index("RSS MiB")]) > 100 for row in rows)
    stored = {row[0]: number(row[head.index("bytes/token stored")]) for row in rows}
    assert stored["plain"] > stored["learnt"] > stored["fp8"] > stored["fp8-learnt"]
    assert not (tmp_path / "prepared" / "hidden_states").exists()


@pytest.mark.slow
def test_small_large_dataset_runs_every_step(tmp_path):
    _, *rows = table("large_dataset.py", str(tmp_path), "--conversations", "40")
    assert [row[1] for row in rows] == [
        "nothing but imports",
        "prepare",
        "extract",
        "extract again",
        "plan an epoch",
        "cache verify",
    ]
    assert all(re.fullmatch(r"[\d,.]+", cell) for row in rows for cell in row[2:])
    assert list(tmp_path.iterdir()) == []


def test_texts_that_end_count_in_the_chi_square_of_the_token_that_ends_them(tmp_path):
    """A verifier that ends half of its texts at each token, and texts that it could have written itself."""
    chances = [1.0, 1.0, 7.0, 1.0, 1.0, 1.0, 1.0, 0.04]  # whatever came before; token 2 ends a text
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in (model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(8))
        for token, chance in enumerate(chances):
            model.lm_head.weight[token] = math.log(chance) / math.sqrt(8)  # the norm makes a 1 the root of 8
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.multinomial(torch.tensor(chances), 3, True, generator=generator).tolist() for _ in range(2000)]
    texts = [text[: text.index(2) + 1] if 2 in text else text for text in texts]
    said = runpy.run_path(str(BENCHMARKS / "draft_sampling.py"))["chi_square"](str(tmp_path), [3], texts, 1.0)
    deviations = [float(found) for found in re.findall(r"\(([+-][\d.]+) deviations", said)]
    assert len(deviations) == 2
    assert max(map(abs, deviations)) < 3


def test_results_of_long_contexts_are_not_shown_for_other_options(tmp_path):
    keep = runpy.run_path(str(BENCHMARKS / "long_contexts.py"))["keep_options"]
    options = argparse.Namespace(output=tmp_path / "out", windows=[0], seeds=[0], num_layers=2)
    keep(options)
    options.windows, options.seeds = [0, 64], [1]
    keep(options)
    options.num_layers = 4
    with pytest.raises(SystemExit, match="results of other options: num_layers is 4 and was 2"):
        keep(options)
    (tmp_path / "out" / "options.json").unlink()
    (tmp_path / "out" / "data").mkdir()
    with pytest.raises(SystemExit, match="not the options that they were made with"):
        keep(options)
