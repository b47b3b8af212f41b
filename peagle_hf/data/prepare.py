"""Step 1: chats to token ids and a loss mask that is 1 exactly where the assistant speaks."""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..arguments import CONFIG, Arguments, check_ranges, config_path, write_config
from ..errors import PeagleError
from ..files import atomic_path, locked_folder, remove_leftovers, with_places, write_json
from ..fingerprint import file_fingerprint
from ..verifier.draft_vocabulary import load_token_freq
from .cache_storage import cache_folder, cached_rows
from .chats import Chat, Unlearnable, count_answers, read_chat
from .loss_mask import ChatTokenizer, MaskedRow
from .prepared_dataset import (
    CHAT_TEMPLATE_FILE,
    DATASET_INFO,
    DATASET_STATE,
    PREPARE_RECORD,
    UNMOVED,
    column,
    digest_of_rows,
    load_prepared,
    read_prepare_record,
    row_digest,
)
from .sources import Source, data_sha256, is_local_file, open_source, source_name
from .tokenizer import (
    CHAT_TEMPLATE_HELP,
    CHAT_TEMPLATE_KWARGS_HELP,
    ChatOptions,
    load_tokenizer,
    read_template_kwargs,
    tokenization_fingerprint,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
)

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

INSPECTION = "inspect"
"""The name, without its ending, of what `peagle-hf data inspect` writes into the folder."""
_ANSWER_COLUMNS = ("answers", "cut_answers", "marked_answers")
COUNTS = (
    *("conversations_in_data", "conversations_read"),
    *("rows", "tokens", "learnt_tokens", "truncated_rows", "cut_tokens"),
)
"""What `prepare.json` counts, of all sources and of each: conversations, rows, what is in the rows and what was cut."""
_CHECKED_FILES = ("data-*.arrow", DATASET_INFO, DATASET_STATE, "token_freq.pt", CHAT_TEMPLATE_FILE)
"""The record has a fingerprint of these, so that whoever reads the dataset notices another file in their place."""
_SKIPPED = "skipped.json"
_OWN_FILES = (PREPARE_RECORD, *_CHECKED_FILES, _SKIPPED, f"{INSPECTION}.html", f"{INSPECTION}.json")

CONVERSATION = "conversation"
"""A field of a row in the data: rows of one source with the same value, text or an integer, are one conversation."""
BYTES_A_TOKEN = 5
"""Of a prepared dataset: an int32 id and an int8 mask."""
LEAST_READ = 256
"""Conversations that are tokenized in one go, at least, until there are `max_samples` rows."""


@dataclass
class PrepareArguments(Arguments):
    """What `peagle-hf prepare` is told; in Python `data` also takes `datasets.Dataset` objects."""

    model: str = field(
        metadata={"aliases": ["--verifier"], "help": "The target model, a hub name or a folder: its tokenizer is used."}
    )
    data: list[str] = field(
        metadata={
            "help": "Conversations, one or more of: sharegpt, ultrachat, a file (.jsonl, .json, .parquet, .csv, also "
            "compressed as .gz or .zst), a folder of such files, a hub dataset as org/name, org/name:split or "
            "org/name:configuration:split. The flag may be repeated.",
            "action": "extend",
        }
    )
    output: str = field(
        default="./output", metadata={"aliases": ["--data-path"], "help": "Folder for the prepared dataset."}
    )
    weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Mix: the share of the conversations that each --data is to have, in their order and in any unit. "
            "The mixture ends where the first --data runs out (default: all conversations of all)."
        },
    )
    max_samples: int | None = field(
        default=None,
        metadata={
            "help": "Make this many rows (samples), from conversations of all --data that are drawn with the seed; "
            "extract --max-samples counts the same rows (default: the rows of all conversations)."
        },
    )
    seq_length: int = field(default=8192, metadata={"help": "Cut rows after this many tokens."})
    seed: int = field(default=0, metadata={"help": "Seed of the order in which the conversations come."})
    num_workers: int = field(
        default=1, metadata={"help": "Processes that tokenize.", "aliases": ["--num-preprocessing-workers"]}
    )
    min_learnt_tokens: int = field(
        default=1,
        metadata={
            "help": "Skip rows with fewer assistant tokens than this.",
            "aliases": ["--minimum-valid-tokens"],
        },
    )
    token_freq_path: str | None = field(
        default=None,
        metadata={"help": "A second place for the token counts, which are always in <output>/token_freq.pt."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a dataset that is already in the output folder."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the tokenizer run code from its repository."})
    chat_template: str | None = field(default=None, metadata={"help": CHAT_TEMPLATE_HELP})
    chat_template_kwargs: dict | str | None = field(default=None, metadata={"help": CHAT_TEMPLATE_KWARGS_HELP})
    preference: Literal["chosen", "rejected"] | None = field(
        default=None, metadata={"help": "Of preference rows take this answer (default: such rows are an error)."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Say what would be read and written, and stop."})

    GROUPS: ClassVar = {
        "Input and output": ("model", "data", "output", "overwrite", "token_freq_path", "trust_remote_code", "dry_run"),
        "Which conversations": ("max_samples", "weights", "seed", "preference"),
        "Tokens": ("seq_length", "min_learnt_tokens", "chat_template", "chat_template_kwargs"),
        "Speed": ("num_workers",),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1 = ("max_samples", "seq_length", "num_workers", "min_learnt_tokens")
        check_ranges(self, dict.fromkeys(at_least_1, (1, math.inf)) | {"seed": (0, 2**32 - 1)})


def prepare(arguments: PrepareArguments) -> Path:
    """Tokenize conversations with the target's own chat template and mark what the assistant says.

    The output folder is a `datasets` folder (`load_from_disk`) of the columns `input_ids` (int32), `loss_mask` (int8,
    1 = learnt), `seq_len` and `conversation_id`. Conversations come in an order drawn with the seed, and the rows of
    one lie side by side. Beside it lie `token_freq.pt` (a dict from token id to its number of learnt occurrences),
    `skipped.json` (each answer and row that was left out, with its place and the reason), `prepare.json` (what the
    dataset was made from, and counts, of each source too) and `chat_template.jinja` if one was chosen. Every assistant
    turn is counted once in `prepare.json`, under `answers`: learnt whole, cut, left out or beyond `max_samples`.

    A conversation is one row of the data, or all rows of a source that have the same value in the field
    `conversation`. `conversation_id` numbers the conversations of all sources in turn; those whose rows are the same,
    token for token, share the number of the first, so that no copy of a training row is validated on.

    With `max_samples` there are that many rows, or all if there are fewer; what the last conversation has beyond them
    is among the rows that are left out.

    With `weights` each conversation is drawn from a source with the probability of its weight, as
    `datasets.interleave_datasets` does, none of them twice, until a source runs out or there are `max_samples` rows.

    A dataset made from the same input in the same way is kept as it is, or made anew if a file of it is missing,
    truncated or damaged. Another one stops the work unless `overwrite` is set, which replaces the files written here
    and nothing else, and not under a cache of hidden states, which would no longer fit. The new files take their place
    when all of them are complete.

    Returns:
        The output folder.

    Raises:
        PeagleError: the model or the data can't be read, a row is malformed, no row is left, or the output folder
            holds something else.
    """
    if arguments.weights is not None and (len(arguments.weights) != len(arguments.data) or min(arguments.weights) <= 0):
        raise PeagleError(
            f"--weights {' '.join(map(str, arguments.weights))} must be numbers above 0, one for each of the "
            f"{len(arguments.data)} --data. Leave out the data that is not wanted."
        )
    output = Path(arguments.output)
    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code, arguments.chat_template)
    origin = {
        "model": arguments.model,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "tokenization_fingerprint": tokenization_fingerprint(tokenizer),
        "data": [source_name(data) for data in arguments.data],
        "data_sha256": [data_sha256(data) for data in arguments.data],
        "weights": arguments.weights,
        "max_samples": arguments.max_samples,
        "seq_length": arguments.seq_length,
        "seed": arguments.seed,
        "min_learnt_tokens": arguments.min_learnt_tokens,
        "chat_template": arguments.chat_template,
        "chat_template_kwargs": read_template_kwargs(arguments.chat_template_kwargs),
        "preference": arguments.preference,
    }
    if output.exists() and not output.is_dir():
        raise PeagleError(f"--output {output} is a file. Name a folder.")
    if arguments.dry_run:
        print(_plan(arguments, _is_made(output, origin, arguments.overwrite)))
        return output
    is_cut_off = (output / UNMOVED).exists()
    if not is_cut_off and arguments.token_freq_path is None and _is_made(output, origin, arguments.overwrite):
        logger.info("%s already holds this dataset; it is kept as it is.", output)
        return output  # also where the folder can only be read
    with locked_folder(output, "Wait until it has ended, or name another --output.", "prepare"):
        return _prepare(arguments, output, tokenizer, origin)


def _prepare(
    arguments: PrepareArguments, output: Path, tokenizer: PreTrainedTokenizerBase, origin: dict[str, Any]
) -> Path:
    _finish_move(output)
    if _is_made(output, origin, arguments.overwrite):
        logger.info("%s already holds this dataset; it is kept as it is.", output)
    else:
        remove_leftovers(output, r"\.prepared")
        with atomic_path(output / UNMOVED) as folder:
            folder.mkdir()
            made = _make(folder, tokenizer, arguments, origin)
            write_config(arguments, folder / config_path(output, "prepare").name, "prepare")
            if arguments.chat_template is not None:
                (folder / CHAT_TEMPLATE_FILE).write_text(str(tokenizer.chat_template), encoding="utf-8")
            checked = (path for pattern in _CHECKED_FILES for path in folder.glob(pattern))
            files = {path.name: file_fingerprint(path) for path in checked}
            record = origin | made | {"files": files}
            write_json(folder / PREPARE_RECORD, with_places(record, "model", output))
        _finish_move(output)
    if arguments.token_freq_path is not None:
        with atomic_path(arguments.token_freq_path) as temporary:
            shutil.copyfile(output / "token_freq.pt", temporary)
    return output


def _plan(arguments: PrepareArguments, is_made: bool) -> str:
    """What `prepare` would read and write, for `--dry-run`. Files are read; a hub dataset is not downloaded."""
    lines = []
    num_rows: int | None = 0
    with tempfile.TemporaryDirectory() as scratch:
        for number, data in enumerate(arguments.data):
            if not is_local_file(data):
                lines.append(f"would read {source_name(data)}, of which the length isn't known before it is there")
                num_rows = None
                continue
            (folder := Path(scratch) / str(number)).mkdir()
            found = len(open_source(data, folder))
            lines.append(f"would read {found} conversations of {data}")
            num_rows = None if num_rows is None else num_rows + found
    if is_made:
        lines.append(f"{arguments.output} holds this dataset already and would be kept as it is")
        return "\n".join(lines)
    output = Path(arguments.output)
    lines.append(f"would {'replace the dataset in' if (output / PREPARE_RECORD).exists() else 'write'} {output}")
    limits = [number for number in (num_rows, arguments.max_samples) if number is not None]
    if limits:
        size = min(limits) * arguments.seq_length * BYTES_A_TOKEN
        lines.append(
            f"that is at most {size / 2**20:.1f} MiB for {min(limits)} samples of {arguments.seq_length} tokens, and "
            "more only where a chat takes several samples"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class _RowMaker:
    """Maps rows of the sources, by number, to rows of the dataset, for `Dataset.map`.

    An answer or a row that is left out is a row with the reason and its place; `content` is a hash of the tokens and
    the mask.
    """

    chat_tokenizer: ChatTokenizer
    sources: list[Source]
    num_ids: int
    vocabulary: str
    chat_options: ChatOptions
    seq_length: int
    min_learnt_tokens: int
    preference: str | None

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        read = [self._read_row(number) for number in batch["number"]]
        masked = iter(self.chat_tokenizer.mask([content for _, content in read if isinstance(content, Chat)]))
        rows: list[dict[str, Any]] = []
        for number, conversation_id, (place, content) in zip(*batch.values(), read, strict=True):
            common = {"number": number, "conversation_id": conversation_id, "place": place}
            if isinstance(content, MaskedRow):
                rows.append(common | self._row(content))
            elif isinstance(content, Chat):
                chat = next(masked)
                rows += [common | self._row(row) for row in chat.rows]
                for entry in chat.left_out:
                    where = None if entry.message is None else content.field_of(entry.message)
                    rows.append(common | _left_out(entry.reason, place, where, int(where is not None)))
            else:
                rows.append(common | content)
        return {name: [row.get(name) for row in rows] for name in _working_features()}

    def _read_row(self, number: int) -> tuple[str, Chat | MaskedRow | dict[str, Any]]:
        """The place of a row, and its content or the columns that say why it is left out."""
        place, content = _read(self.sources, number)
        if "input_ids" in content and "loss_mask" in content:
            return place, _read_tokens(content, place, self.num_ids, self.vocabulary, self.chat_options)
        try:
            return place, read_chat(content, place, self.preference)
        except Unlearnable as error:
            return place, _left_out(str(error), place, error.field, count_answers(content))

    def _row(self, row: MaskedRow) -> dict[str, Any]:
        """The columns of a row: what is kept of it, or why it is left out."""
        ids, mask = row.input_ids[: self.seq_length], row.loss_mask[: self.seq_length]
        if mask.sum() < self.min_learnt_tokens:
            limit = f"{self.min_learnt_tokens} learnt tokens within the first {self.seq_length}"
            return {"reason": f"fewer than {limit}", "answers": len(row.ends)}
        num_cut = sum(end > self.seq_length for end in row.ends)
        return {
            "input_ids": ids,
            "loss_mask": mask,
            "seq_len": len(ids),
            "num_cut": len(row.input_ids) - len(ids),
            "content": row_digest(ids, mask),
            "answers": len(row.ends) - num_cut,
            "cut_answers": num_cut,
            "marked_answers": len(row.marked),
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


def _number_conversations(sources: list[Source]) -> np.ndarray:
    """For each row of all sources in turn the number of its conversation, int64 [rows]; see `CONVERSATION`.

    Raises:
        PeagleError: a row's field is neither text nor an integer.
    """
    numbers = np.arange(sum(map(len, sources)))
    start = end = 0  # of the rows before this source, and of their conversations
    for source in sources:
        first: dict[Any, int] = {}
        for index, value in enumerate(_conversation_values(source)):
            if isinstance(value, list):  # the messages, by another name
                value = None
            if value is not None and type(value) not in (str, int):
                raise PeagleError(
                    f"{source.read(index)[0]}: {CONVERSATION} must be text or an integer that rows of one conversation "
                    f"share, but is {type(value).__name__}. Correct it, or take it out."
                )
            numbers[start + index] = end + first.setdefault(index if value is None else (value,), len(first))
        start, end = start + len(source), end + len(first)
    return numbers


def _conversation_values(source: Source) -> Iterator[Any]:
    """The field `conversation` of each row; None where it is absent or holds the messages themselves."""
    if source.files is None:
        names = source.rows.column_names
        values = column(source.rows, CONVERSATION) if CONVERSATION in names else [None] * len(source)
        has_others = "messages" in names or "conversations" in names
        yield from (None if isinstance(value, list) and not has_others else value for value in values)
        return
    for batch in source.rows.iter(batch_size=1000):
        for text in batch["json"]:  # most have no such field, and needn't be decoded twice
            row = json.loads(text) if f'"{CONVERSATION}"' in text else {}
            value = row.get(CONVERSATION)
            is_messages = isinstance(value, list) and not row.keys() & {"messages", "conversations"}
            yield None if is_messages else value


def _read_tokens(
    row: dict[str, Any], place: str, num_ids: int, vocabulary: str, chat_options: ChatOptions
) -> MaskedRow:
    """Check a row that is tokenized already; each run of 1 in its loss mask is an answer.

    Args:
        num_ids: one more than the largest id of the vocabulary.
        vocabulary: its fingerprint, which `regenerate` writes into each row as `tokenizer`.
        chat_options: those of `prepare`; `regenerate` writes its own into each row.
    """
    if row.get("tokenizer") not in (None, vocabulary):
        raise PeagleError(
            f"{place}: the input_ids are of another tokenizer, that of {row.get('model') or 'an unknown model'}. Name "
            "that model with --model, make the rows anew with peagle-hf regenerate, or take `input_ids` out of the "
            "rows so that their `messages` are tokenized."
        )
    if row.get("chat_options") not in (None, chat_options.fingerprint()):
        raise PeagleError(
            f"{place}: the input_ids were written with other chat options ({row['chat_options']}) than those here "
            f"({chat_options.fingerprint()}), which the drafter would be measured and served with. Give peagle-hf "
            "prepare the --chat-template and --chat-template-kwargs that peagle-hf regenerate had, or make the rows "
            "anew."
        )
    for name, limit in (("input_ids", num_ids), ("loss_mask", 2)):
        values = row[name]
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value < limit for value in values):
            what = "ids of the tokenizer's vocabulary" if name == "input_ids" else "a loss mask"
            raise PeagleError(
                f"{place}: {name} must be a list of integers from 0 to {limit - 1}, {what}. Was it made for another "
                "model? Correct it or take the row out."
            )
    if len(row["input_ids"]) != len(row["loss_mask"]):
        raise PeagleError(
            f"{place}: there are {len(row['input_ids'])} input_ids but {len(row['loss_mask'])} values in loss_mask. "
            "Correct the row or take it out."
        )
    loss_mask = np.array(row["loss_mask"], dtype=np.int8)
    ends = (np.flatnonzero(np.diff(loss_mask, append=0) == -1) + 1).tolist()
    return MaskedRow(np.array(row["input_ids"], dtype=np.int32), loss_mask, ends, [])


def _working_features() -> "datasets.Features":
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
            **{name: Value("int64") for name in _ANSWER_COLUMNS},
            "place": Value("string"),
            "reason": Value("string"),
        }
    )


def _make(
    folder: Path, tokenizer: PreTrainedTokenizerBase, arguments: PrepareArguments, origin: dict[str, Any]
) -> dict[str, Any]:
    """Write rows, token counts and what was left out into the empty `folder`; gives what to record of them."""
    scratch = folder / "scratch"
    scratch.mkdir()
    sources = [open_source(data, scratch) for data in arguments.data]
    conversation_ids = _number_conversations(sources)
    ends = np.cumsum([len(source) for source in sources])
    # Conversations of a source follow those of the one before, so the last row of a source has its highest number.
    last_ids = np.maximum.accumulate(conversation_ids)[ends - 1]
    sizes = np.diff(last_ids, prepend=-1)
    num_ids = max(tokenizer.get_vocab().values()) + 1
    make = _RowMaker(
        ChatTokenizer(tokenizer, origin["chat_template_kwargs"]),
        sources,
        num_ids,
        vocabulary_fingerprint(tokenizer),
        ChatOptions(
            None if arguments.chat_template is None else str(tokenizer.chat_template), origin["chat_template_kwargs"]
        ),
        arguments.seq_length,
        arguments.min_learnt_tokens,
        arguments.preference,
    )
    order = _order(sizes.tolist(), arguments)
    rows, num_read = _tokenize(make, conversation_ids, order, arguments, scratch, json.dumps(origin))
    order = order[:num_read]
    notes = rows.select_columns(["conversation_id", "place", "reason", *_ANSWER_COLUMNS])[:]
    usable = [index for index, reason in enumerate(notes["reason"]) if reason is None]
    shared_ids, num_copies = _same_conversations(rows.select(usable))
    kept = usable[: arguments.max_samples]
    answers = _count_answers(notes, len(usable) - len(kept))
    for index in usable[len(kept) :]:
        notes["reason"][index] = f"beyond the {arguments.max_samples} rows of --max-samples"
    skipped = [
        {"conversation_id": conversation_id, "row": place, "reason": reason}
        for conversation_id, place, reason in zip(
            notes["conversation_id"], notes["place"], notes["reason"], strict=True
        )
        if reason is not None
    ]
    if len(skipped) == len(rows):
        raise PeagleError(
            f"Nothing can be learnt from {', '.join(origin['data'])}: all {len(order)} conversations were left out. "
            f"{_summary(skipped)} Correct the data or choose other data; where the chat template is the reason, "
            f"peagle-hf data template --model {arguments.model} shows what it can do."
        )
    dataset = rows.select(kept)
    rows_fingerprint = digest_of_rows(column(dataset, "content"))
    by_source, token_counts = _count(dataset, ends, sizes, np.searchsorted(last_ids, order))
    dataset = dataset.select_columns(["input_ids", "loss_mask", "seq_len"])
    dataset = dataset.add_column("conversation_id", shared_ids[: len(kept)])
    dataset.with_format("torch").save_to_disk(folder)

    torch.save(dict(token_counts), folder / "token_freq.pt")
    counts = {name: sum(counted[name] for counted in by_source) for name in COUNTS} | {
        "copied_conversations": num_copies,
        "skipped": dict(Counter(entry["reason"] for entry in skipped)),
        "sources": [{"data": data, **counted} for data, counted in zip(origin["data"], by_source, strict=True)],
    }
    write_json(folder / _SKIPPED, skipped)
    shutil.rmtree(scratch)
    _report(counts, arguments)
    beyond = ", %(beyond_max_samples)d beyond --max-samples" if answers["beyond_max_samples"] else ""
    logger.info(
        f"Of %(all)d answers %(learnt)d are learnt whole, %(cut)d cut{beyond} and %(left_out)d left out.", answers
    )
    if skipped:
        logger.warning(
            "%d rows, or answers within rows, were left out; skipped.json lists them. %s",
            len(skipped),
            _summary(skipped),
        )
    if answers["marked"]:
        logger.warning(
            "Of %d answers only a part is learnt, that which the chat template marks with {%% generation %%}; the "
            "verifier generates more of them. `peagle-hf data template` shows it; --chat-template takes another one.",
            answers["marked"],
        )
    return {"rows_fingerprint": rows_fingerprint, "counts": counts, "answers": answers}


def _count_answers(notes: dict[str, list[Any]], num_surplus: int) -> dict[str, int]:
    """Count the assistant turns by what came of them; those that the template marks in part are among the learnt.

    Args:
        notes: columns of all rows.
        num_surplus: how many of the last rows that could be kept are beyond `max_samples`.
    """
    counts = dict.fromkeys(("all", "learnt", "cut", "left_out", "beyond_max_samples", "marked"), 0)
    num_kept = notes["reason"].count(None) - num_surplus
    columns = (notes[name] for name in _ANSWER_COLUMNS)
    for reason, num_whole, num_cut, num_marked in zip(notes["reason"], *columns, strict=True):
        if reason is not None:
            counts["left_out"] += num_whole
        elif num_kept > 0:
            counts["learnt"] += num_whole
            counts["cut"] += num_cut
            counts["marked"] += num_marked
            num_kept -= 1
        else:
            counts["beyond_max_samples"] += num_whole + num_cut
        counts["all"] += num_whole + (num_cut or 0)
    return counts


def _tokenize(
    make: _RowMaker,
    conversation_ids: np.ndarray,
    order: np.ndarray,
    arguments: PrepareArguments,
    scratch: Path,
    origin: str,
) -> tuple["datasets.Dataset", int]:
    """Make the rows of whole conversations in `order`, until `max_samples` of them are kept.

    Returns:
        The rows, those left out too, and the number of conversations that they are of.
    """
    from datasets import Dataset, concatenate_datasets

    place = np.full(conversation_ids.max() + 1, len(order))
    place[order] = np.arange(len(order))
    numbers = np.argsort(place[conversation_ids], kind="stable")
    ends = np.searchsorted(place[conversation_ids[numbers]], np.arange(len(order)), side="right")
    parts: list[Dataset] = []
    num_kept = num_read = 0
    while num_read < len(order) and num_kept < (arguments.max_samples or math.inf):
        wanted = max(arguments.max_samples - num_kept, LEAST_READ) if arguments.max_samples else len(order)
        start, num_read = ends[num_read - 1] if num_read else 0, min(num_read + wanted, len(order))
        part = numbers[start : ends[num_read - 1]]
        parts.append(
            Dataset.from_dict({"number": part, "conversation_id": conversation_ids[part]}).map(
                make,
                batched=True,
                batch_size=100,
                num_proc=arguments.num_workers if arguments.num_workers > 1 else None,
                features=_working_features(),
                cache_file_name=str(scratch / f"rows_{len(parts)}.arrow"),
                new_fingerprint=hashlib.sha256(f"{origin} {start}".encode()).hexdigest()[:16],
                desc="Tokenizing",
            )
        )
        num_kept += column(parts[-1], "reason").count(None)
    rows = concatenate_datasets(parts)
    if arguments.max_samples is None or num_kept < arguments.max_samples:
        return rows, num_read
    kept = [index for index, reason in enumerate(column(rows, "reason")) if reason is None]
    places = place[column(rows, "conversation_id")]
    last = places[kept[arguments.max_samples - 1]]
    return rows.select(range(np.searchsorted(places, last, side="right"))), int(last) + 1


def _same_conversations(rows: "datasets.Dataset") -> tuple[np.ndarray, int]:
    """Give conversations with the same rows, token for token, the same number: the lowest of theirs.

    Returns:
        The number for each row, int64 [rows], and the number of conversations that are copies of another one.
    """
    contents: dict[int, list[str]] = {}
    numbers = column(rows, "conversation_id")
    for conversation_id, content in zip(numbers, column(rows, "content"), strict=True):
        contents.setdefault(conversation_id, []).append(content)
    first: dict[tuple[str, ...], int] = {}
    shared = {number: first.setdefault(tuple(contents[number]), number) for number in sorted(contents)}
    return np.array([shared[number] for number in numbers]), len(contents) - len(first)


def _order(sizes: list[int], arguments: PrepareArguments) -> np.ndarray:
    """The numbers of the conversations in the order in which they are read; `sizes` counts those of each source."""
    from datasets import Dataset, interleave_datasets

    generator = np.random.default_rng(arguments.seed)
    if arguments.weights is None:
        return generator.permutation(sum(sizes))
    starts = np.cumsum([0, *sizes[:-1]])
    shuffled = [
        Dataset.from_dict({"id": start + generator.permutation(size)})
        for start, size in zip(starts, sizes, strict=True)
    ]
    shares = np.array(arguments.weights) / sum(arguments.weights)
    mixture = interleave_datasets(shuffled, shares.tolist(), seed=arguments.seed)
    return np.array(mixture.with_format("numpy")["id"][:])


def _report(counts: dict[str, Any], arguments: PrepareArguments) -> None:
    logger.info(
        "%(rows)d rows from %(conversations_read)d of %(conversations_in_data)d conversations: %(tokens)d tokens, "
        "%(learnt_tokens)d of them learnt; %(truncated_rows)d rows cut after %(seq_length)d tokens.",
        counts | {"seq_length": arguments.seq_length},
    )
    if counts["copied_conversations"]:
        logger.info(
            "%d conversations are copies of others, token for token. They are kept, on the same side of the validation "
            "split.",
            counts["copied_conversations"],
        )
    if arguments.weights is None:
        return
    for weight, source in zip(arguments.weights, counts["sources"], strict=True):
        conversations, learnt = (source[name] / counts[name] for name in ("conversations_read", "learnt_tokens"))
        wanted = weight / sum(arguments.weights)
        logger.info(
            f"{source['data']}: {conversations:.1%} of the conversations ({wanted:.1%} wanted), {learnt:.1%} of the "
            "learnt tokens."
        )
        runs_out = source["conversations_read"] == source["conversations_in_data"]
        if runs_out and counts["rows"] != arguments.max_samples:
            logger.warning(
                f"{source['data']} has run out after {source['conversations_read']} conversations, so the mixture ends "
                f"with {counts['conversations_read']}. A smaller weight for it, or more of it, makes it larger."
            )


def _summary(skipped: list[dict[str, Any]]) -> str:
    """Say for each reason how many rows were left out, and name the first of them."""
    places: dict[str, list[str]] = {}
    for entry in skipped:
        places.setdefault(entry["reason"], []).append(entry["row"])
    return " ".join(
        f"{reason}: {len(rows)} ({'; '.join(rows[:3])}{' …' if len(rows) > 3 else ''})."
        for reason, rows in places.items()
    )


def _count(
    dataset: "datasets.Dataset", ends: np.ndarray, sizes: np.ndarray, sources_read: np.ndarray
) -> tuple[list[dict[str, int]], Counter[int]]:
    """Count what came of each source (`COUNTS`), and how often each token id is learnt.

    Args:
        ends: of each source the number of the row behind its last one, int64 [sources].
        sizes: its conversations, int64 [sources].
        sources_read: the source of each conversation that was read, int64.
    """
    read = np.bincount(sources_read, minlength=len(ends)).tolist()
    by_source = [
        dict.fromkeys(COUNTS, 0) | {"conversations_in_data": size, "conversations_read": number}
        for size, number in zip(sizes.tolist(), read, strict=True)
    ]
    token_counts: Counter[int] = Counter()
    for batch in dataset.with_format("numpy").iter(batch_size=1000):
        is_learnt = np.concatenate(batch["loss_mask"]) == 1
        ids, numbers = np.unique(np.concatenate(batch["input_ids"])[is_learnt], return_counts=True)
        token_counts.update(dict(zip(ids.tolist(), numbers.tolist(), strict=True)))
        origins = np.searchsorted(ends, batch["number"], side="right").tolist()
        for origin, length, num_cut, mask in zip(
            origins, batch["seq_len"].tolist(), batch["num_cut"].tolist(), batch["loss_mask"], strict=True
        ):
            row = (1, length, int(mask.sum()), int(num_cut > 0), num_cut)
            for name, number in zip(COUNTS[2:], row, strict=True):
                by_source[origin][name] += number
    return by_source, token_counts


def _is_made(output: Path, origin: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds this very dataset, whole.

    Raises:
        PeagleError: it holds another one that must not be replaced.
    """
    if not any(_own_files(output)):
        return False
    record_path = output / PREPARE_RECORD
    if not record_path.exists() and not overwrite:
        raise PeagleError(
            f"{output} holds a dataset without {PREPARE_RECORD}: it is not complete, or something else made it. "
            "Pass --overwrite to replace it, or name another --output."
        )
    changes = _changes(read_prepare_record(output), origin) if record_path.exists() else ["it has no record"]
    if changes and not overwrite:
        raise PeagleError(
            f"{output} holds a dataset that was made otherwise: {'; '.join(changes)}. "
            "Pass --overwrite to replace it, or name another --output."
        )
    if changes:
        if cached_rows(cache_folder(output)):
            raise PeagleError(
                f"{cache_folder(output)} holds hidden states of the dataset in {output}; they would not fit "
                f"another one ({'; '.join(changes)}). Remove that folder first, or name another --output."
            )
        return False
    try:
        load_prepared(output)
        load_token_freq(output / "token_freq.pt")
    except PeagleError as error:
        logger.warning("The dataset is made anew: %s", error)
        return False
    return True


def _changes(record: dict[str, Any], origin: dict[str, Any]) -> list[str]:
    """How a dataset was made otherwise, by its record; what the record of an earlier version lacks isn't compared.

    What has the same content may have another name now: the folder of the model, a file of data or of a template.
    """
    changes = [
        f"{name} was {record[name]}, is {value}"
        for name, value in origin.items()
        if name in record and record[name] != value and name not in ("model", "data", "data_sha256", "chat_template")
    ]
    if (record.get("chat_template") is None) != (origin["chat_template"] is None):
        changes.append(f"chat_template was {record.get('chat_template')}, is {origin['chat_template']}")
    then, now = (
        list(zip(one.get("data") or [], one.get("data_sha256") or [], strict=False)) for one in (record, origin)
    )
    if len(then) != len(now):
        changes.append(f"data was {record.get('data')}, is {origin['data']}")
    for (name_then, sha_then), (name, sha) in zip(then, now, strict=False):
        if sha_then != sha and name_then == name:
            changes.append(f"the content of {name} has changed (SHA-256 was {sha_then}, is {sha})")
        elif sha_then != sha or (sha is None and name_then != name):
            changes.append(f"data was {name_then}, is {name}")
    return changes


def _own_files(folder: Path) -> list[Path]:
    arguments = {config_path(folder, "prepare"), folder / "prepare.yaml"}
    return [*(path for pattern in _OWN_FILES for path in folder.glob(pattern)), *filter(Path.exists, arguments)]


def _finish_move(output: Path) -> None:
    """Put the files of a dataset that is complete into place; where this was cut off it goes on."""
    source = output / UNMOVED
    if not (source / PREPARE_RECORD).exists():
        shutil.rmtree(source, ignore_errors=True)
        return
    files = read_prepare_record(source).get("files", {})  # a version before this one had none
    (output / PREPARE_RECORD).unlink(missing_ok=True)
    for path in _own_files(output):
        if path.name not in (*files, _SKIPPED, CONFIG, "prepare.yaml"):
            path.unlink()
    for path in _own_files(source):
        if path.name != PREPARE_RECORD:
            os.replace(path, output / path.name)
    os.replace(source / PREPARE_RECORD, output / PREPARE_RECORD)
    source.rmdir()
