"""Run vLLM's OpenAI-compatible server: so that it gives hidden states (step 2), or with a drafter (step 7)."""

import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

import psutil

from .arguments import Arguments
from .data.endpoint import write_server_record
from .data.extract import check_layer_ids
from .errors import PeagleError
from .serving import check_checkpoint, drafter_folder, speculative_config, vllm_environment
from .target import load_verifier_config

PLUGIN_FOLDER = Path(__file__).parent / "vllm_plugin"
GRACE_SECONDS = 15.0
"""How long vLLM may take to end by itself."""
DRY_RUN_HELP = "Print the command and stop."
VLLM_PYTHON_HELP = "The Python that vLLM is installed in (default: the one that runs this)."
TRUST_HELP = "Let the verifier run code from its repository, in vLLM too."


@dataclass
class LaunchArguments(Arguments):
    """Arguments of `peagle-hf launch-vllm MODEL ... -- <vLLM's own flags>`."""

    model: str = field(
        metadata={"aliases": ["--verifier"], "help": "The verifier, a hub name or a folder; the flag may be left out."}
    )
    hidden_states_path: str = field(
        metadata={"help": "Folder that the server writes to. Who asks it must see the folder under the same path."}
    )
    target_layer_ids: list[int] | None = field(
        default=None,
        metadata={
            "help": "The auxiliary layers, by number of layers passed (0 = embeddings; default: 2, n/2 and n-3 of n)."
        },
    )
    include_last_layer: bool = field(
        default=True,
        metadata={
            "help": "Give the last layer's states after those of --target-layer-ids. Training needs them: "
            "--no-include-last-layer is for a list that ends with the last layer already."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN_HELP})
    vllm_python: str | None = field(default=None, metadata={"help": VLLM_PYTHON_HELP})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    vllm_args: list[str] = field(default_factory=list, init=False)

    GROUPS: ClassVar = {
        "Model and output": ("model", "hidden_states_path", "trust_remote_code"),
        "Hidden states": ("target_layer_ids", "include_last_layer"),
        "Command": ("dry_run", "vllm_python"),
    }


@dataclass
class ServeArguments(Arguments):
    """Arguments of `peagle-hf serve MODEL ... -- <vLLM's own flags>`."""

    model: str = field(
        metadata={
            "aliases": ["--drafter"],
            "help": "The drafter, a checkpoint folder or a hub name; the flag may be left out.",
        },
    )
    verifier: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the target; default: the one in the checkpoint."}
    )
    num_speculative_tokens: int | None = field(
        default=None, metadata={"help": "Tokens to draft at a time; default: as many as it was trained for."}
    )
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN_HELP})
    vllm_python: str | None = field(default=None, metadata={"help": VLLM_PYTHON_HELP})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    vllm_args: list[str] = field(default_factory=list, init=False)

    GROUPS: ClassVar = {
        "Models": ("model", "verifier", "num_speculative_tokens", "trust_remote_code"),
        "Command": ("dry_run", "vllm_python"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_speculative_tokens is not None and self.num_speculative_tokens < 1:
            raise PeagleError(f"--num-speculative-tokens is {self.num_speculative_tokens} but must be at least 1.")


def launch(arguments: LaunchArguments) -> None:
    """Run the server until it ends or is told to; with it end all processes that it has started.

    Raises:
        PeagleError: vLLM isn't installed, the verifier can't be read or has no such layers, or the server failed.
    """
    environment = vllm_environment(arguments.vllm_python)
    command, slots = server_command(arguments, _on_cpu(environment))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PLUGIN_FOLDER), environment.get("PYTHONPATH")]))
    _show(command, environment)
    if not arguments.dry_run:
        Path(arguments.hidden_states_path).mkdir(parents=True, exist_ok=True)
        write_server_record(arguments.hidden_states_path, arguments.model, slots)
        _run(command, environment)


def serve(arguments: ServeArguments) -> None:
    """Serve the verifier with its drafter until told to stop; with vLLM end all processes that it has started.

    Raises:
        PeagleError: vLLM isn't installed, it would load the checkpoint wrongly, the verifier is another than the
            drafter was made for, or the server failed.
    """
    environment = vllm_environment(arguments.vllm_python)
    command = drafting_command(arguments, _on_cpu(environment))
    _show(command, environment)
    if not arguments.dry_run:
        _run(command, environment)


def server_command(arguments: LaunchArguments, on_cpu: bool) -> tuple[list[str], list[int]]:
    """The command line of vLLM, and the layers that it will extract: the auxiliary ones, then the last.

    Raises:
        PeagleError: the verifier can't be read or has no such layers.
    """
    config = load_verifier_config(arguments.model, trust_remote_code=arguments.trust_remote_code)
    last = config.num_hidden_layers
    wanted = arguments.target_layer_ids
    if wanted and wanted[-1] == last and len(wanted) > 1:
        wanted = wanted[:-1]
    elif not arguments.include_last_layer:
        raise PeagleError(
            f"--no-include-last-layer needs --target-layer-ids that end with {last}, the verifier's last layer: "
            "drafters learn from its states. Leave the flag out to have them added."
        )
    slots = [*check_layer_ids(wanted, config), last]
    extraction = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": sorted(set(slots))}},
    }
    folder = os.path.abspath(arguments.hidden_states_path)
    connector: dict[str, Any] = {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": folder},
    }
    if on_cpu:
        connector |= {
            "kv_connector": "CpuHiddenStatesConnector",
            "kv_connector_module_path": "peagle_cpu_connector",
        }
    options = {"--speculative-config": json.dumps(extraction), "--kv-transfer-config": json.dumps(connector)}
    return _vllm_command(arguments, arguments.model, options, on_cpu), slots


def drafting_command(arguments: ServeArguments, on_cpu: bool) -> list[str]:
    """The command line of vLLM with the drafter, once that is found to be sound.

    Raises:
        PeagleError: vLLM would load the checkpoint wrongly, or the verifier is another than it was made for.
    """
    folder = drafter_folder(arguments.model)
    verifier = arguments.verifier or str(check_checkpoint(folder).verifier_name_or_path)
    config = check_checkpoint(folder, verifier, arguments.trust_remote_code)
    drafting = speculative_config(folder, config, arguments.num_speculative_tokens)
    options = {"--speculative-config": json.dumps(drafting), "--per-request-spec-decode-metrics": "summary"}
    return _vllm_command(arguments, verifier, options, on_cpu)


def _vllm_command(
    arguments: LaunchArguments | ServeArguments, model: str, options: dict[str, str], on_cpu: bool
) -> list[str]:
    if on_cpu:
        # The CPU builds go by another name, by which `vllm serve` doesn't find its own version.
        server = ["vllm.entrypoints.openai.api_server", "--model", model, "--enforce-eager"]
    else:
        server = ["vllm.entrypoints.cli.main", "serve", model]
    return [
        arguments.vllm_python or sys.executable,
        "-m",
        *server,
        *(word for option, value in options.items() for word in (option, value)),
        *(["--trust-remote-code"] if arguments.trust_remote_code else []),
        *arguments.vllm_args,
    ]


def _on_cpu(environment: dict[str, str]) -> bool:
    return environment.get("VLLM_TARGET_DEVICE") == "cpu"


def _show(command: list[str], environment: dict[str, str]) -> None:
    added = [f"{name}={value}" for name, value in environment.items() if os.environ.get(name) != value]
    print(shlex.join(["env", *added, *command]), flush=True)


def _run(command: list[str], environment: dict[str, str]) -> None:
    status = run_to_the_end(command, environment)
    if status:
        raise PeagleError(f"vLLM ended with status {status}. What it said is above; correct the flags after --.")


def run_to_the_end(command: list[str], environment: dict[str, str]) -> int:
    """Run a program in a session of its own; however it ends, no process of the session stays.

    Returns:
        The program's exit status. An interrupt or a request to end becomes `SystemExit` once all have ended.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait()
    finally:
        try:
            process.terminate()
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill_session(process.pid)
            process.wait()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _kill_session(session: int) -> None:
    for process_id in psutil.pids():
        with suppress(ProcessLookupError):
            if os.getsid(process_id) == session:
                os.kill(process_id, signal.SIGKILL)
