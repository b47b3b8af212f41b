"""Rendering chats with a chat template, probing what the template writes, and checking that it shows a chat whole.

What the template hides must not be trained on: the verifier would not see it, or not write it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import PeagleError
from .chats import Chat, Unlearnable
from .tokenizer import no_default_template

# A letter of Unicode's private use area, with which no answer and no chat template begins or ends.
PROBE = "\ue000"
_THINK_TAG = re.compile(r"</?think>")
_EMPTY_THOUGHT = re.compile(r"([<\[])(\S+?)([>\]])\s*\1/\2\3")
"""A tag that is closed at once, as templates put it before an answer without reasoning."""
TEMPLATE_ERROR = "the chat template refuses it"
THOUGHT_TAKEN_OUT = "the chat template takes the reasoning out of the answer's text"
_ROLES = ("system", "user", "assistant", "tool")
_GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")

Span = tuple[int, int]
"""Beginning and end of a piece of text, in characters."""


class Refused(Unlearnable):
    """An answer that the chat template refuses or doesn't show whole. In another form of the messages it may."""


@dataclass(frozen=True)
class TemplateKind:
    """Properties of a chat template, found by rendering the simplest chats.

    Args:
        is_marking: whether it has {% generation %} marks.
        roles_of_parts: the roles whose content it wants as a list of parts.
        has_thinking_parts: whether it shows reasoning that is a part of the content.
        generation_prompt: the text that `add_generation_prompt` adds after a question; may be empty.
        answer_header: the text that the verifier itself writes before a plain answer, if a special token is in it.
        prompt_tail: all text after a question with `add_generation_prompt`: its closing and the generation prompt.
        closing: the text after a plain answer; None if the template refuses the probe.
        end_of_turn: how many characters of the closing the verifier generates.
        stop_tokens: the tokens that end a plain turn, the likeliest first.
        next_token: the first special token after an answer in the middle of a chat, with the space before it; or empty.
        special_token: finds any special token.
    """

    is_marking: bool
    roles_of_parts: frozenset[str]
    has_thinking_parts: bool
    generation_prompt: str
    answer_header: str
    prompt_tail: str
    closing: str | None
    end_of_turn: int
    stop_tokens: list[str]
    next_token: str
    special_token: re.Pattern[str]


PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Probe.",
        "parameters": {
            "type": "object",
            "properties": {"value": {"type": "string", "description": "A value."}},
            "required": ["value"],
        },
    },
}


class ChatRenderer:
    """Renders chats with a tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        template_kwargs: variables for the chat template, such as `enable_thinking`.
        template: another template than the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: dict[str, Any] | None = None,
        template: str | None = None,
    ) -> None:
        added = tokenizer.added_tokens_decoder
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self._tokenizer, self._given = tokenizer, template
        self._kwargs: dict[str, Any] = {**tokenizer.special_tokens_map, **(template_kwargs or {})}
        self._special_token = re.compile(_any_of(special))
        self._kinds: dict[bool, TemplateKind] = {}

    def render_other(self, chat: Chat, index: int, content: str) -> str:
        """Render a chat with another text in the place of an answer."""
        is_text = not isinstance(chat.messages[index].get("content"), list)
        answer = {"role": "assistant", "content": content if is_text else as_parts(content)}
        return self.render(Chat([*chat.messages[:index], answer], chat.tools), index + 1)[0]

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[Any] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """Render messages up to the next answer, their contents as parts for the roles that need that.

        Raises:
            Unlearnable: the template refuses the messages.
        """
        roles = self.kind(bool(tools)).roles_of_parts
        chat = Chat([with_parts(message, roles) for message in messages], tools)
        return self.render(chat, len(messages), add_generation_prompt)[0]

    def content_of(self, written: str, has_tools: bool) -> str | None:
        """The text for later turns of what the verifier wrote, special tokens included but the last.

        That is what follows the header that it writes before its text (as gpt-oss does, whose reasoning comes before);
        empty if it wrote no text behind one. None if the template has no such header.
        """
        header = self.kind(has_tools).answer_header
        if not header:
            return None
        _, found, text = written.rpartition(header)
        return self._special_token.sub("", text).strip() if found or not self._special_token.search(written) else ""

    def render(self, chat: Chat, count: int, add_generation_prompt: bool = False) -> tuple[str, list[Span] | None]:
        """Render the first `count` messages of a chat; returns the text, and the spans that the template marks or None.

        Like `apply_chat_template`, but before tokenization, whose mask loses marks that begin with a trimmed space.

        Raises:
            Unlearnable: the template refuses the messages.
        """
        template = self._template(bool(chat.tools))
        is_marking = not add_generation_prompt and _GENERATION_MARK.search(template) is not None
        try:
            rendered: Any = render_jinja_template(
                [chat.messages[:count]],
                tools=chat.tools,
                chat_template=template,
                return_assistant_tokens_mask=is_marking,
                add_generation_prompt=add_generation_prompt,
                **self._kwargs,
            )
        except jinja2.TemplateSyntaxError as error:
            raise PeagleError(
                f"The chat template of {self._tokenizer.name_or_path} is no valid Jinja: {error.message} (line "
                f"{error.lineno}). Name another one with --chat-template."
            ) from error
        # A template may do anything to a value, so it can raise any error.
        except Exception as error:
            raise Refused(f"{TEMPLATE_ERROR} ({error})") from error
        (text,), marks = rendered
        return text, marks[0] if is_marking else None

    def _template(self, has_tools: bool) -> str:
        if self._given is not None:
            return self._given
        try:
            return self._tokenizer.get_chat_template(tools=[{}] if has_tools else None)
        except ValueError as error:
            raise no_default_template(self._tokenizer) from error

    def kind(self, has_tools: bool) -> TemplateKind:
        """The template's properties, probed once with tools and once without."""
        if has_tools not in self._kinds:
            self._kinds[has_tools] = self._probe(has_tools)
        return self._kinds[has_tools]

    def _probe(self, has_tools: bool) -> TemplateKind:
        """Render a question, an answer and both with markers as their text, and see what stands around the markers."""
        tools = [PROBE_TOOL] if has_tools else None

        def text_of(*messages: dict[str, Any], prompted: bool = False) -> str | None:
            try:
                return self.render(Chat(list(messages), tools), len(messages), prompted)[0]
            except Unlearnable:
                return None

        roles_of_parts: set[str] = set()
        for role in _ROLES:
            before = [] if role in ("system", "user") else [_message("user", PROBE, roles_of_parts)]
            number = len(before)
            as_text = text_of(*before, {"role": role, "content": PROBE})
            if as_text is None or as_text.count(PROBE) <= number:
                in_parts = text_of(*before, {"role": role, "content": as_parts(PROBE)})
                if in_parts is not None and in_parts.count(PROBE) > number and "'text'" not in in_parts:
                    roles_of_parts.add(role)
        question, answer = (_message(role, PROBE, roles_of_parts) for role in ("user", "assistant"))
        thinking = text_of(question, {"role": "assistant", "content": with_thought(PROBE, PROBE)}) or ""
        asked, prompt = text_of(question), text_of(question, prompted=True)
        generation_prompt = prompt[len(asked) :] if asked and prompt and prompt.startswith(asked) else ""
        plain, more = text_of(question, answer), text_of(question, answer, question)
        header = plain[len(prompt) :].partition(PROBE)[0] if plain and prompt and plain.startswith(prompt) else ""
        header = _EMPTY_THOUGHT.sub("", header)
        prompt_tail = prompt.rpartition(PROBE)[2] if prompt and PROBE in prompt else ""
        closing = None if plain is None or plain.count(PROBE) < 2 else plain.rpartition(PROBE)[2]
        following = more.rpartition(PROBE)[0].rpartition(PROBE)[2] if more and more.count(PROBE) > 2 else ""
        end_of_turn = self._end_of_turn(closing or "", following)
        ends = [found.group() for found in self._special_token.finditer((closing or "")[:end_of_turn])]
        eos = self._tokenizer.eos_token
        next_token = re.match(rf"\s*({self._special_token.pattern})", following)
        return TemplateKind(
            is_marking=_GENERATION_MARK.search(self._template(has_tools)) is not None,
            roles_of_parts=frozenset(roles_of_parts),
            has_thinking_parts=thinking.count(PROBE) > 2 and not re.search("['\"]thinking['\"]", thinking),
            generation_prompt=generation_prompt,
            answer_header=header.strip() if self._special_token.search(header) else "",
            prompt_tail=prompt_tail,
            closing=closing,
            end_of_turn=end_of_turn,
            stop_tokens=[*ends[-1:], *([eos] if eos else [])],
            next_token=next_token.group() if next_token else "",
            special_token=self._special_token,
        )

    def _end_of_turn(self, closing: str, following: str) -> int:
        """Number of a closing's characters that the verifier generates: through its first special token, 0 without one.

        The end-of-sequence token may follow another special token that only closes the content; it counts if the
        template writes both in the middle of a chat too.
        """
        found = self._special_token.search(closing)
        if found is None:
            return 0
        end, eos = found.end(), self._tokenizer.eos_token
        while eos and found.group() != eos:
            found = self._special_token.match(closing, found.end())
            if found is None or not following.startswith(closing[: found.end()]):
                return end
        return found.end()

    def render_instead(self, chat: Chat, index: int, message: dict[str, Any]) -> str | None:
        """Render a chat with another message in the place of an answer; None if the template refuses it."""
        try:
            return self.render(Chat([*chat.messages[:index], message], chat.tools), index + 1)[0]
        except Unlearnable:
            return None


def _any_of(texts: set[str]) -> str:
    """A regular expression for any of these texts, the longest first."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _message(role: str, content: str, roles_of_parts: set[str] | frozenset[str]) -> dict[str, Any]:
    return {"role": role, "content": as_parts(content) if role in roles_of_parts else content}


def with_parts(message: dict[str, Any], roles_of_parts: frozenset[str]) -> dict[str, Any]:
    """The message with its content as parts, if its role needs that."""
    if message["role"] in roles_of_parts and isinstance(message.get("content"), str):
        return {**message, "content": as_parts(message["content"])}
    return message


def as_parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def with_thought(thought: str, content: str) -> list[dict[str, str]]:
    """Parts of reasoning and of text, as Mistral's templates take them."""
    return [{"type": "thinking", "thinking": thought}, *(as_parts(content) if content else [])]


def joined(content: Any) -> str:
    """The text of a content, without its thinking parts."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def check_shown(renderer: ChatRenderer, chat: Chat, index: int, answer: str) -> int:
    """Check that the template shows an answer whole.

    Args:
        index: of the answer in `chat.messages`.
        answer: the answer's part of the rendered text.

    Returns:
        Where the last part of the message ends in `answer`, in characters.

    Raises:
        Unlearnable: a part of the message is missing.
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
    """Say that the template doesn't show one of the messages from `first` to before `last`, or None.

    Args:
        prompt: the rendered text of the chat before message `last`.
    """
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
    """The parts of an answer that the template must show, each as (reason if it doesn't, text)."""
    if reasoning := (message.get("reasoning_content") or "").strip():
        yield "the chat template does not show reasoning", reasoning
    content = joined(message.get("content"))
    pieces = [piece.strip() for piece in _THINK_TAG.split(content)]
    reason = "the chat template does not show all of the answer's text"
    if len(pieces) > 1:
        reason = THOUGHT_TAKEN_OUT
    elif message.get("tool_calls"):
        reason = "the chat template does not show the text beside a tool call"
    for piece in pieces:
        if piece:
            yield reason, piece


def _find(piece: str, text: str, start: int) -> int | None:
    """End of a piece of text, verbatim or as JSON writes it, at or after `start` if possible; None if it is missing."""
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
