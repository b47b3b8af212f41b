"""The command line: `peagle-hf <command> [config.yaml] [--flag value ...]`."""

import gc
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import yaml
from transformers import HfArgumentParser

from .errors import PeagleError
from .files import write_json

logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments")


@dataclass(frozen=True)
class Command:
    """Where a command's function and its arguments dataclass live, imported when the command is used.

    Args:
        positional: the arguments that may stand first, without their flags.
        rest: the field that takes everything after `--`.
    """

    module: str
    function: str
    arguments: str
    help: str
    positional: tuple[str, ...] = ()
    rest: str | None = None

    def load(self) -> tuple[Callable[[Any], Any], type]:
        module = import_module(f".{self.module}", __package__)
        return getattr(module, self.function), getattr(module, self.arguments)

    def usage(self) -> str:
        """What may stand behind the command's name."""
        needed = {one.name for one in fields(self.load()[1]) if one.default is MISSING}
        first = [name.upper() if name in needed else f"[{name.upper()}]" for name in self.positional]
        return " ".join([*(first or ["[config.yaml]"]), "[--flag value ...]", *(["[-- ...]"] if self.rest else [])])


COMMANDS = {
    "prepare": Command("data.prepare", "prepare", "PrepareArguments", "turn chats into tokens and a loss mask"),
    "data": Command(
        "data.inspection", "inspect_data", "DataArguments", "show a prepared dataset", ("action", "folder")
    ),
    "regenerate": Command("data.regenerate", "regenerate", "RegenerateArguments", "let the target answer prompts"),
    "launch-vllm": Command(
        "launch", "launch", "LaunchArguments", "run vLLM as a server of hidden states", ("model",), rest="vllm_args"
    ),
    "extract": Command("data.extract", "extract", "ExtractArguments", "cache the verifier's hidden states"),
    "cache": Command(
        "data.cache_command",
        "cache",
        "CacheArguments",
        "describe, verify or convert hidden states",
        ("action", "folder", "destination"),
    ),
    "train": Command("training", "train", "PeagleTrainingArguments", "train a drafter on the cache"),
    "serve": Command("launch", "serve", "ServeArguments", "run vLLM with a drafter", ("model",), rest="vllm_args"),
    "chat": Command("chat", "chat", "ChatArguments", "chat with a server, and see how much it accepts"),
    "acceptance": Command("offline", "acceptance", "AcceptanceArguments", "measure acceptance on cached states"),
    "evaluate": Command("evaluation", "evaluate", "EvaluateArguments", "measure acceptance and speed in vLLM"),
    "push": Command("hub", "push", "PushArguments", "upload a drafter to the hub"),
    "run": Command("cli", "run", "RunArguments", "all steps of a pipeline.yaml, going on where it stopped"),
}
STEPS = ("regenerate", "prepare", "extract", "train", "evaluate")
LENGTHS = {"num_train_epochs", "max_steps"}
"""Arguments with which a finished training goes on."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a `PeagleError` is printed as one paragraph and ends with status 1."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger(__package__).setLevel(logging.INFO)
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name not in COMMANDS:
        print(f"peagle-hf: there is no command {name!r}.\n\n{_usage()}", file=sys.stderr)
        raise SystemExit(2)
    try:
        command = COMMANDS[name]
        function, arguments = command.load()
        passed_on: list[str] = []
        if command.rest and "--" in rest:
            passed_on, rest = rest[rest.index("--") + 1 :], rest[: rest.index("--")]
        for place, field_name in enumerate(command.positional):
            if len(rest) <= 2 * place or rest[2 * place].startswith("-") or rest[0].endswith((".yaml", ".yml")):
                break
            rest.insert(2 * place, f"--{field_name}")
        parsed: Any = parse_arguments(arguments, rest, f"peagle-hf {name}", command.usage())
        if command.rest:
            setattr(parsed, command.rest, passed_on)
        function(parsed)
    except PeagleError as error:
        print(f"peagle-hf {name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    end_processes()


def end_processes() -> None:
    """Let the processes of a distributed run end together: one that is still waited for would abort the others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # a model that is still wrapped keeps threads of the process group alive
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def parse_arguments(
    arguments: type[Arguments],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    usage: str = "[config.yaml] [--flag value ...]",
) -> Arguments:
    """Parse a command line into a dataclass: an optional YAML file first, whose values flags override.

    Keys of the file are flag names without the dashes, aliases included; an unknown key or flag is an error. A flag
    takes the place of all values that the file gives, also of a list.

    Args:
        arguments: the dataclass, such as `PeagleTrainingArguments`.
        argv: default: the process's own arguments.
        prog: the program's name in messages.
        usage: what may follow it, in messages.

    Raises:
        PeagleError: the YAML file is missing or is no mapping.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(arguments, prog=prog, usage=f"%(prog)s {usage}", allow_abbrev=False)  # type: ignore[arg-type]

    if argv and argv[0].endswith((".yaml", ".yml")):
        given = {_field_of(parser, word.partition("=")[0]) for word in argv[1:] if word.startswith("--")}
        content = read_yaml(argv[0])
        kept = {key: value for key, value in content.items() if _field_of(parser, f"--{key}") not in given}
        argv = flags(kept) + argv[1:]
    parsed: Any
    parsed, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return parsed


def _field_of(parser: HfArgumentParser, flag: str) -> str:
    """What a flag sets; itself if it is unknown."""
    action = parser._option_string_actions.get(flag)
    return action.dest if action else flag


@dataclass
class RunArguments:
    """A pipeline: the arguments of each step, by step, as a YAML file holds them; a step left out is not run."""

    output: str = field(metadata={"help": "Folder that remembers which steps are finished (pipeline.json)."})
    regenerate: dict | str | None = field(default=None, metadata={"help": "Arguments of peagle-hf regenerate."})
    prepare: dict | str | None = field(default=None, metadata={"help": "Arguments of peagle-hf prepare."})
    extract: dict | str | None = field(default=None, metadata={"help": "Arguments of peagle-hf extract."})
    train: dict | str | None = field(default=None, metadata={"help": "Arguments of peagle-hf train."})
    evaluate: dict | str | None = field(default=None, metadata={"help": "Arguments of peagle-hf evaluate."})

    def __post_init__(self) -> None:
        for step in STEPS:
            section = getattr(self, step)
            section = json.loads(section) if isinstance(section, str) else section
            if section is not None and not isinstance(section, dict):
                raise PeagleError(f"The section {step!r} of the pipeline must hold that command's arguments.")
            setattr(self, step, section)


def run(arguments: RunArguments) -> None:
    """Run a pipeline's steps in order; a finished one is done again only if its arguments or an earlier step changed.

    Steps that are cut off go on where they stopped, as their commands do. All arguments are parsed before the first
    step starts.

    Raises:
        PeagleError: a step is to be done again whose output would stay as it is: training that would go on from its
            last checkpoint with other arguments or data. More epochs alone are fine.
    """
    sections = {step: section for step in STEPS if (section := getattr(arguments, step)) is not None}
    parsed: dict[str, Any] = {
        step: parse_arguments(COMMANDS[step].load()[1], flags(section), f"peagle-hf {step}")
        for step, section in sections.items()
    }
    record = Path(arguments.output) / "pipeline.json"
    finished = json.loads(record.read_text()) if record.exists() else {}
    unchanged = True
    for step, section in sections.items():
        were_unchanged, unchanged = unchanged, unchanged and finished.get(step) == section
        if unchanged:
            logger.info("%s: finished earlier.", step)
            continue
        if step == "train" and step in finished:
            _require_fresh(parsed[step], finished[step] if were_unchanged else None, section)
            del finished[step]
            write_json(record, finished)
        logger.info("%s", step)
        started = time.monotonic()
        COMMANDS[step].load()[0](parsed[step])
        # Of a step behind this one it stays known that it was finished, with something else before it.
        finished = {name: done if STEPS.index(name) < STEPS.index(step) else None for name, done in finished.items()}
        finished[step] = section
        write_json(record, finished)
        logger.info("%s: %.0f s.", step, time.monotonic() - started)


def _require_fresh(arguments: Any, before: dict[str, Any] | None, section: dict[str, Any]) -> None:
    """Refuse to train on from checkpoints of a training that finished with other arguments, None being other data."""
    from .callbacks import newest_checkpoint

    parser = HfArgumentParser(cast(Any, type(arguments)))
    now, then = (
        {_field_of(parser, f"--{key}"): value for key, value in (one or {}).items()} for one in (section, before)
    )
    changed = [name for name in sorted({*now, *then} - LENGTHS) if now.get(name) != then.get(name)]
    if arguments.resume and (before is None or changed) and newest_checkpoint(arguments.output_dir):
        reason = "an earlier step" if before is None else ", ".join(changed)
        raise PeagleError(
            f"{reason} changed since train was finished, but it would go on from the checkpoints in "
            f"{arguments.output_dir}, where nothing is left to do. Remove that folder to train anew, or name another "
            "one in the section train."
        )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        PeagleError: no such file, or something else than a mapping in it.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PeagleError(f"There is no file {path}. Name the YAML file with the arguments.") from error
    except yaml.YAMLError as error:
        raise PeagleError(f"{path} is not valid YAML: {' '.join(str(error).split())}. Correct it there.") from error
    if not isinstance(content, dict):
        raise PeagleError(f"{path} must hold a mapping of arguments, such as `num_layers: 2`.")
    return content


def flags(content: dict[str, Any]) -> list[str]:
    """The command line that says the same as a mapping; null or an empty list leaves an argument at its default."""
    argv = []
    for key, value in content.items():
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        argv.append(f"--{key}")
        argv += [json.dumps(item) if isinstance(item, dict) else str(item) for item in values]
    return argv


def _usage() -> str:
    lines = [f"  {name:<12} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: peagle-hf <command> [config.yaml] [--flag value ...]", "", *lines, "", "peagle-hf <command> --help"]
    )
