"""The markers that a chat template writes around the reasoning and the tool calls of an answer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat_template import PROBE, PROBE_TOOL, ChatRenderer, as_parts, with_thought
from .chats import Chat, Unlearnable

REASONING, TOOL_CALL, TEXT = "reasoning", "tool_call", "text"
"""The segments of an answer."""

_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_REASON, _NAME, _VALUE = "\ue001", "\ue002", "\ue003"
"""Letters of Unicode's private use area: the text of the reasoning, the tool's name, the value of its argument."""

_ID = "call00001"
"""The id of the tool call; Mistral's templates want nine letters or digits."""

_TAG = r"<[^<>\s{}\"'=]+>|\[/?[A-Z][A-Z_]*\]"
_PLAIN_TAG = re.compile(r"<[\w:-]+>|\[[A-Z_]+\]")
_CODE_START = re.compile(r"[\[{(\"'].*|<\S*\Z", re.S)
"""Where the syntax of a call begins (JSON, Python), or a tag that is named after the tool."""
_CODE_END = re.compile(r"\A[\s\]})\"',]+")


def drafted_segments(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The segments that are worth showing of an entry of an evaluation's report, by name in words.

    Empty if nothing was drafted outside the plain text, or if the counts by segment aren't known.
    """
    drafted = {name: figures for name, figures in (entry.get("by_segment") or {}).items() if figures["num_drafts"]}
    if drafted.keys() <= {TEXT}:
        return {}
    return {name.replace("_", " "): figures for name, figures in drafted.items()}


@dataclass(frozen=True)
class Marker:
    """What encloses a segment. White space in an answer doesn't matter where a marker is looked for.

    Args:
        opening: the text with which the segment begins.
        closing: the text with which it ends; None if it extends to the end of the answer.
    """

    opening: str
    closing: str | None


@dataclass(frozen=True)
class AnswerMarkers:
    """The markers of a chat template.

    Args:
        by_segment: `REASONING` and `TOOL_CALL`, as far as the template marks them.
        begins_in: the segment in which every answer begins: `REASONING` if the generation prompt opens it.
    """

    by_segment: dict[str, Marker]
    begins_in: str = TEXT


def find_answer_markers(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None
) -> AnswerMarkers:
    """Find the markers by rendering answers with reasoning and with a tool call, and comparing with a plain answer.

    A template that doesn't show reasoning, because it takes it out of earlier answers, may open it in the generation
    prompt, or name `<think>` in its source. Tool calls without a marker (bare JSON) are not found.

    Args:
        tokenizer: of the verifier; without a chat template there are no markers.
        template_kwargs: variables for the chat template, such as `enable_thinking`.

    Raises:
        PeagleError: the chat template is no valid Jinja, or none of several templates is the default.
    """
    if tokenizer.chat_template is None:
        return AnswerMarkers({})
    prober = _Prober(tokenizer, template_kwargs)
    reasoning = prober.reasoning()
    found = {REASONING: reasoning, TOOL_CALL: prober.tool_call(reasoning)}
    markers = {name: marker for name, marker in found.items() if marker is not None}
    return AnswerMarkers(markers, REASONING if prober.prompt_opens(markers.get(REASONING)) else TEXT)


class _Prober:
    """Renders a question with an answer, and looks at the text after the question.

    That text is handled as *atoms*: special tokens and tags are one each, the text between two of them is another.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None):
        self._renderer = ChatRenderer(tokenizer, template_kwargs)
        self._mark = re.compile(f"({self._renderer.kind(False).special_token.pattern}|{_TAG})")
        self._source = str(tokenizer.chat_template)

    def reasoning(self) -> Marker | None:
        for has_call in (False, True):
            plain = self._plain(has_call)
            for message in self._thoughts(has_call):
                before, is_shown, after = (self._answer(has_call, message) or "").partition(_REASON)
                if is_shown and (closing := self._closing_of_reasoning(after)):
                    opening = self._opening(before, plain, has_call) or self._opening_of_empty(before, plain, closing)
                    if opening is not None:
                        return Marker(opening, closing)
        return self._reasoning_not_shown(self._plain(has_tools=False))

    def tool_call(self, reasoning: Marker | None) -> Marker | None:
        kind = self._renderer.kind(True)
        plain = self._plain(has_tools=True)
        for message in self._calls():
            shown = self._answer(True, message) or ""
            places = [place for place in (shown.find(_NAME), shown.find(_VALUE)) if place >= 0]
            if not places:
                continue
            before = shown[: min(places)]
            opening = self._opening(before, plain, True)
            if reasoning and reasoning.closing and opening == reasoning.opening:  # empty, but always before a call
                opening = self._opening(before.partition(reasoning.closing)[2], plain, True)
            after = shown[max(shown.rfind(part) + len(part) for part in (_NAME, _VALUE, _ID) if part in shown) :]
            for end in filter(None, (*kind.stop_tokens, kind.closing)):
                after = after.partition(end)[0]
            return None if opening is None else Marker(opening, self._closing_of_call(opening, after))
        return None

    def prompt_opens(self, marker: Marker | None) -> bool:
        """Whether the generation prompt opens a segment without closing it."""
        tail = _squeezed(self._renderer.kind(False).prompt_tail)
        if marker is None or marker.closing is None:
            return False
        return tail.rfind(_squeezed(marker.opening)) > tail.rfind(_squeezed(marker.closing))

    def _thoughts(self, has_call: bool) -> Iterator[dict[str, Any]]:
        """A message with reasoning, in the forms about which templates disagree; some show it beside a call only."""
        if has_call:
            for name in (*_REASONING_FIELDS, "tool_plan"):
                yield from (message | {name: _REASON} for message in self._calls())
            return
        for name in _REASONING_FIELDS:
            yield {"content": self._content(PROBE, False), name: _REASON}
        yield {"content": with_thought(_REASON, PROBE)}

    def _calls(self) -> Iterator[dict[str, Any]]:
        """A message with a tool call, in the forms about which chat templates disagree."""
        for content in ("", None):
            for arguments in ({"value": _VALUE}, f'{{"value": "{_VALUE}"}}'):
                function = {"name": _NAME, "arguments": arguments}
                call = {"type": "function", "id": _ID, "function": function}
                yield {"content": content and self._content(content, True), "tool_calls": [call]}

    def _content(self, text: str, has_tools: bool) -> Any:
        return as_parts(text) if "assistant" in self._renderer.kind(has_tools).roles_of_parts else text

    def _answer(self, has_tools: bool, message: dict[str, Any]) -> str | None:
        """The text after the question of a chat with this answer; None if the template refuses it."""
        kind = self._renderer.kind(has_tools)
        question = {"role": "user", "content": as_parts(PROBE) if "user" in kind.roles_of_parts else PROBE}
        chat = Chat([question, {"role": "assistant", **message}], [PROBE_TOOL] if has_tools else None)
        try:
            text, _ = self._renderer.render(chat, 2)
        except Unlearnable:
            return None
        return text.partition(PROBE)[2]

    def _plain(self, has_tools: bool) -> str:
        """The text between the question and the content of an answer without reasoning or calls."""
        shown = self._answer(has_tools, {"content": self._content(PROBE, has_tools)})
        return (shown or "").rpartition(PROBE)[0]

    def _opening(self, before: str, plain: str, has_tools: bool) -> str | None:
        """The shortest text before a segment that the header of a plain answer doesn't have, in whole atoms.

        Args:
            before: the text between the question and the segment.
            plain: see `_plain`.
        """
        tail = self._renderer.kind(has_tools).prompt_tail
        given = tail if before.startswith(tail) else ""
        atoms, others = self._atoms(before[len(given) :]), self._atoms(plain.removeprefix(given))
        common = next(
            (place for place, (one, other) in enumerate(zip(atoms, others, strict=False)) if one != other),
            min(len(atoms), len(others)),
        )
        rest = atoms[common:]
        if rest and not self._is_mark(rest[-1]):
            rest[-1:] = filter(None, [_CODE_START.sub("", rest[-1]).strip()])
        if rest and given and common and not self._is_mark(rest[0]) and self._is_mark(atoms[common - 1]):
            rest.insert(0, atoms[common - 1])
        for count in range(1, len(rest) + 1):
            opening = "".join(rest[:count])
            if _squeezed(opening) not in _squeezed(plain) and re.search(r"\w\w", opening):
                return opening
        return None

    def _opening_of_empty(self, before: str, plain: str, closing: str) -> str | None:
        """The mark before a segment that the generation prompt opens, or that plain answers have too, but empty."""
        opening = (self._atoms(before) or [""])[-1]
        is_empty_there = _squeezed(opening + closing) in _squeezed(plain)
        return opening if self._is_mark(opening) and (is_empty_there or opening not in plain) else None

    def _closing_of_reasoning(self, after: str) -> str | None:
        """The first mark after reasoning, or all text before the content if that doesn't begin with a mark."""
        atoms = self._atoms(after.partition(PROBE)[0])
        return atoms[0] if atoms and self._is_mark(atoms[0]) else "".join(atoms) or None

    def _closing_of_call(self, opening: str, after: str) -> str | None:
        """The closing tag of the opening one, else the last mark, else the last text behind the call's own syntax."""
        atoms = self._atoms(after)
        if (tag := _closing_tag(opening)) in atoms:
            return tag
        marks = list(filter(self._is_mark, atoms))
        return marks[-1] if marks else _CODE_END.sub("", "".join(atoms)) or None

    def _reasoning_not_shown(self, plain: str) -> Marker | None:
        """The marker of a template that shows no reasoning of earlier answers."""
        given = self._atoms(self._renderer.kind(False).prompt_tail)
        if given and _PLAIN_TAG.fullmatch(given[-1]) and given[-1] not in plain:
            return Marker(given[-1], _closing_tag(given[-1]))
        return Marker("<think>", "</think>") if re.search("</?think>", self._source) else None

    def _atoms(self, text: str) -> list[str]:
        return [atom for piece in self._mark.split(text) if (atom := piece.strip())]

    def _is_mark(self, atom: str) -> bool:
        return self._mark.fullmatch(atom) is not None


def _closing_tag(opening: str) -> str:
    return f"{opening[:1]}/{opening[1:]}"


def _squeezed(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())
