"""Dataclasses of command arguments: checks of paths and ranges, and writing them as a YAML file."""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import PeagleError
from .files import atomic_path
from .redaction import is_secret, public_command, public_settings

CONFIG = "config.yaml"
VLLM_ARGS = "vllm_args"
"""The field of vLLM's own flags, which stand after `--` on a command line."""
VLLM_ARGS_HELP = (
    "vLLM's own flags. On the command line write them at the end, after --; in a YAML file give a list of their words, "
    'such as [--tensor-parallel-size, "2"].'
)


@dataclass
class Arguments:
    """Base class of the commands' arguments: expands `~/` at the beginning of a path, and refuses empty names.

    In Python a path may be a `Path`, and the only item of a list may be given without the list.

    Class attributes:
        GROUPS: titles under which `--help` shows the fields, and the names of these fields.
        TEXTS: fields that hold text rather than names or paths: they are not checked.

    Raises:
        PeagleError: a name is empty, a value is none of those that a field may have, or a flag for vLLM and its value
            are one word.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    TEXTS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self._take_python_values()
        check_types(self)
        check_names(self, [one.name for one in fields(self) if one.name not in (VLLM_ARGS, *self.TEXTS)])
        for word in getattr(self, VLLM_ARGS, []):
            if re.match(r"--?[\w-]+\s", word):
                raise PeagleError(
                    f"{VLLM_ARGS} has the item {word!r}, which vLLM would take for one flag. Give each word as an item "
                    f"of its own: {json.dumps(shlex.split(word))}."
                )

    def _take_python_values(self) -> None:
        """Bring values that only Python gives into the form that the command line gives, and check the choices."""
        hints = get_type_hints(type(self))
        for one in fields(self):
            value, kind = getattr(self, one.name), _without_none(hints[one.name])
            if get_origin(kind) is list and value is not None and not isinstance(value, list | tuple):
                value = [value]
            values = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in _items(value)]
            setattr(self, one.name, values if isinstance(value, list | tuple) else values[0])
        check_choices(self)


def check_choices(arguments: Any) -> None:
    """Make sure that fields with a choice of values have one of them; the command line checks this itself.

    Raises:
        PeagleError: names the field, its value and the choices.
    """
    hints = get_type_hints(type(arguments))
    for one in fields(arguments):
        value, kind = getattr(arguments, one.name), _without_none(hints[one.name])
        if get_origin(kind) is Literal and value is not None and value not in get_args(kind):
            choices = ", ".join(map(str, get_args(kind)))
            raise PeagleError(f"{flag_of(one.name)} is {value!r} but must be one of {choices}.")


def _without_none(kind: Any) -> Any:
    """A type `X | None` as X; another type as it is."""
    parts = [part for part in get_args(kind) if part is not NoneType]
    return parts[0] if get_origin(kind) in (Union, UnionType) and len(parts) == 1 else kind


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


_KINDS = {int: (Integral, "a whole number"), float: (Real, "a number"), bool: (bool, "True or False")}


def check_types(arguments: Any) -> None:
    """Make sure that numbers and switches have values of their kind; only Python and other parsers give others.

    Raises:
        PeagleError: names the field and its value, such as "false", which would count as true.
    """
    hints = get_type_hints(type(arguments))
    for one in fields(arguments):
        kind = _without_none(hints[one.name])
        kind = get_args(kind)[0] if get_origin(kind) is list else kind
        for value in _items(getattr(arguments, one.name)) if kind in _KINDS else ():
            wanted, words = _KINDS[kind]
            if value is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool)):
                raise PeagleError(f"{flag_of(one.name)} is {value!r} but must be {words}.")


def check_names(arguments: Any, names: Sequence[str]) -> None:
    """Expand `~/` at the beginning of the named fields' values, or of a list's items, to the home folder.

    Raises:
        PeagleError: such a value is empty.
    """
    for name in names:
        value = getattr(arguments, name)
        values = _items(value)
        if "" in values:
            raise PeagleError(f"{flag_of(name)} is empty. Give it a value or leave it out.")
        expanded = [_in_home_folder(one) for one in values]
        if expanded != values:
            setattr(arguments, name, expanded if isinstance(value, list) else expanded[0])


def check_ranges(arguments: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Make sure that numbers are within their limits; None is allowed, and lists are checked item by item.

    Args:
        arguments: a command's dataclass.
        ranges: the least and the greatest allowed value of each field; `math.inf` for no limit.

    Raises:
        PeagleError: a number is outside its limits; the message names its flag, its value and the limits.
    """
    for name, (least, greatest) in ranges.items():
        value = getattr(arguments, name)
        for one in _items(value):
            if isinstance(one, int | float) and not least <= one <= greatest:  # NaN is in no range
                limits = f"at least {least}" if greatest == float("inf") else f"from {least} to {greatest}"
                raise PeagleError(f"{flag_of(name)} is {one} but must be {limits}.")


def check_ascending(arguments: Any, names: Sequence[str]) -> None:
    """Make sure that lists of numbers are positive, distinct and ascending.

    Raises:
        PeagleError: a list isn't; the message names its flag and its values.
    """
    for name in names:
        numbers = getattr(arguments, name)
        if min(numbers, default=1) < 1 or numbers != sorted(set(numbers)):
            raise PeagleError(
                f"{flag_of(name)} is {' '.join(map(str, numbers))} but needs positive, distinct and ascending "
                "numbers, for example 1 4 16."
            )


def command_text(arguments: Any, command: str) -> str:
    """The command line that gives these arguments, without passwords."""
    words = ["peagle-hf", command]
    vllm_args = getattr(arguments, VLLM_ARGS, [])
    for one in fields(arguments):
        value = getattr(arguments, one.name)
        if one.init and one.name != VLLM_ARGS and value != default_of(one):
            words.append(flag_of(one.name))
            words += map(str, plain(value)) if isinstance(value, list) else [_word(value)]
    return shlex.join(public_command([*words, *(["--", *vllm_args] if vllm_args else [])]))


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def flag_of(name: str) -> str:
    """The flag that sets a field: `--total-seq-len` for `total_seq_len`."""
    return f"--{name.replace('_', '-')}"


def config_text(arguments: Any) -> str:
    """A dataclass as YAML that `parse_arguments` reads back; it has the values that differ from their defaults.

    Tokens and passwords are left out.
    """
    content = {}
    given = getattr(arguments, "as_given", vars(arguments))
    for one in fields(arguments):
        value = plain(given[one.name])
        if one.init and value not in (None, plain(default_of(one))) and not is_secret(one.name):
            content[one.name] = value
    return yaml.safe_dump(public_settings(content), sort_keys=False, allow_unicode=True)


def config_path(folder: str | Path, command: str) -> Path:
    """The file of a command's arguments in its output folder.

    That is `config.yaml`, or `<command>.yaml` if another command has its `config.yaml` in the same folder.
    """
    path = Path(folder) / CONFIG
    is_another = path.exists() and not path.read_bytes().startswith(_config_header(command).encode())
    return path.with_name(f"{command}.yaml") if is_another else path


def write_config(arguments: Any, path: Path, command: str) -> None:
    """Write the YAML file (see `config_path`) with which `peagle-hf <command> FILE` runs the same command again."""
    with atomic_path(path) as temporary:
        temporary.write_text(_config_header(command) + config_text(arguments), encoding="utf-8")


def _config_header(command: str) -> str:
    return f"# Arguments of peagle-hf {command}.\n"


def plain(value: Any) -> Any:
    """A value in a form that YAML and JSON can hold: of an enumeration its value, of a tuple a list.

    Of an object that no file can hold, such as a `datasets.Dataset`, the type is named.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if isinstance(value, str | int | float | dict | None) else f"<{type(value).__name__} in memory>"


def default_of(one: "Field[Any]") -> Any:
    """The default of a dataclass's field; `dataclasses.MISSING` if it has none."""
    return one.default_factory() if one.default_factory is not MISSING else one.default


def _in_home_folder(value: Any) -> Any:
    is_in_home = isinstance(value, str) and (value == "~" or value.startswith("~/"))
    return str(Path(value).expanduser()) if is_in_home else value
