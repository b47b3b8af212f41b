"""`peagle-hf launch-vllm` and `serve`: run vLLM as a server of hidden states, or of a verifier with its drafter."""

import hashlib
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..arguments import VLLM_ARGS_HELP, Arguments, check_ranges, flag_of
from ..data.endpoint_folder import (
    SERVER_RECORD,
    SWEEP_SECONDS,
    check_other_servers,
    remove_server_record,
    remove_unwanted,
    server_name,
    write_server_record,
)
from ..data.tokenizer import CHAT_KWARGS_OF_DRAFTER_HELP, CHAT_TEMPLATE_OF_DRAFTER_HELP
from ..errors import PeagleError
from ..files import atomic_path, check_writable
from ..hub.evaluation_json import damage_named, read_evaluation
from ..hub.training_json import chosen_chat_options
from ..model.served_checkpoint import (
    DRAFT_SAMPLE_METHOD_HELP,
    DRAFTER_HELP,
    VERIFIER_HELP,
    check_checkpoint,
    check_verifier,
    drafter_folder,
    speculative_config,
    verifier_of,
)
from ..redaction import public_command
from ..verifier.loading import check_layer_ids, load_verifier_config
from .address import Address
from .environment import installed_vllm, vllm_environment
from .installed import REQUEST_COUNTS, drafting_environment
from .supervisor import supervised
from .tokens_by_load import AUTO, RECOMMENDED, SCHEDULE, reports_beside, scheduled

logger = logging.getLogger(__name__)

PLUGIN_FOLDER = Path(__file__).parent / "vllm_plugin"
POLL_SECONDS = 1.0
"""Pause between two checks whether the server is ready."""
DRY_RUN_HELP = "Print the command and stop."
VLLM_PYTHON_HELP = "The Python interpreter that has vLLM (default: this one)."
TRUST_HELP = "Let the verifier run code from its repository, in vLLM too."


@dataclass
class LaunchArguments(Arguments):
    """Arguments of `peagle-hf launch-vllm MODEL ... -- <vLLM's own flags>`."""

    model: str = field(
        metadata={"aliases": ["--verifier"], "help": "The verifier, a hub name or a folder; the flag may be left out."}
    )
    hidden_states_path: str = field(
        metadata={"help": "Folder that the server writes to; its clients must see the folder under the same path."}
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
            "help": "Extract the last layer's states too, after those of --target-layer-ids. Training needs them; use "
            "--no-include-last-layer only if the list already ends with the last layer."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN_HELP})
    vllm_python: str | None = field(default=None, metadata={"help": VLLM_PYTHON_HELP})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    vllm_args: list[str] = field(default_factory=list, metadata={"help": VLLM_ARGS_HELP})

    GROUPS: ClassVar = {
        "Model and output": ("model", "hidden_states_path", "trust_remote_code"),
        "Hidden states": ("target_layer_ids", "include_last_layer"),
        "vLLM": ("vllm_args", "vllm_python", "dry_run"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"target_layer_ids": (0, math.inf)})
        if self.target_layer_ids is not None and len(set(self.target_layer_ids)) < len(self.target_layer_ids):
            raise PeagleError(f"--target-layer-ids {self.target_layer_ids} must be distinct.")


@dataclass
class ServeArguments(Arguments):
    """Arguments of `peagle-hf serve MODEL ... -- <vLLM's own flags>`."""

    model: str = field(metadata={"aliases": ["--drafter"], "help": f"{DRAFTER_HELP} The flag may be left out."})
    verifier: str | None = field(default=None, metadata={"help": VERIFIER_HELP})
    num_speculative_tokens: str | None = field(
        default=None,
        metadata={
            "help": "K, the tokens to draft at a time, or auto: what was fastest in an evaluation, by load. Default: "
            "the K that the drafter was trained with."
        },
    )
    evaluation: str | None = field(
        default=None,
        metadata={
            "help": "For auto, the report of peagle-hf evaluate on this drafter. Default: evaluation.json in the "
            "drafter's folder or in one of the three above it, or in a folder evaluation there."
        },
    )
    draft_sample_method: Literal["probabilistic", "greedy"] | None = field(
        default=None, metadata={"help": DRAFT_SAMPLE_METHOD_HELP}
    )
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN_HELP})
    vllm_python: str | None = field(default=None, metadata={"help": VLLM_PYTHON_HELP})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    chat_template: str | None = field(default=None, metadata={"help": CHAT_TEMPLATE_OF_DRAFTER_HELP})
    chat_template_kwargs: dict | str | None = field(default=None, metadata={"help": CHAT_KWARGS_OF_DRAFTER_HELP})
    vllm_args: list[str] = field(default_factory=list, metadata={"help": VLLM_ARGS_HELP})

    GROUPS: ClassVar = {
        "Models": ("model", "verifier", "trust_remote_code"),
        "Drafts": ("num_speculative_tokens", "evaluation", "draft_sample_method"),
        "Chat template": ("chat_template", "chat_template_kwargs"),
        "vLLM": ("vllm_args", "vllm_python", "dry_run"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = self.num_speculative_tokens
        if not (tokens is None or tokens == AUTO or (str(tokens).isdecimal() and int(tokens) >= 1)):
            raise PeagleError(f"--num-speculative-tokens is {tokens} but must be at least 1, or auto.")
        if self.evaluation is not None and tokens != AUTO:
            raise PeagleError("--evaluation is read for --num-speculative-tokens auto only. Add that, or leave it out.")


def launch(arguments: LaunchArguments) -> None:
    """Run a vLLM server of hidden states until it ends or is stopped; then no process of it is left.

    While it answers, `server.json` in its folder says which layers it extracts.

    Raises:
        PeagleError: vLLM isn't installed, the verifier can't be read or has no such layers, the port is taken, or the
            server failed.
    """
    address = Address.of(arguments.vllm_args)
    environment = vllm_environment(arguments.vllm_python, needs_vllm=not arguments.dry_run)
    command, layer_ids = server_command(arguments, _on_cpu(environment))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PLUGIN_FOLDER), environment.get("PYTHONPATH")]))
    _show(command, environment)
    if arguments.dry_run:
        return
    folder = Path(arguments.hidden_states_path)
    check_writable(folder)
    address.check_free()
    if address.is_tcp:
        remove_server_record(folder, server_name(address.port))  # a killed server left its record behind
        check_other_servers(folder, arguments.model, layer_ids)
    try:
        with supervised(command, environment) as process:
            status = _record_when_ready(process, address, folder, arguments.model, layer_ids)
    finally:
        if address.is_tcp:
            remove_server_record(folder, server_name(address.port))
        remove_unwanted(folder)
    _check_status(status)


def serve(arguments: ServeArguments) -> None:
    """Serve the verifier with its drafter in vLLM until it ends or is stopped; then no process of it is left.

    Raises:
        PeagleError: vLLM isn't installed, lacks an argument or is told to use its second model runner, it would load
            the checkpoint wrongly, the verifier is another than the drafter was made for, the port is taken, or the
            server failed.
    """
    address = Address.of(arguments.vllm_args)
    environment = drafting_environment(vllm_environment(arguments.vllm_python, needs_vllm=not arguments.dry_run))
    command = drafting_command(arguments, _on_cpu(environment))
    if _on_cpu(environment) and (fault := installed_vllm(arguments.vllm_python).sampling_fault):
        logger.warning(
            "%s Requests without a temperature are answered greedily. Name none above 0, or serve without a drafter.",
            fault,
        )
    _show(command, environment)
    if not arguments.dry_run:
        address.check_free()
        with supervised(command, environment) as process:
            status = process.wait()
        _check_status(status)


def _record_when_ready(
    process: subprocess.Popen, address: Address, folder: Path, model: str, layer_ids: list[int]
) -> int:
    """Write the server's record once it answers, and wait for its end; returns its exit status.

    Raises:
        PeagleError: another server answers at the same address.
    """
    is_ready, swept = False, time.monotonic()
    while (status := process.poll()) is None:
        if not is_ready and address.is_answered_by(process.pid):
            is_ready = True
            write_server_record(folder, model, layer_ids, server_name(address.port))
            logger.info(
                "The server answers at port %d; %s says which layers it extracts.", address.port, folder / SERVER_RECORD
            )
        if time.monotonic() - swept > SWEEP_SECONDS:
            remove_unwanted(folder)
            swept = time.monotonic()
        try:
            process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    return status


def _check_status(status: int) -> None:
    if status:
        raise PeagleError(f"vLLM ended with status {status}. Its output is above; correct the flags after --.")


def server_command(arguments: LaunchArguments, on_cpu: bool) -> tuple[list[str], list[int]]:
    """The command line of vLLM, and the layers that it extracts: the auxiliary ones, then the last.

    Raises:
        PeagleError: the verifier can't be read or has no such layers.
    """
    layer_ids = _extracted_layers(arguments)
    extraction = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": sorted(set(layer_ids))}},
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
    options = {"speculative_config": extraction, "kv_transfer_config": connector}
    return _vllm_command(arguments, arguments.model, options, on_cpu), layer_ids


def _extracted_layers(arguments: LaunchArguments) -> list[int]:
    """The layers to extract, the last one at the end."""
    wanted = arguments.target_layer_ids
    try:
        config = load_verifier_config(arguments.model, trust_remote_code=arguments.trust_remote_code)
    except PeagleError as error:
        if not arguments.dry_run or not wanted:
            raise
        if arguments.include_last_layer:
            logger.warning(
                "%s So the number of its last layer, which the server must extract too, isn't known: the command below "
                "has the layers %s only. Add the last layer to --target-layer-ids, with --no-include-last-layer.",
                error,
                wanted,
            )
        return wanted
    last = config.num_hidden_layers
    if wanted and wanted[-1] == last and len(wanted) > 1:
        wanted = wanted[:-1]
    elif not arguments.include_last_layer:
        raise PeagleError(
            f"--no-include-last-layer needs --target-layer-ids that end with {last}, the verifier's last layer, "
            "because training needs its states. Leave the flag out to add that layer."
        )
    return [*check_layer_ids(wanted, config), last]


def drafting_command(arguments: ServeArguments, on_cpu: bool) -> list[str]:
    """Check the drafter and return vLLM's command line with it.

    Raises:
        PeagleError: vLLM would load the checkpoint wrongly, or it was made for another verifier.
    """
    folder = drafter_folder(arguments.model)
    config = check_checkpoint(folder)
    verifier = verifier_of(folder, config, arguments.verifier)
    check_verifier(folder, config, verifier, arguments.trust_remote_code)
    tokens = arguments.num_speculative_tokens
    number = None if tokens in (None, AUTO) else int(str(tokens))
    drafting = speculative_config(folder, config, number, arguments.draft_sample_method)
    if tokens == AUTO:
        drafting |= _tokens_by_load(arguments, folder)
    options = {"speculative_config": drafting, REQUEST_COUNTS: "detailed"}
    options |= _chat_options(arguments, folder, verifier)
    if on_cpu and installed_vllm(arguments.vllm_python).sampling_fault:
        # A request that names no temperature then has temperature 0.
        options["override_generation_config"] = {"temperature": 0}
    return _vllm_command(arguments, verifier, options, on_cpu)


def _tokens_by_load(arguments: ServeArguments, folder: Path) -> dict[str, Any]:
    """The fields of `--speculative-config` that an evaluation of this drafter recommends."""
    path, report = _report(arguments, folder)
    if RECOMMENDED not in report:
        raise PeagleError(f"{path} comes from an older peagle-hf evaluate and recommends nothing. Run it again.")
    takes_schedule = installed_vllm(arguments.vllm_python).takes(SCHEDULE)
    with damage_named(path):
        device, version = report["device"], report["versions"]["vllm"]
        logger.info(
            "K by load comes from the report %s, measured on %s with vLLM %s. Others may want another K.",
            path,
            device,
            version,
        )
        return scheduled(report[RECOMMENDED], takes_schedule)


def _report(arguments: ServeArguments, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The report that is named, or else the first one found that is about this drafter."""
    if arguments.evaluation is not None:
        return Path(arguments.evaluation), read_evaluation(arguments.evaluation, folder)
    link = Path(os.path.abspath(arguments.model)) if Path(arguments.model).is_dir() else None
    errors = []
    for path in reports_beside(folder, link):
        try:
            return path, read_evaluation(path, folder)
        except PeagleError as error:
            errors.append(error)
    raise errors[0]


def _chat_options(arguments: ServeArguments, folder: Path, verifier: str) -> dict[str, Any]:
    """The chat template and its variables for vLLM: those of the drafter's training, or of the arguments."""
    chosen = chosen_chat_options(
        folder, verifier, arguments.trust_remote_code, arguments.chat_template, arguments.chat_template_kwargs
    )
    options: dict[str, Any] = {}
    if chosen.template is not None:
        options["chat_template"] = str(_template_file(arguments.chat_template, chosen.template))
    if chosen.kwargs:
        options["default_chat_template_kwargs"] = chosen.kwargs
    return options


def _template_file(name: str | None, template: str) -> Path:
    """A file with this chat template: the one that the user named, else a temporary file named after its content."""
    with suppress(OSError, ValueError):
        if name is not None and Path(name).read_text(encoding="utf-8") == template:
            return Path(name).absolute()
    digest = hashlib.sha256(template.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"peagle-hf-{_user()}-{digest}.jinja"
    with atomic_path(path) as temporary:
        temporary.write_text(template, encoding="utf-8")
    return path


def _user() -> str:
    """A number for the user, who may have no name, as in a container; on Windows the folder itself is the user's."""
    return str(os.getuid()) if hasattr(os, "getuid") else "user"


def _vllm_command(
    arguments: LaunchArguments | ServeArguments, model: str, options: dict[str, Any], on_cpu: bool
) -> list[str]:
    """The command line of vLLM.

    Args:
        options: values of vLLM's arguments, by name with underscores; True for a switch.

    Raises:
        PeagleError: this vLLM lacks one that is needed, or vLLM's own flags would replace one.
    """
    _check_not_replaced(arguments.vllm_args, options)
    if on_cpu:
        # `vllm serve` can't find the version of the CPU builds, which have another package name.
        server = ["vllm.entrypoints.openai.api_server", "--model", model]
        options = {"enforce_eager": True, **options}
    else:
        server = ["vllm.entrypoints.cli.main", "serve", model]
    if arguments.trust_remote_code:
        options = {**options, "trust_remote_code": True}
    words = [arguments.vllm_python or sys.executable, "-m", *server]
    for name, value in installed_vllm(arguments.vllm_python).known(options).items():
        words.append(flag_of(name))
        if value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return [*words, *arguments.vllm_args]


def _check_not_replaced(vllm_args: Sequence[str], options: Mapping[str, Any]) -> None:
    """Make sure that vLLM's own flags don't name the model or a configuration again: vLLM takes the last one."""
    ours = {"--model", *(flag_of(name) for name in ("speculative_config", "kv_transfer_config") if name in options)}
    for word in vllm_args:
        flag = re.split("[=.]", word)[0].replace("_", "-")
        if flag == "-sc" or flag.startswith("--spec-"):
            flag = flag_of("speculative_config")
        if flag in ours:
            raise PeagleError(
                f"{word} stands after --, but this command itself sets {flag}, and vLLM would replace all of it. Leave "
                "it out: the flags before -- name the models. What they can't say, write into the command that "
                "--dry-run prints."
            )


def _on_cpu(environment: dict[str, str]) -> bool:
    return environment.get("VLLM_TARGET_DEVICE") == "cpu"


def _show(command: list[str], environment: dict[str, str]) -> None:
    added = [f"{name}={value}" for name, value in environment.items() if os.environ.get(name) != value]
    print(shlex.join(public_command(["env", *added, *command])), flush=True)
