"""Pages that mkdocs makes with the site: the architecture, the command line from its parsers, the code blocks that CI
skips, and the faults that the tests inject; and labels in the cells of wide tables, for phones."""

import argparse
import ast
import html
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import architecture
import code_blocks

from peagle_hf.cli import COMMANDS
from peagle_hf.cli.parsing import GENERAL, TRAINER, CommandParser, HelpFormatter

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
WIDE_COLUMNS = 5
LONG_ROW = 100
"""A table doesn't fit a phone if it has so many columns, or three columns and a row of so many characters."""
CLI_INTRODUCTION = """# Command line

`peagle-hf <command> [config.yaml] [--flag value ...]`. This page is made from the parsers when the site is built;
`peagle-hf help <command>` prints the same, and `peagle-hf train --help-all` the Trainer's own arguments too.

- **Flags** may be written with dashes or underscores. The flag of a list may be repeated: `--suite a --suite b`. Every
  command takes `--quiet`, `--verbose` and `--print-config`.
- **A YAML or JSON file** as the first argument holds flag names without the dashes (`no_linear_start: true` works too),
  and flags take precedence over it. Numbers follow YAML 1.2: `lr: 2e-3` is a number. `~/` is the home folder.
- **`config.yaml`** in the output folder of prepare, extract, train and evaluate holds its arguments,
  without passwords and tokens, and can be given to the same command again: `peagle-hf train checkpoints/config.yaml`.
  If the folder already has the `config.yaml` of another command, the file is `<command>.yaml`, such as `train.yaml`.
- **`--dry-run`** of prepare, extract, train, launch-vllm and serve prints what would be read, run and written.
- **Exit codes**: 0 done; 1 an error, described in one paragraph; 2 a wrong command line; 130 interrupted with Ctrl-C;
  141 the reader of a pipe has ended; 143 (129) ended by SIGTERM (SIGHUP). For an unexpected error the message names a
  log file with the traceback.
- **Progress bars** are shown only if standard error is a terminal.
"""
FAULTS_INTRODUCTION = """# Faults that the tests inject

Each line is a test that injects the fault and checks what happens. This page is made from the marks of the tests when
the site is built.
"""
FAULTS_HEADER = """
| how the fault is injected | what happens | test |
|---|---|---|
"""


def on_config(config: "MkDocsConfig") -> "MkDocsConfig":
    """Take the repository's address from PEAGLE_HF_REPOSITORY or pyproject.toml (mkdocs calls this)."""
    config.repo_url = repository()
    config.edit_uri = config.edit_uri if config.repo_url else None
    return config


def repository() -> str | None:
    """The address for the repository's link and the edit links, with a slash at its end; None leaves them out."""
    listed = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    address = os.environ.get("PEAGLE_HF_REPOSITORY") or (listed[1] if listed else "")
    return f"{address.rstrip('/')}/" if address else None


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the generated pages (mkdocs calls this, which the tests that use this module don't need)."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "architecture.md", content=architecture.page()))
    files.append(File.generated(config, "cli.md", content=command_line()))
    files.append(File.generated(config, "not-run.md", content=code_blocks.not_run()))
    files.append(File.generated(config, "faults.md", content=faults_page()))
    return files


def on_page_content(html_of_page: str, **_: Any) -> str:
    """Write the head of its column into each cell of a wide table (mkdocs calls this); site.css shows it on a phone."""
    return re.sub(r"<table>.*?</table>", lambda table: _labelled(table[0]), html_of_page, flags=re.S)


def _labelled(table: str) -> str:
    heads = [_text(head) for head in re.findall(r"<th\b[^>]*>(.*?)</th>", table, re.S)]
    longest_row = max(len(" ".join(_text(row).split())) for row in table.split("</tr>"))
    if len(heads) < WIDE_COLUMNS and (len(heads) < 3 or longest_row < LONG_ROW):
        return table
    labels = itertools.cycle(html.escape(head) for head in heads)
    return re.sub(r"<td\b", lambda _: f'<td data-label="{next(labels)}"', table)


def _text(element: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", element))


def faults_page() -> str:
    """The page of all faults that tests inject, a table for each file of tests, under that file's first line."""
    page = FAULTS_INTRODUCTION
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        rows = [" | ".join(cell.replace("|", "\\|") for cell in fault) for fault in faults(path)]
        if rows:
            title = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem).splitlines()[0]
            page += f"\n## {title.partition(':')[0].rstrip('.')}\n{FAULTS_HEADER}"
            page += "".join(f"| {row} |\n" for row in rows)
    return page


def faults(path: Path) -> list[tuple[str, str, str]]:
    """The faults of a file of tests: of each `pytest.mark.fault(injected, outcome)` both texts and the test's name.

    Raises:
        ValueError: a mark's arguments aren't two literal strings.
    """
    found = []
    for part in ast.parse(path.read_text(encoding="utf-8")).body:
        name = part.name if isinstance(part, ast.FunctionDef) else path.stem
        for node in ast.walk(part):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                injected, outcome = map(ast.literal_eval, node.args)
                found.append((injected, outcome, f"`{name}`"))
    return found


def command_line() -> str:
    """The page of all commands and their flags; of `train` those that are not the Trainer's own."""
    page = CLI_INTRODUCTION
    for name, command in COMMANDS.items():
        arguments: Any = command.load()[1]
        page += f"\n## peagle-hf {name}\n\n{command.help[0].upper()}{command.help[1:]}: "
        page += f"`peagle-hf {name} {command.usage()}`.\n\n"
        if name == "train":
            page += (
                "Below are the drafter's own flags and the Trainer's that are used most. All others of "
                "[transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer"
                "#transformers.TrainingArguments) work too, under their own names.\n\n"
            )
        examples = "".join(f"peagle-hf {example}\n" for example in command.examples)
        page += f"```text\n{examples}```\n" + "".join(_tables(arguments))
    return page


def _tables(arguments: Any) -> Iterator[str]:
    """A table for each group of flags, as `--help` groups them, without the flags that all commands share."""
    parser = CommandParser(arguments)
    formatter = HelpFormatter("")
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if group.title in (GENERAL, TRAINER) or not shown:
            continue
        yield f"\n**{group.title}**\n\n| flag | |\n|---|---|\n"
        for action in shown:
            meaning = formatter._expand_help(action).replace("<", "&lt;").replace("|", "\\|")
            if action.choices:
                meaning += f" One of: {', '.join(map(str, action.choices))}."
            yield f"| `{formatter._format_action_invocation(action).partition(' {')[0]}` | {meaning} |\n"
