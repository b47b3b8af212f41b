"""Pages that mkdocs makes with the site: the command line, from its parsers, and the code blocks that CI skips."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from transformers import HfArgumentParser

from peagle_hf.cli import COMMANDS

ROOT = Path(__file__).parents[1]
EXECUTED = ("README.md", "docs/tutorial.md")
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n+)?^```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.M | re.S
)
CLI_INTRODUCTION = """# Command line

`peagle-hf <command> [config.yaml] [--flag value ...]`. A YAML file holds flag names without the dashes; flags win over
it. Every flag may also be written with underscores. This page is made from the parsers when the site is built;
`peagle-hf <command> --help` prints the same.
"""
NOT_RUN_INTRODUCTION = """# What CI does not run

The tests run the code blocks of the README and of the [tutorial](tutorial.md), in order, with SmolLM2-135M-Instruct in
place of Qwen3-8B and a dozen chats in place of ShareGPT. All but these:

| page | begins | not run because |
|---|---|---|
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of code; `reason` says why it is not run, None if it is."""

    language: str
    code: str
    reason: str | None


def blocks(markdown: str) -> list[Block]:
    """The bash and python blocks of a page, in order; `<!-- not run: reason -->` before one takes it out of the run."""
    return [Block(found["language"], found["code"], found["reason"]) for found in BLOCK.finditer(markdown)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages (mkdocs calls this)."""
    files.append(File.generated(config, "cli.md", content=command_line()))
    files.append(File.generated(config, "not-run.md", content=not_run()))
    return files


def not_run() -> str:
    """The page of blocks that are not run, and why."""
    page = NOT_RUN_INTRODUCTION
    for name in EXECUTED:
        for block in blocks((ROOT / name).read_text(encoding="utf-8")):
            if block.reason:
                first = re.sub(r"\s+(\\|#.*)?$", "", block.code.splitlines()[0])
                page += f"| {Path(name).stem} | `{first}` | {block.reason} |\n"
    return page


def command_line() -> str:
    """The page of all commands and their flags; of `train` those that are not the Trainer's own."""
    page = CLI_INTRODUCTION
    for name, command in COMMANDS.items():
        arguments: Any = command.load()[1]
        page += f"\n## peagle-hf {name}\n\n{command.help[0].upper()}{command.help[1:]}: "
        page += f"`peagle-hf {name} {command.usage()}`.\n\n"
        if name == "train":
            page += (
                "Below are the drafter's own flags and those whose default differs from the Trainer's. All others of "
                "[transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer"
                "#transformers.TrainingArguments) work too, under their own names.\n\n"
            )
        page += "| flag | default | |\n|---|---|---|\n" + "".join(_rows(arguments))
    return page


def _rows(arguments: Any) -> Iterator[str]:
    actions_of = defaultdict(list)
    for action in HfArgumentParser(arguments)._actions:
        actions_of[action.dest].append(action)
    for field in [name for name in arguments.__annotations__ if name in actions_of]:
        actions = actions_of[field]
        first = actions[0]  # others are its negations
        options = [option for action in actions for option in action.option_strings if "_" not in option]
        meaning = (first.help or "").replace("<", "&lt;").replace("|", "\\|")
        if first.choices:
            meaning += f" One of: {', '.join(map(str, first.choices))}."
        yield f"| {', '.join(f'`{option}`' for option in options)} | {_default(first)} | {meaning} |\n"


def _default(action: Any) -> str:
    if action.required:
        return "required"
    if action.default in (None, []) or re.search("default: ", action.help or "", re.I):
        return ""
    value = action.default.value if isinstance(action.default, Enum) else action.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
