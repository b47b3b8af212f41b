"""`peagle-hf regenerate`: on-policy chats, in which the verifier answers prompts from a file or of its own invention.

A drafter has to predict what its verifier writes, so that is the best text to train on. Every answer keeps the token
ids that the verifier wrote: text that is decoded and encoded again often gives other ids.
"""

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..arguments import Arguments, check_ranges, flag_of
from ..console import progress_bar
from ..errors import PeagleError
from ..files import ANOTHER_OUTPUT, atomic_path, check_writable, locked_file, remove_leftovers, write_json
from ..fingerprint import has_weights, weights_of
from ..verifier.head import warn_if_untrainable
from .answer_journal import Journal
from .chat_models import ChatModel, LocalChatModel, ServedChatModel
from .dialogues import Answers, answer_prompts, fitting_prompts, invent_prompts, replay
from .endpoint import MAX_RETRIES, MAX_RETRIES_HELP, REQUEST_TIMEOUT_HELP
from .prompts import Prompt, distinct, grams, read_prompts
from .tokenizer import (
    CHAT_TEMPLATE_HELP,
    CHAT_TEMPLATE_KWARGS_HELP,
    ChatOptions,
    load_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
)

logger = logging.getLogger(__name__)

MAX_REPETITION = 0.3
"""Share of repeated 4-grams of an answer's tokens above which it is looping."""
ANSWER_TIMEOUT = 600.0

_RANGES = {
    **dict.fromkeys(("max_samples", "max_new_tokens", "concurrency", "batch_size"), (1, math.inf)),
    **dict.fromkeys(("invent", "temperature", "invent_temperature", "top_k"), (0, math.inf)),
    **dict.fromkeys(("min_answer_tokens", "request_timeout", "max_retries"), (0, math.inf)),
    **dict.fromkeys(("top_p", "min_p", "max_repetition"), (0, 1)),
}
_ELSEWHERE = (
    *("output", "max_samples", "endpoint", "concurrency", "request_timeout", "max_retries", "batch_size"),
    "trust_remote_code",
)
"""Arguments that the output doesn't depend on, or that `_settings` describes by content."""


@dataclass
class RegenerateArguments(Arguments):
    """Arguments of `peagle-hf regenerate`."""

    model: str = field(
        metadata={"aliases": ["--verifier"], "help": "The verifier, which answers: a folder or a hub name."}
    )
    output: str = field(
        metadata={
            "help": "The .jsonl file to write. What was dropped and why goes into a .report.json beside it, answers as "
            "they come into a .journal."
        }
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts to answer: a file, a folder or a hub dataset, as for prepare --data, or rows with `turns` "
            "(Spec-Bench's shape). User turns are kept, and assistant turns are answered anew."
        },
    )
    invent: int = field(
        default=0,
        metadata={"help": "How many prompts the verifier invents by continuing its own user tag; filters leave fewer."},
    )
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "Prompts that no prompt may resemble, as for --prompts, such as those of the evaluation."},
    )
    max_samples: int | None = field(default=None, metadata={"help": "Take at most this many of the given prompts."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, and longest invented prompt."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the answers; 0 is greedy."})
    invent_temperature: float = field(default=1.0, metadata={"help": "Temperature of the invented prompts."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the likeliest tokens that have this probability together."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from this many of the likeliest tokens; 0 is all."})
    min_p: float = field(
        default=0.0,
        metadata={"help": "Sample from tokens with at least this share of the likeliest one's probability."},
    )
    min_answer_tokens: int = field(
        default=0,
        metadata={"help": "Drop chats with a shorter answer, its end-of-turn token not counted. Empty ones always go."},
    )
    drop_cut_answers: bool = field(
        default=False, metadata={"help": "Drop chats with an answer that --max-new-tokens cuts off."}
    )
    max_repetition: float = field(
        default=MAX_REPETITION,
        metadata={
            "help": "Drop chats with a looping answer: one whose 4-grams of tokens are repeats by more than this "
            "share; 1 keeps all."
        },
    )
    endpoint: str | None = field(
        default=None,
        metadata={"help": "vLLM servers that run the verifier, URL[,URL...] (default: run it in this process)."},
    )
    concurrency: int = field(default=32, metadata={"help": "Chats that the servers answer at a time."})
    request_timeout: float = field(default=ANSWER_TIMEOUT, metadata={"help": REQUEST_TIMEOUT_HELP})
    max_retries: int = field(default=MAX_RETRIES, metadata={"help": MAX_RETRIES_HELP})
    batch_size: int = field(default=32, metadata={"help": "Chats that are answered together in this process."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Dtype of the verifier in this process; auto is float32 on CPU, the checkpoint's on GPU."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of all sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the verifier."})
    chat_template: str | None = field(default=None, metadata={"help": CHAT_TEMPLATE_HELP})
    chat_template_kwargs: dict | str | None = field(default=None, metadata={"help": CHAT_TEMPLATE_KWARGS_HELP})

    GROUPS: ClassVar = {
        "Input and output": ("model", "prompts", "invent", "output", "exclude", "max_samples"),
        "Chat template": ("chat_template", "chat_template_kwargs"),
        "Sampling": ("max_new_tokens", "temperature", "invent_temperature", "top_p", "top_k", "min_p", "seed"),
        "Which answers are kept": ("min_answer_tokens", "drop_cut_answers", "max_repetition"),
        "vLLM servers": ("endpoint", "concurrency", "request_timeout", "max_retries"),
        "This process": ("batch_size", "dtype", "trust_remote_code"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is None and self.invent == 0:
            raise PeagleError("There is nothing to answer: name a file with --prompts, or give --invent a number.")
        if Path(self.output).suffix != ".jsonl":
            raise PeagleError(f"--output {self.output} must end in .jsonl, as it gets a JSON object a line.")
        read = [Path(path).resolve() for path in (self.prompts, *self.exclude) if isinstance(path, str)]
        if Path(self.output).resolve() in read:
            raise PeagleError(f"--output {self.output} is a file that is read here. Name another one.")
        check_ranges(self, _RANGES)
        for name in ("temperature", "invent_temperature", "top_p", "request_timeout"):
            value, above_0 = getattr(self, name), "" if name == "temperature" else " above 0"
            if value == math.inf or (value == 0 and above_0):
                raise PeagleError(f"{flag_of(name)} is {value} but must be a finite number{above_0}.")
        if self.min_answer_tokens > self.max_new_tokens:
            raise PeagleError(
                f"--min-answer-tokens {self.min_answer_tokens} is more than --max-new-tokens {self.max_new_tokens}, so "
                "every chat would be dropped. Raise one or lower the other."
            )
        if self.endpoint and self.dtype != "auto":
            raise PeagleError(
                "--dtype is for a verifier in this process. With --endpoint, give the server its own --dtype."
            )


def regenerate(arguments: RegenerateArguments) -> Path:
    """Let the verifier answer prompts, and write the chats to a .jsonl file in the order of the prompts.

    Each line is a sample with `id`, `category`, `conversation` (the same text in all samples of one chat and in no
    other), `messages`, `tools` if the chat offers some, `input_ids`, `loss_mask` (1 on every token that the verifier
    wrote, its end-of-turn token included), `finish_reason` of the last answer ("stop" or "length"), `model`,
    `tokenizer` (a fingerprint of the vocabulary of `input_ids`), `chat_options` (a fingerprint of the chosen chat
    template, and its variables) and `template_fingerprint` (of the chat template that was used, chosen or not). A chat
    is one sample, unless the chat template renders earlier turns differently later: then each such turn starts a sample
    of its own.

    The report lists what is dropped and why: near-duplicate, excluded and unusable prompts before they are answered,
    prompts that a server refuses, and chats with an answer that is empty, too short, cut off or looping. Answers are
    kept in a journal beside the output, under a key of all that they depend on. So another run, also with prompts
    added, removed or in another order, asks only for the answers that the journal doesn't have.

    What is sampled depends on the seed and the text before it, not on the order of the prompts or on which prompts are
    answered at the same time.

    Returns:
        The path of the .jsonl file.

    Raises:
        PeagleError: a file is malformed, the model can't be loaded or has no chat template, the output was made with
            other arguments, another process writes it, or the servers failed a request.
    """
    output = Path(arguments.output)
    with locked_file(output, ANOTHER_OUTPUT):
        report_path = output.with_suffix(".report.json")
        remove_leftovers(output.parent, "|".join(re.escape(path.name) for path in (output, report_path)))
        return _regenerate(arguments, output, report_path)


def _regenerate(arguments: RegenerateArguments, output: Path, report_path: Path) -> Path:
    dropped: list[dict[str, str]] = []
    prompts = read_prompts(arguments.prompts, dropped)[: arguments.max_samples] if arguments.prompts else []
    excluded = [prompt for path in arguments.exclude for prompt in read_prompts(path, dropped, to_answer=False)]
    options = ChatOptions.chosen(
        arguments.model, arguments.trust_remote_code, arguments.chat_template, arguments.chat_template_kwargs
    )
    settings = _settings(arguments, prompts, excluded) | options.description()
    journal_path = output.with_suffix(".journal")
    if output.exists():
        found = _settings_of(output, report_path)
        _require_same_settings(settings, found, output, journal_path)
        logger.info("%s is complete already.", output)
        return output

    check_writable(output.parent)
    warn_if_untrainable(arguments.model, arguments.trust_remote_code)
    verifier = _load(arguments, options)
    with Journal(journal_path) as journal:
        answer_settings = _answer_settings(arguments) | options.description()
        before = (journal.settings or {}).get("model")
        if has_weights(before, arguments.model):  # a commit on the hub, and now its files in a folder
            answer_settings["model"] = before
        _log_changes(journal, answer_settings)
        journal.begin(answer_settings)
        prompts += invent_prompts(verifier, journal, answer_settings, arguments, dropped)
        prompts = distinct(prompts, excluded, dropped)
        prompts, lengths = fitting_prompts(verifier, prompts, dropped)
        answers = Answers(verifier, journal, answer_settings, arguments, arguments.temperature, verifier.end_ids)
        unanswerable = answer_prompts(answers, prompts, lengths)
        chats = _chats(answers, prompts, unanswerable, arguments, dropped)
        _write(output, report_path, chats, settings, dropped)
    return output


def _write(
    output: Path,
    report_path: Path,
    chats: Iterable[list[dict[str, Any]]],
    settings: dict[str, Any],
    dropped: list[dict[str, str]],
) -> None:
    """Write the samples of each chat as they come, and then the report on them."""
    report = _Report()
    with atomic_path(output) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for samples in chats:
                for sample in samples:
                    report.add(sample)
                    file.write(json.dumps(sample, ensure_ascii=False, separators=(",", ":")) + "\n")
        if not report.num_samples:
            counted = Counter(drop["reason"] for drop in dropped).most_common(5)
            reasons = "; ".join(f"{reason}: {count}" for reason, count in counted)
            raise PeagleError(
                f"No chat is left for {output}: {len(dropped)} were dropped ({reasons}). Give other prompts, or a "
                "model that answers better."
            )
        counts = report.counts(dropped)
        write_json(report_path, {"settings": settings, **counts, "dropped": dropped})
    logger.info("%s: %s", output, json.dumps(counts, ensure_ascii=False))


def _load(arguments: RegenerateArguments, options: ChatOptions) -> ChatModel:
    if arguments.endpoint is None:
        return LocalChatModel(
            arguments.model,
            arguments.max_new_tokens,
            arguments.trust_remote_code,
            arguments.batch_size,
            arguments.dtype,
            options,
        )
    return ServedChatModel(
        arguments.model,
        arguments.max_new_tokens,
        arguments.trust_remote_code,
        arguments.endpoint,
        arguments.concurrency,
        arguments.request_timeout,
        arguments.max_retries,
        options,
    )


def _settings(arguments: RegenerateArguments, prompts: list[Prompt], excluded: list[Prompt]) -> dict[str, Any]:
    """All settings that the output depends on, without a path of this machine, for the report."""
    settings = {name: value for name, value in asdict(arguments).items() if name not in _ELSEWHERE}
    settings["backend"] = _backend(arguments)
    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code, arguments.chat_template)
    settings["tokenizer"] = f"with its chat template sha256 {tokenizer_fingerprint(tokenizer)[:16]}"
    if Path(arguments.model).is_dir():
        settings["model"] = Path(arguments.model).resolve().name
        settings["weights"] = weights_of(arguments.model)
    for name, read in (("prompts", prompts), ("exclude", excluded)):
        digest = hashlib.sha256()
        for prompt in read:
            digest.update(json.dumps([prompt.id, prompt.category, prompt.digest]).encode())
        settings[name] = f"{len(read)}, sha256 {digest.hexdigest()}"
    return settings


def _backend(arguments: RegenerateArguments) -> str:
    return "transformers" if arguments.endpoint is None else "vLLM"


def _settings_of(output: Path, report_path: Path) -> dict[str, Any]:
    """The settings of an output, from its report."""
    try:
        return dict(json.loads(report_path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = (
            f"there is no report {report_path} that tells how it was made"
            if isinstance(error, FileNotFoundError)
            else f"its report {report_path} is damaged ({type(error).__name__}: {error})"
        )
        raise PeagleError(
            f"{output} exists already, but {problem}. Name another --output, or remove {output} to regenerate it."
        ) from error


def _require_same_settings(settings: dict[str, Any], found: dict[str, Any], output: Path, journal_path: Path) -> None:
    changes = [
        f"{name}: {found.get(name)} there, {value} now" for name, value in settings.items() if found.get(name) != value
    ]
    if changes:
        kept = f" Answers in {journal_path} that are still valid will be used." if journal_path.exists() else ""
        raise PeagleError(
            f"{output} belongs to a run with other arguments ({'; '.join(changes)}). Give the same arguments as then, "
            f"name another --output, or remove {output} to regenerate it.{kept}"
        )


def _answer_settings(arguments: RegenerateArguments) -> dict[str, Any]:
    """The settings that an answer depends on, those of sampling only if anything is sampled, for the journal."""
    names = ["dtype", "max_new_tokens", "temperature"]
    if arguments.invent:
        names.append("invent_temperature")
    if arguments.invent or arguments.temperature > 0:
        names += ["top_p", "top_k", "min_p", "seed"]
    model = weights_of(arguments.model) or arguments.model
    return {"backend": _backend(arguments), "model": model} | {name: getattr(arguments, name) for name in names}


def _log_changes(journal: Journal, answer_settings: dict[str, Any]) -> None:
    """Warn if the journal's latest answers were made with other settings."""
    before = journal.settings or {}
    changes = [
        f"{name}: {before[name]} there, {value} now"
        for name, value in answer_settings.items()
        if before.get(name, value) != value
    ]
    if changes:
        logger.warning(
            "The latest answers in %s were made with other arguments (%s). Prompts are answered again if their answers "
            "depend on these. The old answers stay in the file, for runs with the old arguments.",
            journal.path,
            "; ".join(changes),
        )


def repetition(token_ids: Sequence[int]) -> float:
    """Share of an answer's 4-grams that occurred earlier in it, 0 .. 1."""
    runs = grams(token_ids, 4)
    return 1 - len(set(runs)) / len(runs)


def _chats(
    answers: Answers,
    prompts: list[Prompt],
    unanswerable: dict[int, str],
    arguments: RegenerateArguments,
    dropped: list[dict[str, str]],
) -> Iterator[list[dict[str, Any]]]:
    """Yield the samples of each chat that is kept, in the order of the prompts.

    Args:
        unanswerable: prompts, by index, that can't be answered, and why.
        dropped: receives an entry (`Prompt.dropped`) for each of the others.
    """
    end_ids = answers.verifier.end_ids
    origin = {
        "model": Path(arguments.model).resolve().name if Path(arguments.model).is_dir() else arguments.model,
        "tokenizer": vocabulary_fingerprint(answers.verifier.tokenizer),
        "chat_options": answers.verifier.options.fingerprint(),
        "template_fingerprint": template_fingerprint(answers.verifier.tokenizer),
    }
    for index, prompt in enumerate(progress_bar(prompts, desc="Writing", unit="chat")):
        if index in unanswerable:
            dropped.append(prompt.dropped(unanswerable[index]))
            continue
        samples = replay(answers, prompt)
        assert samples is not None
        if reason := _why_dropped(samples, end_ids, arguments):
            dropped.append(prompt.dropped(reason))
        else:
            yield [sample | origin for sample in samples]


def _why_dropped(samples: list[dict[str, Any]], end_ids: set[int], arguments: RegenerateArguments) -> str | None:
    """The reason why a chat is dropped, None if it is kept."""
    answers = [answer for sample in samples for answer in answer_spans(sample)]
    if any(message["role"] == "assistant" and not message["content"] for message in samples[-1]["messages"]):
        return "an empty answer"
    if any(len(answer) - (answer[-1] in end_ids) < arguments.min_answer_tokens for answer in answers):
        return f"an answer of fewer than {arguments.min_answer_tokens} tokens"
    if arguments.drop_cut_answers and any(answer[-1] not in end_ids for answer in answers):
        return f"an answer cut off after {arguments.max_new_tokens} tokens"
    if any(repetition(answer) > arguments.max_repetition for answer in answers):
        return "a looping answer"
    return None


def answer_spans(sample: dict[str, Any]) -> list[list[int]]:
    """The token ids of each answer in a sample: its runs of loss mask 1."""
    spans = groupby(zip(sample["loss_mask"], sample["input_ids"], strict=True), key=itemgetter(0))
    return [[token_id for _, token_id in span] for mask, span in spans if mask]


class _Report:
    """Counts samples as they are written."""

    def __init__(self) -> None:
        self.num_samples = self.tokens = self.answer_tokens = 0
        self.by_category: Counter[str] = Counter()
        self.by_finish_reason: Counter[str] = Counter()

    def add(self, sample: dict[str, Any]) -> None:
        self.num_samples += 1
        self.tokens += len(sample["input_ids"])
        self.answer_tokens += sum(sample["loss_mask"])
        self.by_category[sample["category"]] += 1
        self.by_finish_reason[sample["finish_reason"]] += 1

    def counts(self, dropped: list[dict[str, str]]) -> dict[str, Any]:
        return {
            "rows": self.num_samples,
            "rows_by_category": dict(sorted(self.by_category.items())),
            "rows_by_finish_reason": dict(sorted(self.by_finish_reason.items())),
            "tokens": self.tokens,
            "answer_tokens": self.answer_tokens,
            "dropped_by_reason": _counted(dropped, "reason"),
            "dropped_by_category": _counted(dropped, "category"),
        }


def _counted(dropped: list[dict[str, str]], name: str) -> dict[str, int]:
    return dict(sorted(Counter(drop[name] for drop in dropped).items()))
