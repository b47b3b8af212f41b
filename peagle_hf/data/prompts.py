"""Prompts: the user turns of files and hub datasets, and the removal of near-duplicates among them."""

import hashlib
import json
import math
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..console import progress_bar
from ..errors import PeagleError
from .chats import Unlearnable, check_text, read_chat
from .sources import open_source, source_name

if TYPE_CHECKING:
    import datasets

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese letters."""
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
MAX_PROMPT_SIMILARITY = 0.5
"""Jaccard similarity of the 5-grams of two prompts above which they are near-duplicates."""

_ODD = 0x9E3779B97F4A7C15
"""Odd multiplier of the hash of a run of words, so that the order of the words counts."""


@dataclass(frozen=True)
class Prompt:
    """The user's turns of a chat, and its system messages.

    Args:
        tools: JSON schemas of the tools that the chat offers, or None.
        place: file name (without its folder) and line, or the hub dataset and row, where the prompt was read.
    """

    id: str
    category: str
    system: list[dict[str, Any]]
    turns: list[str]
    tools: list[Any] | None = None
    place: str = ""

    def dropped(self, reason: str) -> dict[str, str]:
        """The entry of a report about this prompt, which is left out, with the reason."""
        place = {"place": self.place} if self.place else {}
        return {"id": self.id, "category": self.category, **place, "reason": reason}

    @property
    def digest(self) -> str:
        """32 hex digits of SHA-256 of the content, without id, category and place."""
        content = [self.system, self.turns, *([self.tools] if self.tools else [])]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def read_prompts(
    source: "str | datasets.Dataset", dropped: list[dict[str, str]], to_answer: bool = True
) -> list[Prompt]:
    """Read the prompts of a file or dataset (see `RegenerateArguments.prompts`), their user turns alone.

    Args:
        dropped: receives an entry (`Prompt.dropped`) for each row that can't be used.
        to_answer: also drop rows that no model can answer; False for prompts that are only compared with others.

    Raises:
        PeagleError: the source can't be read or a row is malformed.
    """
    prompts = []
    with tempfile.TemporaryDirectory() as folder:
        rows = open_source(source, Path(folder))
        for index in progress_bar(range(len(rows)), desc=f"Reading {source_name(source)}"):
            place, row = rows.read(index)
            prompt = Prompt(
                _label(row, ("question_id", "id"), str(index)),
                _label(row, ("category",), "chat"),
                system=[],
                turns=[],
                place=_writable(_without_folder(place)),
            )
            try:
                prompt, roles = _with_content(prompt, row, place)
                if to_answer:
                    _check_answerable(prompt, roles)
            except Unlearnable as reason:
                dropped.append(prompt.dropped(str(reason)))
            else:
                prompts.append(prompt)
    return prompts


def _check_answerable(prompt: Prompt, roles: list[str]) -> None:
    """Raise `Unlearnable` for a prompt that no model can answer."""
    check_text(json.dumps([prompt.system, prompt.turns, prompt.tools], ensure_ascii=False))
    if "tool" in roles and "user" in roles[roles.index("tool") :]:
        raise Unlearnable("a user turn follows a tool result, which can't be regenerated")


def _label(row: dict[str, Any], names: Sequence[str], default: str) -> str:
    """The first of these fields that isn't null, as text that can be written to a file."""
    return _writable(str(next((row[name] for name in names if row.get(name) is not None), default)))


def _without_folder(place: str) -> str:
    """The place without the file's folder, since what is written about a prompt may be published."""
    source, comma, number = place.rpartition(", ")
    is_path = source.count("/") > 1 or Path(source).exists()
    return f"{Path(source).name if is_path else source}{comma}{number}"


def _writable(text: str) -> str:
    """Write half a surrogate pair as an escape, such as \\ud83d."""
    return text.encode("utf-8", "backslashreplace").decode()


def _with_content(prompt: Prompt, row: dict[str, Any], place: str) -> tuple[Prompt, list[str]]:
    """The prompt with the content of a row, and the roles of the row's messages."""
    turns, listed = row.get("turns"), row.get("prompt")
    if turns is None and listed and isinstance(listed, list) and all(isinstance(turn, str) for turn in listed):
        turns = listed  # as in MT-bench on the hub
    if turns is not None:
        if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns)):
            raise PeagleError(f"{place}: `turns` must be a list of texts, none of them empty. Correct the row.")
        row = {**row, "messages": [{"role": "user", "content": turn} for turn in turns]}
    # The chosen and the rejected answer follow the same user turns, so either will do.
    chat = read_chat(row, place, preference="chosen")
    messages = chat.messages
    turns = [message["content"] for message in messages if message["role"] == "user"]
    if not any(turn.strip() for turn in turns):
        raise Unlearnable("no user turn")
    system = [message for message in messages if message["role"] in ("system", "developer")]
    return replace(prompt, system=system, turns=turns, tools=chat.tools), [message["role"] for message in messages]


def distinct(prompts: list[Prompt], excluded: list[Prompt], dropped: list[dict[str, str]]) -> list[Prompt]:
    """Remove prompts that resemble an excluded prompt or one that was kept before.

    A prompt resembles an excluded one also if a single turn of it does, or if it resembles the other's first turn.
    """
    sets = [_word_5_grams(" ".join(prompt.turns)) for prompt in prompts]
    if excluded:
        kept = []
        for number, near in enumerate(_near_excluded(prompts, sets, excluded)):
            if near:
                dropped.append(prompts[number].dropped("resembles an excluded prompt"))
            else:
                kept.append(number)
        prompts, sets = [prompts[number] for number in kept], [sets[number] for number in kept]
    known = _NearDuplicates(sets)
    kept = []
    for number, prompt in enumerate(prompts):
        if known.find(number):
            dropped.append(prompt.dropped("resembles an earlier prompt"))
        else:
            known.add(number)
            kept.append(number)
    return [prompts[number] for number in kept]


def _near_excluded(prompts: list[Prompt], sets: list[np.ndarray], excluded: list[Prompt]) -> Iterable[bool]:
    """For each prompt whether it resembles an excluded one."""
    texts = {text for prompt in excluded for text in (" ".join(prompt.turns), prompt.turns[0])}
    turns = [_turns_5_grams(prompt) for prompt in prompts]
    known = _NearDuplicates([*map(_word_5_grams, sorted(texts)), *sets, *(own for one in turns for own in one)])
    for number in range(len(texts)):
        known.add(number)
    whole = len(texts)
    turn = whole + len(sets)
    for own in turns:
        yield known.find(whole) or any(known.find(number) for number in range(turn, turn + len(own)))
        whole, turn = whole + 1, turn + len(own)


def _turns_5_grams(prompt: Prompt) -> list[np.ndarray]:
    return [_word_5_grams(turn) for turn in prompt.turns] if len(prompt.turns) > 1 else []


class _NearDuplicates:
    """Finds whether a set of 5-grams resembles one that was added before, without approximation.

    Comparing all pairs would take hours for 100,000 prompts, so this is the prefix filter of PPJoin. Sets of a and b
    5-grams have a Jaccard similarity above s (`MAX_PROMPT_SIMILARITY`) if they have more than s / (1 + s) · (a + b) in
    common. Sort the 5-grams of each by one order, the rarest first: the first common one must have that many behind it
    in both sets. So only sets are compared that share a 5-gram early enough in this order, and what many prompts
    share, such as an instruction that all of them begin with, comes last. 5-grams of only one set are not stored.

    Args:
        sets: all sets that will be added or looked for, known by their number: unique 64-bit hashes each.
    """

    def __init__(self, sets: Sequence[np.ndarray]):
        self.sizes = np.array([len(own) for own in sets], dtype=np.int32)
        grams = np.concatenate([np.empty(0, dtype=np.uint64), *sets])
        grams.sort()
        shared, counts = np.unique(grams[1:][grams[1:] == grams[:-1]], return_counts=True)
        del grams
        order = np.argsort(counts, kind="stable")
        ranks = np.empty(len(shared), dtype=np.int32)
        ranks[order] = np.arange(len(shared))
        self.shared = [np.sort(ranks[_positions(own, shared)]) for own in sets]
        # The sets that contain rank r, and its place in each of them, are stored from `starts[r]` to `starts[r] +
        # lengths[r] - 1`.
        self.starts = np.concatenate([[0], np.cumsum(counts[order] + 1)])
        self.lengths = np.zeros(len(shared), dtype=np.int32)
        self.smallest = np.full(len(shared), np.iinfo(np.int32).max // 2, dtype=np.int32)
        self.holders = np.empty(self.starts[-1], dtype=np.int32)
        self.places = np.empty(self.starts[-1], dtype=np.int32)

    def add(self, number: int) -> None:
        ranks, places = self._prefix(number)
        slots = self.starts[ranks] + self.lengths[ranks]
        self.holders[slots], self.places[slots] = number, places
        self.lengths[ranks] += 1
        self.smallest[ranks] = np.minimum(self.smallest[ranks], self.sizes[number])

    def find(self, number: int) -> bool:
        """Whether a set that was added before resembles this one."""
        size, own = self.sizes[number], self.shared[number]
        ranks, places = self._prefix(number)
        may_lead = size - places > _needed(size, self.smallest[ranks])
        compared = set()
        for rank, place in zip(ranks[may_lead].tolist(), places[may_lead].tolist(), strict=True):
            slots = slice(self.starts[rank], self.starts[rank] + self.lengths[rank])
            others = self.holders[slots]
            left = np.minimum(size - place, self.sizes[others] - self.places[slots])
            for other in others[left > _needed(size, self.sizes[others])].tolist():
                if other in compared:
                    continue
                compared.add(other)
                common = len(np.intersect1d(own, self.shared[other], assume_unique=True))
                if common / (size + self.sizes[other] - common) > MAX_PROMPT_SIMILARITY:
                    return True
        return False

    def _prefix(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The members by which a set may be found: their ranks, and their places in the order of all its members.

        One at place p leaves size - p, and even the smallest set that is alike has more than s · size in common.
        """
        size, own = int(self.sizes[number]), self.shared[number]
        num_unshared = size - len(own)
        end = max(num_unshared, math.ceil(size * (1 - MAX_PROMPT_SIMILARITY)))
        return own[: end - num_unshared], np.arange(num_unshared, end)


def _needed(size: Any, other_size: Any) -> Any:
    """The number of common members above which two sets of these sizes are near-duplicates."""
    return (size + other_size) * MAX_PROMPT_SIMILARITY / (1 + MAX_PROMPT_SIMILARITY)


def _positions(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Indices of values in a sorted array; values that aren't in it are left out."""
    places = np.searchsorted(among, values)
    if not len(among):
        return places[:0]
    return places[among.take(places, mode="clip") == values]


def _word_5_grams(text: str) -> np.ndarray:
    """The 5-grams of a text's words as sorted, unique 64-bit hashes; a text of fewer words is one gram."""
    hashes = np.array([_word_hash(word) for word in words(text)], dtype=np.uint64)
    width = min(5, len(hashes))
    runs = np.zeros(max(1, len(hashes) - width + 1), dtype=np.uint64)
    for start in range(width):
        runs = runs * np.uint64(_ODD) + hashes[start : start + len(runs)]
    return np.unique(runs)


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def words(text: str) -> list[str]:
    """The words of a text, without case, punctuation and Unicode variants (decomposed or full-width letters).

    Scripts that put no spaces between words, such as Chinese, Japanese and Thai, give single letters.
    """
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


def grams(items: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    """All runs of n adjacent items; fewer items than n are one run."""
    return [tuple(items[start : start + n]) for start in range(max(1, len(items) - n + 1))]
