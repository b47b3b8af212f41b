"""The command line: `peagle-hf <command> [config.yaml] [--flag value ...]`."""

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from typing import Any

from ..arguments import VLLM_ARGS, flag_of
from ..console import MISUSED, check_one_process, command_line, log_lines_above_bars, versions


@dataclass(frozen=True)
class Command:
    """A command: the module of its function and of its dataclass of arguments, imported when the command is used.

    Args:
        examples: command lines without the program's name, for `--help`.
        positional: the arguments that may be given without their flags.
    """

    module: str
    function: str
    arguments: str
    help: str
    examples: tuple[str, str]
    positional: tuple[str, ...] = ()

    def load(self) -> tuple[Callable[[Any], Any], Any]:
        module = import_module(f"..{self.module}", __package__)
        return getattr(module, self.function), getattr(module, self.arguments)

    def takes_vllm_args(self) -> bool:
        """Whether vLLM's own flags may stand after `--`."""
        return VLLM_ARGS in {one.name for one in fields(self.load()[1])}

    def usage(self) -> str:
        """What follows the command's name in a command line."""
        needed = {one.name for one in fields(self.load()[1]) if one.default is MISSING}
        first = [name.upper() if name in needed else f"[{name.upper()}]" for name in self.positional]
        flags = ["[-- vLLM's flags]"] if self.takes_vllm_args() else []
        return " ".join([*(first or ["[config.yaml]"]), "[--flag value ...]", *flags])


COMMANDS = {
    "init": Command(
        "cli.init",
        "init",
        "InitArguments",
        "write the examples: scripts, a pipeline, notebooks, data",
        ("init", "init my-drafter"),
        ("folder",),
    ),
    "plan": Command(
        "evaluation.plan",
        "plan",
        "PlanArguments",
        "say from which acceptance length a drafter pays, before training",
        (
            "plan --model Qwen/Qwen3-8B --num-layers 1 4 --draft-vocab-size 32000 --concurrency 1 16 --output plan",
            "plan ./folder-with-config-json --num-speculative-tokens 4 -- --load-format dummy --quantization fp8",
        ),
        ("model",),
    ),
    "prepare": Command(
        "data.prepare",
        "prepare",
        "PrepareArguments",
        "turn chats into tokens and a loss mask",
        (
            "prepare --model Qwen/Qwen3-8B --data sharegpt --output out --max-samples 5000",
            "prepare --model ./my-model --data chats.jsonl --data more.jsonl --output out --seq-length 4096",
        ),
    ),
    "data": Command(
        "data.inspect_dataset",
        "data_command",
        "DataArguments",
        "show a prepared dataset, or what a chat template does",
        ("data inspect out", "data inspect out --rows 0 17 --output page.html"),
        ("action", "folder"),
    ),
    "regenerate": Command(
        "data.regenerate",
        "regenerate",
        "RegenerateArguments",
        "let the verifier answer prompts, or invent them",
        (
            "regenerate --model Qwen/Qwen3-8B --prompts prompts.jsonl --output chats.jsonl",
            "regenerate --model Qwen/Qwen3-8B --invent 2000 --output chats.jsonl --endpoint http://localhost:8000/v1",
        ),
    ),
    "launch-vllm": Command(
        "serving.launch",
        "launch",
        "LaunchArguments",
        "run vLLM as a server of hidden states",
        (
            "launch-vllm Qwen/Qwen3-8B --hidden-states-path out/hidden_states -- --port 8000",
            "launch-vllm Qwen/Qwen3-8B --hidden-states-path out/hidden_states --dry-run -- --data-parallel-size 2",
        ),
        ("model",),
    ),
    "extract": Command(
        "data.extract",
        "extract",
        "ExtractArguments",
        "cache the verifier's hidden states",
        (
            "extract --model Qwen/Qwen3-8B --preprocessed-data out",
            "extract --preprocessed-data out --endpoint http://localhost:8000/v1 --concurrency 32 --storage fp8",
        ),
    ),
    "cache": Command(
        "data.cache_command",
        "cache",
        "CacheArguments",
        "describe, verify or convert hidden states",
        ("cache info out/hidden_states", "cache convert out/hidden_states smaller --storage fp8"),
        ("action", "folder", "destination"),
    ),
    "train": Command(
        "training.run",
        "train",
        "PeagleTrainingArguments",
        "train a drafter on the verifier's hidden states",
        (
            "train --verifier-name-or-path Qwen/Qwen3-8B --data-path out --save-path out/checkpoints --epochs 5",
            "train --data-path out --save-path out/checkpoints --num-layers 4 --num-depths 4 --lr 6e-4 --memory-report",
        ),
    ),
    "serve": Command(
        "serving.launch",
        "serve",
        "ServeArguments",
        "run vLLM with a drafter",
        (
            "serve out/checkpoints/checkpoint_best -- --port 8000",
            "serve out/checkpoints/checkpoint_best --num-speculative-tokens 4 --dry-run",
        ),
        ("model",),
    ),
    "chat": Command(
        "serving.chat",
        "chat",
        "ChatArguments",
        "chat with a server and see the acceptance of its drafts",
        ("chat", "chat --endpoint http://localhost:8001/v1 --temperature 0"),
    ),
    "acceptance": Command(
        "evaluation.acceptance",
        "acceptance",
        "AcceptanceArguments",
        "estimate acceptance from cached hidden states",
        (
            "acceptance --model out/checkpoints/checkpoint_best --data-path answers --output acceptance.json",
            "acceptance --model out/checkpoints/0 --data-path out --output kept.json --train-data-ratio 0.9",
        ),
    ),
    "evaluate": Command(
        "evaluation.benchmark",
        "evaluate",
        "EvaluateArguments",
        "measure acceptance and speed in vLLM",
        (
            "evaluate --model out/checkpoints/checkpoint_best --suite prompts.jsonl --output out/evaluation",
            "evaluate --model new --compare old --suite prompts.jsonl --output out --concurrency 1 16 --rounds 2",
        ),
    ),
    "push": Command(
        "hub.push",
        "push",
        "PushArguments",
        "upload a drafter to the hub",
        (
            "push --model out/checkpoints/checkpoint_best --repo-id my-org/Qwen3-8B-peagle",
            "push --model out/checkpoints/checkpoint_best --repo-id my-org/drafter --evaluation out/evaluation.json",
        ),
    ),
    "run": Command(
        "cli.pipeline",
        "run",
        "RunArguments",
        "run all steps of a pipeline.yaml, continuing where it stopped",
        ("run pipeline.yaml", "run pipeline.yaml --output elsewhere"),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; `console.command_line` turns errors and signals into messages and exit codes."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "help" and rest:
        name, rest = rest[0], ["--help"]
    if name in ("-h", "--help", "help", "--version"):
        with command_line("peagle-hf"):
            print(versions() if name == "--version" else _usage())
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        print(f"peagle-hf: there is no command {name!r}.{meant}\n\n{_usage()}", file=sys.stderr)
        raise SystemExit(MISUSED)
    else:
        with command_line(f"peagle-hf {name}", rest):
            _run(name, rest)


def _run(name: str, argv: list[str]) -> None:
    check_one_process(name)
    command = COMMANDS[name]
    function, arguments = command.load()
    if "--" in argv and command.takes_vllm_args():
        end = argv.index("--")
        argv = [*argv[:end], *(f"{flag_of(VLLM_ARGS)}={word}" for word in argv[end + 1 :])]
    from .parsing import parse_arguments  # importing it above would import transformers for --help

    examples = [f"peagle-hf {example}" for example in command.examples]
    parsed = parse_arguments(arguments, argv, f"peagle-hf {name}", command.positional, command.usage(), examples)
    with log_lines_above_bars():
        function(parsed)


def _usage() -> str:
    lines = [f"  {name:<12} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: peagle-hf <command> [config.yaml] [--flag value ...]",
            "",
            *lines,
            "",
            "peagle-hf help <command>   the flags of a command, with examples",
            "peagle-hf --version        the versions to name in a bug report",
            "",
            "Every command also takes --quiet, --verbose and --print-config.",
            "Exit codes: 0 done, 1 an error, 2 a wrong command line, 130 interrupted, 143 ended by SIGTERM.",
        ]
    )
