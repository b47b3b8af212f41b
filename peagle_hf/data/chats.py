"""Reading conversations: rows of the data, in any of the usual shapes, become a `Chat`."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import PeagleError

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
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Names of roles in the data, and the role that the chat template gets for each."""

PREFERENCES = ("chosen", "rejected")

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
_QUESTION_FIELDS = ("prompt", "instruction", "question", "query", "input")
_ANSWER_FIELDS = ("completion", "response", "output", "answer")
_GIVEN_FIELDS = {"instruction": ("input", "context"), "question": ("context",)}
"""What belongs to a question beside it, such as the text that it is about."""
_PAIR_FIELDS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))
_MEDIA_FIELDS = ("images", "image", "audios", "audio", "videos", "video")
_TRAIN_FIELDS = ("weight", "train", "loss")
_CHANNELS = ("analysis", "commentary")
"""Those of gpt-oss that hold no answer; its chat template doesn't read a message's channel."""
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


class Unlearnable(Exception):
    """A well-formed conversation that nothing can be trained on.

    Args:
        reason: why, in a few words.
        field: the part of the row that the reason is about; None for the whole row.
    """

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.field = field


def check_text(text: str) -> None:
    """Raise `Unlearnable` for text with half a surrogate pair, which no tokenizer encodes."""
    if _SURROGATE.search(text):
        raise Unlearnable("it holds half a surrogate pair, which is no text")


@dataclass(frozen=True)
class Chat:
    """A conversation as `apply_chat_template` takes it.

    Args:
        messages: dicts of role, content and all other fields that the chat template may show.
        tools: JSON schemas of the tools on offer, or None.
        excluded: the assistant messages that must not be trained on, by index, and why.
        fields: the field of its row in which each message was found, such as `messages[2]`.
        template_kwargs: variables for the chat template that the row itself sets.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    excluded: dict[int, str] = field(default_factory=dict)
    fields: tuple[str, ...] = field(default=(), compare=False)
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def field_of(self, index: int) -> str:
        """The field of its row in which a message was found, such as `messages[2]`."""
        return self.fields[index] if index < len(self.fields) else f"messages[{index}]"


def read_chat(row: dict[str, Any], place: str, preference: str | None = None) -> Chat:
    """Read a row of the data that has one of these shapes.

    - `messages`, `conversations` or `conversation`: messages with role/content or from/value, or pairs of question and
      answer;
    - `prompt`, `instruction` (with `input` or `context`), `question` (with `context`), `query` or `input`, and
      `completion`, `response`, `output` or `answer`, or `answers` with tool calls as JSON text;
    - a preference row with `chosen` and `rejected`, with or without a `prompt`; `preference` says which to take.

    The row's `chat_template_kwargs` are variables for the chat template, as TRL has them. Every field of a message that
    isn't null is kept for the template. Reasoning is stored under each name that templates know, and a tool call's
    arguments as an object also if the row has them as JSON text. Tools are the row's `tools`, or `functions` as they
    were called before; one without `{"type": "function"}` around it gets that. The row's `system` becomes the first
    message. Answers with `weight` 0, `train` false or `loss` false are not trained on, nor are those that were cut off
    within `<think>`.

    Args:
        place: where the row was found, for error messages.
        preference: "chosen" or "rejected", the answer to take of preference rows; None refuses such rows.

    Raises:
        PeagleError: the row has another shape, a field has the wrong type or a role is unknown.
        Unlearnable: a message holds something other than text, reasoning that differs from its other reasoning, or a
            function call that is not JSON.
    """
    if media := next((name for name in _MEDIA_FIELDS if row.get(name)), None):
        raise Unlearnable(f"the row has {media}, and only text can be trained on", media)
    raw, fields = _raw_messages(row, place, preference)
    messages: list[dict[str, Any]] = []
    excluded: dict[int, str] = {}
    for index, (message, name) in enumerate(zip(raw, fields, strict=True)):
        read = _read_message(message, place, name)
        if reason := _exclusion(read):
            excluded[index] = reason
        messages.append({name: value for name, value in read.items() if name not in _TRAIN_FIELDS})
    if reason := _exclusion(row):
        excluded = {index: reason for index, message in enumerate(messages) if message["role"] == "assistant"}
    kwargs = _decoded(row.get("chat_template_kwargs") or {}, place, "chat_template_kwargs")
    if not isinstance(kwargs, dict):
        raise wrong_value(place, "chat_template_kwargs", "a JSON object", kwargs)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}  # Arrow adds nulls
    return Chat(messages, _read_tools(row, place), excluded, tuple(fields), kwargs)


def count_answers(row: dict[str, Any]) -> int:
    """Number of assistant turns in a row that can't be read; at least 1."""
    messages: list[Any] = next((row[name] for name in _CONVERSATION_FIELDS if isinstance(row.get(name), list)), [])
    roles = [message.get("from", message.get("role")) for message in messages if isinstance(message, dict)]
    return max(1, sum(isinstance(role, str) and ROLES.get(role) == "assistant" for role in roles))


def _raw_messages(row: dict[str, Any], place: str, preference: str | None) -> tuple[list[Any], list[str]]:
    """The messages of a row as they are, and the field in which each was found."""
    present = [name for name in row if row[name] is not None]
    # A `conversation` that is no list is the name of the conversation that the row belongs to.
    named = [name for name in present if name != "conversation" or isinstance(row[name], list)]
    name = next((name for name in _CONVERSATION_FIELDS if name in named), None)
    question = next((name for name in _QUESTION_FIELDS if name in present), None)
    answer = next((name for name in _ANSWER_FIELDS if name in present), None)
    if name is not None:
        messages, fields = _list_of_messages(row[name], place, name)
    elif set(PREFERENCES) <= set(present) or "chosen" in present:
        if preference is None:
            raise PeagleError(
                f"{place}: this is a preference row, with an answer that is `chosen` and one that is `rejected`. Say "
                "with --preference chosen that the chosen ones are to be trained on."
            )
        messages, fields = _with_question(row, place, question, preference)
    elif question is not None:
        messages, fields = _with_question(row, place, question, answer)
        calls = row.get("answers")
        if answer is None and isinstance(calls, str) and calls.lstrip().startswith("["):
            messages, fields = [*messages, {"from": "function_call", "value": calls}], [*fields, "answers"]
    else:
        raise PeagleError(
            f"{place}: there is neither {' nor '.join(f'`{name}`' for name in _CONVERSATION_FIELDS)} nor `prompt` with "
            f"`completion` nor `instruction` with `output` nor `question` with `answer` nor `input_ids` with "
            f"`loss_mask`; the fields are {', '.join(row) or 'none'}. Rename the field that holds the conversation to "
            "`messages`, a list of objects with `role` and `content`."
        )
    system = row.get("system") or row.get("system_prompt")
    if system is not None and not isinstance(system, str):
        raise wrong_value(place, "system", "text", system)
    if system and system.strip():
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if first.get("role", first.get("from")) != "system":
            messages, fields = [{"role": "system", "content": system}, *messages], ["system", *fields]
        elif first.get("content", first.get("value")) != system:
            raise Unlearnable("the row has two system prompts, a field of its own and a message", "system")
    return messages, fields


def _list_of_messages(value: Any, place: str, name: str) -> tuple[list[Any], list[str]]:
    """The messages of a list, with pairs of question and answer split, and the field of each."""
    value = _decoded(value, place, name) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not isinstance(value, list):
        raise wrong_value(place, name, "a list of messages", value)
    messages: list[Any] = []
    fields = []
    for index, message in enumerate(value):
        pair = next((pair for pair in _PAIR_FIELDS if isinstance(message, dict) and message.keys() >= {*pair}), None)
        if pair is None or message.keys() & {"role", "from"}:
            messages.append(message)
            fields.append(f"{name}[{index}]")
            continue
        for role, key in (("system", "system"), ("user", pair[0]), ("assistant", pair[1])):
            if message.get(key) is not None and (role != "system" or message[key]):
                messages.append({"role": role, "content": message[key]})
                fields.append(f"{name}[{index}].{key}")
    return messages, fields


def _with_question(row: dict[str, Any], place: str, question: str | None, answer: str | None) -> tuple[list, list[str]]:
    """Messages of a row that has question and answer in fields of their own, either as text or as messages."""
    if answer is not None and isinstance(row[answer], list):
        whole = _list_of_messages(row[answer], place, answer)
        first = whole[0][0] if whole[0] and isinstance(whole[0][0], dict) else {}
        if ROLES.get(str(first.get("role", first.get("from")))) in ("system", "developer", "user"):
            return whole  # the answer's list has the question too
    messages: list[Any] = []
    fields: list[str] = []
    for index, pair in enumerate(row.get("history") or []):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise wrong_value(place, f"history[{index}]", "a pair of texts, a question and its answer", pair)
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
        fields += [f"history[{index}]"] * 2
    for role, name in (("user", question), ("assistant", answer)):
        if name is None:
            continue
        value = row[name]
        if isinstance(value, str) and role == "user":
            given = [row[more] for more in _GIVEN_FIELDS.get(name, ()) if row.get(more)]
            texts = [text for one in given for text in (one if isinstance(one, list) else [one])]
            value = "\n".join(filter(None, [value, *(text for text in texts if isinstance(text, str))]))
        if isinstance(value, str):
            messages.append({"role": role, "content": value})
            fields.append(name)
        elif isinstance(value, list):
            more = _list_of_messages(value, place, name)
            messages += more[0]
            fields += more[1]
        elif isinstance(value, dict):
            messages.append(value)
            fields.append(name)
        else:
            raise wrong_value(place, name, "text or a list of messages", value)
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "assistant" and question is None:
        raise PeagleError(
            f"{place}: {answer} holds an answer without the question; the fields are {', '.join(row)}. Put the "
            "question into `prompt`, or the whole conversation into the field."
        )
    return messages, fields


def _exclusion(fields: dict[str, Any]) -> str | None:
    """The reason why a message or a row must not be trained on, if one of its fields says so."""
    for name in (*_TRAIN_FIELDS, "label"):
        value = fields.get(name)
        if isinstance(value, str):  # as in CSV
            value = {"false": False, "0": 0, "0.0": 0.0}.get(value.strip().lower())
        is_no = value is False or (name != "label" and isinstance(value, int | float) and value == 0)
        if is_no:
            return f"the data says not to train on it ({name}: {json.dumps(value)})"
    content = (fields.get("content") or "") if fields.get("role") == "assistant" else None
    if content == "" and fields.get("refusal"):
        return "the answer is a `refusal` in a field of its own, which chat templates don't show"
    if isinstance(content, str) and content.lstrip().startswith("<think>") and "</think>" not in content:
        return "the answer was cut off within its reasoning: <think> is never closed"
    return None


def _read_message(message: Any, place: str, field: str) -> dict[str, Any]:
    """A message with its role, content, reasoning and tool calls in the form that chat templates take."""
    if not isinstance(message, dict):
        raise wrong_value(place, field, "an object with a role and a content", message)
    if not message.keys() & {"content", "value", "tool_calls", "function_call", "refusal"}:
        raise PeagleError(f"{place}: {field} has no content. Add one or take the row out.")
    message = {name: value for name, value in message.items() if value is not None}
    role = message.pop("from", message.get("role"))
    if not isinstance(role, str) or role not in ROLES:
        raise PeagleError(
            f"{place}: {field} has the role {role!r}, which is unknown. Known roles are {', '.join(ROLES)}: rename it "
            "or take the row out."
        )
    if message.get("channel") in _CHANNELS:
        advice = "reasoning belongs to `reasoning` of the answer, calls to `tool_calls`"
        raise Unlearnable(f"a message is in the channel {message['channel']}; {advice}", f"{field}.channel")
    message["role"] = ROLES[role]
    content = message.pop("value", message.get("content"))
    calls = message.pop("tool_calls", None)
    if role == "function_call":
        calls, content = _decoded_call(content, f"{field}.value"), None
    elif (old := message.pop("function_call", None)) and not calls:
        calls = [old]
    message["content"] = _text(content, message, place, f"{field}.content")
    for name in _REASONING_FIELDS:
        if not isinstance(message.get(name, ""), str):
            raise wrong_value(place, f"{field}.{name}", "text", message[name])
    _unite_reasoning(message, field)
    if calls:
        message["tool_calls"] = _read_tool_calls(calls, place, f"{field}.tool_calls")
        if content is None:
            message["content"] = None
    return message


def _unite_reasoning(message: dict[str, Any], field: str) -> None:
    """Store reasoning under each name that templates know, or under none if the content begins with it."""
    thoughts = {name: message.pop(name) for name in _REASONING_FIELDS if name in message}
    stripped = {thought.strip(): name for name, thought in thoughts.items() if thought.strip()}
    is_in_content = message["content"].lstrip().startswith("<think>")
    if stripped and is_in_content:
        thought = message["content"].partition("</think>")[0].strip().removeprefix("<think>").strip()
        stripped.setdefault(thought, "content")
    if len(stripped) > 1:
        raise Unlearnable(f"a message has different reasoning in {' and '.join(sorted(stripped.values()))}", field)
    if stripped and not is_in_content:
        message |= dict.fromkeys(_REASONING_FIELDS, next(filter(str.strip, thoughts.values())))


def _text(content: Any, message: dict[str, Any], place: str, field: str) -> str:
    """A content as text. Of a list of parts, thinking parts are moved into the message's reasoning."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not (isinstance(content, list) and all(isinstance(part, dict) for part in content)):
        raise wrong_value(place, field, "text or a list of parts", content)
    texts, thoughts = [], []
    for index, part in enumerate(content):
        kind = part.get("type") or "text"
        text = next((part[name] for name in ("text", "value") if isinstance(part.get(name), str)), None)
        if kind == "thinking" and isinstance(part.get("thinking"), str) and message["role"] == "assistant":
            thoughts.append(part["thinking"])
        elif text is None or kind not in ("text", "input_text", "output_text"):
            raise Unlearnable(f"a message holds something other than text ({kind})", f"{field}[{index}]")
        else:
            texts.append(text)
    if thoughts:
        name = next((name for name in _REASONING_FIELDS if not message.get(name)), _REASONING_FIELDS[0])
        message[name] = "".join(thoughts)
    return "".join(texts)


def _decoded_call(value: Any, field: str) -> list[Any]:
    """The function calls of a ShareGPT message, which holds them as JSON text."""
    try:
        decoded = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise Unlearnable("a function call is not valid JSON", field) from error
    calls = decoded if isinstance(decoded, list) else [decoded]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Unlearnable("a function call is no JSON object with a name", field)
    return calls


def _read_tools(row: dict[str, Any], place: str) -> list[dict[str, Any]] | None:
    """The tools on offer, each in the form that servers take; None if there are none."""
    name = "tools" if row.get("tools") else "functions"
    tools = _decoded(row.get(name) or None, place, name)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise wrong_value(place, name, "a list of JSON objects", tools)
    read = []
    for tool in tools or ():
        if "function" not in tool and tool.get("type", "function") == "function":
            tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
        read.append(tool)
    return read or None


def _read_tool_calls(calls: Any, place: str, field: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, also if the row has them as JSON text."""
    if isinstance(calls, str) and calls.lstrip().startswith("["):
        calls = _decoded(calls, place, field)
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise wrong_value(place, field, "a list of JSON objects", calls)
    read = []
    for index, call in enumerate(calls):
        function = call.get("function", call)
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise wrong_value(place, f"{field}[{index}].function", "an object with a name", function)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except json.JSONDecodeError as error:
                where = f"{field}[{index}].function.arguments"
                raise Unlearnable("the arguments of a tool call are not valid JSON", where) from error
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            where = f"{field}[{index}].function.arguments"
            raise Unlearnable("the arguments of a tool call are no JSON object", where)
        others = {name: value for name, value in call.items() if name not in ("name", "arguments")}
        read.append({"type": "function", **others, "function": {**function, "arguments": arguments}})
    return read


def _decoded(value: Any, place: str, field: str) -> Any:
    """Decode a value that may be an object or its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise PeagleError(f"{place}: {field} is not valid JSON ({error}). Correct it or take the row out.") from error


def wrong_value(place: str, field: str, wanted: str, found: Any) -> PeagleError:
    """The error for a field of a row that holds a value of the wrong kind."""
    is_ = "null" if found is None else f"{type(found).__name__} {str(found)[:60]!r}"
    return PeagleError(f"{place}: {field} must be {wanted}, but is {is_}. Correct it or take the row out.")
