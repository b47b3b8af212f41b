"""The benchmark of the training step runs and fills its table; its times at these sizes mean nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
BENCHMARK = BENCHMARKS / "training_step.py"


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
