"""Whether a chat template shows all that a chat holds: what it hides must not be trained on."""

import json
import re
from collections.abc import Iterator
from typing import Any

from .chats import Chat, Unlearnable
from .rendering import PROBE, ChatRenderer, Refused, as_parts, joined

_THINK_TAG = re.compile(r"</?think>")


def check_shown(renderer: ChatRenderer, chat: Chat, index: int, answer: str) -> int:
    """Check that the template shows an answer whole; give where the last part of it ends in the answer's text.

    Raises:
        Unlearnable: a part of it is missing.
    """
    message = chat.messages[index]
    calls = message.get("tool_calls") or []
    place = 0
    for reason, piece in pieces_of(message):
        found = _find(piece, answer, place)
        if found is None:
            raise Refused(reason)
        place = max(place, found)
    if not calls:
        return place
    whole = renderer.render(chat, index + 1)[0]
    for number in range(len(calls)):
        fewer = [call for other, call in enumerate(calls) if other != number]
        silent = {**message, "tool_calls": fewer} if fewer else _without(message, "tool_calls")
        if renderer.render_instead(chat, index, silent) == whole:
            which = "tool calls" if len(calls) == 1 else "all tool calls"
            raise Refused(f"the chat template does not show {which}")
    for call in calls:
        for value in _strings(call.get("function", call).get("arguments")):
            found = _find(value, answer, 0)
            if found is None:
                raise Refused("the chat template does not show all arguments of a tool call")
            place = max(place, found)
    if message.get("content") is None and "None" in answer:
        with_text = renderer.render_instead(chat, index, {**message, "content": ""})
        if with_text is not None and whole.count("None") > with_text.count("None"):
            raise Refused("the chat template writes None for the missing content of a tool call")
    return place


def hidden_message(renderer: ChatRenderer, chat: Chat, first: int, last: int, prompt: str) -> str | None:
    """Say which of some messages the template doesn't show, if there is one."""
    for index in range(first, last):
        message = chat.messages[index]
        content = joined(message.get("content"))
        if message["role"] == "assistant" or not content.strip() or content.strip() in prompt:
            continue
        other = {**message, "content": PROBE if isinstance(message["content"], str) else as_parts(PROBE)}
        messages = [*chat.messages[:index], other, *chat.messages[index + 1 : last]]
        try:
            is_hidden = renderer.render(Chat(messages, chat.tools), last, add_generation_prompt=True)[0] == prompt
        except Unlearnable:
            continue
        if is_hidden:
            return f"the chat template does not show a message of the role {message['role']} before it"
    return None


def pieces_of(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The parts of an answer's text that the template must show, each after the reason if it doesn't."""
    if reasoning := (message.get("reasoning_content") or "").strip():
        yield "the chat template does not show reasoning", reasoning
    content = joined(message.get("content"))
    pieces = [piece.strip() for piece in _THINK_TAG.split(content)]
    reason = "the chat template does not show all of the answer's text"
    if len(pieces) > 1:
        reason = "the chat template takes the reasoning out of the answer's text"
    elif message.get("tool_calls"):
        reason = "the chat template does not show the text beside a tool call"
    for piece in pieces:
        if piece:
            yield reason, piece


def _find(piece: str, text: str, start: int) -> int | None:
    """Where a piece of text ends, as it is or as JSON writes it; from `start` on if it is there."""
    for written in (piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1]):
        for begin in (start, 0):
            if (at := text.find(written, begin)) >= 0:
                return at + len(written)
    return None


def _strings(value: Any) -> Iterator[str]:
    """All texts in a tool call's arguments, which may be JSON text themselves."""
    if isinstance(value, str):
        try:
            decoded = json.loads(value)
        except ValueError:
            decoded = value
        if isinstance(decoded, dict | list):
            yield from _strings(decoded)
        elif value.strip():
            yield value.strip()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _without(message: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in message.items() if other != name}
