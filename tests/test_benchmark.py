"""The benchmark of the training step runs and fills its table; its times at these sizes mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parent / "benchmarks" / "training_step.py"


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
