"""`peagle-hf prepare`: conversations become samples, token ids with a loss mask that is 1 on what is trained on."""

import json
import logging
import math
import shlex
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..arguments import Arguments, check_ranges, config_path, write_config
from ..console import number_of
from ..errors import PeagleError
from ..files import ANOTHER_OUTPUT, add_relative_path, atomic_path, locked_folder, remove_leftovers, write_json
from ..verifier.head import warn_if_untrainable
from .loss_mask import ChatTokenizer
from .prepared_dataset import (
    CHAT_TEMPLATE_FILE,
    PREPARE_RECORD,
    SKIPPED,
    UNMOVED,
    column,
    digest_of_rows,
    fingerprints_of_files,
    finish_move,
    is_made,
)
from .samples import (
    ANSWER_COLUMNS,
    Conversations,
    SampleMaker,
    draw_order,
    number_conversations,
    number_copies,
    tokenize_in_order,
)
from .sources import Source, data_sha256, is_local_file, open_source, source_name
from .tokenizer import (
    CHAT_TEMPLATE_HELP,
    CHAT_TEMPLATE_KWARGS_HELP,
    ChatOptions,
    load_tokenizer,
    read_template_kwargs,
    template_fingerprint,
    tokenization_fingerprint,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
)

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

COUNTS = (
    *("conversations_in_data", "conversations_read"),
    *("rows", "tokens", "learnt_tokens", "truncated_rows", "cut_tokens"),
)
"""Fields of `prepare.json`, over all sources and of each: conversations, samples, tokens in them, and what was cut."""

BYTES_A_TOKEN = 5
"""Bytes of a token in a prepared dataset: an int32 id and an int8 mask."""


@dataclass
class PrepareArguments(Arguments):
    """Arguments of `peagle-hf prepare`; in Python `data` also takes `datasets.Dataset` objects."""

    model: str = field(
        metadata={"aliases": ["--verifier"], "help": "The verifier, a hub name or a folder: its tokenizer is used."}
    )
    data: list[str] = field(
        metadata={
            "help": "Conversations, one or more of: sharegpt, ultrachat, a file (.jsonl, .json, .parquet, .csv, also "
            "compressed as .gz or .zst), a folder of such files, a hub dataset as org/name, and each of the last two "
            "with :split or :configuration:split behind it. The flag may be repeated.",
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
            "help": "Make this many samples, from conversations of all --data that are drawn with the seed; extract "
            "--max-samples counts the same samples (default: the samples of all conversations)."
        },
    )
    seq_length: int = field(default=8192, metadata={"help": "Cut samples after this many tokens."})
    seed: int = field(default=0, metadata={"help": "Seed of the order in which the conversations come."})
    num_workers: int = field(
        default=1, metadata={"help": "Processes that tokenize.", "aliases": ["--num-preprocessing-workers"]}
    )
    min_learnt_tokens: int = field(
        default=1,
        metadata={
            "help": "Skip samples with fewer tokens to train on than this.",
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
    """Tokenize conversations with the verifier's chat template and mark what the assistant says.

    The output folder is a `datasets` folder (`load_from_disk`) whose rows are samples, with the columns `input_ids`
    (int32), `loss_mask` (int8, 1 = trained on), `seq_len` and `conversation_id`. Conversations come in an order drawn
    with the seed; samples of one conversation are adjacent. Beside the columns the folder holds

    - `token_freq.pt`: a dict from token id to how often it is trained on;
    - `skipped.json`: each answer and sample that was left out, with its place in the data and the reason;
    - `prepare.json`: what the dataset was made from, and counts, of each source too. Every assistant turn is counted
      once, under `answers`: trained on whole, cut, left out or beyond `max_samples`;
    - `chat_template.jinja`, if one was chosen.

    A conversation is one row of the data, or all rows of a source that have the same value in the field
    `conversation`. `conversation_id` numbers the conversations of all sources in turn. Conversations whose samples are
    the same, token for token, share the number of the first, so that no copy of a training sample is validated on.

    With `max_samples` there are that many samples, or all if there are fewer; further samples of the last conversation
    are left out.

    With `weights` each conversation is drawn from a source with the probability of its weight, as
    `datasets.interleave_datasets` does, none of them twice, until a source runs out or there are `max_samples` samples.

    A dataset made from the same input in the same way is kept, or made again if a file of it is missing, truncated or
    damaged. Another dataset in the folder is an error unless `overwrite` is set. That replaces only files of
    `prepare`, and never under a cache of hidden states, which would no longer fit. The new files replace the old ones
    when all of them are complete.

    Returns:
        The output folder.

    Raises:
        PeagleError: the model or the data can't be read, a row of the data is malformed, no sample is left, or the
            output folder holds something else.
    """
    if not arguments.data:
        raise PeagleError("--data names nothing. Name a file, a folder or a dataset with conversations.")
    are_weights = all(0 < weight < math.inf for weight in arguments.weights or ())
    if arguments.weights is not None and (len(arguments.weights) != len(arguments.data) or not are_weights):
        raise PeagleError(
            f"--weights {' '.join(map(str, arguments.weights))} must be finite numbers above 0, one for each of the "
            f"{len(arguments.data)} --data. Leave out the data that is not wanted."
        )
    output = Path(arguments.output)
    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code, arguments.chat_template)
    warn_if_untrainable(arguments.model, arguments.trust_remote_code)
    origin = _origin(arguments, tokenizer)
    if output.exists() and not output.is_dir():
        raise PeagleError(f"--output {output} is a file. Name a folder.")
    if arguments.dry_run:
        print(_plan(arguments, is_made(output, origin, arguments.overwrite)))
        return output
    is_cut_off = (output / UNMOVED).exists()
    if not is_cut_off and arguments.token_freq_path is None and is_made(output, origin, arguments.overwrite):
        logger.info("%s already holds this dataset; it is kept as it is.", output)
        return output  # so a folder that can only be read is fine
    with locked_folder(output, ANOTHER_OUTPUT, "prepare"):
        _prepare(arguments, output, tokenizer, origin)
    return output


def _origin(arguments: PrepareArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that the dataset depends on, for `prepare.json`."""
    return {
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


def _prepare(
    arguments: PrepareArguments, output: Path, tokenizer: PreTrainedTokenizerBase, origin: dict[str, Any]
) -> None:
    """Make the dataset in a hidden folder inside the output folder and move it into place, unless it is there."""
    finish_move(output)
    if is_made(output, origin, arguments.overwrite):
        logger.info("%s already holds this dataset; it is kept as it is.", output)
    else:
        remove_leftovers(output, r"\.prepared")
        with atomic_path(output / UNMOVED) as folder:
            folder.mkdir()
            made = _make(folder, tokenizer, arguments, origin)
            write_config(arguments, folder / config_path(output, "prepare").name, "prepare")
            if arguments.chat_template is not None:
                (folder / CHAT_TEMPLATE_FILE).write_text(str(tokenizer.chat_template), encoding="utf-8")
            record = origin | made | {"files": fingerprints_of_files(folder)}
            write_json(folder / PREPARE_RECORD, add_relative_path(record, "model", output))
        finish_move(output)
    if arguments.token_freq_path is not None:
        with atomic_path(arguments.token_freq_path) as temporary:
            shutil.copyfile(output / "token_freq.pt", temporary)


def _plan(arguments: PrepareArguments, is_there: bool) -> str:
    """Describe what `prepare` would read and write, for `--dry-run`. Files are read, hub datasets not downloaded."""
    lines = []
    num_rows: int | None = 0
    with tempfile.TemporaryDirectory() as scratch:
        for number, data in enumerate(arguments.data):
            if not is_local_file(data):
                lines.append(f"would read {source_name(data)}, whose length is known only after the download")
                num_rows = None
                continue
            (folder := Path(scratch) / str(number)).mkdir()
            found = len(open_source(data, folder))
            lines.append(f"would read {number_of(found, 'conversation')} of {data}")
            num_rows = None if num_rows is None else num_rows + found
    if is_there:
        lines.append(f"{arguments.output} holds this dataset already and would be kept as it is")
        return "\n".join(lines)
    output = Path(arguments.output)
    lines.append(f"would {'replace the dataset in' if (output / PREPARE_RECORD).exists() else 'write'} {output}")
    limits = [number for number in (num_rows, arguments.max_samples) if number is not None]
    if limits:
        size = min(limits) * arguments.seq_length * BYTES_A_TOKEN
        lines.append(
            f"that is at most {size / 2**20:.1f} MiB for {number_of(min(limits), 'sample')} of {arguments.seq_length} "
            "tokens, and more only where a chat takes several samples"
        )
    return "\n".join(lines)


def _make(
    folder: Path, tokenizer: PreTrainedTokenizerBase, arguments: PrepareArguments, origin: dict[str, Any]
) -> dict[str, Any]:
    """Write samples, token counts and what was left out into the empty `folder`.

    Returns:
        What `prepare.json` records of them: `rows_fingerprint`, `counts` and `answers`.
    """
    scratch = folder / "scratch"
    scratch.mkdir()
    sources = [open_source(data, scratch) for data in arguments.data]
    conversations = number_conversations(sources)
    maker = _sample_maker(arguments, tokenizer, sources, origin["chat_template_kwargs"])
    order = draw_order(conversations.sizes.tolist(), arguments.weights, arguments.seed)
    candidates, num_read = tokenize_in_order(
        maker, conversations.ids, order, arguments.max_samples, arguments.num_workers, scratch, json.dumps(origin)
    )
    order = order[:num_read]
    notes = candidates.select_columns(["conversation_id", "place", "reason", *ANSWER_COLUMNS])[:]
    usable = [index for index, reason in enumerate(notes["reason"]) if reason is None]
    shared_ids, num_copies = number_copies(candidates.select(usable))
    kept = usable[: arguments.max_samples]
    answers = _count_answers(notes, len(usable) - len(kept))
    skipped = _skipped(notes, usable[len(kept) :], arguments.max_samples)
    if not kept:
        raise PeagleError(
            f"Nothing in {', '.join(origin['data'])} can be trained on: all {len(order)} conversations were left out. "
            f"{_summary(skipped)} Correct the data or choose other data; where the chat template is the reason, "
            f"peagle-hf data template --model {shlex.quote(arguments.model)} shows what it can do."
        )
    dataset = candidates.select(kept)
    by_source, token_counts = _count(dataset, conversations, order)
    counts = {name: sum(counted[name] for counted in by_source) for name in COUNTS} | {
        "copied_conversations": num_copies,
        "skipped": dict(Counter(entry["reason"] for entry in skipped)),
        "sources": [{"data": data, **counted} for data, counted in zip(origin["data"], by_source, strict=True)],
    }
    record = {"rows_fingerprint": digest_of_rows(column(dataset, "content")), "counts": counts, "answers": answers}
    dataset = dataset.select_columns(["input_ids", "loss_mask", "seq_len"])
    dataset = dataset.add_column("conversation_id", shared_ids[: len(kept)])
    dataset.with_format("torch").save_to_disk(folder)
    torch.save(dict(token_counts), folder / "token_freq.pt")
    write_json(folder / SKIPPED, skipped)
    shutil.rmtree(scratch)
    _log_counts(counts, arguments)
    _log_answers(answers, skipped)
    return record


def _sample_maker(
    arguments: PrepareArguments,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    template_kwargs: dict[str, Any],
) -> SampleMaker:
    template = None if arguments.chat_template is None else str(tokenizer.chat_template)
    return SampleMaker(
        ChatTokenizer(tokenizer, template_kwargs),
        sources,
        max(tokenizer.get_vocab().values()) + 1,
        vocabulary_fingerprint(tokenizer),
        ChatOptions(template, template_kwargs),
        template_fingerprint(tokenizer),
        arguments.seq_length,
        arguments.min_learnt_tokens,
        arguments.preference,
    )


def _skipped(notes: dict[str, list[Any]], surplus: list[int], max_samples: int | None) -> list[dict[str, Any]]:
    """The entries of `skipped.json`: each answer or sample that is left out, with its place and the reason.

    Args:
        notes: columns of all candidates.
        surplus: indices of the candidates that could be kept, but are beyond `max_samples`.
    """
    reasons = list(notes["reason"])
    for index in surplus:
        reasons[index] = f"beyond the {max_samples} samples of --max-samples"
    return [
        {"conversation_id": conversation_id, "row": place, "reason": reason}
        for conversation_id, place, reason in zip(notes["conversation_id"], notes["place"], reasons, strict=True)
        if reason is not None
    ]


def _count_answers(notes: dict[str, list[Any]], num_surplus: int) -> dict[str, int]:
    """Count the assistant turns by what came of them; those that the template marks in part are among the learnt.

    Args:
        notes: columns of all candidates, those that were left out too.
        num_surplus: how many of the last candidates that could be kept are beyond `max_samples`.
    """
    counts = dict.fromkeys(("all", "learnt", "cut", "left_out", "beyond_max_samples", "marked"), 0)
    num_kept = notes["reason"].count(None) - num_surplus
    columns = (notes[name] for name in ANSWER_COLUMNS)
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


def _count(
    dataset: "datasets.Dataset", conversations: Conversations, order: np.ndarray
) -> tuple[list[dict[str, int]], Counter[int]]:
    """Count what came of each source (`COUNTS`), and how often each token id is trained on.

    Args:
        dataset: the samples that are kept.
        order: the conversations that were read, int64.
    """
    sources_read = np.searchsorted(conversations.last_ids, order)
    read = np.bincount(sources_read, minlength=len(conversations.sizes)).tolist()
    by_source = [
        dict.fromkeys(COUNTS, 0) | {"conversations_in_data": size, "conversations_read": number}
        for size, number in zip(conversations.sizes.tolist(), read, strict=True)
    ]
    token_counts: Counter[int] = Counter()
    for batch in dataset.with_format("numpy").iter(batch_size=1000):
        is_learnt = np.concatenate(batch["loss_mask"]) == 1
        ids, numbers = np.unique(np.concatenate(batch["input_ids"])[is_learnt], return_counts=True)
        token_counts.update(dict(zip(ids.tolist(), numbers.tolist(), strict=True)))
        origins = np.searchsorted(conversations.row_ends, batch["number"], side="right").tolist()
        for origin, length, num_cut, mask in zip(
            origins, batch["seq_len"].tolist(), batch["num_cut"].tolist(), batch["loss_mask"], strict=True
        ):
            sample = (1, length, int(mask.sum()), int(num_cut > 0), num_cut)
            for name, number in zip(COUNTS[2:], sample, strict=True):
                by_source[origin][name] += number
    return by_source, token_counts


def _log_counts(counts: dict[str, Any], arguments: PrepareArguments) -> None:
    """Log the numbers of samples, tokens and copies, and each source's share of a mixture."""
    logger.info(
        "%(rows)d samples from %(conversations_read)d of %(conversations_in_data)d conversations: %(tokens)d tokens, "
        "%(learnt_tokens)d of them trained on; %(truncated_rows)d samples cut after %(seq_length)d tokens.",
        counts | {"seq_length": arguments.seq_length},
    )
    if counts["copied_conversations"]:
        logger.info(
            "%s of others, token for token, and kept on the same side of the validation split.",
            number_of(counts["copied_conversations"], "conversation is a copy", "conversations are copies"),
        )
    if arguments.weights is None:
        return
    for weight, source in zip(arguments.weights, counts["sources"], strict=True):
        conversations, learnt = (source[name] / counts[name] for name in ("conversations_read", "learnt_tokens"))
        wanted = weight / sum(arguments.weights)
        logger.info(
            f"{source['data']}: {conversations:.1%} of the conversations ({wanted:.1%} wanted), {learnt:.1%} of the "
            "tokens that are trained on."
        )
        runs_out = source["conversations_read"] == source["conversations_in_data"]
        if runs_out and counts["rows"] != arguments.max_samples:
            logger.warning(
                f"{source['data']} has run out after {source['conversations_read']} conversations, so the mixture ends "
                f"with {counts['conversations_read']}. A smaller weight for it, or more of it, makes it larger."
            )


def _log_answers(answers: dict[str, int], skipped: list[dict[str, Any]]) -> None:
    """Log how many answers are trained on, cut and left out, and why."""
    beyond = ", %(beyond_max_samples)d beyond --max-samples" if answers["beyond_max_samples"] else ""
    logger.info(
        f"Of %(all)d answers %(learnt)d are trained on whole, %(cut)d cut{beyond} and %(left_out)d left out.", answers
    )
    if skipped:
        logger.warning(
            "%d samples, or answers within samples, were left out; skipped.json lists them. %s",
            len(skipped),
            _summary(skipped),
        )
    if answers["marked"]:
        logger.warning(
            "Of %d answers only a part is trained on, that which the chat template marks with {%% generation %%}; the "
            "verifier generates more of them. `peagle-hf data template` shows it; --chat-template takes another one.",
            answers["marked"],
        )


def _summary(skipped: list[dict[str, Any]]) -> str:
    """Say for each reason how much was left out, and name the first places."""
    places: dict[str, list[str]] = {}
    for entry in skipped:
        places.setdefault(entry["reason"], []).append(entry["row"])
    return " ".join(
        f"{reason}: {len(found)} ({'; '.join(found[:3])}{' …' if len(found) > 3 else ''})."
        for reason, found in places.items()
    )
