"""Situations from public bug reports: each script ends with 0 if what happens is right, and says what it saw."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent / "cases").glob("*.sh"))


@pytest.mark.slow
@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name != "lib.sh"], ids=lambda path: path.stem)
def test_a_reported_situation_comes_out_right(script):
    command = ["bash", str(script), str(Path(sys.executable).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
