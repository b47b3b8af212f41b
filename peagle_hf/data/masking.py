"""Which tokens of a chat the verifier would generate itself: the loss mask, found by rendering with its chat template.

The rule: every assistant turn ends up in exactly one place. It is trained on whole, through the token that ends the
turn; or it is left out, with a reason. What the verifier would generate is the difference between two renderings of the
chat template: the chat up to the answer with the generation prompt, and the chat with the answer.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import PeagleError
from .chats import Chat, Unlearnable

# A letter of the private use area: no answer and no chat template begins or ends with it.
_PROBE = "\ue000"
_ROLES = ("system", "user", "assistant", "tool")
_SURROGATE = re.compile("[\ud800-\udfff]")
_GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")
_ERROR = "the chat template refuses it"
_OPEN_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
"""A tag that text breaks off in: two tags that begin alike have no token in common."""
_THINK_TAG = re.compile(r"</?think>")

Span = tuple[int, int]
"""Where a piece of text begins and ends, in characters."""


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
class MaskedRow:
    """The tokens of a chat up to the last answer in it.

    Args:
        input_ids: int32 [T].
        loss_mask: int8 [T], 1 for tokens that are trained on.
        ends: for each answer that is trained on in this row the number of tokens up to its end.
        marked: indices of the messages of which the template's own {% generation %} marks leave out a part.
        messages: index of each answer in `Chat.messages`; empty for rows that were never messages.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    ends: list[int]
    marked: list[int]
    messages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class MaskedChat:
    """What came of a chat: every assistant turn is in one of `rows` or in `left_out`, and in one only."""

    rows: list[MaskedRow]
    left_out: list[LeftOut]


@dataclass(frozen=True)
class _Form:
    """How messages are handed to the template: templates disagree about what an assistant message looks like.

    Args:
        null: content of an assistant message that only calls tools.
        arguments_are_text: whether a tool call's arguments are JSON text instead of an object.
    """

    null: str | None
    arguments_are_text: bool


_FORMS = [_Form(null, arguments_are_text) for arguments_are_text in (False, True) for null in (None, "")]


@dataclass(frozen=True)
class _Answer:
    """An answer in a rendered text: where it begins and ends, and where in it the template puts its own marks.

    Args:
        is_open: whether its end-of-turn token, if any, is what the template writes next.
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
class _Row:
    """A rendered text and the answers in it."""

    text: str
    answers: list[_Answer]


@dataclass
class _Plan:
    """The rows of a chat before they are tokenized."""

    rows: list[_Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def badness(self) -> tuple[int, int]:
        """How many answers are left out, and how many because of an error in the template, which says less."""
        return len(self.left_out), sum(entry.reason.startswith(_ERROR) for entry in self.left_out)


class _Refused(Unlearnable):
    """An answer that the chat template refuses or doesn't show whole; handed over in another form it may."""


class ChatTokenizer:
    """Turns chats into rows of token ids with a loss mask.

    Trained on are the tokens that the verifier generates: its text as the template writes it (reasoning and tool calls
    too) and the end-of-turn token, on which generation stops; neither the header before them, which the generation
    prompt gives, nor what the template writes after them. Where a template marks its `{% generation %}`, only what it
    marks of these tokens is trained on. A token counts only if it lies wholly in the answer: one that a tokenizer makes
    of the header's last character and the answer's first is nothing that the verifier generates.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        template_kwargs: variables for the chat template, such as `enable_thinking`.

    Raises:
        PeagleError: the chat template is no valid Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None) -> None:
        added = tokenizer.added_tokens_decoder
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self._tokenizer = tokenizer
        self._kwargs: dict[str, Any] = {**tokenizer.special_tokens_map, **(template_kwargs or {})}
        self._special_token = re.compile(_any_of(special))
        self._added_text = {id_: token.content for id_, token in added.items()}
        self._is_added = np.zeros(max([*added, *tokenizer.get_vocab().values(), 0]) + 1, dtype=bool)
        self._is_added[list(added)] = True
        self._templates: dict[bool, _TemplateKind] = {}

    def mask(self, chats: Sequence[Chat]) -> list[MaskedChat]:
        """Tokenize chats, with the ids and the loss mask of one row or more for each.

        Answers stay in one row as long as the template renders them later as it did when they were given. One that
        it renders otherwise later (Qwen3 takes out earlier reasoning) ends its row there, and the conversation goes
        on in a new row in which only the later answers are trained on.

        Raises:
            PeagleError: the tokenizer has no chat template, or can't tell which characters a token stands for.
        """
        if chats and (self._tokenizer.chat_template is None or not self._tokenizer.is_fast):
            raise PeagleError(
                f"The tokenizer of {self._tokenizer.name_or_path} has no chat template or no tokenizer.json, and both "
                "are needed to turn conversations into tokens. Name a chat model with both, give a template with "
                "--chat-template, or give rows with `input_ids` and `loss_mask`."
            )
        plans = [self._plan(chat) for chat in chats]
        texts = [row.text for plan in plans for row in plan.rows]
        encoding: Any = (
            self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if texts
            else {"input_ids": [], "offset_mapping": []}
        )
        tokens = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        return [MaskedChat([self._mask_row(row, *next(tokens)) for row in plan.rows], plan.left_out) for plan in plans]

    def _mask_row(self, row: _Row, ids: list[int], offsets: list[Span]) -> MaskedRow:
        input_ids = np.array(ids, dtype=np.int32)
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        loss_mask = np.zeros(len(ids), dtype=np.int8)
        answer_ends = []
        for answer in row.answers:
            for start, end in answer.spans:
                # A token whose spaces are trimmed away is empty: it ends where the answer starts if it is before it.
                is_inside = (starts >= start) & (ends > start) & (ends <= end)
                for index in self._straddling(row.text, input_ids, starts, ends, start, end):
                    is_inside[index] = True
                loss_mask |= is_inside
            answer_ends.append(int(np.searchsorted(starts, answer.end, side="left")))
        return MaskedRow(
            input_ids,
            loss_mask,
            answer_ends,
            [answer.message for answer in row.answers if not _is_covered(row.text, answer)],
            [answer.message for answer in row.answers],
        )

    def _straddling(
        self, text: str, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray, start: int, end: int
    ) -> Iterator[int]:
        """Added tokens across a border of an answer that belong to it.

        An added token may swallow the spaces around it (`lstrip`, `rstrip`), but never melts with other text: it is
        generated if its own text is.
        """
        is_across = self._is_added[ids] & (ends > start) & (starts < end) & ((starts < start) | (ends > end))
        for index in np.flatnonzero(is_across):
            content = self._added_text[int(ids[index])]
            at = text.find(content, starts[index], ends[index])
            if at >= start and at + len(content) <= end:
                yield int(index)

    def _plan(self, chat: Chat) -> _Plan:
        """Find the rows of a chat, in the form of messages in which the template shows most of its answers."""
        if not any(message["role"] == "assistant" for message in chat.messages):
            return _Plan(left_out=[LeftOut(None, "no answer of the assistant")])
        kind = self._kind(bool(chat.tools))
        has_calls = any(message.get("tool_calls") for message in chat.messages)
        best: _Plan | None = None
        for form in _FORMS if has_calls else _FORMS[:1]:
            plan = self._plan_form(_formed(chat, form, kind.roles_of_parts), chat.excluded, kind)
            if best is None or plan.badness < best.badness:
                best = plan
            if not any(entry.is_of_template for entry in plan.left_out):
                break
        assert best is not None
        return best

    def _plan_form(self, chat: Chat, excluded: dict[int, str], kind: "_TemplateKind") -> _Plan:
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
                prompt = self._render(chat, index, add_generation_prompt=True)[0]
                hidden = hidden or self._hidden(chat, seen, index, prompt)
                seen = index
                if hidden:
                    raise _Refused(hidden)
                text, answer = self._find_answer(chat, index, prompt, kind)
            except Unlearnable as error:
                plan.left_out.append(LeftOut(index, str(error), isinstance(error, _Refused)))
                continue
            row = plan.rows[-1] if plan.rows else None
            if row is not None and text.startswith(row.text[: row.answers[-1].end]):
                row.answers[-1] = kind.closed(row.answers[-1], text, chat.messages)
                row.text = text
                row.answers.append(answer)
            else:
                plan.rows.append(_Row(text, [answer]))
        return plan

    def _find_answer(self, chat: Chat, index: int, prompt: str, kind: "_TemplateKind") -> tuple[str, _Answer]:
        """Render a chat up to an answer; give the text of its row and where in it the answer is."""
        text, marks = self._render(chat, index + 1)
        if text.startswith(prompt):
            start = self._end_of_header(chat, index, text, prompt, kind)
        else:
            text, start, shift = self._start_without_prompt(chat, index, text, prompt, kind)
            marks = [(begin + shift, end + shift) for begin, end in marks or []]
        end, is_open = self._end_of_answer(chat, index, text, start, kind)
        if _SURROGATE.search(text):
            raise Unlearnable("it holds half a surrogate pair, which is no text")
        answer = _Answer(index, start, end, is_open and not kind.is_marking, None)
        if kind.is_marking:
            inside = [(max(begin, start), min(stop, end)) for begin, stop in marks or []]
            answer = replace(answer, marks=tuple(span for span in inside if span[0] < span[1]))
            if not answer.marks:
                raise _Refused("no answer: the chat template's {% generation %} marks leave it out")
        return text, answer

    def _end_of_header(self, chat: Chat, index: int, text: str, prompt: str, kind: "_TemplateKind") -> int:
        """Where the answer begins in a text that begins with the prompt.

        That is the end of the prompt, unless the template gives a generation prompt elsewhere but none here (after a
        system message, or after another answer): then what it writes before any answer is the header.
        """
        if prompt.endswith(kind.generation_prompt) or prompt != self._render(chat, index)[0]:
            return len(prompt)
        if text.startswith(kind.generation_prompt, len(prompt)):
            return len(prompt) + len(kind.generation_prompt)
        others = [self._render_other(chat, index, answer) for answer in (_PROBE, _PROBE[::-1] + "x")]
        return max(len(prompt), _common_prefix(text, *others))

    def _start_without_prompt(
        self, chat: Chat, index: int, text: str, prompt: str, kind: "_TemplateKind"
    ) -> tuple[str, int, int]:
        """Where the answer begins in a text that doesn't begin with the prompt.

        A prompt may begin the answer itself with something that this answer does not begin with (`<think>` for an
        answer without reasoning). Then the answer begins after what the prompt, this answer and any other answer
        share, if the conversation before it is still the same. If the template has taken something out of the
        conversation or put something into it (a system prompt that it shows in the last user turn only, earlier
        reasoning, a line break), the row is the prompt with the answer after it, as the verifier would see them.

        Returns:
            The text of the row, where the answer begins in it, and how far it has moved there.
        """
        other = self._render_other(chat, index, _PROBE)
        header = _common_prefix(text, other)
        start = len(_OPEN_TAG.sub("", text[: _common_prefix(text, prompt, other)]))
        rest = prompt[start:]
        end = self._end_of_changed_header(text, start, header, rest, prompt, kind)
        if end is None and len(rest) < len(kind.prompt_tail) and prompt.endswith(kind.prompt_tail):
            return text, start, 0
        if end is None and start >= _common_prefix(self._render(chat, index)[0], prompt):
            return text, start, 0
        if end is None:
            end = self._end_of_rewritten_header(chat, index, text, header, prompt, kind)
        return prompt + text[end:], len(prompt), len(prompt) - end

    def _end_of_changed_header(
        self, text: str, start: int, header: int, rest: str, prompt: str, kind: "_TemplateKind"
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
        self, chat: Chat, index: int, text: str, header: int, prompt: str, kind: "_TemplateKind"
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
        if not is_of_prompt or any(piece in text[end:header] for _, piece in _pieces(chat.messages[index - 1])):
            raise _Refused("the chat template changes the conversation once it is answered")
        return end

    def _end_of_answer(self, chat: Chat, index: int, text: str, start: int, kind: "_TemplateKind") -> tuple[int, bool]:
        """Where generation stops, after the end-of-turn token; and whether that token may be what comes next.

        What the template writes after the content is seen on a plain answer. An answer that closes otherwise (Llama
        3.1 ends some tool calls with `<|eom_id|>`) ends with the same token if it has it, else with its last special
        token. Without a special token the answer is its content alone.
        """
        closing = kind.closing
        if closing is not None and text.endswith(closing) and len(text) - len(closing) >= start:
            end = len(text) - len(closing)
            self._check_shown(chat, index, text[start:end])
            if kind.end_of_turn:
                return end + kind.end_of_turn, False
            ends_with_special = re.search(rf"({self._special_token.pattern})\s*\Z", text[start:end]) is not None
            return end, not ends_with_special
        trailer = (closing or "")[kind.end_of_turn :]
        last = len(text) - len(trailer) if trailer.strip() and text.endswith(trailer) else len(text)
        shown = start + self._check_shown(chat, index, text[start:last])
        for known in kind.stop_tokens:
            if (at := text.find(known, shown, last)) >= 0:
                return at + len(known), False
        specials = list(self._special_token.finditer(text, shown, last))
        return (specials[-1].end(), False) if specials else (last, not kind.end_of_turn)

    def _check_shown(self, chat: Chat, index: int, answer: str) -> int:
        """Check that the template shows an answer whole; give where the last part of it ends in the answer's text.

        Raises:
            Unlearnable: a part of it is missing.
        """
        message = chat.messages[index]
        calls = message.get("tool_calls") or []
        place = 0
        for reason, piece in _pieces(message):
            found = _find(piece, answer, place)
            if found is None:
                raise _Refused(reason)
            place = max(place, found)
        if not calls:
            return place
        whole = self._render(chat, index + 1)[0]
        for number in range(len(calls)):
            fewer = [call for other, call in enumerate(calls) if other != number]
            silent = {**message, "tool_calls": fewer} if fewer else _without(message, "tool_calls")
            if self._render_instead(chat, index, silent) == whole:
                which = "tool calls" if len(calls) == 1 else "all tool calls"
                raise _Refused(f"the chat template does not show {which}")
        for call in calls:
            for value in _strings(call.get("function", call).get("arguments")):
                found = _find(value, answer, 0)
                if found is None:
                    raise _Refused("the chat template does not show all arguments of a tool call")
                place = max(place, found)
        if message.get("content") is None and "None" in answer:
            with_text = self._render_instead(chat, index, {**message, "content": ""})
            if with_text is not None and whole.count("None") > with_text.count("None"):
                raise _Refused("the chat template writes None for the missing content of a tool call")
        return place

    def _render_instead(self, chat: Chat, index: int, message: dict[str, Any]) -> str | None:
        """Render a chat with another message in the place of an answer; None if the template refuses it."""
        try:
            return self._render(Chat([*chat.messages[:index], message], chat.tools), index + 1)[0]
        except Unlearnable:
            return None

    def _hidden(self, chat: Chat, first: int, last: int, prompt: str) -> str | None:
        """Say which of some messages the template doesn't show, if there is one."""
        for index in range(first, last):
            message = chat.messages[index]
            content = _joined(message.get("content"))
            if message["role"] == "assistant" or not content.strip() or content.strip() in prompt:
                continue
            other = {**message, "content": _PROBE if isinstance(message["content"], str) else _parts(_PROBE)}
            messages = [*chat.messages[:index], other, *chat.messages[index + 1 : last]]
            try:
                is_hidden = self._render(Chat(messages, chat.tools), last, add_generation_prompt=True)[0] == prompt
            except Unlearnable:
                continue
            if is_hidden:
                return f"the chat template does not show a message of the role {message['role']} before it"
        return None

    def _render_other(self, chat: Chat, index: int, content: str) -> str:
        """Render a chat with another text in the place of an answer."""
        is_text = not isinstance(chat.messages[index].get("content"), list)
        answer = {"role": "assistant", "content": content if is_text else _parts(content)}
        return self._render(Chat([*chat.messages[:index], answer], chat.tools), index + 1)[0]

    def _render(self, chat: Chat, count: int, add_generation_prompt: bool = False) -> tuple[str, list[Span] | None]:
        """Render the first messages of a chat; give the text and the spans that the template marks, None if none.

        This is `apply_chat_template` short of the tokens, whose mask loses marks that begin with a trimmed space.

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
        except Exception as error:  # a template may do anything to a value, so any error may come out of it
            raise _Refused(f"{_ERROR} ({error})") from error
        (text,), marks = rendered
        return text, marks[0] if is_marking else None

    def _template(self, has_tools: bool) -> str:
        try:
            return self._tokenizer.get_chat_template(tools=[{}] if has_tools else None)
        except ValueError as error:
            raise PeagleError(
                f"The tokenizer of {self._tokenizer.name_or_path} has several chat templates and none of them is the "
                f"default: {', '.join(self._tokenizer.chat_template)}. Name one with --chat-template."
            ) from error

    def _kind(self, has_tools: bool) -> "_TemplateKind":
        """What a template does with the simplest chats, found out once."""
        if has_tools not in self._templates:
            self._templates[has_tools] = self._probe(has_tools)
        return self._templates[has_tools]

    def _probe(self, has_tools: bool) -> "_TemplateKind":
        tools = [_PROBE_TOOL] if has_tools else None

        def text_of(*messages: dict[str, Any], prompted: bool = False) -> str | None:
            try:
                return self._render(Chat(list(messages), tools), len(messages), prompted)[0]
            except Unlearnable:
                return None

        roles_of_parts: set[str] = set()
        for role in _ROLES:
            before = [] if role in ("system", "user") else [_message("user", _PROBE, roles_of_parts)]
            number = len(before)
            as_text = text_of(*before, {"role": role, "content": _PROBE})
            if as_text is None or as_text.count(_PROBE) <= number:
                as_parts = text_of(*before, {"role": role, "content": _parts(_PROBE)})
                if as_parts is not None and as_parts.count(_PROBE) > number and "'text'" not in as_parts:
                    roles_of_parts.add(role)
        question, answer = (_message(role, _PROBE, roles_of_parts) for role in ("user", "assistant"))
        asked, prompt = text_of(question), text_of(question, prompted=True)
        generation_prompt = prompt[len(asked) :] if asked and prompt and prompt.startswith(asked) else ""
        plain, more = text_of(question, answer), text_of(question, answer, question)
        prompt_tail = prompt.rpartition(_PROBE)[2] if prompt and _PROBE in prompt else ""
        closing = None if plain is None or plain.count(_PROBE) < 2 else plain.rpartition(_PROBE)[2]
        following = more.rpartition(_PROBE)[0].rpartition(_PROBE)[2] if more and more.count(_PROBE) > 2 else ""
        end_of_turn = self._end_of_turn(closing or "", following)
        ends = [found.group() for found in self._special_token.finditer((closing or "")[:end_of_turn])]
        eos = self._tokenizer.eos_token
        next_token = re.match(rf"\s*({self._special_token.pattern})", following)
        return _TemplateKind(
            is_marking=_GENERATION_MARK.search(self._template(has_tools)) is not None,
            roles_of_parts=frozenset(roles_of_parts),
            generation_prompt=generation_prompt,
            prompt_tail=prompt_tail,
            closing=closing,
            end_of_turn=end_of_turn,
            stop_tokens=[*ends[-1:], *([eos] if eos else [])],
            next_token=next_token.group() if next_token else "",
            special_token=self._special_token,
        )

    def _end_of_turn(self, closing: str, following: str) -> int:
        """Length of what the verifier generates of a closing: through its first special token, 0 if it has none.

        The token that ends all text may come right after another one that only closes the content; it counts if the
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


@dataclass(frozen=True)
class _TemplateKind:
    """What a chat template does with the simplest chats.

    Args:
        is_marking: whether it has {% generation %} marks.
        roles_of_parts: the roles whose content it wants as a list of parts.
        generation_prompt: what it writes after a question to have it answered; empty if it writes nothing.
        prompt_tail: all that it writes after the question to have it answered: its closing, and the generation prompt.
        closing: what it writes after a plain answer; None if it refuses the probe.
        end_of_turn: how many characters of the closing the verifier generates.
        stop_tokens: the tokens that end a plain turn, the likeliest first.
        next_token: the first special token after an answer in the middle of a chat, with the space before it; or empty.
        special_token: finds any special token.
    """

    is_marking: bool
    roles_of_parts: frozenset[str]
    generation_prompt: str
    prompt_tail: str
    closing: str | None
    end_of_turn: int
    stop_tokens: list[str]
    next_token: str
    special_token: re.Pattern[str]

    def closed(self, answer: _Answer, text: str, messages: list[dict[str, Any]]) -> _Answer:
        """Add to an answer the end-of-turn token that the template writes as the next turn's first token."""
        follower = messages[answer.message + 1 : answer.message + 2]
        if not answer.is_open or not follower:
            return answer
        found = re.compile(rf"\s*({self.special_token.pattern})").match(text, answer.end)
        # Before another answer it may also be the header of that one.
        if found is None or (follower[0]["role"] == "assistant" and found.group() != self.next_token):
            return answer
        return replace(answer, end=found.end(), is_open=False)


_PROBE_TOOL = {
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


def _any_of(texts: set[str]) -> str:
    """A regular expression for any of these texts, the longest first."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _message(role: str, content: str, roles_of_parts: set[str] | frozenset[str]) -> dict[str, Any]:
    return {"role": role, "content": _parts(content) if role in roles_of_parts else content}


def _parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _joined(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _formed(chat: Chat, form: _Form, roles_of_parts: frozenset[str]) -> Chat:
    messages = []
    for message in chat.messages:
        if calls := message.get("tool_calls"):
            if message.get("content") is None:
                message = {**message, "content": form.null}
            if form.arguments_are_text:
                message = {**message, "tool_calls": [_with_text_arguments(call) for call in calls]}
        if message["role"] in roles_of_parts and isinstance(message.get("content"), str):
            message = {**message, "content": _parts(message["content"])}
        messages.append(message)
    return Chat(messages, chat.tools)


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if isinstance(function.get("arguments"), str):
        return call
    function = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
    return {**call, "function": function} if "function" in call else function


def _is_answer(message: dict[str, Any]) -> bool:
    return bool(
        _joined(message.get("content")).strip()
        or message.get("tool_calls")
        or (message.get("reasoning_content") or "").strip()
    )


def _pieces(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The parts of an answer's text that the template must show, each after the reason if it doesn't."""
    if reasoning := (message.get("reasoning_content") or "").strip():
        yield "the chat template does not show reasoning", reasoning
    content = _joined(message.get("content"))
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


def _is_covered(text: str, answer: _Answer) -> bool:
    """Whether the template's marks, if it has any, leave out nothing but space of an answer."""
    end = answer.start
    for start, stop in answer.spans:
        if text[end:start].strip():
            return False
        end = stop
    return not text[end : answer.end].strip()


def _common_prefix(*texts: str) -> int:
    return len(os.path.commonprefix(texts))  # noqa: RUF071 (characters, not path components, are wanted)
