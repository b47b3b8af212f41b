"""On-policy chats: the target answers prompts that are given, or that it invents itself.

A drafter is measured on the text that its target writes, so that is the best text to learn from. Every answer keeps the
token ids that the target made: text decoded and encoded again often gives other ids.
"""

import errno
import hashlib
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

from tqdm import tqdm

from ..arguments import Arguments
from ..errors import PeagleError
from ..files import atomic_path, write_json
from ..target import weights_of
from .chat_models import Batch, ChatModel, LocalChatModel, Sampling, ServedChatModel
from .endpoint import MAX_RETRIES
from .prompts import Prompt, distinct, grams, read_prompts, words

logger = logging.getLogger(__name__)

MAX_REPETITION = 0.3
"""Share of repeated 4-grams of an answer's tokens above which it is looping."""
ANSWER_TIMEOUT = 600.0

_MIN_INVENTED_WORDS = 3
_RANGES = (
    *((name, 1, math.inf) for name in ("max_new_tokens", "concurrency", "batch_size")),
    *((name, 0, math.inf) for name in ("temperature", "top_k", "min_answer_tokens", "max_retries")),
    *((name, 0, 1) for name in ("top_p", "min_p", "max_repetition")),
)
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
        metadata={"help": "The .jsonl file to write. What was dropped and why goes into a .report.json beside it."}
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

    GROUPS: ClassVar = {
        "Input and output": ("model", "prompts", "invent", "output", "exclude", "max_samples"),
        "Sampling": ("max_new_tokens", "temperature", "invent_temperature", "top_p", "top_k", "min_p", "seed"),
        "Which answers are kept": ("min_answer_tokens", "drop_cut_answers", "max_repetition"),
        "vLLM servers": ("endpoint", "concurrency", "request_timeout", "max_retries"),
        "This process": ("batch_size", "dtype", "trust_remote_code"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is None and self.invent <= 0:
            raise PeagleError("There is nothing to answer: name a file with --prompts, or give --invent a number.")
        if self.invent > 0 and self.invent_temperature <= 0:
            raise PeagleError("--invent-temperature must be above 0, or else all invented prompts are the same.")
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if not least <= value <= most:
                limits = f"at least {least}" if most == math.inf else f"in {least} .. {most}"
                raise PeagleError(f"--{name.replace('_', '-')} is {value} but must be {limits}.")
        if self.endpoint and self.dtype != "auto":
            raise PeagleError("--dtype is for a target in this process. With --endpoint tell the server.")


def regenerate(arguments: RegenerateArguments) -> Path:
    """Let the target answer prompts, and give the path of the .jsonl file with the chats, in the order of the prompts.

    A row has `id`, `category`, `messages`, `input_ids`, `loss_mask` (1 on every token that the target made,
    its end-of-turn token included), `finish_reason` of the last answer ("stop" or "length") and `model`. A chat is one
    row, unless the chat template renders earlier turns differently later: then each such turn starts a row of its own.

    Near-duplicate, excluded and unusable prompts are dropped before they are answered, chats with an answer that is
    empty, too short, cut off or looping afterwards; the report says which and why. Finished answers are kept beside the
    output, so that an interrupted run continues with the same result.

    What is sampled depends on the seed, the prompt's id and the turn, not on who else is answered at the time.

    Raises:
        PeagleError: a file is malformed, the model can't be loaded or has no chat template, the output was made with
            other arguments, or the servers failed a request.
    """
    dropped: list[dict[str, str]] = []
    prompts = read_prompts(arguments.prompts, dropped)[: arguments.max_samples] if arguments.prompts else []
    excluded = [prompt for path in arguments.exclude for prompt in read_prompts(path, dropped)]
    settings = _settings(arguments, prompts, excluded)

    output = Path(arguments.output)
    report_path = output.with_suffix(".report.json")
    if output.exists():
        _require_same_settings(settings, _settings_of(output, report_path), output)
        logger.info("%s is complete already.", output)
        return output

    journal = _Journal(output.with_suffix(".journal"), settings)
    target = _load(arguments)
    prompts += _invent(target, journal, arguments, dropped)
    prompts = distinct(prompts, excluded, dropped)
    chats = _answer(target, journal, prompts, arguments, dropped)
    kept = []
    for rows in chats:
        if reason := _fault(rows, target.end_ids, arguments):
            dropped.append({"id": rows[0]["id"], "category": rows[0]["category"], "reason": reason})
        else:
            kept += rows
    if not kept:
        reasons = ", ".join(sorted({drop["reason"] for drop in dropped}))
        raise PeagleError(
            f"No chat is left for {output}: {len(dropped)} were dropped ({reasons}). Give other prompts, or a model "
            "that answers better."
        )

    report = _report(kept, dropped)
    write_json(report_path, {"settings": settings, **report, "dropped": dropped})
    with atomic_path(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in kept:
            row["model"] = settings["model"]
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    journal.remove()
    logger.info("%s: %s", output, json.dumps(report, ensure_ascii=False))
    return output


def _load(arguments: RegenerateArguments) -> ChatModel:
    if arguments.endpoint is None:
        return LocalChatModel(
            arguments.model,
            arguments.max_new_tokens,
            arguments.trust_remote_code,
            arguments.batch_size,
            arguments.dtype,
        )
    return ServedChatModel(
        arguments.model,
        arguments.max_new_tokens,
        arguments.trust_remote_code,
        arguments.endpoint,
        arguments.concurrency,
        arguments.request_timeout,
        arguments.max_retries,
    )


def _settings(arguments: RegenerateArguments, prompts: list[Prompt], excluded: list[Prompt]) -> dict[str, Any]:
    """Describe all that the result depends on, without a path of this machine."""
    settings = {name: value for name, value in asdict(arguments).items() if name not in _ELSEWHERE}
    settings["backend"] = "transformers" if arguments.endpoint is None else "vLLM"
    if Path(arguments.model).is_dir():
        settings["model"] = Path(arguments.model).resolve().name
        settings["weights"] = weights_of(arguments.model)
    for name, read in (("prompts", prompts), ("exclude", excluded)):
        text = json.dumps([asdict(prompt) for prompt in read])
        settings[name] = f"{len(read)}, sha256 {hashlib.sha256(text.encode()).hexdigest()}"
    return settings


def _settings_of(output: Path, report_path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(report_path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError) as error:
        raise PeagleError(
            f"{output} exists already, but there is no report {report_path} that tells how it was made. Name another "
            "--output, or remove the file."
        ) from error


def _require_same_settings(settings: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    changes = [
        f"{name}: {found.get(name)} there, {value} now" for name, value in settings.items() if found.get(name) != value
    ]
    if changes:
        raise PeagleError(
            f"{path} belongs to a run with other arguments ({'; '.join(changes)}). Give the same arguments as then, "
            "name another --output, or remove the file to start afresh."
        )


class _Journal:
    """Results on disk, a JSON line each after a first line with the settings, so that a rerun skips them."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.done: dict[str, dict[int, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        complete, newline, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        if not newline:
            self._write([settings], "w")
            return
        try:
            header, *lines = [json.loads(line) for line in complete.split(b"\n")]
        except ValueError as error:
            raise PeagleError(f"{path} is damaged ({error}). Remove it to start afresh.") from error
        _require_same_settings(settings, header, path)
        with open(path, "r+b") as file:
            file.truncate(len(complete) + 1)
        for line in lines:
            self.done.setdefault(line["step"], {})[line["item"]] = line["result"]

    def run(
        self, step: str, target: ChatModel, items: Sequence[int], work: Callable[[Batch], list[Any]]
    ) -> dict[int, Any]:
        """Give the result of every item, those that are not done yet by `work` on batches of them."""
        done = self.done.setdefault(step, {})
        size = target.batch_size
        batches = [list(items[start : start + size]) for start in range(0, len(items), size)]
        # Batches stay the same in a rerun: by whom else a model is asked changes the rounding of its arithmetic.
        batches = [batch for batch in batches if not done.keys() >= set(batch)]
        waiting = sum(map(len, batches))
        with tqdm(total=len(items), initial=len(items) - waiting, desc=step, unit="chat", disable=None) as progress:
            for batch, results in target.work_off(batches, work):
                done |= zip(batch, results, strict=True)
                lines = zip(batch, results, strict=True)
                self._write([{"step": step, "item": item, "result": result} for item, result in lines], "a")
                progress.update(len(batch))
        return done

    def remove(self) -> None:
        self.path.unlink()

    def _write(self, lines: list[dict[str, Any]], mode: str) -> None:
        try:
            with open(self.path, mode, encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise PeagleError(
                f"No space is left on the disk of {self.path}. Free some and run the same command again: it continues."
            ) from error


def _seed(arguments: RegenerateArguments, purpose: str) -> int:
    return random.Random(f"{arguments.seed} {purpose}").getrandbits(63)


def _invent(
    target: ChatModel, journal: _Journal, arguments: RegenerateArguments, dropped: list[dict[str, str]]
) -> list[Prompt]:
    """Sample what follows the user's tag (Magpie, arXiv 2406.08464), and keep what could be a user's words."""
    if arguments.invent <= 0:
        return []
    prefix, end_ids = target.user_turn()

    sampling = Sampling(arguments.invent_temperature, arguments.top_p, arguments.top_k, arguments.min_p)

    def work(batch: Batch) -> list[list[int]]:
        seeds = [_seed(arguments, f"invented-{number}") for number in batch]
        return target.complete([prefix] * len(batch), end_ids, sampling, seeds)

    results = journal.run("Inventing", target, range(arguments.invent), work)
    prompts = []
    for number in range(arguments.invent):
        ids = results[number]
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


def _answer(
    target: ChatModel,
    journal: _Journal,
    prompts: list[Prompt],
    arguments: RegenerateArguments,
    dropped: list[dict[str, str]],
) -> list[list[dict[str, Any]]]:
    """Answer the prompts, those of similar length together, and give the rows of each, in the order of the prompts."""
    lengths = [_longest(target, prompt) for prompt in prompts]
    fitting = []
    for index, length in enumerate(lengths):
        if target.max_length is not None and length > target.max_length:
            dropped.append(prompts[index].dropped("longer than the model's context with its answers"))
        else:
            fitting.append(index)
    fitting.sort(key=lambda index: (len(prompts[index].turns), lengths[index]))
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.top_k, arguments.min_p)

    def work(batch: Batch) -> list[list[dict[str, Any]]]:
        dialogues = [_Dialogue(prompts[index]) for index in batch]
        for turn in range(max(len(dialogue.prompt.turns) for dialogue in dialogues)):
            asked = [dialogue for dialogue in dialogues if turn < len(dialogue.prompt.turns)]
            for dialogue in asked:
                dialogue.ask(dialogue.prompt.turns[turn], target)
            seeds = [_seed(arguments, f"{dialogue.prompt.id} turn {turn}") for dialogue in asked]
            answers = target.complete([dialogue.input_ids for dialogue in asked], target.end_ids, sampling, seeds)
            for dialogue, ids in zip(asked, answers, strict=True):
                dialogue.hear(ids, target)
        return [dialogue.close() for dialogue in dialogues]

    results = journal.run("Answering", target, fitting, work)
    return [results[index] for index in sorted(fitting)]


def _longest(target: ChatModel, prompt: Prompt) -> int:
    """Give the tokens of a chat in which every answer is as long as it may be."""
    messages = [*prompt.system, {"role": "user", "content": prompt.turns[0]}]
    for turn in prompt.turns[1:]:
        messages += [{"role": "assistant", "content": "."}, {"role": "user", "content": turn}]
    return len(target.encode(target.render(messages))) + len(prompt.turns) * target.max_new_tokens


class _Dialogue:
    """A chat in the making: as messages, and as the token ids that the target read and wrote.

    The answers' own ids stay; only what the chat template writes between them is encoded. Where the template writes an
    earlier answer in other words than the target did, the history is encoded anew and starts another row.
    """

    def __init__(self, prompt: Prompt):
        self.prompt = prompt
        self.messages: list[dict[str, Any]] = list(prompt.system)
        self.text = ""  # what the chat template should write up to the end of the last answer
        self.input_ids: list[int] = []
        self.loss_mask: list[int] = []
        self.finish_reason = ""
        self.rows: list[dict[str, Any]] = []

    def ask(self, turn: str, target: ChatModel) -> None:
        self.messages.append({"role": "user", "content": turn})
        text = target.render(self.messages)
        if not text.startswith(self.text):
            self._end_row(self.messages[:-1])
            self.text = ""
        new_ids = target.encode(text[len(self.text) :])
        self.input_ids = self.input_ids + new_ids
        self.loss_mask = self.loss_mask + [0] * len(new_ids)
        self.text = text

    def hear(self, ids: list[int], target: ChatModel) -> None:
        ended = ids[-1] in target.end_ids
        self.finish_reason = "stop" if ended else "length"
        content = target.decode(ids[:-1] if ended else ids).strip()
        self.messages.append({"role": "assistant", "content": content})
        self.text += content + (target.decode(ids[-1:], skip_special_tokens=False) if ended else "")
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
                "messages": list(messages),
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


def _report(kept: list[dict[str, Any]], dropped: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "rows": len(kept),
        "rows_by_category": dict(sorted(Counter(row["category"] for row in kept).items())),
        "rows_by_finish_reason": dict(sorted(Counter(row["finish_reason"] for row in kept).items())),
        "tokens": sum(len(row["input_ids"]) for row in kept),
        "answer_tokens": sum(sum(row["loss_mask"]) for row in kept),
        "dropped_by_reason": dict(sorted(Counter(drop["reason"] for drop in dropped).items())),
        "dropped_by_category": dict(sorted(Counter(drop["category"] for drop in dropped).items())),
    }
