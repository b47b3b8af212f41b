"""On-policy chats: the target answers prompts that are given, or that it invents itself.

A drafter is measured on the text that its target writes, so that is the best text to learn from. Every answer keeps the
token ids that the target made: text decoded and encoded again often gives other ids.
"""

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..arguments import Arguments, check_ranges, flag_of
from ..console import progress_bar
from ..errors import PeagleError
from ..files import atomic_path, locked_file, remove_leftovers, write_json
from ..fingerprint import has_weights, weights_of
from .answer_journal import Journal
from .chat_models import Batch, ChatModel, LocalChatModel, Sampling, ServedChatModel
from .chats import Unlearnable
from .endpoint import MAX_RETRIES
from .errors import EndpointError, RefusedEndpointError
from .prompts import Prompt, distinct, grams, read_prompts, words
from .tokenizer import CHAT_TEMPLATE_HELP, CHAT_TEMPLATE_KWARGS_HELP, ChatOptions, vocabulary_fingerprint

logger = logging.getLogger(__name__)

MAX_REPETITION = 0.3
"""Share of repeated 4-grams of an answer's tokens above which it is looping."""
ANSWER_TIMEOUT = 600.0

_MIN_INVENTED_WORDS = 3
_MAX_REFUSED_AT_FIRST = 100
"""Servers that refuse as many prompts, and have answered none, would refuse all others too."""
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
"""Arguments that the result doesn't depend on, or that `_settings` describes otherwise."""


@dataclass
class RegenerateArguments(Arguments):
    """Arguments of `peagle-hf regenerate`."""

    model: str = field(metadata={"aliases": ["--verifier"], "help": "The target that answers: a folder or a hub name."})
    output: str = field(
        metadata={
            "help": "The .jsonl file to write. What was dropped and why goes into a .report.json beside it, answers as "
            "they come into a .journal."
        }
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts to answer: a .jsonl or .json file or a hub dataset with `turns` (Spec-Bench's shape), "
            "`messages` or `conversations`, whose user turns are kept and whose assistant turns are answered anew."
        },
    )
    invent: int = field(
        default=0,
        metadata={"help": "How many prompts the target invents by continuing its own user tag; filters leave fewer."},
    )
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "Files of prompts that no prompt may resemble, such as those of the evaluation."},
    )
    max_samples: int | None = field(default=None, metadata={"help": "Take at most this many of the given prompts."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, and longest invented prompt."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the answers; 0 is greedy."})
    invent_temperature: float = field(default=1.0, metadata={"help": "Temperature of the invented prompts."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the likeliest tokens that have this probability together."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from so many of the likeliest tokens; 0 is all."})
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
        metadata={"help": "vLLM servers that run the target, URL[,URL...] (default: run it in this process)."},
    )
    concurrency: int = field(default=32, metadata={"help": "Chats that the servers answer at a time."})
    request_timeout: float = field(
        default=ANSWER_TIMEOUT, metadata={"help": "Seconds to wait for a server's answer, each time it is tried."}
    )
    max_retries: int = field(
        default=MAX_RETRIES, metadata={"help": "How often a request is repeated that a server fails."}
    )
    batch_size: int = field(default=32, metadata={"help": "Chats that are answered together in this process."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Dtype of the target in this process; auto is float32 on CPU, the checkpoint's own on GPU."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of all sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the target."})
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
            raise PeagleError("--dtype is for a target in this process. With --endpoint tell the server.")


def regenerate(arguments: RegenerateArguments) -> Path:
    """Let the target answer prompts, and give the path of the .jsonl file with the chats, in the order of the prompts.

    A row has `id`, `category`, `conversation` (the same text in all rows of one chat and in no other), `messages`,
    `tools` if the chat offers some, `input_ids`, `loss_mask` (1 on every token that the target made, its end-of-turn
    token included), `finish_reason` of the last answer ("stop" or "length"), `model`, `tokenizer` (a fingerprint of the
    vocabulary of `input_ids`) and `chat_options` (the chosen chat template, by a fingerprint, and its variables). A
    chat is one row, unless the chat template renders earlier turns differently later: then each such turn starts a row
    of its own.

    The report lists what is dropped and why: near-duplicate, excluded and unusable prompts before they are answered,
    prompts that a server refuses, and chats with an answer that is empty, too short, cut off or looping. Answers are
    kept in a journal beside the output, under all that they depend on, so that a run that goes on, also with prompts
    added, removed or in another order, asks only for answers that aren't there yet.

    What is sampled depends on the seed and the text before it, not on the order of the prompts or on which prompts are
    answered at the same time.

    Raises:
        PeagleError: a file is malformed, the model can't be loaded or has no chat template, the output was made with
            other arguments, another process writes it, or the servers failed a request.
    """
    output = Path(arguments.output)
    with locked_file(output, "Wait until it has ended, or name another --output."):
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
        if has_weights(found.get("weights"), arguments.model):  # also by the fingerprint of an earlier version
            found["weights"] = settings.get("weights")
        _require_same_settings(settings, found, output, journal_path)
        logger.info("%s is complete already.", output)
        return output

    target = _load(arguments, options)
    with Journal(journal_path) as journal:
        basis = _basis(arguments) | options.description()
        before = (journal.settings or {}).get("model")
        if has_weights(before, arguments.model):  # also by the fingerprint of an earlier version
            basis["model"] = before
        _log_changes(journal, basis)
        journal.begin(basis)
        prompts += _invent(target, journal, basis, arguments, dropped)
        prompts = distinct(prompts, excluded, dropped)
        prompts, lengths = _fitting(target, prompts, dropped)
        answers = _Answers(target, journal, basis, arguments, arguments.temperature, target.end_ids)
        unanswerable = _answer(answers, prompts, lengths)
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
    """Write the chats as they come, and then the report of them."""
    report = _Report()
    with atomic_path(output) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for rows in chats:
                for row in rows:
                    report.add(row)
                    file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
        if not report.rows:
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
    """Describe all that the result depends on, without a path of this machine."""
    settings = {name: value for name, value in asdict(arguments).items() if name not in _ELSEWHERE}
    settings["backend"] = _backend(arguments)
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
    """Read from its report how an output was made."""
    try:
        return dict(json.loads(report_path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = (
            f"there is no report {report_path} that tells how it was made"
            if isinstance(error, FileNotFoundError)
            else f"its report {report_path} is damaged ({type(error).__name__}: {error})"
        )
        raise PeagleError(
            f"{output} exists already, but {problem}. Name another --output, or remove {output} to make it anew."
        ) from error


def _require_same_settings(settings: dict[str, Any], found: dict[str, Any], output: Path, journal_path: Path) -> None:
    changes = [
        f"{name}: {found.get(name)} there, {value} now" for name, value in settings.items() if found.get(name) != value
    ]
    if changes:
        kept = f" Answers in {journal_path} that are still valid will be used." if journal_path.exists() else ""
        raise PeagleError(
            f"{output} belongs to a run with other arguments ({'; '.join(changes)}). Give the same arguments as then, "
            f"name another --output, or remove {output} to make it anew.{kept}"
        )


def _basis(arguments: RegenerateArguments) -> dict[str, Any]:
    """Give the arguments that an answer depends on, those of drawing only if anything is drawn."""
    names = ["dtype", "max_new_tokens", "temperature"]
    if arguments.invent:
        names.append("invent_temperature")
    if arguments.invent or arguments.temperature > 0:
        names += ["top_p", "top_k", "min_p", "seed"]
    model = weights_of(arguments.model) or arguments.model
    return {"backend": _backend(arguments), "model": model} | {name: getattr(arguments, name) for name in names}


def _log_changes(journal: Journal, basis: dict[str, Any]) -> None:
    before = journal.settings or {}
    changes = [
        f"{name}: {before[name]} there, {value} now"
        for name, value in basis.items()
        if before.get(name, value) != value
    ]
    if changes:
        logger.warning(
            "The latest answers in %s were made with other arguments (%s). Prompts are asked anew where their answers "
            "depend on these; a run with the old arguments would find the old answers, which stay in the file.",
            journal.path,
            "; ".join(changes),
        )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Answers:
    """The target's answers to token ids, from the journal where it has them.

    Args:
        basis: see `_basis`.
        temperature: of these answers.
        end_ids: an answer ends with one of these token ids.
    """

    def __init__(
        self,
        target: ChatModel,
        journal: Journal,
        basis: dict[str, Any],
        arguments: RegenerateArguments,
        temperature: float,
        end_ids: set[int],
    ):
        self.target, self.journal, self.end_ids, self.seed = target, journal, end_ids, arguments.seed
        self.sampling = Sampling(temperature, arguments.top_p, arguments.top_k, arguments.min_p)
        drawing = asdict(self.sampling) if temperature > 0 else "greedy"
        same = [basis[name] for name in ("backend", "model", "dtype", "max_new_tokens")]
        self.basis = [*same, drawing, sorted(end_ids)]

    def has(self, question: list[int], number: int = 0) -> bool:
        """Whether the journal has the answer.

        Args:
            number: tells draws for the same question from each other.
        """
        return self._key(question, number) in self.journal

    def get(self, question: list[int], number: int = 0) -> list[int]:
        """Give an answer that the journal has."""
        return self.journal.get(self._key(question, number))

    def ask(self, questions: list[list[int]], numbers: Sequence[int] | None = None) -> list[list[int]]:
        """Give the answer to each question, after asking the target once for all that the journal hasn't got."""
        numbers = [0] * len(questions) if numbers is None else numbers
        keys = [self._key(*one) for one in zip(questions, numbers, strict=True)]
        new = {key: place for place, key in enumerate(keys) if key not in self.journal}
        if new:
            asked = [questions[place] for place in new.values()]
            seeds = [self._draw(questions[place], numbers[place]) for place in new.values()]
            answers = self.target.complete(asked, self.end_ids, self.sampling, seeds)
            self.journal.add(dict(zip(new, answers, strict=True)))
        return [self.journal.get(key) for key in keys]

    def _key(self, question: list[int], number: int) -> str:
        draw = self._draw(question, number) if self.sampling.temperature > 0 else None
        return _digest(self.basis, draw, question)[:32]

    def _draw(self, question: list[int], number: int) -> int:
        """Give the seed of an answer, 0 .. 2^63 - 1, which is the same wherever the prompt stands in its file."""
        return int(_digest(self.seed, number, question)[:16], 16) >> 1


def _run_batches(target: ChatModel, step: str, batches: list[Batch], work: Callable[[Batch], None], total: int) -> None:
    waiting = sum(map(len, batches))
    with progress_bar(total=total, initial=total - waiting, desc=step, unit="chat") as progress:
        for batch in target.run_batches(batches, work):
            progress.update(len(batch))


def _batches(items: Sequence[int], size: int) -> list[Batch]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _invent(
    target: ChatModel,
    journal: Journal,
    basis: dict[str, Any],
    arguments: RegenerateArguments,
    dropped: list[dict[str, str]],
) -> list[Prompt]:
    """Sample what follows the user's tag (Magpie, arXiv 2406.08464), and keep what could be a user's words."""
    if not arguments.invent:
        return []
    prefix, end_ids = target.user_turn()
    answers = _Answers(target, journal, basis, arguments, arguments.invent_temperature, end_ids)

    def work(batch: Batch) -> None:
        answers.ask([prefix] * len(batch), batch)

    missing = [number for number in range(arguments.invent) if not answers.has(prefix, number)]
    _run_batches(target, "Inventing", _batches(missing, target.batch_size), work, arguments.invent)
    prompts = []
    for number in range(arguments.invent):
        ids = answers.get(prefix, number)
        ended = ids[-1] in end_ids
        text = target.decode(ids[:-1] if ended else ids, skip_special_tokens=False).strip()
        prompt = Prompt(f"invented-{number}", "invented", [], [text])
        if not ended:
            dropped.append(prompt.dropped("the invented prompt did not end"))
        elif len(words(text)) < _MIN_INVENTED_WORDS:
            dropped.append(prompt.dropped("the invented prompt is too short"))
        elif not all(character.isprintable() or character in "\n\t" for character in text) or "\ufffd" in text:
            dropped.append(prompt.dropped("the invented prompt is not text"))
        elif not target.tokenizer.added_tokens_decoder.keys().isdisjoint(ids[:-1]):
            dropped.append(prompt.dropped("the invented prompt holds a special token"))
        else:
            prompts.append(prompt)
    return prompts


def repetition(token_ids: Sequence[int]) -> float:
    """Give the share of an answer's 4-grams that occurred in it before."""
    runs = grams(token_ids, 4)
    return 1 - len(set(runs)) / len(runs)


def _fitting(target: ChatModel, prompts: list[Prompt], dropped: list[dict[str, str]]) -> tuple[list[Prompt], list[int]]:
    """Keep the prompts that the chat template takes and that fit the model's context; also give their lengths."""
    fitting, lengths = [], []
    for prompt in progress_bar(prompts, desc="Measuring", unit="chat"):
        try:
            length = _longest(target, prompt)
            if target.max_length is not None and length > target.max_length:
                raise Unlearnable("longer than the model's context with its answers")
        except Unlearnable as reason:
            dropped.append(prompt.dropped(str(reason)))
        else:
            fitting.append(prompt)
            lengths.append(length)
    return fitting, lengths


def _longest(target: ChatModel, prompt: Prompt) -> int:
    """Give the tokens of a chat in which every answer is as long as it may be."""
    messages = [*prompt.system, {"role": "user", "content": prompt.turns[0]}]
    for turn in prompt.turns[1:]:
        messages += [{"role": "assistant", "content": "."}, {"role": "user", "content": turn}]
    return len(target.encode(target.render(messages, prompt.tools))) + len(prompt.turns) * target.max_new_tokens


def _answer(answers: _Answers, prompts: list[Prompt], lengths: list[int]) -> dict[int, str]:
    """See to it that all prompts are answered, those of similar length together.

    Returns:
        The prompts, by their place, that can't be answered, and why.
    """
    target = answers.target
    unanswerable: dict[int, str] = {}
    waiting = list(range(len(prompts)))
    if len(answers.journal):
        waiting = []
        for index, prompt in enumerate(progress_bar(prompts, desc="Looking up", unit="chat")):
            try:
                if _replay(answers, prompt) is None:
                    waiting.append(index)
            except Unlearnable as reason:
                unanswerable[index] = str(reason)
        if len(waiting) < len(prompts):
            logger.info(
                "%s has answers to %d of %d prompts already; the other %d are asked for.",
                *(answers.journal.path, len(prompts) - len(waiting), len(prompts), len(waiting)),
            )
    # The composition of a batch changes rounding. A run that goes on has the same batches: those before are complete,
    # as the prompts of one have equally many turns, and the order is not that of the file.
    waiting.sort(key=lambda index: (len(prompts[index].turns), lengths[index], prompts[index].digest))
    groups = groupby(waiting, key=lambda index: len(prompts[index].turns))
    batches = [batch for _, group in groups for batch in _batches(list(group), target.batch_size)]
    num_refused, has_answers = 0, len(waiting) < len(prompts)

    def work(batch: Batch) -> None:
        nonlocal num_refused, has_answers
        dialogues = {index: _Dialogue(prompts[index], target) for index in batch}
        for turn in range(len(prompts[batch[0]].turns)):
            for index in batch:
                try:
                    if index in dialogues:
                        dialogues[index].ask(turn)
                except Unlearnable as reason:  # the template refuses the chat because of an answer in it
                    unanswerable[index] = str(reason)
                    del dialogues[index]
            try:
                replies = answers.ask([dialogue.input_ids for dialogue in dialogues.values()])
            except RefusedEndpointError as error:
                unanswerable.update(dict.fromkeys(dialogues, f"the server refuses it: {str(error)[:300]}"))
                num_refused += len(dialogues)
                if num_refused >= _MAX_REFUSED_AT_FIRST and not has_answers:
                    raise PeagleError(
                        f"The servers refused the first {num_refused} prompts, the latest with: {error}. See to the "
                        "servers or the arguments, and run the same command again."
                    ) from error
                return
            except EndpointError as error:
                names = ", ".join(f"prompt {prompts[index].id} ({prompts[index].place})" for index in dialogues)
                raise EndpointError(f"{names}: {error.url or 'the servers'}: {error.reason}", error.advice) from error
            for dialogue, ids in zip(dialogues.values(), replies, strict=True):
                dialogue.hear(ids)
        has_answers = True

    _run_batches(target, "Answering", batches, work, len(prompts))
    return unanswerable


def _replay(answers: _Answers, prompt: Prompt) -> list[dict[str, Any]] | None:
    """Give the rows of a chat whose answers are all in the journal; None of others.

    Raises:
        Unlearnable: the chat template refuses the chat because of an answer in it.
    """
    dialogue = _Dialogue(prompt, answers.target)
    for turn in range(len(prompt.turns)):
        dialogue.ask(turn)
        if not answers.has(dialogue.input_ids):
            return None
        dialogue.hear(answers.get(dialogue.input_ids))
    return dialogue.close()


def _chats(
    answers: _Answers,
    prompts: list[Prompt],
    unanswerable: dict[int, str],
    arguments: RegenerateArguments,
    dropped: list[dict[str, str]],
) -> Iterator[list[dict[str, Any]]]:
    """Give the rows of each chat that is kept, in the order of the prompts."""
    end_ids = answers.target.end_ids
    origin = {
        "model": Path(arguments.model).resolve().name if Path(arguments.model).is_dir() else arguments.model,
        "tokenizer": vocabulary_fingerprint(answers.target.tokenizer),
        "chat_options": answers.target.options.fingerprint(),
    }
    for index, prompt in enumerate(progress_bar(prompts, desc="Writing", unit="chat")):
        if index in unanswerable:
            dropped.append(prompt.dropped(unanswerable[index]))
            continue
        rows = _replay(answers, prompt)
        assert rows is not None
        if reason := _fault(rows, end_ids, arguments):
            dropped.append(prompt.dropped(reason))
        else:
            yield [row | origin for row in rows]


class _Dialogue:
    """A chat in the making: as messages, and as the token ids that the target read and wrote.

    The answers' own ids stay; only what the chat template writes between them is encoded. Where the template writes an
    earlier answer in other words than the target did, the history is encoded anew and starts another row.
    """

    def __init__(self, prompt: Prompt, target: ChatModel):
        self.prompt, self.target = prompt, target
        self.messages: list[dict[str, Any]] = list(prompt.system)
        self.text = ""  # what the chat template should write up to the end of the last answer
        self.input_ids: list[int] = []
        self.loss_mask: list[int] = []
        self.finish_reason = ""
        self.rows: list[dict[str, Any]] = []

    def ask(self, turn: int) -> None:
        """Let the user say what comes in this turn.

        Raises:
            Unlearnable: the chat template refuses the chat.
        """
        self.messages.append({"role": "user", "content": self.prompt.turns[turn]})
        text = self.target.render(self.messages, self.prompt.tools)
        if not text.startswith(self.text):
            self._end_row(self.messages[:-1])
            self.text = ""
        new_ids = self.target.encode(text[len(self.text) :])
        self.input_ids = self.input_ids + new_ids
        self.loss_mask = self.loss_mask + [0] * len(new_ids)
        self.text = text

    def hear(self, ids: list[int]) -> None:
        """Let the target answer."""
        ended = ids[-1] in self.target.end_ids
        self.finish_reason = "stop" if ended else "length"
        content = self.target.decode(ids[:-1] if ended else ids).strip()
        self.messages.append({"role": "assistant", "content": content})
        self.text += content + (self.target.decode(ids[-1:], skip_special_tokens=False) if ended else "")
        self.input_ids = self.input_ids + ids
        self.loss_mask = self.loss_mask + [1] * len(ids)

    def close(self) -> list[dict[str, Any]]:
        """Give the rows of the chat."""
        self._end_row(self.messages)
        return self.rows

    def _end_row(self, messages: list[dict[str, Any]]) -> None:
        self.rows.append(
            {
                "id": self.prompt.id,
                "category": self.prompt.category,
                "conversation": self.prompt.digest,
                "messages": list(messages),
                **({"tools": self.prompt.tools} if self.prompt.tools else {}),
                "input_ids": self.input_ids,
                "loss_mask": self.loss_mask,
                "finish_reason": self.finish_reason,
            }
        )
        self.input_ids, self.loss_mask = [], []


def _fault(rows: list[dict[str, Any]], end_ids: set[int], arguments: RegenerateArguments) -> str | None:
    """Why the chat is dropped, if it is."""
    answers = [answer for row in rows for answer in learnt_spans(row)]
    if any(message["role"] == "assistant" and not message["content"] for message in rows[-1]["messages"]):
        return "an empty answer"
    if any(len(answer) - (answer[-1] in end_ids) < arguments.min_answer_tokens for answer in answers):
        return f"an answer of fewer than {arguments.min_answer_tokens} tokens"
    if arguments.drop_cut_answers and any(answer[-1] not in end_ids for answer in answers):
        return f"an answer cut off after {arguments.max_new_tokens} tokens"
    if any(repetition(answer) > arguments.max_repetition for answer in answers):
        return "a looping answer"
    return None


def learnt_spans(row: dict[str, Any]) -> list[list[int]]:
    """Give the token ids of each answer in a row: its runs of loss mask 1."""
    spans = groupby(zip(row["loss_mask"], row["input_ids"], strict=True), key=itemgetter(0))
    return [[token_id for _, token_id in span] for learnt, span in spans if learnt]


class _Report:
    """Counts rows as they are written."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.answer_tokens = 0
        self.by_category: Counter[str] = Counter()
        self.by_finish_reason: Counter[str] = Counter()

    def add(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.tokens += len(row["input_ids"])
        self.answer_tokens += sum(row["loss_mask"])
        self.by_category[row["category"]] += 1
        self.by_finish_reason[row["finish_reason"]] += 1

    def counts(self, dropped: list[dict[str, str]]) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "rows_by_category": dict(sorted(self.by_category.items())),
            "rows_by_finish_reason": dict(sorted(self.by_finish_reason.items())),
            "tokens": self.tokens,
            "answer_tokens": self.answer_tokens,
            "dropped_by_reason": _counted(dropped, "reason"),
            "dropped_by_category": _counted(dropped, "category"),
        }


def _counted(dropped: list[dict[str, str]], name: str) -> dict[str, int]:
    return dict(sorted(Counter(drop[name] for drop in dropped).items()))
