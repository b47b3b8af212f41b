"""`peagle-hf data inspect`: what a prepared dataset holds, as an HTML page and as JSON."""

import logging
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..arguments import Arguments
from ..console import number_of
from ..errors import PeagleError
from ..files import atomic_path, write_json
from ..pages.page import render
from ..pages.pictures import BLUE, GREY, picture
from ..pages.tables import Table
from ..verifier.draft_vocabulary import draft_vocabulary, load_token_freq
from .inspect_template import show_template
from .prepared_dataset import INSPECTION, PREPARE_RECORD, chat_options, column, load_prepared, read_prepare_record
from .tokenizer import CHAT_TEMPLATE_HELP, CHAT_TEMPLATE_KWARGS_HELP, load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

DRAFT_VOCAB_SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
COVERED_SHARES = (0.9, 0.95, 0.99, 0.999)
NUM_EXAMPLES, NUM_FREQUENT = 8, 40
_QUANTILES = {"min": 0, "5%": 5, "25%": 25, "median": 50, "75%": 75, "95%": 95, "99%": 99, "max": 100}
_TEMPLATE = Path(__file__).with_name("inspect_dataset.html")
_LONGEST_CHARACTER = 4
"""Largest number of tokens of one character: bytes of UTF-8."""


@dataclass
class DataArguments(Arguments):
    """Arguments of `peagle-hf data ACTION [FOLDER]`."""

    action: Literal["inspect", "template"] = field(
        metadata={
            "help": "inspect: write a page that shows a prepared dataset. template: show what the chat template of "
            "--model lets be trained on, for some 30 kinds of chats."
        }
    )
    folder: str | None = field(
        default=None, metadata={"aliases": ["--data-path"], "help": "inspect: folder of `peagle-hf prepare`."}
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": f"The page; its numbers go into a .json beside it (default: {INSPECTION}.html in the folder)."
        },
    )
    draft_vocab_sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "Sizes of a draft vocabulary to try (default: powers of 2 from 1024 on, less than all tokens)."
        },
    )
    rows: list[int] | None = field(
        default=None,
        metadata={"help": f"Rows of the samples to show in full (default: the first {NUM_EXAMPLES})."},
    )
    model: str | None = field(
        default=None,
        metadata={
            "aliases": ["--verifier"],
            "help": f"The model whose tokenizer turns tokens into text (default: the one in {PREPARE_RECORD}).",
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the tokenizer run code from its repository."})
    chat_template: str | None = field(default=None, metadata={"help": f"template: {CHAT_TEMPLATE_HELP}"})
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": f"template: {CHAT_TEMPLATE_KWARGS_HELP}"}
    )
    html: str | None = field(default=None, metadata={"help": "template: write the same into this file, as a page."})

    GROUPS: ClassVar = {
        "Input and output": ("action", "folder", "output", "rows", "draft_vocab_sizes", "html"),
        "Tokenizer": ("model", "trust_remote_code", "chat_template", "chat_template_kwargs"),
    }


@dataclass(frozen=True)
class DataReport:
    """What a prepared dataset holds. "Learnt" tokens are those that are trained on; None stands for unknown.

    Args:
        folder: path of the dataset.
        model: the model of the tokenizer.
        num_rows: samples.
        num_conversations: number of conversations that these samples come from.
        num_tokens: tokens of all samples.
        num_learnt_tokens: tokens with loss mask 1.
        learnt_share: `num_learnt_tokens` / `num_tokens`.
        seq_length: number of tokens after which samples were cut.
        num_truncated_rows: samples that were cut.
        truncated_share: `num_truncated_rows` / `num_rows`.
        num_cut_tokens: tokens that were cut off.
        row_tokens: quantiles of the tokens of a sample.
        row_learnt_tokens: quantiles of the learnt tokens of a sample.
        row_learnt_share: quantiles of the share of learnt tokens in a sample.
        sources: what `prepare` counted of each `--data`.
        skipped: number of samples and answers that `prepare` left out, by reason.
        vocab_size: of the tokenizer.
        num_distinct_learnt: distinct tokens that are learnt anywhere.
        coverage: for each size of the draft vocabulary its share of the learnt tokens.
        unseen_coverage: the same for a draft vocabulary chosen by nine tenths of the samples, on the last tenth.
        tokens_for_share: for each share of the learnt tokens the size of the smallest draft vocabulary that has it.
        most_frequent: the most frequent learnt tokens, with text, count and share.
    """

    folder: str
    model: str
    num_rows: int
    num_conversations: int
    num_tokens: int
    num_learnt_tokens: int
    learnt_share: float
    seq_length: int | None
    num_truncated_rows: int | None
    truncated_share: float | None
    num_cut_tokens: int | None
    row_tokens: dict[str, float]
    row_learnt_tokens: dict[str, float]
    row_learnt_share: dict[str, float]
    sources: list[dict[str, Any]] | None
    skipped: dict[str, int] | None
    vocab_size: int
    num_distinct_learnt: int
    coverage: dict[int, float]
    unseen_coverage: dict[int, float]
    tokens_for_share: dict[float, int]
    most_frequent: list[dict[str, Any]]


def data_command(arguments: DataArguments) -> None:
    """Inspect a prepared dataset, or try a chat template.

    Raises:
        PeagleError: an argument is missing or the work fails.
    """
    if arguments.action == "inspect":
        inspect_data(arguments)
        return
    if arguments.model is None:
        raise PeagleError("`peagle-hf data template` needs --model, whose chat template is tried.")
    if arguments.folder is not None:
        raise PeagleError(
            f"`peagle-hf data template` tries a chat template on its own chats and reads no folder: leave out "
            f"{arguments.folder}. `peagle-hf data inspect {shlex.quote(str(arguments.folder))}` shows a prepared "
            "dataset."
        )
    show_template(
        arguments.model,
        arguments.trust_remote_code,
        arguments.chat_template,
        arguments.chat_template_kwargs,
        arguments.html,
    )


def inspect_data(arguments: DataArguments) -> DataReport:
    """Write a page (one file, without scripts) and JSON about a prepared dataset.

    The draft vocabularies are those that training chooses from the same counts.

    Raises:
        PeagleError: the folder is no prepared dataset, its tokenizer can't be loaded or is another one, or there is no
            such row.
    """
    if arguments.folder is None:
        raise PeagleError("`peagle-hf data inspect` needs the folder of a prepared dataset: name it.")
    folder = Path(arguments.folder)
    page = Path(arguments.output) if arguments.output else folder / f"{INSPECTION}.html"
    if page.suffix != ".html":
        example = page / f"{INSPECTION}.html" if page.is_dir() else page.with_suffix(".html")
        raise PeagleError(f"--output {page} must end in .html, as it names the page: take {example}, for example.")
    data = load_prepared(folder)
    record = read_prepare_record(folder)
    tokenizer = _tokenizer(arguments, folder, record)
    rows = range(min(NUM_EXAMPLES, len(data))) if arguments.rows is None else arguments.rows
    if outside := [row for row in rows if not 0 <= row < len(data)]:
        raise PeagleError(f"There is no row {outside[0]} in {folder}: name rows from 0 to {len(data) - 1}.")

    lengths, learnt = _row_counts(data)
    counts = _learnt_counts(folder, tokenizer)
    last_counts = _count_last(data, len(counts))
    report = _report(arguments, record, tokenizer, data, lengths, learnt, counts, last_counts)
    text = render(
        _TEMPLATE,
        report=report,
        summary=_summary(report),
        tables=_tables(report),
        pictures={
            "lengths": picture("Tokens of a sample", lambda axes: _draw_lengths(axes, lengths, learnt)),
            "shares": picture("Share that is trained on", lambda axes: _draw_shares(axes, learnt / lengths)),
            "coverage": picture(
                "Share of the tokens by size of the draft vocabulary",
                lambda axes: _draw_coverage(axes, counts, report.coverage),
            ),
        },
        examples=[_example(data, row, record, tokenizer) for row in rows],
    )
    with atomic_path(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(page.with_suffix(".json"), asdict(report))
    print(_text(report))
    logger.info("%s shows more.", page)
    return report


def _tokenizer(arguments: DataArguments, folder: Path, record: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of the dataset, checked against the fingerprint in the record."""
    model = arguments.model or record.get("model")
    if model is None:
        raise PeagleError(
            f"{arguments.folder} has no {PREPARE_RECORD}, so the tokenizer isn't known. Name the model with --model."
        )
    try:
        tokenizer = load_tokenizer(model, arguments.trust_remote_code, chat_options(folder)[0])
    except PeagleError as error:
        if arguments.model is not None:
            raise
        raise PeagleError(
            f"{error} {folder / PREPARE_RECORD} names it; if it is somewhere else now, name it with --model."
        ) from error
    if record.get("tokenizer_fingerprint") not in (None, tokenizer_fingerprint(tokenizer)):
        raise PeagleError(
            f"{arguments.folder} was prepared with another tokenizer than that of {model}, or it has changed since: "
            "its tokens would show as other text. Name the model as it was with --model."
        )
    return tokenizer


def _row_counts(data: "datasets.Dataset") -> tuple[np.ndarray, np.ndarray]:
    """Tokens and learnt tokens of each sample, both int64 [samples]."""
    learnt = [
        int(np.sum(mask))
        for batch in data.select_columns(["loss_mask"]).with_format("numpy").iter(batch_size=1000)
        for mask in batch["loss_mask"]
    ]
    return np.array(column(data, "seq_len"), dtype=np.int64), np.array(learnt, dtype=np.int64)


def _learnt_counts(folder: Path, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """How often each id of the vocabulary is trained on, int64 [V]."""
    frequencies = load_token_freq(folder / "token_freq.pt")
    pairs = frequencies.items() if isinstance(frequencies, dict) else enumerate(frequencies.tolist())
    seen = {token_id: count for token_id, count in pairs if count}
    counts = np.zeros(max([*tokenizer.get_vocab().values(), *seen]) + 1, dtype=np.int64)
    counts[list(seen)] = list(seen.values())
    return counts


def _count_last(data: "datasets.Dataset", vocab_size: int) -> np.ndarray:
    """How often each id is trained on in the last tenth of the samples, which are in random order; int64 [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    last = data.select(range(len(data) - (len(data) + 9) // 10, len(data))).with_format("numpy")
    for batch in last.iter(batch_size=1000):
        is_learnt = np.concatenate(batch["loss_mask"]) == 1
        counts += np.bincount(np.concatenate(batch["input_ids"])[is_learnt], minlength=vocab_size)
    return counts


def _report(
    arguments: DataArguments,
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    data: "datasets.Dataset",
    lengths: np.ndarray,
    learnt: np.ndarray,
    counts: np.ndarray,
    last_counts: np.ndarray,
) -> DataReport:
    recorded = record.get("counts", {})
    conversations = column(data, "conversation_id") if "conversation_id" in data.column_names else range(len(data))
    sizes = arguments.draft_vocab_sizes or [size for size in DRAFT_VOCAB_SIZES if size < len(counts)]
    by_frequency = np.sort(counts)[::-1].cumsum() / counts.sum()
    most_frequent = np.argsort(-counts, kind="stable")[: min(NUM_FREQUENT, int((counts > 0).sum()))]
    truncated = recorded.get("truncated_rows")
    return DataReport(
        folder=str(arguments.folder),
        model=arguments.model or record["model"],
        num_rows=len(data),
        num_conversations=len(set(conversations)),
        num_tokens=int(lengths.sum()),
        num_learnt_tokens=int(learnt.sum()),
        learnt_share=float(learnt.sum() / lengths.sum()),
        seq_length=record.get("seq_length"),
        num_truncated_rows=truncated,
        truncated_share=None if truncated is None else truncated / len(data),
        num_cut_tokens=recorded.get("cut_tokens"),
        row_tokens=_quantiles(lengths),
        row_learnt_tokens=_quantiles(learnt),
        row_learnt_share=_quantiles(learnt / lengths),
        sources=recorded.get("sources"),
        skipped=recorded.get("skipped"),
        vocab_size=len(counts),
        num_distinct_learnt=int((counts > 0).sum()),
        coverage={size: _coverage(counts, counts, size) for size in sizes},
        unseen_coverage={size: _coverage(counts - last_counts, last_counts, size) for size in sizes},
        tokens_for_share={share: int(np.searchsorted(by_frequency, share)) + 1 for share in COVERED_SHARES},
        most_frequent=[
            {
                "token_id": token_id,
                "text": _visible(tokenizer, token_id),
                "count": int(counts[token_id]),
                "share": float(counts[token_id] / counts.sum()),
            }
            for token_id in most_frequent.tolist()
        ],
    )


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return dict(zip(_QUANTILES, np.percentile(values, [*_QUANTILES.values()]).tolist(), strict=True))


def _coverage(chosen_by: np.ndarray, counts: np.ndarray, size: int) -> float:
    """Share of the counted tokens that are in a draft vocabulary of this size.

    Args:
        chosen_by: counts by which the vocabulary is chosen, int64 [V].
        counts: counts of the tokens to cover, int64 [V].
    """
    _, is_drafted = draft_vocabulary(dict(enumerate(chosen_by.tolist())), size, len(counts))
    return float(counts[is_drafted.numpy()].sum() / max(1, counts.sum()))


def _visible(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as text with visible spaces and newlines; if it is no whole character, its name in the vocabulary."""
    text = _decode(tokenizer, [token_id])
    if not text or "\ufffd" in text:
        return str(tokenizer.convert_ids_to_tokens(token_id))
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _example(
    data: "datasets.Dataset", row: int, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """A sample for the page: its runs of learnt and of other tokens, each a list of (token ids, text)."""
    sample = data.with_format(None)[row]
    runs = groupby(zip(sample["loss_mask"], sample["input_ids"], strict=True), key=lambda pair: pair[0])
    tokens = []
    before: list[int] = []
    for is_learnt, run in runs:
        pieces = list(_pieces(tokenizer, before, [token_id for _, token_id in run]))
        before = pieces[-1][0]
        tokens.append((bool(is_learnt), [(" ".join(map(str, ids)), text) for ids, text in pieces]))
    sources = record.get("counts", {}).get("sources", [])
    ends = np.cumsum([source["conversations_in_data"] for source in sources])
    number = sample.get("conversation_id")
    return {
        "row": row,
        "source": sources[int(np.searchsorted(ends, number, side="right"))]["data"] if sources else None,
        "conversation_id": number,
        "num_tokens": len(sample["input_ids"]),
        "num_learnt": sum(sample["loss_mask"]),
        "runs": tokens,
    }


def _pieces(
    tokenizer: PreTrainedTokenizerBase, before: list[int], token_ids: list[int]
) -> Iterator[tuple[list[int], str]]:
    """The text that each token adds to those before it; tokens that only together are a character stay together."""
    pending: list[int] = []
    for number, token_id in enumerate(token_ids, 1):
        pending.append(token_id)
        text = _decode(tokenizer, before + pending)
        is_whole = not text.endswith("\ufffd") or len(pending) == _LONGEST_CHARACTER
        if is_whole or number == len(token_ids):
            yield pending, text[len(_decode(tokenizer, before)) :]
            before, pending = pending, []


def _draw_lengths(axes: Any, lengths: np.ndarray, learnt: np.ndarray) -> None:
    edges = np.linspace(0, max(int(lengths.max()), 1), 41)
    axes.hist(lengths, bins=edges, label="all tokens", color=GREY)
    axes.hist(learnt, bins=edges, label="trained on", color=BLUE, histtype="step", linewidth=1.5)
    axes.set(xlabel="Tokens of a sample", ylabel="Samples")
    axes.legend()


def _draw_shares(axes: Any, shares: np.ndarray) -> None:
    axes.hist(100 * shares, bins=np.linspace(0, 100, 41).tolist(), color=BLUE)
    axes.set(xlabel="Trained on, % of a sample", ylabel="Samples")


def _draw_coverage(axes: Any, counts: np.ndarray, coverage: dict[int, float]) -> None:
    frequencies: Sequence[float] = np.sort(counts[counts > 0])[::-1].cumsum() / counts.sum() * 100
    axes.plot(range(1, len(frequencies) + 1), frequencies, color=BLUE)
    axes.plot(coverage.keys(), [100 * share for share in coverage.values()], "o", color=BLUE)
    axes.set(xscale="log", xlabel="Draft vocabulary", ylabel="Tokens trained on in it, %", ylim=(0, 103))


def _summary(report: DataReport) -> dict[str, str]:
    """What a reader asks first, by name."""
    truncated = "not known"
    if report.truncated_share is not None:
        truncated = (
            f"{number_of(report.num_truncated_rows or 0, 'sample')} ({report.truncated_share:.1%}), after "
            f"{report.seq_length} tokens"
        )
        if report.num_cut_tokens is not None:
            truncated += f"; cut off: {number_of(report.num_cut_tokens, 'token')}"
    return {
        "Samples": f"{report.num_rows}, of {number_of(report.num_conversations, 'conversation')}",
        "Tokens": f"{report.num_tokens}",
        "Trained on": f"{report.num_learnt_tokens} ({report.learnt_share:.1%}), {report.num_distinct_learnt} different",
        "Cut": truncated,
        "Left out": "not known" if report.skipped is None else number_of(sum(report.skipped.values()), "sample"),
    }


def _text(report: DataReport) -> str:
    """The report in a few lines for a terminal."""
    coverage = ", ".join(f"{share:.1%} by {size}" for size, share in report.coverage.items())
    lines = {
        "Folder": report.folder,
        **_summary(report),
        "Lengths": ", ".join(f"{name} {value:.0f}" for name, value in report.row_tokens.items()),
        "Covered": coverage or "no draft vocabulary is smaller than the whole one",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items())


def _tables(report: DataReport) -> dict[str, Table]:
    """The tables of the page."""

    def quantiles(name: str, values: dict[str, float], scale: int = 1, unit: str = "") -> list[str]:
        return [name, *(f"{scale * value:.0f}{unit}" for value in values.values())]

    def percent(share: float, form: str = ".1f") -> str:
        return f"{100 * share:{form}} %"

    lengths = [
        quantiles("Tokens of a sample", report.row_tokens),
        quantiles("Tokens of it that are trained on", report.row_learnt_tokens),
        quantiles("Their share", report.row_learnt_share, 100, " %"),
    ]
    counted = ("conversations_read", "conversations_in_data", "rows", "truncated_rows", "tokens", "learnt_tokens")
    sources = [
        [
            source["data"],
            *(str(source[name]) for name in counted),
            percent(source["learnt_tokens"] / report.num_learnt_tokens),
        ]
        for source in report.sources or []
    ]
    heads = ("conversations", "of", "samples", "cut", "tokens", "trained on", "of all trained on")
    coverage = [
        [str(size), percent(share, ".2f"), percent(report.unseen_coverage[size], ".2f")]
        for size, share in report.coverage.items()
    ]
    return {
        "left_out": Table("", ["Left out", "reason"], [[str(n), why] for why, n in (report.skipped or {}).items()]),
        "lengths": Table("", ["", *report.row_tokens], lengths),
        "sources": Table("Sources", ["", *heads], sources),
        "coverage": Table("", ["draft vocabulary", "tokens in it", "in one chosen by other samples"], coverage),
        "shares": Table(
            "",
            ["to hold", "takes"],
            [[percent(share), f"{size} tokens"] for share, size in report.tokens_for_share.items()],
        ),
    }
