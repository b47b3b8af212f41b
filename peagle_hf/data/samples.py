"""Conversations become samples: which conversations, in which order, and what each contributes.

A *row* here is one of the data (a line of a file, a row of a hub dataset), known by its number over all sources. A
*candidate* is a sample, or an answer or a row that gave none, with the reason.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..console import number_of, progress_bar
from ..errors import PeagleError
from .chats import Chat, Unlearnable, count_answers, read_chat
from .loss_mask import ChatTokenizer, MaskedSample
from .prepared_dataset import column, row_digest
from .sources import Source
from .tokenizer import ChatOptions

if TYPE_CHECKING:
    import datasets

ANSWER_COLUMNS = ("answers", "cut_answers", "marked_answers")
"""Columns of a candidate that count assistant turns: whole (or left out), cut, and marked in part by the template."""
CONVERSATION = "conversation"
"""A field of the data: rows of one source with the same value, text or an integer, are one conversation."""
LEAST_READ = 256
"""Least number of conversations that are tokenized at once until there are `max_samples` samples."""


@dataclass(frozen=True)
class SampleMaker:
    """Turns rows of the data into candidates, for `Dataset.map`: see `_candidate_features` for their columns.

    Args:
        chat_tokenizer: turns chats into tokens and loss masks.
        sources: all sources, in their order.
        num_ids: one more than the largest id of the vocabulary.
        vocabulary: fingerprint of the vocabulary, which rows that are tokenized already must have.
        chat_options: those of `prepare`, which rows that are tokenized already must have.
        template: fingerprint of the chat template, which rows that are tokenized already must have.
        seq_length: tokens after which a sample is cut.
        min_learnt_tokens: a sample with fewer tokens to train on is left out.
        preference: which answer of preference rows to take; None refuses such rows.
    """

    chat_tokenizer: ChatTokenizer
    sources: list[Source]
    num_ids: int
    vocabulary: str
    chat_options: ChatOptions
    template: str
    seq_length: int
    min_learnt_tokens: int
    preference: str | None

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        read = [self._read_row(number) for number in batch["number"]]
        masked = iter(self.chat_tokenizer.mask([content for _, content in read if isinstance(content, Chat)]))
        candidates: list[dict[str, Any]] = []
        for number, conversation_id, (place, content) in zip(*batch.values(), read, strict=True):
            common = {"number": number, "conversation_id": conversation_id, "place": place}
            if isinstance(content, MaskedSample):
                candidates.append(common | self._sample(content))
            elif isinstance(content, Chat):
                chat = next(masked)
                candidates += [common | self._sample(sample) for sample in chat.samples]
                for entry in chat.left_out:
                    where = None if entry.message is None else content.field_of(entry.message)
                    candidates.append(common | _left_out(entry.reason, place, where, int(where is not None)))
            else:
                candidates.append(common | content)
        return {name: [one.get(name) for one in candidates] for name in _candidate_features()}

    def _read_row(self, number: int) -> tuple[str, Chat | MaskedSample | dict[str, Any]]:
        """The place of a row, and its content or the columns that say why it is left out."""
        place, content = _read(self.sources, number)
        if "input_ids" in content and "loss_mask" in content:
            return place, self._read_tokens(content, place)
        try:
            return place, read_chat(content, place, self.preference)
        except Unlearnable as error:
            return place, _left_out(str(error), place, error.field, count_answers(content))

    def of_first_wrong_row(self, error: PeagleError) -> PeagleError:
        """The error of the first wrong row of the data, with how many others there are; `error` if no row is wrong.

        Conversations are read in a drawn order and by several processes, so another wrong row may have been met first.
        """
        first, num_others = "", -1
        for number in progress_bar(range(sum(map(len, self.sources))), desc="Looking for wrong rows"):
            try:
                self._read_row(number)
            except PeagleError as found:
                first, num_others = first or str(found), num_others + 1
        if num_others < 1:
            return PeagleError(first) if first else error
        others = number_of(num_others, "other row can't be read", "other rows can't be read")
        return PeagleError(f"{first} {others} either.")

    def _read_tokens(self, row: dict[str, Any], place: str) -> MaskedSample:
        """Check a row of the data that is tokenized already; each run of 1 in its loss mask is an answer.

        `regenerate` writes into each row with which tokenizer, chat options and chat template it was made.
        """
        if row.get("tokenizer") not in (None, self.vocabulary):
            raise PeagleError(
                f"{place}: the input_ids are of another tokenizer, that of {row.get('model') or 'an unknown model'}. "
                "Name that model with --model, run peagle-hf regenerate with this one, or remove `input_ids` from the "
                "rows so that their `messages` are tokenized."
            )
        if row.get("chat_options") not in (None, self.chat_options.fingerprint()):
            raise PeagleError(
                f"{place}: the input_ids were written with other chat options ({row['chat_options']}) than those here "
                f"({self.chat_options.fingerprint()}), which the drafter would be measured and served with. Give "
                "peagle-hf prepare the --chat-template and --chat-template-kwargs that peagle-hf regenerate had, or "
                "run peagle-hf regenerate again with those given here."
            )
        if row.get("template_fingerprint") not in (None, self.template):
            raise PeagleError(
                f"{place}: the input_ids were written with another chat template than the verifier's own is now, with "
                "which the drafter would be measured and served. Put the old template back, or name another --output "
                "for peagle-hf regenerate and run it again."
            )
        for name, limit in (("input_ids", self.num_ids), ("loss_mask", 2)):
            values = row[name]
            if not isinstance(values, list) or not all(type(value) is int and 0 <= value < limit for value in values):
                what = "ids of the tokenizer's vocabulary" if name == "input_ids" else "a loss mask"
                raise PeagleError(
                    f"{place}: {name} must be a list of integers from 0 to {limit - 1}, {what}. Was it made for "
                    "another model? Correct it or take the row out."
                )
        if len(row["input_ids"]) != len(row["loss_mask"]):
            raise PeagleError(
                f"{place}: there are {len(row['input_ids'])} input_ids but {len(row['loss_mask'])} values in "
                "loss_mask. Correct the row or take it out."
            )
        loss_mask = np.array(row["loss_mask"], dtype=np.int8)
        ends = (np.flatnonzero(np.diff(loss_mask, append=0) == -1) + 1).tolist()
        return MaskedSample(np.array(row["input_ids"], dtype=np.int32), loss_mask, ends, [])

    def _sample(self, masked: MaskedSample) -> dict[str, Any]:
        """The columns of a sample, cut after `seq_length` tokens, or the reason why it is left out."""
        ids, mask = masked.input_ids[: self.seq_length], masked.loss_mask[: self.seq_length]
        if mask.sum() < self.min_learnt_tokens:
            limit = f"{self.min_learnt_tokens} tokens to train on within the first {self.seq_length}"
            return {"reason": f"fewer than {limit}", "answers": len(masked.ends)}
        num_cut = sum(end > self.seq_length for end in masked.ends)
        return {
            "input_ids": ids,
            "loss_mask": mask,
            "seq_len": len(ids),
            "num_cut": len(masked.input_ids) - len(ids),
            "content": row_digest(ids, mask),
            "answers": len(masked.ends) - num_cut,
            "cut_answers": num_cut,
            "marked_answers": len(masked.marked),
        }


def _left_out(reason: str, place: str, where: str | None, num_answers: int) -> dict[str, Any]:
    """The columns that say why something is left out, and how many answers that costs."""
    return {
        "place": place if where is None else f"{place}, {where}",
        "reason": reason.encode(errors="backslashreplace").decode(),
        "answers": num_answers,
    }


def _read(sources: list[Source], number: int) -> tuple[str, dict[str, Any]]:
    """The place and the content of a row, by its number over all sources."""
    for source in sources:
        if number < len(source):
            return source.read(number)
        number -= len(source)
    raise IndexError(number)


@dataclass(frozen=True)
class Conversations:
    """Which conversation each row of the data is of; conversations are numbered from source to source.

    Args:
        ids: the conversation's number of each row, int64 [rows].
        row_ends: of each source the number after its last row, int64 [sources].
        last_ids: of each source the highest number of a conversation, int64 [sources].
        sizes: conversations of each source, int64 [sources].
    """

    ids: np.ndarray
    row_ends: np.ndarray
    last_ids: np.ndarray
    sizes: np.ndarray


def number_conversations(sources: list[Source]) -> Conversations:
    """Number the conversations of all sources in turn; rows of one source may share one (see `CONVERSATION`).

    Raises:
        PeagleError: a row's field is neither text nor an integer.
    """
    numbers = np.arange(sum(map(len, sources)))
    start = end = 0  # numbers of rows and of conversations before this source
    for source in sources:
        first: dict[Any, int] = {}
        for index, value in enumerate(_conversation_values(source)):
            if isinstance(value, list):  # the field holds the messages themselves
                value = None
            if value is not None and type(value) not in (str, int):
                raise PeagleError(
                    f"{source.read(index)[0]}: {CONVERSATION} must be text or an integer that rows of one conversation "
                    f"share, but is {type(value).__name__}. Correct it, or take it out."
                )
            numbers[start + index] = end + first.setdefault(index if value is None else (value,), len(first))
        start, end = start + len(source), end + len(first)
    row_ends = np.cumsum([len(source) for source in sources])
    # The conversations of a source are numbered after those of the source before, so the maximum up to its last row is
    # its own highest number.
    last_ids = np.maximum.accumulate(numbers)[row_ends - 1]
    return Conversations(numbers, row_ends, last_ids, np.diff(last_ids, prepend=-1))


def _conversation_values(source: Source) -> Iterator[Any]:
    """The field `conversation` of each row; None where it is absent or holds the messages themselves."""
    if source.files is None:
        names = source.rows.column_names
        values = column(source.rows, CONVERSATION) if CONVERSATION in names else [None] * len(source)
        has_others = "messages" in names or "conversations" in names
        yield from (None if isinstance(value, list) and not has_others else value for value in values)
        return
    for batch in source.rows.iter(batch_size=1000):
        # Most rows have no such field, so searching their text saves decoding them twice.
        for text in batch["json"]:
            row = json.loads(text) if f'"{CONVERSATION}"' in text else {}
            value = row.get(CONVERSATION)
            is_messages = isinstance(value, list) and not row.keys() & {"messages", "conversations"}
            yield None if is_messages else value


def _candidate_features() -> "datasets.Features":
    """The columns of a candidate; those that don't apply to it are null.

    A sample has `input_ids`, `loss_mask`, `seq_len`, `num_cut` (tokens that were cut off) and `content` (a hash of ids
    and mask). What is left out has a `reason`. Both have `number` (row of the data), `conversation_id`, `place` (for
    people) and the counts of `ANSWER_COLUMNS`.
    """
    from datasets import Features, List, Value

    return Features(
        {
            "input_ids": List(Value("int32")),
            "loss_mask": List(Value("int8")),
            "seq_len": Value("int64"),
            "number": Value("int64"),
            "conversation_id": Value("int64"),
            "num_cut": Value("int64"),
            "content": Value("string"),
            **{name: Value("int64") for name in ANSWER_COLUMNS},
            "place": Value("string"),
            "reason": Value("string"),
        }
    )


def tokenize_in_order(
    maker: SampleMaker,
    conversation_ids: np.ndarray,
    order: np.ndarray,
    max_samples: int | None,
    num_workers: int,
    scratch: Path,
    origin: str,
) -> tuple["datasets.Dataset", int]:
    """Turn whole conversations into candidates, in `order`, until there are `max_samples` samples among them.

    Args:
        conversation_ids: the conversation's number of each row of the data, int64 [rows].
        order: numbers of the conversations, int64.
        num_workers: processes that tokenize.
        scratch: folder for the candidates.
        origin: text that tells this dataset from others, for the fingerprints of `datasets`.

    Returns:
        The candidates, and the number of conversations that they come from.

    Raises:
        PeagleError: rows are wrong; names the first one.
    """
    from datasets import Dataset, concatenate_datasets

    place = np.full(conversation_ids.max() + 1, len(order))
    place[order] = np.arange(len(order))
    numbers = np.argsort(place[conversation_ids], kind="stable")
    ends = np.searchsorted(place[conversation_ids[numbers]], np.arange(len(order)), side="right")
    parts: list[Dataset] = []
    num_kept = num_read = 0
    while num_read < len(order) and num_kept < (max_samples or math.inf):
        wanted = max(max_samples - num_kept, LEAST_READ) if max_samples else len(order)
        start, num_read = ends[num_read - 1] if num_read else 0, min(num_read + wanted, len(order))
        part = numbers[start : ends[num_read - 1]]
        rows = Dataset.from_dict({"number": part, "conversation_id": conversation_ids[part]})
        try:
            made = rows.map(
                maker,
                batched=True,
                batch_size=100,
                num_proc=num_workers if num_workers > 1 else None,
                features=_candidate_features(),
                cache_file_name=str(scratch / f"rows_{len(parts)}.arrow"),
                new_fingerprint=hashlib.sha256(f"{origin} {start}".encode()).hexdigest()[:16],
                desc="Tokenizing",
            )
        except PeagleError as error:
            raise maker.of_first_wrong_row(error) from error
        parts.append(made)
        num_kept += column(parts[-1], "reason").count(None)
    candidates = concatenate_datasets(parts)
    if max_samples is None or num_kept < max_samples:
        return candidates, num_read
    kept = [index for index, reason in enumerate(column(candidates, "reason")) if reason is None]
    places = place[column(candidates, "conversation_id")]
    last = places[kept[max_samples - 1]]
    return candidates.select(range(np.searchsorted(places, last, side="right"))), int(last) + 1


def number_copies(samples: "datasets.Dataset") -> tuple[np.ndarray, int]:
    """Give conversations with the same samples, token for token, the same number: the lowest of theirs.

    Returns:
        The conversation's number of each sample, int64, and how many conversations are copies of another one.
    """
    contents: dict[int, list[str]] = {}
    numbers = column(samples, "conversation_id")
    for conversation_id, content in zip(numbers, column(samples, "content"), strict=True):
        contents.setdefault(conversation_id, []).append(content)
    first: dict[tuple[str, ...], int] = {}
    shared = {number: first.setdefault(tuple(contents[number]), number) for number in sorted(contents)}
    return np.array([shared[number] for number in numbers]), len(contents) - len(first)


def draw_order(sizes: list[int], weights: list[float] | None, seed: int) -> np.ndarray:
    """Draw the order in which conversations are read, with the seed.

    Args:
        sizes: conversations of each source.
        weights: share of each source in a mixture that ends where the first source runs out; None reads all of all.

    Returns:
        Numbers of conversations, int64.
    """
    from datasets import Dataset, interleave_datasets

    generator = np.random.default_rng(seed)
    if weights is None:
        return generator.permutation(sum(sizes))
    starts = np.cumsum([0, *sizes[:-1]])
    shuffled = [
        Dataset.from_dict({"id": start + generator.permutation(size)})
        for start, size in zip(starts, sizes, strict=True)
    ]
    shares = np.array(weights) / sum(weights)
    mixture = interleave_datasets(shuffled, shares.tolist(), seed=seed)
    return np.array(mixture.with_format("numpy")["id"][:])
