"""Parse command lines and YAML files into the dataclass of a command."""

import argparse
import difflib
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..arguments import VLLM_ARGS, config_text, flag_of, plain
from ..console import MISUSED, set_verbosity
from ..errors import PeagleError
from .speculators import NOT_NEEDED, NOT_THERE, counterpart

Parsed = TypeVar("Parsed")
GENERAL = "General"
SECTION = "MAPPING"
"""Metavar of a flag whose value is a mapping, such as a step of a pipeline."""
TRAINER = "Arguments of transformers.TrainingArguments"


def parse_arguments(
    arguments: type[Parsed],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    positional: Sequence[str] = (),
    usage: str = "[config.yaml] [--flag value ...]",
    examples: Sequence[str] = (),
) -> Parsed:
    """Parse a command line into a dataclass: an optional YAML or JSON file first, whose values flags override.

    Keys of the file are flag names without the dashes, including aliases and negations (`no_linear_start: true`). An
    unknown key or flag is an error. A flag replaces the file's value, also a whole list; repeating a list's flag adds
    to the list.

    Args:
        arguments: the dataclass, such as `PeagleTrainingArguments`.
        argv: default: the process's own arguments.
        prog: the program's name in messages.
        positional: fields whose values may be given without flags, in this order, anywhere between the flags.
        usage: what follows the program's name in `--help`.
        examples: command lines that `--help` shows.

    Raises:
        PeagleError: the YAML file can't be read, or the dataclass refuses a value.
        SystemExit: 2 for an unknown or incomplete flag; 0 for `--help`, `--help-all` and `--print-config`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = CommandParser(arguments, positional, prog=prog, usage=f"%(prog)s {usage}", examples=examples)
    given: list[tuple[str, str]] = []
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        given = parser.read_mapping(read_yaml(argv[0]), argv.pop(0))
    return parser.parse([*given], argv)


def parse_mapping(arguments: type[Parsed], content: Mapping[str, Any], source: str, prog: str) -> Parsed:
    """Parse a mapping, such as a section of a pipeline, like the YAML file of `parse_arguments`.

    Args:
        source: name of the mapping in messages.
    """
    parser = CommandParser(arguments, prog=prog)
    return parser.parse(parser.read_mapping(content, source), [])


def field_names(arguments: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with each key replaced by the name of the field that it sets."""
    parser = CommandParser(arguments)
    return {parser.field_of(f"--{key}") or key: value for key, value in content.items()}


class CommandParser(HfArgumentParser):
    """The flags of a dataclass, in groups, each shown once and with dashes.

    In addition to HfArgumentParser: repeatable flags for lists, positional fields, groups, `--help-all` for the
    Trainer's own arguments, suggestions for misspelt flags, and mappings (YAML files) as another source of values.
    """

    def __init__(
        self, arguments: type, positional: Sequence[str] = (), examples: Sequence[str] = (), **kwargs: Any
    ) -> None:
        self._groups: dict[str, Any] = {}
        self._title_of = {name: title for title, names in _groups(arguments).items() for name in names}
        self._positional = positional
        self._arguments = arguments
        # HfArgumentParser accepts one value for a field such as `report_to: str | list[str]`. Here such a field may
        # have several.
        hints = get_type_hints(arguments)
        self._one_or_more = {name for name, hint in hints.items() if {str, list[str]} <= set(get_args(hint))}
        epilog = "\n".join(["examples:", *(f"  {example}" for example in examples)]) if examples else None
        super().__init__(
            arguments,  # type: ignore[arg-type]
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            add_help=False,
            epilog=epilog,
            **kwargs,
        )
        # argparse keeps the order of the dataclass, in which the Trainer's own fields come first.
        for title, names in _groups(arguments).items():
            if title in self._groups:
                self._groups[title]._group_actions.sort(key=lambda action, names=names: names.index(action.dest))
        self.add_argument("-h", "--help", action=_ShowHelp, nargs=0, help="Show this help and stop.")
        if TRAINER in self._title_of.values():
            self.add_argument(
                "--help-all", action=_ShowHelp, nargs=0, help="Show the Trainer's own arguments too, and stop."
            )
        self.add_argument("--quiet", action="store_true", help="Show only warnings, errors and results.")
        self.add_argument("--verbose", action="store_true", help="Show more log lines, also those of transformers.")
        self.add_argument(
            "--print-config", action="store_true", help="Print the arguments as a YAML file for this command, and stop."
        )

    def add_argument(self, *flags: Any, **kwargs: Any) -> Any:
        """Add a flag to its field's group; argparse and HfArgumentParser call this."""
        flags = tuple(dict.fromkeys(one for flag in flags for one in _spellings(flag)))
        name = kwargs.get("dest") or flags[0].lstrip("-").replace("-", "_")
        if not self._groups:
            titles = [title for title in dict.fromkeys(self._title_of.values()) if title != TRAINER]
            self._groups = {title: self.add_argument_group(title) for title in [*titles, GENERAL, TRAINER]}
        group = self._groups[self._title_of.get(name, GENERAL)]
        # `HELP` has other words for some fields of the Trainer.
        kwargs["help"] = getattr(self._arguments, "HELP", {}).get(name, kwargs.get("help"))
        if kwargs.get("action") == "store_false":
            kwargs["help"] = argparse.SUPPRESS  # its help stands beside the flag that it negates
        if name in self._one_or_more:
            kwargs["nargs"] = "+"
        if kwargs.get("nargs") == "+":
            kwargs["action"] = _Extend
        if kwargs.get("type") is dict or get_origin(kwargs.get("type")) is dict:
            kwargs["type"] = json.loads
        if name in self._positional:
            kwargs["required"] = False  # it may stand without its flag, so `parse` checks it
        return group.add_argument(*flags, **kwargs)

    def field_of(self, flag: str) -> str | None:
        """The field that a flag sets; None for an unknown flag."""
        action = self._option_string_actions.get(flag)
        return action.dest if action else None

    def read_mapping(self, content: Mapping[str, Any], source: str) -> list[tuple[str, str]]:
        """The flags and values of a mapping; null or an empty list leaves an argument at its default."""
        given: list[tuple[str, str]] = []
        for key, value in content.items():
            action = self._option_string_actions.get(f"--{key}")
            if action is None:
                self.error(f"{source}: unknown key {key}.{self._suggestion(f'--{key}', prefix='')}")
            if value is None and action.metavar == SECTION:
                self.error(f"{source}: {key} is empty. Write `{key}: {{}}` for its defaults, or leave it out.")
            if value is None or value == []:
                continue
            if action.nargs == 0:
                if not isinstance(value, bool):
                    self.error(f"{source}: {key} is a switch. Write `{key}: true` or `{key}: false`.")
                opposite = f"--{action.dest}=true" if isinstance(action, argparse._StoreFalseAction) else None
                if value or opposite:
                    given.append((action.dest, f"--{key}" if value else str(opposite)))
                continue
            if isinstance(value, list) and action.nargs != "+":
                self.error(f"{source}: {key} takes one value, not a list.")
            if isinstance(value, list) and None in value:
                self.error(f"{source}: {key} has an empty item. Give it a value, or remove it.")
            for one in value if isinstance(value, list) else [value]:
                text = json.dumps(one) if isinstance(one, dict | list | bool) else str(one)
                given.append((action.dest, f"--{key}={text}"))
        return given

    def parse(self, given: list[tuple[str, str]], argv: Sequence[str]) -> Any:
        """Make the dataclass from a mapping's flags (see `read_mapping`) and a command line, which takes precedence."""
        words = self._split(argv)
        replaced = {name for name, _ in words}
        namespace = self.parse_args(
            [word for name, word in given if name not in replaced] + [word for _, word in words]
        )
        for name, word in words:
            self._check_json(name, *word.partition("=")[::2])
        missing = [name.upper() for name in self._positional if self._lacks(name, namespace)]
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        if namespace.quiet or namespace.verbose:
            set_verbosity(logging.WARNING if namespace.quiet else logging.DEBUG)
        values = {one.name: getattr(namespace, one.name) for one in fields(self._arguments) if one.init}
        for name in self._one_or_more:
            values[name] = (
                values[name][0] if isinstance(values[name], list) and len(values[name]) == 1 else values[name]
            )
        try:
            parsed = self._arguments(**values)
        except PeagleError:
            raise
        except (ValueError, TypeError, ImportError, NotImplementedError, OSError) as error:
            raise PeagleError(f"These arguments can't be used: {' '.join(str(error).split())}") from error
        if namespace.print_config:
            print(config_text(parsed), end="")
            raise SystemExit(0)
        return parsed

    def _check_json(self, name: str, flag: str, value: str) -> None:
        # A Jinja template isn't JSON, and Jinja's own errors are clearer.
        is_template = value.startswith(("{%", "{{", "{#"))
        if value.startswith("{") and not is_template and name not in getattr(self._arguments, "TEXTS", ()):
            try:
                json.loads(value)
            except json.JSONDecodeError as error:
                self.error(f"{flag} is not valid JSON: {error}.")

    def _lacks(self, name: str, namespace: argparse.Namespace) -> bool:
        (one,) = (one for one in fields(self._arguments) if one.name == name)
        return one.default is MISSING and getattr(namespace, name) is None

    def _split(self, argv: Sequence[str]) -> list[tuple[str, str]]:
        """Split a command line into pairs of a field and a word `--flag=value`.

        A word that isn't the value of a flag is the value of the next positional field.
        """
        rest, found, free = list(argv), list[tuple[str, str]](), list[str]()
        while rest:
            word = rest.pop(0)
            flag, is_whole, _ = word.partition("=")
            action = self._option_string_actions.get(flag)
            if action is None:
                if word.startswith("-") and len(word) > 1:
                    self.error(f"unknown flag {flag}.{self._suggestion(flag)}")
                free.append(word)
                continue
            values = [] if is_whole else self._values_of(action, rest)
            if is_whole or not values:
                found.append((action.dest, word))
            found += [(action.dest, f"{flag}={value}") for value in values]
        given = {name for name, _ in found}
        for name in self._positional:
            if free and name not in given:
                found.append((name, f"--{name}={free.pop(0)}"))
        if free:
            self.error(f"unexpected argument {free[0]!r}: every value must follow its flag.")
        return found

    def _values_of(self, action: argparse.Action, rest: list[str]) -> list[str]:
        """Remove the values of a flag from the words that follow it, and return them."""
        if action.nargs == 0:
            return []
        if action.nargs == "?":
            takes = string_to_bool if action.type is string_to_bool else str
            is_value = bool(rest) and not rest[0].startswith("--") and _is(takes, rest[0])
            return [rest.pop(0) if is_value else "true"]
        if action.nargs != "+":
            return [rest.pop(0)] if rest and rest[0].partition("=")[0] not in self._option_string_actions else []
        taken: list[str] = []
        while rest and not rest[0].startswith("--") and (action.type is str or _is(action.type, rest[0])):
            taken.append(rest.pop(0))
        if not taken and rest and not rest[0].startswith("--"):
            taken.append(rest.pop(0))  # a first word that doesn't fit is taken too, so that the error names it
        return taken

    def _suggestion(self, flag: str, prefix: str = "--") -> str:
        """A sentence that suggests a flag: the one for a flag of speculators, else the closest, else `--help`."""
        dashed = flag.replace("_", "-")
        here = counterpart(dashed)
        if here in (NOT_NEEDED, NOT_THERE):
            return f" speculators has this flag; here it is {here}, so leave it out."
        flags_here = re.findall(r"--[\w-]+", here) if here and here.startswith("--") else []
        if here and self._option_string_actions.keys() >= {*flags_here}:
            shown = here if prefix else re.sub(r"--([\w-]+)", lambda found: found[1].replace("-", "_"), here)
            return f" speculators has this flag; here it is {shown}."
        known = [option for option in self._option_string_actions if "_" not in option and option.startswith("--")]
        close = difflib.get_close_matches(dashed, known, n=1, cutoff=0.7)
        if close:
            name = close[0] if prefix else close[0].removeprefix("--").replace("-", "_")
            return f" Did you mean {name}?"
        of_vllm = "; flags of vLLM stand after --" if prefix and VLLM_ARGS in self._title_of else ""
        return f" `{self.prog} --help` lists all{of_vllm}."

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (?:\S+/)?(--[\w-]+):", r"\1:", message)  # show one spelling of the flag only
        message = re.sub(r"--\w+_\w+/(?=--)", "", message)
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(MISUSED)


class _Extend(argparse.Action):
    """Collect the values of a list's flag, which may be repeated; they replace the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if before is self.default or before is None else before), *values])


class _ShowHelp(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for group in parser._action_groups:
            is_hidden = group.title == TRAINER and option_string != "--help-all"
            for action in group._group_actions if is_hidden else ():
                action.help = argparse.SUPPRESS
        parser.print_help()
        raise SystemExit(0)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show each flag once, with dashes and its negation, and its default unless that is empty or off."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        options = [option for option in action.option_strings if "_" not in option]
        if action.nargs == 0:
            return ", ".join(options)
        if action.nargs == "?":
            is_on = action.default is True
            return ", ".join([*options, f"--no-{action.dest.replace('_', '-')}"] if is_on else options)
        return f"{', '.join(options)} {self._format_args(action, action.dest.upper())}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        name = self._metavar_formatter(action, default_metavar)(1)[0]
        return f"{name} [{name} ...]" if action.nargs == "+" else name

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required:
            return f"{text} (required)"
        is_number = type(action.default) in (int, float)  # 0 is a default to show, though it equals False
        is_empty = not is_number and action.default in (None, False, [], argparse.SUPPRESS)
        if action.nargs == 0 or is_empty or re.search(r"\bdefault:", text, re.I):
            return text
        default = plain(action.default)
        if isinstance(default, list):
            default = " ".join(map(str, default))
        default = str(default).lower() if isinstance(default, bool) else str(default)
        return f"{text} (default: {default.replace('%', '%%')})"


def _spellings(flag: str) -> tuple[str, ...]:
    """A flag as it was given, with underscores, and with dashes."""
    return (flag, f"--{flag[2:].replace('-', '_')}", flag_of(flag[2:])) if flag.startswith("--") else (flag,)


def _groups(arguments: type) -> Mapping[str, tuple[str, ...]]:
    """Field names by group: the dataclass's `GROUPS`, and one group of all other fields."""
    own: Mapping[str, tuple[str, ...]] = getattr(arguments, "GROUPS", {})
    named = {name for names in own.values() for name in names}
    others = tuple(one.name for one in fields(arguments) if one.init and one.name not in named)
    return {**own, (TRAINER if own and others else GENERAL): others}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: `2e-3` is a number and `no` is text; a repeated key is an error."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key) if isinstance(key, str) else None
        return super().construct_mapping(node, deep)


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping with text keys, or a JSON one, which YAML includes.

    Raises:
        PeagleError: the file can't be read or isn't such a mapping; the message names the file and the line.
    """
    try:
        content = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise PeagleError(f"There is no file {path}. Name the YAML file with the arguments.") from error
    except IsADirectoryError as error:
        raise PeagleError(f"{path} is a folder. Name a YAML file with the arguments.") from error
    except UnicodeDecodeError as error:
        raise PeagleError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise PeagleError(f"{path} can't be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        kind = "JSON" if str(path).endswith(".json") else "YAML"
        raise PeagleError(f"{path} is not valid {kind}: {' '.join(str(error).split())}. Correct it there.") from error
    if not isinstance(content, dict):
        raise PeagleError(f"{path} must hold a mapping of arguments, such as `num_layers: 2`.")
    for key in content:
        if not isinstance(key, str):
            raise PeagleError(f"{path} has the key {key!r}, which isn't the name of a flag.")
    return content


def flags(content: Mapping[str, Any]) -> list[str]:
    """The command line with the values of a mapping; null or an empty list leaves an argument at its default."""
    argv: list[str] = []
    for key, value in content.items():
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
    return argv


def _is(convert: Any, word: str) -> bool:
    try:
        convert(word)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
    return True
