"""Prompts: what users say, read from files and hub datasets, without those that resemble each other."""

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import PeagleError
from .chats import Unlearnable, open_source, read_chat

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese letters."""
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
MAX_PROMPT_SIMILARITY = 0.5
"""Jaccard similarity of the 5-grams of two prompts above which they are near-duplicates."""


@dataclass(frozen=True)
class Prompt:
    """What a user says in a chat, turn by turn, after the system messages if there are any."""

    id: str
    category: str
    system: list[dict[str, Any]]
    turns: list[str]

    def dropped(self, reason: str) -> dict[str, str]:
        """What a report says of a prompt that is left out."""
        return {"id": self.id, "category": self.category, "reason": reason}


def read_prompts(source: str, dropped: list[dict[str, str]]) -> list[Prompt]:
    """Read the prompts of a file or hub dataset (see `RegenerateArguments.prompts`), their user turns alone.

    What can't be used is added to `dropped`, with its place and the reason.

    Raises:
        PeagleError: the source can't be read or a row is malformed.
    """
    prompts = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = open_source(source, Path(folder))
        except FileNotFoundError as error:
            raise PeagleError(f"There is no file {source}. Name a .jsonl or .json file with prompts.") from error
        for index in tqdm(range(len(rows)), desc=f"Reading {source}", disable=None):
            place, row = rows.read(index)
            try:
                prompts.append(_read_prompt(row, place, str(row.get("question_id", row.get("id", index)))))
            except Unlearnable as reason:
                dropped.append({"id": place, "category": "", "reason": str(reason)})
    return prompts


def _read_prompt(row: dict[str, Any], place: str, identifier: str) -> Prompt:
    if (turns := row.get("turns")) is not None:
        if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns)):
            raise PeagleError(f"{place}: `turns` must be a list of texts, none of them empty. Correct the row.")
        messages = [{"role": "user", "content": turn} for turn in turns]
    elif "messages" in row or "conversations" in row:
        messages = read_chat(row, place).messages
    else:
        raise PeagleError(
            f"{place}: there is neither `turns` nor `messages` nor `conversations`; the fields are "
            f"{', '.join(row) or 'none'}. Rename the field that holds what the user says."
        )
    turns = [message["content"] for message in messages if message["role"] == "user"]
    if not any(turn.strip() for turn in turns):
        raise Unlearnable("no user turn")
    system = [message for message in messages if message["role"] in ("system", "developer")]
    return Prompt(identifier, str(row.get("category", "chat")), system, turns)


def distinct(prompts: list[Prompt], excluded: list[Prompt], dropped: list[dict[str, str]]) -> list[Prompt]:
    """Keep the prompts that resemble neither an excluded one nor one kept before."""
    known = _Neighbours()
    for prompt in excluded:
        known.add(prompt, "an excluded prompt")
    kept = []
    for prompt in prompts:
        if near := known.find(prompt):
            dropped.append(prompt.dropped(f"resembles {near}"))
        else:
            known.add(prompt, "an earlier prompt")
            kept.append(prompt)
    return kept


class _Neighbours:
    """Finds prompts whose 5-grams of words overlap, by an index from 5-grams to prompts."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.labels: list[str] = []
        self.holders: dict[tuple[str, ...], list[int]] = {}

    def add(self, prompt: Prompt, label: str) -> None:
        own = _word_5_grams(prompt)
        for gram in own:
            self.holders.setdefault(gram, []).append(len(self.sizes))
        self.sizes.append(len(own))
        self.labels.append(label)

    def find(self, prompt: Prompt) -> str | None:
        """Give the label of the first prompt that is a near-duplicate of this one."""
        own = _word_5_grams(prompt)
        shared = Counter(holder for gram in own for holder in self.holders.get(gram, ()))
        near = [
            holder
            for holder, count in shared.items()
            if count / (self.sizes[holder] + len(own) - count) > MAX_PROMPT_SIMILARITY
        ]
        return self.labels[min(near)] if near else None


def _word_5_grams(prompt: Prompt) -> set[tuple[str, ...]]:
    """Give the 5-grams of a prompt's words; a shorter prompt is one gram."""
    return set(grams(words(" ".join(prompt.turns)), 5))


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; a letter is one where none are written between spaces."""
    return _WORDS.findall(text.lower())


def grams(items: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    """The runs of n items; fewer items are one run."""
    return [tuple(items[start : start + n]) for start in range(max(1, len(items) - n + 1))]
