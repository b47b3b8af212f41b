"""`peagle-hf data template`: what a model's chat template lets be trained on, shown on some 30 kinds of chats."""

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..files import atomic_path
from ..pages.page import render
from .chats import read_chat
from .loss_mask import ChatTokenizer
from .tokenizer import load_tokenizer, read_template_kwargs

logger = logging.getLogger(__name__)

EXACT, MARKED, LEFT_OUT = "exact", "by the template's marks", "left out"
_PAGE = Path(__file__).with_name("inspect_template.html")
_COLOURS, _BRACKETS = ("\033[1;32m", "\033[0m"), ("⟦", "⟧")
"""Marks around text that is trained on: colours in a terminal, else brackets."""


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _says(
    content: str | None, reasoning: str | None = None, calls: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}


def _call(number: int, city: str | None, **others: Any) -> dict[str, Any]:
    arguments = {**({} if city is None else {"city": city}), **others}
    return {"id": f"call0000{number}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def _result(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "get_weather", "content": content}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Which city."},
                    "days": {"type": "integer", "description": "How many days ahead."},
                },
                "required": ["city"],
            },
        },
    }
]
_SYSTEM = {"role": "system", "content": "You answer in few words."}
_RAIN = _user("Will it rain in Paris?")
_BOTH = _user("And in Paris and Rome?")
_HELLO, _WELL = _user("Hello, who are you?"), _says("I am a helpful voice.")
_MORE, _SURE = _user("Can you count to three?"), _says("One, two, three.")

KINDS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "a question": ([_HELLO, _WELL], False),
    "two questions": ([_HELLO, _WELL, _MORE, _SURE], False),
    "three questions": ([_HELLO, _WELL, _MORE, _SURE, _user("Thank you."), _says("Any time!")], False),
    "a system prompt": ([_SYSTEM, _HELLO, _WELL, _MORE, _SURE], False),
    "a developer prompt": ([{**_SYSTEM, "role": "developer"}, _HELLO, _WELL], False),
    "a system prompt in mid-chat": ([_HELLO, _WELL, _SYSTEM, _MORE, _SURE], False),
    "an answer right after the system prompt": ([_SYSTEM, _WELL, _MORE, _SURE], False),
    "a greeting before any question": ([_WELL, _MORE, _SURE], False),
    "two answers in a row": ([_HELLO, _WELL, _SURE], False),
    "two questions in a row": ([_HELLO, _MORE, _SURE], False),
    "a question at the end": ([_HELLO, _WELL, _MORE], False),
    "an answer with spaces around it": ([_HELLO, _says("\n  Well, here I am. \n")], False),
    "an answer with markup": ([_HELLO, _says("Use <b> & \"quotes\", 'these' too:\n\n```\nx < y\n```")], False),
    "an empty answer": ([_HELLO, _says(""), _MORE, _SURE], False),
    "text in parts": ([_user([{"type": "text", "text": "Hello, who are you?"}]), _WELL], False),
    "reasoning": ([_HELLO, _says("I am a voice.", "They ask for my name.")], False),
    "reasoning on two questions": (
        [_HELLO, _says("I am a voice.", "They ask for my name."), _MORE, _says("One, two, three.", "Easy numbers.")],
        False,
    ),
    "reasoning on the first question only": ([_HELLO, _says("I am a voice.", "They ask for it."), _MORE, _SURE], False),
    "reasoning in the text": ([_HELLO, _says("<think>\nThey ask for my name.\n</think>\n\nI am a voice.")], False),
    "reasoning in the text of two answers": (
        [
            *(_HELLO, _says("<think>\nThey ask for my name.\n</think>\n\nI am a voice.")),
            *(_MORE, _says("<think>\nEasy numbers.\n</think>\n\nOne, two, three.")),
        ],
        False,
    ),
    "tools that are not used": ([_HELLO, _WELL], True),
    "a system prompt and tools": ([_SYSTEM, _HELLO, _WELL, _MORE, _SURE], True),
    "a tool call": ([_RAIN, _says(None, calls=[_call(1, "Paris")])], True),
    "a tool call beside text": ([_RAIN, _says("Let me look outside.", calls=[_call(1, "Paris")])], True),
    "a tool call after reasoning": ([_RAIN, _says(None, "I need the forecast.", [_call(1, "Paris")])], True),
    "a tool call without arguments": ([_RAIN, _says(None, calls=[_call(1, None)])], True),
    "a tool call with several arguments": (
        [_RAIN, _says(None, calls=[_call(1, 'Paris "sur" Seine\n', days=3, hours=[6, 12], more={"wind": True})])],
        True,
    ),
    "two tool calls at once": ([_BOTH, _says(None, calls=[_call(1, "Paris"), _call(2, "Rome")])], True),
    "an answer after a tool result": (
        [_RAIN, _says(None, calls=[_call(1, "Paris")]), _result(1, "sunny"), _says("No, it stays dry.")],
        True,
    ),
    "an answer after two tool results": (
        [
            *(_BOTH, _says(None, calls=[_call(1, "Paris"), _call(2, "Rome")])),
            *(_result(1, "sunny"), _result(2, '{"sky": "grey"}'), _says("Only in Rome, perhaps.")),
        ],
        True,
    ),
    "two rounds of tools": (
        [
            *(_BOTH, _says(None, calls=[_call(1, "Paris")]), _result(1, "sunny")),
            *(_says(None, calls=[_call(2, "Rome")]), _result(2, "grey"), _says("Only in Rome, perhaps.")),
        ],
        True,
    ),
    "an agent with reasoning": (
        [
            *(_SYSTEM, _RAIN, _says(None, "I need the forecast.", [_call(1, "Paris")]), _result(1, "sunny")),
            *(_says("No, it stays dry.", "The forecast is good."), _user("Thank you."), _says("Any time!", "Polite.")),
        ],
        True,
    ),
}
"""For each kind of chat its messages and whether tools are on offer."""


@dataclass(frozen=True)
class KindResult:
    """What is trained on of one kind of chat.

    Args:
        kind: which kind, a key of `KINDS`.
        status: `EXACT`, `MARKED` or `LEFT_OUT`, the worst of its answers'.
        num_answers: assistant turns in the chat.
        left_out: for each answer that isn't trained on, which message it is and why.
        samples: each sample as pieces of text, each with whether it is trained on.
    """

    kind: str
    status: str
    num_answers: int
    left_out: list[tuple[str, str]]
    samples: list[list[tuple[str, bool]]]


def check_template(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None
) -> list[KindResult]:
    """Try all `KINDS` of chats on a tokenizer's chat template.

    Raises:
        PeagleError: the tokenizer has no chat template, or one that is no valid Jinja.
    """
    chats = [
        read_chat({"messages": messages, "tools": TOOLS if has_tools else None}, kind)
        for kind, (messages, has_tools) in KINDS.items()
    ]
    results = []
    for kind, chat, masked in zip(KINDS, chats, ChatTokenizer(tokenizer, template_kwargs).mask(chats), strict=True):
        is_marked = any(sample.marked for sample in masked.samples)
        results.append(
            KindResult(
                kind,
                LEFT_OUT if masked.left_out else MARKED if is_marked else EXACT,
                sum(message["role"] == "assistant" for message in chat.messages),
                [(chat.field_of(entry.message or 0), entry.reason) for entry in masked.left_out],
                [list(_pieces(tokenizer, one.input_ids.tolist(), one.loss_mask.tolist())) for one in masked.samples],
            )
        )
    return results


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[int]) -> Iterator[tuple[str, bool]]:
    for is_trained_on, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1] == 1):
        yield str(tokenizer.decode([id_ for id_, _ in run])), is_trained_on


def show_template(
    model: str,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | str | None = None,
    page: str | None = None,
) -> list[KindResult]:
    """Print what a model's chat template lets be trained on, kind by kind of chat; write it as a page too if asked.

    Raises:
        PeagleError: the tokenizer can't be loaded, it has no chat template, or the page can't be written.
    """
    tokenizer = load_tokenizer(model, trust_remote_code, chat_template)
    results = check_template(tokenizer, read_template_kwargs(chat_template_kwargs))
    is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n".join(_lines(results, *(_COLOURS if is_coloured else _BRACKETS))))
    if page is not None:
        text = render(_PAGE, model=model, template=chat_template, results=results, counts=_counts(results))
        with atomic_path(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        logger.info("%s shows the same as a page.", page)
    return results


def _counts(results: list[KindResult]) -> dict[str, int]:
    """How many kinds of chats have each status."""
    return {status: sum(result.status == status for result in results) for status in (EXACT, MARKED, LEFT_OUT)}


def _lines(results: list[KindResult], opening: str, closing: str) -> Iterator[str]:
    for result in results:
        number = f", {len(result.left_out)} of {result.num_answers} answers" if result.left_out else ""
        yield f"{result.kind}: {result.status}{number}"
        yield from (f"    {where}: {reason}" for where, reason in result.left_out)
        for sample in result.samples:
            text = "".join(f"{opening}{piece}{closing}" if is_trained_on else piece for piece, is_trained_on in sample)
            yield "    | " + text.replace("\n", "\n    | ")
    yield ", ".join(f"{count} {status}" for status, count in _counts(results).items() if count) + "."
    yield f"Text between {opening}these{closing} is trained on."
