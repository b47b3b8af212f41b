"""Reading conversations: local JSON files and hub datasets, ShareGPT or messages form, into one shape."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PeagleError

if TYPE_CHECKING:
    import datasets

BUILT_IN_DATASETS = {
    "sharegpt": "Aeala/ShareGPT_Vicuna_unfiltered:train",
    "ultrachat": "HuggingFaceH4/ultrachat_200k:train_sft",
}

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""What a row may call a role, and the role that the chat template sees."""

_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_CHUNK_CHARACTERS = 1 << 20
_BETWEEN_ITEMS = re.compile(r"[\s,]*")


class Unlearnable(Exception):
    """A well-formed conversation that nothing can be learnt from; the message is the reason, in a few words."""


@dataclass(frozen=True)
class Chat:
    """A conversation as `apply_chat_template` takes it: messages of role and content, and the tools on offer."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None


@dataclass(frozen=True)
class Source:
    """The rows of one file or hub dataset, in their own order and read from disk one at a time."""

    name: str
    unit: str  # what a row is called in messages: "line" or "item" of a file, "row" of a hub dataset
    rows: "datasets.Dataset"

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[str, dict[str, Any]]:
        """Give where the row of this index was found, for messages, and the row."""
        row = self.rows[index]
        if self.unit == "row":
            return f"{self.name}, row {index}", row
        return f"{self.name}, {self.unit} {row['number']}", json.loads(row["json"])


def open_source(data: str, folder: Path) -> Source:
    """Open a source of rows: a built-in name, a local .jsonl or .json file, or a hub dataset.

    A hub dataset is `org/name`, `org/name:split` or `org/name:configuration:split`; the split is `train` if none is
    named. A local file holds one JSON object a line or one array of objects. It is checked from end to end and copied
    into `folder`, where its rows are read from without holding them in memory.

    Raises:
        PeagleError: the file or the dataset can't be read, a line is not a JSON object, or there is no row.
    """
    if is_local_file(data):
        source = _open_file(Path(data), folder)
    elif "/" in (name := BUILT_IN_DATASETS.get(data, data)):
        source = _open_hub_dataset(name)
    else:
        raise PeagleError(
            f"{data} is neither a built-in dataset ({', '.join(BUILT_IN_DATASETS)}), nor a .jsonl or .json "
            "file, nor a hub dataset written org/name. Name one of these."
        )
    if not len(source):
        raise PeagleError(f"{data} is empty: it holds no conversation. Name a dataset that has some.")
    return source


def is_local_file(data: str) -> bool:
    """Whether a source is a JSON file of this machine rather than a dataset."""
    return data.endswith((".json", ".jsonl"))


def read_chat(row: dict[str, Any], place: str) -> Chat:
    """Bring a row of ShareGPT form (`conversations`, from/value) or messages form (`messages`, role/content) into one.

    Every field of a message is kept for the chat template; those that are null are as good as absent. Reasoning is
    given under each name that templates know, a tool call's arguments as an object where the row has JSON text.

    Raises:
        PeagleError: the row has another shape, a field has the wrong type or a role is unknown.
        Unlearnable: a message holds something other than text.
    """
    field = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
    if field is None:
        raise PeagleError(
            f"{place}: there is neither `messages` nor `conversations` nor `input_ids` with `loss_mask`; the fields "
            f"are {', '.join(row) or 'none'}. Rename the field that holds the conversation."
        )
    if not isinstance(row[field], list):
        raise _wrong(place, field, "a list of messages", row[field])
    messages = [_read_message(message, place, f"{field}[{index}]") for index, message in enumerate(row[field])]
    tools = _decoded(row.get("tools") or None, place, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _wrong(place, "tools", "a list of JSON objects", tools)
    return Chat(messages, tools or None)


def _read_message(message: Any, place: str, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(place, field, "an object with a role and a content", message)
    if not message.keys() & {"content", "value", "tool_calls"}:
        raise PeagleError(f"{place}: {field} has no content. Add one or take the row out.")
    message = {name: value for name, value in message.items() if value is not None}
    role = message.pop("from", message.get("role"))
    if not isinstance(role, str) or role not in ROLES:
        raise PeagleError(
            f"{place}: {field} has the role {role!r}, which is unknown. Known roles are {', '.join(ROLES)}: rename it "
            "or take the row out."
        )
    message["role"] = ROLES[role]
    message["content"] = _text(message.pop("value", message.get("content")), place, f"{field}.content")
    for name in _REASONING_FIELDS:
        if not isinstance(message.get(name, ""), str):
            raise _wrong(place, f"{field}.{name}", "text", message[name])
    if reasoning := next((message[name] for name in _REASONING_FIELDS if message.get(name)), None):
        message |= dict.fromkeys(_REASONING_FIELDS, reasoning)
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = _read_tool_calls(calls, place, f"{field}.tool_calls")
    return message


def _text(content: Any, place: str, field: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not (isinstance(content, list) and all(isinstance(part, dict) for part in content)):
        raise _wrong(place, field, "text or a list of parts", content)
    if not all(isinstance(part.get("text"), str) for part in content):
        raise Unlearnable("a message holds something other than text")
    return "".join(part["text"] for part in content)


def _read_tool_calls(calls: Any, place: str, field: str) -> list[dict[str, Any]]:
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise _wrong(place, field, "a list of JSON objects", calls)
    read = []
    for index, call in enumerate(calls):
        function = call.get("function", call)
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise _wrong(place, f"{field}[{index}].function", "an object with a name", function)
        arguments = _decoded(function.get("arguments"), place, f"{field}[{index}].function.arguments")
        function = {**function, "arguments": arguments}
        read.append({**call, "function": function} if "function" in call else function)
    return read


def _decoded(value: Any, place: str, field: str) -> Any:
    """Decode a value that may be an object or its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise PeagleError(f"{place}: {field} is not valid JSON ({error}). Correct it or take the row out.") from error


def _wrong(place: str, field: str, wanted: str, found: Any) -> PeagleError:
    return PeagleError(
        f"{place}: {field} must be {wanted}, but is {type(found).__name__} {str(found)[:60]!r}. "
        "Correct it or take the row out."
    )


def _open_file(path: Path, folder: Path) -> Source:
    from datasets import Dataset, Features, Value
    from datasets.arrow_writer import ArrowWriter

    with open(path, "rb") as file:
        is_array = file.read(_CHUNK_CHARACTERS).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    unit, items = ("item", _array_items(path)) if is_array else ("line", _line_items(path))

    # Rows travel as text: Arrow would want the same fields and types in every row, which tool calls do not have.
    copy = folder / f"{len(list(folder.iterdir()))}.arrow"
    features = Features({"number": Value("int64"), "json": Value("large_string")})
    with ArrowWriter(path=str(copy), features=features) as writer:
        for number, item in items:
            if not isinstance(item, dict):
                raise _wrong(f"{path}, {unit} {number}", "the row", "a JSON object", item)
            writer.write({"number": number, "json": json.dumps(item)})
        writer.finalize()
    return Source(str(path), unit, Dataset.from_file(str(copy)))


def _line_items(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    if line.strip() == b"{":
                        raise PeagleError(
                            f"{path} holds a JSON object over several lines. Write an array of objects, or an object a "
                            "line."
                        ) from error
                    raise _malformed(f"{path}, line {number}", error) from error


def _array_items(path: Path) -> Iterator[tuple[int, Any]]:
    """Decode the items of a JSON array one after the other, so that the array is never held whole."""
    decoder = json.JSONDecoder()
    number = 1
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_CHUNK_CHARACTERS)
            start = text.index("[") + 1
            while True:
                start += len(_BETWEEN_ITEMS.match(text, start)[0])  # type: ignore[index]
                if text.startswith("]", start):
                    return
                try:
                    item, start = decoder.raw_decode(text, start)
                except json.JSONDecodeError:
                    more = file.read(max(_CHUNK_CHARACTERS, len(text)))
                    if not more:
                        raise
                    text, start = text[start:] + more, 0
                    continue
                yield number, item
                number += 1
    except ValueError as error:
        raise _malformed(f"{path}, item {number}", error) from error


def _malformed(place: str, error: ValueError) -> PeagleError:
    return PeagleError(f"{place}: this is not valid JSON ({error}). Correct it or take it out, and run again.")


def _open_hub_dataset(name: str) -> Source:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path, *rest = name.split(":")
    if len(rest) > 2:
        raise PeagleError(f"{name}: write org/name, org/name:split or org/name:configuration:split.")
    split = rest.pop() if rest else "train"
    try:
        rows = load_dataset(path, *rest, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise PeagleError(
            f"The dataset {path} (split {split}) can't be loaded: {error} Check its name and split and the network, "
            "or name a local .jsonl file."
        ) from error
    return Source(name, "row", rows)
