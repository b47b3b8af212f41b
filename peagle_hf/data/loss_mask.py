"""The loss mask of a chat: which tokens the verifier would generate itself, by its chat template.

The rule: every assistant turn ends up in exactly one place. It is trained on whole, through the token that ends the
turn; or it is left out, with a reason. What the verifier would generate is the difference between two renderings of the
chat template: the chat up to the answer with the generation prompt, and the chat with the answer.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product, starmap
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import PeagleError
from .chat_template import (
    PROBE,
    TEMPLATE_ERROR,
    THOUGHT_TAKEN_OUT,
    ChatRenderer,
    Refused,
    Span,
    TemplateKind,
    check_shown,
    hidden_message,
    joined,
    pieces_of,
    with_parts,
    with_thought,
)
from .chats import Chat, Unlearnable, check_text

_OPEN_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
"""An unfinished tag at the end of a text: two tags that begin with the same characters have no token in common."""

_MOST_VARIANTS = 100
"""Largest number of `ChatTokenizer`s that are kept for chats with template variables of their own."""


@dataclass(frozen=True)
class LeftOut:
    """An assistant turn that is not trained on.

    Args:
        message: index of the turn in `Chat.messages`; None if the chat has no assistant turn at all.
        reason: why, in a few words.
        is_of_template: whether it is the chat template that can't show the turn, rather than the data.
    """

    message: int | None
    reason: str
    is_of_template: bool = False


@dataclass(frozen=True)
class MaskedSample:
    """A sample of a chat: its tokens up to the last answer that is trained on, and their loss mask.

    Args:
        input_ids: int32 [T].
        loss_mask: int8 [T], 1 for tokens that are trained on.
        ends: of each answer that is trained on in this sample the number of tokens up to its end.
        marked: indices of the messages that the template's {% generation %} marks cover only in part.
        messages: index of each answer in `Chat.messages`; empty for data that was tokenized already.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    ends: list[int]
    marked: list[int]
    messages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class MaskedChat:
    """The samples of a chat. Every assistant turn is in exactly one of `samples` or in `left_out`."""

    samples: list[MaskedSample]
    left_out: list[LeftOut]


@dataclass(frozen=True)
class _Form:
    """A form of tool calls and reasoning in messages: chat templates disagree about it, so several are tried.

    Args:
        thoughts_are_parts: whether reasoning is a part of the content instead of a field, as Mistral's templates want.
        arguments_are_text: whether a tool call's arguments are JSON text instead of an object.
        null: content of an assistant message that only calls tools.
    """

    thoughts_are_parts: bool
    arguments_are_text: bool
    null: str | None


@dataclass(frozen=True)
class _Answer:
    """An answer in a rendered text, in characters.

    Args:
        message: index in `Chat.messages`.
        start: where it begins.
        end: where it ends.
        is_open: its end-of-turn token isn't included, since the template writes it as the first token of the next turn.
        marks: the parts that the template marks with {% generation %}; None if it marks nothing anywhere.
    """

    message: int
    start: int
    end: int
    is_open: bool
    marks: tuple[Span, ...] | None

    @property
    def spans(self) -> tuple[Span, ...]:
        return ((self.start, self.end),) if self.marks is None else self.marks


@dataclass
class _Rendering:
    """The rendered text of a sample and the answers in it that are trained on."""

    text: str
    answers: list[_Answer]


@dataclass
class _Plan:
    """The samples of a chat before they are tokenized."""

    renderings: list[_Rendering] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def badness(self) -> tuple[int, int]:
        """How many answers are left out, and how many of them because the template raised an error."""
        return len(self.left_out), sum(entry.reason.startswith(TEMPLATE_ERROR) for entry in self.left_out)


class ChatTokenizer:
    """Turns chats into samples: token ids with a loss mask.

    Trained on are the tokens that the verifier generates: its text as the template writes it (reasoning and tool calls
    too) and the end-of-turn token, on which generation stops; neither the header before them, which the generation
    prompt gives, nor what the template writes after them. Where a template marks its `{% generation %}`, only what it
    marks of these tokens is trained on. A token counts only if it lies wholly in the answer: one that a tokenizer makes
    of the header's last character and the answer's first is nothing that the verifier generates.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        template_kwargs: variables for the chat template, such as `enable_thinking`; a chat may set others.

    Raises:
        PeagleError: the chat template is no valid Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None) -> None:
        added = tokenizer.added_tokens_decoder
        self._tokenizer, self._template_kwargs = tokenizer, template_kwargs or {}
        self._others: dict[str, ChatTokenizer] = {}
        self._renderer = ChatRenderer(tokenizer, template_kwargs)
        self._added_text = {id_: token.content for id_, token in added.items()}
        self._is_added = np.zeros(max([*added, *tokenizer.get_vocab().values(), 0]) + 1, dtype=bool)
        self._is_added[list(added)] = True

    def mask(self, chats: Sequence[Chat]) -> list[MaskedChat]:
        """Turn each chat into one sample or more.

        Answers share a sample as long as the template renders them later as it did when they were given. An answer
        that it renders differently later (Qwen3 removes earlier reasoning) ends its sample, and the conversation
        continues in a new sample in which only the later answers are trained on.

        Raises:
            PeagleError: the tokenizer has no chat template, or can't tell which characters a token stands for.
        """
        if chats and (self._tokenizer.chat_template is None or not self._tokenizer.is_fast):
            raise PeagleError(
                f"The tokenizer of {self._tokenizer.name_or_path} has no chat template or no tokenizer.json, and both "
                "are needed to turn conversations into tokens. Name a chat model with both, give a template with "
                "--chat-template, or give rows with `input_ids` and `loss_mask`."
            )
        plans = [self._with(chat.template_kwargs)._plan(chat) for chat in chats]
        texts = [rendering.text for plan in plans for rendering in plan.renderings]
        encoding: Any = (
            self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if texts
            else {"input_ids": [], "offset_mapping": []}
        )
        tokens = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        return [
            MaskedChat([self._mask(rendering, *next(tokens)) for rendering in plan.renderings], plan.left_out)
            for plan in plans
        ]

    def _with(self, template_kwargs: dict[str, Any]) -> "ChatTokenizer":
        """This object, or one in which a chat's own variables for the chat template come before the given ones."""
        if not template_kwargs:
            return self
        key = json.dumps(template_kwargs, sort_keys=True)
        if key not in self._others:
            if len(self._others) == _MOST_VARIANTS:
                self._others.clear()
            self._others[key] = ChatTokenizer(self._tokenizer, self._template_kwargs | template_kwargs)
        return self._others[key]

    def _mask(self, rendering: _Rendering, ids: list[int], offsets: list[Span]) -> MaskedSample:
        """The loss mask of a rendered text's tokens: a token counts if it lies wholly in an answer."""
        input_ids = np.array(ids, dtype=np.int32)
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        loss_mask = np.zeros(len(ids), dtype=np.int8)
        answer_ends = []
        for answer in rendering.answers:
            for start, end in answer.spans:
                # A token of nothing but trimmed spaces has an empty span. Directly before the answer that span ends
                # where the answer starts.
                is_inside = (starts >= start) & (ends > start) & (ends <= end)
                for index in self._straddling(rendering.text, input_ids, starts, ends, start, end):
                    is_inside[index] = True
                loss_mask |= is_inside
            answer_ends.append(int(np.searchsorted(starts, answer.end, side="left")))
        return MaskedSample(
            input_ids,
            loss_mask,
            answer_ends,
            [answer.message for answer in rendering.answers if not _is_covered(rendering.text, answer)],
            [answer.message for answer in rendering.answers],
        )

    def _straddling(
        self, text: str, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray, start: int, end: int
    ) -> Iterator[int]:
        """Indices of added tokens that extend beyond an answer but belong to it.

        An added token may include the spaces around it (`lstrip`, `rstrip`), but never other text: the verifier
        generates it if its own text lies in the answer.
        """
        is_across = self._is_added[ids] & (ends > start) & (starts < end) & ((starts < start) | (ends > end))
        for index in np.flatnonzero(is_across):
            content = self._added_text[int(ids[index])]
            at = text.find(content, starts[index], ends[index])
            if at >= start and at + len(content) <= end:
                yield int(index)

    def _plan(self, chat: Chat) -> _Plan:
        """Find the samples of a chat, with messages in the form in which the template shows most of its answers."""
        if not any(message["role"] == "assistant" for message in chat.messages):
            return _Plan(left_out=[LeftOut(None, "no answer of the assistant")])
        kind = self._renderer.kind(bool(chat.tools))
        has_calls = any(message.get("tool_calls") for message in chat.messages)
        best: _Plan | None = None
        has_parts = kind.has_thinking_parts and any(message.get("reasoning_content") for message in chat.messages)
        choices = [(False, True)[: 1 + has_parts], (False, True)[: 1 + has_calls], (None, "")[: 1 + has_calls]]
        for form in starmap(_Form, product(*choices)):
            plan = self._plan_form(_formed(chat, form, kind.roles_of_parts), chat.excluded, kind)
            if best is None or plan.badness < best.badness:
                best = plan
            if not any(entry.is_of_template for entry in plan.left_out):
                break
        assert best is not None
        return best

    def _plan_form(self, chat: Chat, excluded: dict[int, str], kind: TemplateKind) -> _Plan:
        """Find the samples of a chat whose messages are in one form."""
        plan = _Plan()
        hidden: str | None = None
        seen = 0
        for index, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            try:
                if index in excluded:
                    raise Unlearnable(excluded[index])
                if not _is_answer(message):
                    raise Unlearnable("the answer is empty")
                if index == 0:
                    raise Unlearnable("no answer: the assistant speaks first, and nothing asks for it")
                prompt = self._renderer.render(chat, index, add_generation_prompt=True)[0]
                hidden = hidden or hidden_message(self._renderer, chat, seen, index, prompt)
                seen = index
                if hidden:
                    raise Refused(hidden)
                try:
                    text, answer = self._find_answer(chat, index, prompt, kind)
                except Refused as error:
                    written = _as_written(message, prompt, kind) if str(error) == THOUGHT_TAKEN_OUT else None
                    if written is None:
                        raise
                    text, answer = written, _Answer(index, len(prompt), len(written), False, None)
                check_text(text)
            except Unlearnable as error:
                plan.left_out.append(LeftOut(index, str(error), isinstance(error, Refused)))
                continue
            last = plan.renderings[-1] if plan.renderings else None
            if last is not None and text.startswith(last.text[: last.answers[-1].end]):
                last.answers[-1] = _closed(last.answers[-1], text, chat.messages, kind)
                last.text = text
                last.answers.append(answer)
            else:
                plan.renderings.append(_Rendering(text, [answer]))
        return plan

    def _find_answer(self, chat: Chat, index: int, prompt: str, kind: TemplateKind) -> tuple[str, _Answer]:
        """Render a chat up to an answer; returns the text of its sample and the answer in it."""
        text, marks = self._renderer.render(chat, index + 1)
        if text.startswith(prompt):
            start = self._end_of_header(chat, index, text, prompt, kind)
        else:
            text, start, shift = self._start_without_prompt(chat, index, text, prompt, kind)
            marks = [(begin + shift, end + shift) for begin, end in marks or []]
        end, is_open = self._end_of_answer(chat, index, text, start, kind)
        answer = _Answer(index, start, end, is_open and not kind.is_marking, None)
        if kind.is_marking:
            inside = [(max(begin, start), min(stop, end)) for begin, stop in marks or []]
            answer = replace(answer, marks=tuple(span for span in inside if span[0] < span[1]))
            if not answer.marks:
                raise Refused("no answer: the chat template's {% generation %} marks leave it out")
        return text, answer

    def _end_of_header(self, chat: Chat, index: int, text: str, prompt: str, kind: TemplateKind) -> int:
        """Where the answer begins in a text that begins with the prompt.

        That is the end of the prompt, unless the template writes a generation prompt elsewhere but none here (after a
        system message, or after another answer): then the header is the text that it writes before any answer.
        """
        if prompt.endswith(kind.generation_prompt) or prompt != self._renderer.render(chat, index)[0]:
            return len(prompt)
        if text.startswith(kind.generation_prompt, len(prompt)):
            return len(prompt) + len(kind.generation_prompt)
        others = [self._renderer.render_other(chat, index, answer) for answer in (PROBE, PROBE[::-1] + "x")]
        return max(len(prompt), _common_prefix(text, *others))

    def _start_without_prompt(
        self, chat: Chat, index: int, text: str, prompt: str, kind: TemplateKind
    ) -> tuple[str, int, int]:
        """Where the answer begins in a text that doesn't begin with the prompt.

        A prompt may begin the answer itself with something that this answer does not begin with (`<think>` for an
        answer without reasoning). Then the answer begins after what the prompt, this answer and any other answer
        share, if the conversation before it is still the same. If the template has removed something from the
        conversation or inserted something (a system prompt that it shows in the last user turn only, earlier
        reasoning, a line break), the sample is the prompt followed by the answer, as the verifier would see them.

        Returns:
            The text of the sample, where the answer begins in it, and by how many characters it has moved there.
        """
        other = self._renderer.render_other(chat, index, PROBE)
        header = _common_prefix(text, other)
        start = len(_OPEN_TAG.sub("", text[: _common_prefix(text, prompt, other)]))
        rest = prompt[start:]
        end = self._end_of_changed_header(text, start, header, rest, prompt, kind)
        if end is None and len(rest) < len(kind.prompt_tail) and prompt.endswith(kind.prompt_tail):
            return text, start, 0
        if end is None and start >= _common_prefix(self._renderer.render(chat, index)[0], prompt):
            return text, start, 0
        if end is None:
            end = self._end_of_rewritten_header(chat, index, text, header, prompt, kind)
        return prompt + text[end:], len(prompt), len(prompt) - end

    def _end_of_changed_header(
        self, text: str, start: int, header: int, rest: str, prompt: str, kind: TemplateKind
    ) -> int | None:
        """Where the answer begins in a text that has one piece more or less before it than the prompt has.

        Args:
            start: where text and prompt begin to differ.
            header: before this place the text is the same for another answer.
            rest: the prompt from `start` on.
        """
        for end in range(header, start, -1):
            between = text[start:end]
            has_less = prompt.endswith(between) and between.strip()
            has_more = between.endswith(rest) and rest.strip()
            if has_less or has_more:
                return end
        has_no_header = kind.generation_prompt and rest.endswith(kind.generation_prompt)
        return start if has_no_header and not text[start:header].strip() else None

    def _end_of_rewritten_header(
        self, chat: Chat, index: int, text: str, header: int, prompt: str, kind: TemplateKind
    ) -> int:
        """Where the answer begins in a text before which several pieces of the prompt are left out.

        Raises:
            Unlearnable: the text before the answer is another one than the prompt, or hard to tell from the answer.
        """
        tail = kind.prompt_tail
        at = text.rfind(tail, 0, header) if tail and prompt.endswith(tail) else -1
        end = at + len(tail)
        remaining = iter("".join(prompt.split()))
        is_of_prompt = at >= 0 and all(letter in remaining for letter in "".join(text[:end].split()))
        if not is_of_prompt or any(piece in text[end:header] for _, piece in pieces_of(chat.messages[index - 1])):
            raise Refused("the chat template changes the conversation once it is answered")
        return end

    def _end_of_answer(self, chat: Chat, index: int, text: str, start: int, kind: TemplateKind) -> tuple[int, bool]:
        """Where generation stops: after the end-of-turn token. And whether that token may be the next turn's first one.

        The template's text after the content is known from a plain answer. An answer that closes differently (Llama
        3.1 ends some tool calls with `<|eom_id|>`) ends with the same token if it has it, else with its last special
        token. Without a special token the answer is its content alone.
        """
        closing = kind.closing
        if closing is not None and text.endswith(closing) and len(text) - len(closing) >= start:
            end = len(text) - len(closing)
            check_shown(self._renderer, chat, index, text[start:end])
            if kind.end_of_turn:
                return end + kind.end_of_turn, False
            ends_with_special = re.search(rf"({kind.special_token.pattern})\s*\Z", text[start:end]) is not None
            return end, not ends_with_special
        trailer = (closing or "")[kind.end_of_turn :]
        last = len(text) - len(trailer) if trailer.strip() and text.endswith(trailer) else len(text)
        shown = start + check_shown(self._renderer, chat, index, text[start:last])
        for known in kind.stop_tokens:
            if (at := text.find(known, shown, last)) >= 0:
                return at + len(known), False
        specials = list(kind.special_token.finditer(text, shown, last))
        return (specials[-1].end(), False) if specials else (last, not kind.end_of_turn)


def _as_written(message: dict[str, Any], prompt: str, kind: TemplateKind) -> str | None:
    """The prompt and an answer as the verifier writes it, though the template takes the reasoning out of its text.

    Templates of reasoning models such as DeepSeek-R1 show the reasoning of no answer, not even of the last one, and
    some open it in the prompt, so that the verifier doesn't write `<think>` itself. None if the prompt closes the
    reasoning, or if the answer's form isn't known.
    """
    opened = re.search(r"<think>(\s*)\Z", prompt)
    content = joined(message.get("content")).strip()
    answer = content.removeprefix("<think>")
    is_closed = prompt.rstrip().endswith("</think>")
    is_known = (opened or answer != content) and "<think>" not in answer and not is_closed
    if not is_known or message.get("tool_calls") or kind.is_marking or not kind.end_of_turn:
        return None
    if opened is None:
        answer = content
    elif opened.group(1):
        answer = answer.lstrip()
    return prompt + answer + (kind.closing or "")[: kind.end_of_turn]


def _closed(answer: _Answer, text: str, messages: list[dict[str, Any]], kind: TemplateKind) -> _Answer:
    """Extend an answer by the end-of-turn token that the template writes as the next turn's first token."""
    follower = messages[answer.message + 1 : answer.message + 2]
    if not answer.is_open or not follower:
        return answer
    found = re.compile(rf"\s*({kind.special_token.pattern})").match(text, answer.end)
    # Before another answer the found token may also be part of the header of that answer.
    if found is None or (follower[0]["role"] == "assistant" and found.group() != kind.next_token):
        return answer
    return replace(answer, end=found.end(), is_open=False)


def _formed(chat: Chat, form: _Form, roles_of_parts: frozenset[str]) -> Chat:
    """The chat with its messages in a form, and their contents as parts for the roles that need that."""
    messages = []
    for message in chat.messages:
        if form.thoughts_are_parts and (thought := message.get("reasoning_content")):
            message = {**message, "content": with_thought(thought, message.get("content") or "")}
        if calls := message.get("tool_calls"):
            if message.get("content") is None:
                message = {**message, "content": form.null}
            if form.arguments_are_text:
                message = {**message, "tool_calls": [_with_text_arguments(call) for call in calls]}
        messages.append(with_parts(message, roles_of_parts))
    return Chat(messages, chat.tools)


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if isinstance(function.get("arguments"), str):
        return call
    function = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
    return {**call, "function": function} if "function" in call else function


def _is_answer(message: dict[str, Any]) -> bool:
    return bool(
        joined(message.get("content")).strip()
        or message.get("tool_calls")
        or (message.get("reasoning_content") or "").strip()
    )


def _is_covered(text: str, answer: _Answer) -> bool:
    """Whether the template's marks, if it has any, cover an answer except for white space."""
    end = answer.start
    for start, stop in answer.spans:
        if text[end:start].strip():
            return False
        end = stop
    return not text[end : answer.end].strip()


def _common_prefix(*texts: str) -> int:
    return len(os.path.commonprefix(texts))  # noqa: RUF071 (characters, not path components, are wanted)
