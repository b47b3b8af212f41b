"""On-policy chats: the target answers prompts that are given, or that it invents itself.

A drafter is measured on the text that its target writes, so that is the best text to learn from. Every answer keeps the
token ids that the target made: text decoded and encoded again often gives other ids.
"""

import errno
import hashlib
import json
import logging
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..errors import PeagleError
from ..files import atomic_path, write_json
from .chats import Unlearnable, open_source, read_chat

logger = logging.getLogger(__name__)

MAX_PROMPT_SIMILARITY = 0.5
"""Jaccard similarity of the 5-grams of two prompts above which they are near-duplicates."""

MAX_REPETITION = 0.3
"""Share of repeated 4-grams of an answer's tokens above which it is looping."""

_MIN_INVENTED_WORDS = 3
_PLACEHOLDER = "PLACEHOLDER"


@dataclass
class RegenerateArguments:
    """Arguments of `peagle-hf regenerate`."""

    model: str = field(metadata={"help": "The target that answers: a folder or a hub name."})
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
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of everything that is sampled."})
    batch_size: int = field(default=32, metadata={"help": "Chats that are answered together."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Dtype of the target; auto is float32 on CPU, the checkpoint's own on GPU."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all sampling."})

    def __post_init__(self) -> None:
        if self.prompts is None and self.invent <= 0:
            raise PeagleError("There is nothing to answer: name a file with --prompts, or give --invent a number.")
        if self.invent > 0 and self.invent_temperature <= 0:
            raise PeagleError("--invent-temperature must be above 0, or else all invented prompts are the same.")


@dataclass(frozen=True)
class Prompt:
    """What a user says in a chat, turn by turn, after the system messages if there are any."""

    id: str
    category: str
    system: list[dict[str, Any]]
    turns: list[str]


def regenerate(arguments: RegenerateArguments) -> Path:
    """Let the target answer prompts, and give the path of the .jsonl file with the chats, in the order of the prompts.

    A row has `id`, `category`, `messages`, `input_ids`, `loss_mask` (1 on every token that the target made,
    its end-of-turn token included), `finish_reason` of the last answer ("stop" or "length") and `model`. A chat is one
    row, unless the chat template renders earlier turns differently later: then each such turn starts a row of its own.

    Near-duplicate, excluded and unusable prompts are dropped before they are answered, chats with an empty or looping
    answer afterwards; the report says which and why. Finished batches are kept beside the output, so that an
    interrupted run continues with the same result.

    Raises:
        PeagleError: a file is malformed, the model can't be loaded or has no chat template, or the output was
            made with other arguments.
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
    target = _Target(arguments)
    prompts += _invent(target, journal, arguments, dropped)
    prompts = _distinct(prompts, excluded, dropped)
    chats = _answer(target, journal, prompts, arguments, dropped)
    kept = [row for rows in chats if _is_sound(rows, dropped) for row in rows]
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


def _settings(arguments: RegenerateArguments, prompts: list[Prompt], excluded: list[Prompt]) -> dict[str, Any]:
    """Describe all that the result depends on, without a path of this machine."""
    settings = asdict(arguments)
    for name in ("output", "max_samples"):
        del settings[name]
    if Path(arguments.model).is_dir():
        settings["model"] = Path(arguments.model).resolve().name
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
    """Finished batches on disk, a JSON line each after a first line with the settings, so that a rerun skips them."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.done: dict[str, list[Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        complete, newline, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        if not newline:
            self._write(json.dumps(settings), "w")
            return
        try:
            header, *lines = [json.loads(line) for line in complete.split(b"\n")]
        except ValueError as error:
            raise PeagleError(f"{path} is damaged ({error}). Remove it to start afresh.") from error
        _require_same_settings(settings, header, path)
        with open(path, "r+b") as file:
            file.truncate(len(complete) + 1)
        self.done = {line["batch"]: line["result"] for line in lines}

    def run(self, step: str, batches: Sequence[Any], work: Callable[[Any, str], list[Any]]) -> Iterator[Any]:
        """Give the results of `work(batch, name of the batch)` over all batches, doing those that are not done yet."""
        for number, batch in enumerate(tqdm(batches, desc=step, unit="batch", disable=None)):
            name = f"{step} {number}"
            if name not in self.done:
                self.done[name] = work(batch, name)
                self._write(json.dumps({"batch": name, "result": self.done[name]}), "a")
            yield from self.done[name]

    def remove(self) -> None:
        self.path.unlink()

    def _write(self, line: str, mode: str) -> None:
        try:
            with open(self.path, mode, encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise PeagleError(
                f"No space is left on the disk of {self.path}. Free some and run the same command again: it continues."
            ) from error


class _Target:
    """The model that answers, with its tokenizer and chat template."""

    def __init__(self, arguments: RegenerateArguments):
        self.arguments = arguments
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "float32" if arguments.dtype == "auto" and device == "cpu" else arguments.dtype
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
            self.model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval().to(device)
        except (OSError, ValueError) as error:
            raise PeagleError(
                f"The model {arguments.model} can't be loaded: {error} Check the folder, or the hub name and the "
                "network."
            ) from error
        if self.tokenizer.chat_template is None:
            raise PeagleError(
                f"The tokenizer of {arguments.model} has no chat template, so it is unknown how a chat is written for "
                "this model. Name a chat model, or add a chat_template.jinja to its folder."
            )
        ends = self.model.generation_config.eos_token_id
        self.end_ids = {self.tokenizer.eos_token_id} if ends is None else {ends} if isinstance(ends, int) else set(ends)
        # What else the checkpoint recommends, such as a repetition penalty, would take the text off the model's own.
        self.model.generation_config = GenerationConfig()
        self.max_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise PeagleError(
                f"The chat template of {self.arguments.model} refuses a chat with the roles {roles}: {error}. "
                "Take such chats out of the prompts, or correct them."
            ) from error

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def user_turn(self) -> tuple[list[int], set[int]]:
        """Give the token ids that lead up to a user's first words, and the ids that end a user's turn."""
        text = self.render([{"role": "user", "content": _PLACEHOLDER}], add_generation_prompt=False)
        before, placeholder, after = text.partition(_PLACEHOLDER)
        if not placeholder:
            raise PeagleError(
                f"The chat template of {self.arguments.model} doesn't write what the user says, so no prompt can be "
                "invented. Give prompts with --prompts instead of --invent."
            )
        tags = [token_id for token_id in self.encode(after) if token_id in self.tokenizer.added_tokens_decoder]
        return self.encode(before), self.end_ids | set(tags[:1])

    @torch.inference_mode()
    def complete(self, prompts: list[list[int]], end_ids: set[int], temperature: float, seed: str) -> list[list[int]]:
        """Give what the model writes after each prompt's token ids, up to and with the first id of `end_ids`."""
        width = max(map(len, prompts))
        pad_id = min(end_ids)
        input_ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
        attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampling = {"temperature": temperature, "top_p": self.arguments.top_p, "top_k": 0} if temperature > 0 else {}
        with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(random.Random(f"{self.arguments.seed} {seed}").getrandbits(63))
            sequences = self.model.generate(
                input_ids=input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                max_new_tokens=self.arguments.max_new_tokens,
                do_sample=temperature > 0,
                eos_token_id=sorted(end_ids),
                pad_token_id=pad_id,
                **sampling,
            )
        return [_up_to_end(ids, end_ids) for ids in sequences[:, width:].tolist()]


def _up_to_end(ids: list[int], end_ids: set[int]) -> list[int]:
    return ids[: next((index + 1 for index, token_id in enumerate(ids) if token_id in end_ids), len(ids))]


def _invent(
    target: _Target, journal: _Journal, arguments: RegenerateArguments, dropped: list[dict[str, str]]
) -> list[Prompt]:
    """Sample what follows the user's tag (Magpie, arXiv 2406.08464), and keep what could be a user's words."""
    if arguments.invent <= 0:
        return []
    prefix, end_ids = target.user_turn()

    def work(count: int, name: str) -> list[list[int]]:
        return target.complete([prefix] * count, end_ids, arguments.invent_temperature, name)

    counts = [
        min(arguments.batch_size, arguments.invent - start)
        for start in range(0, arguments.invent, arguments.batch_size)
    ]
    prompts = []
    for number, ids in enumerate(journal.run("Inventing", counts, work)):
        ended = ids[-1] in end_ids
        text = target.decode(ids[:-1] if ended else ids, skip_special_tokens=False).strip()
        prompt = Prompt(f"invented-{number}", "invented", [], [text])
        if not ended:
            dropped.append(_drop(prompt, "the invented prompt did not end"))
        elif len(_words(text)) < _MIN_INVENTED_WORDS:
            dropped.append(_drop(prompt, "the invented prompt is too short"))
        elif not all(character.isprintable() or character in "\n\t" for character in text) or "\ufffd" in text:
            dropped.append(_drop(prompt, "the invented prompt is not text"))
        elif not target.tokenizer.added_tokens_decoder.keys().isdisjoint(ids[:-1]):
            dropped.append(_drop(prompt, "the invented prompt holds a special token"))
        else:
            prompts.append(prompt)
    return prompts


def _distinct(prompts: list[Prompt], excluded: list[Prompt], dropped: list[dict[str, str]]) -> list[Prompt]:
    """Keep the prompts that resemble neither an excluded one nor one kept before."""
    known = _Neighbours()
    for prompt in excluded:
        known.add(prompt, "an excluded prompt")
    kept = []
    for prompt in prompts:
        if near := known.find(prompt):
            dropped.append(_drop(prompt, f"resembles {near}"))
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
        grams = _word_5_grams(prompt)
        for gram in grams:
            self.holders.setdefault(gram, []).append(len(self.sizes))
        self.sizes.append(len(grams))
        self.labels.append(label)

    def find(self, prompt: Prompt) -> str | None:
        """Give the label of the first prompt that is a near-duplicate of this one."""
        grams = _word_5_grams(prompt)
        shared = Counter(holder for gram in grams for holder in self.holders.get(gram, ()))
        near = [
            holder
            for holder, count in shared.items()
            if count / (self.sizes[holder] + len(grams) - count) > MAX_PROMPT_SIMILARITY
        ]
        return self.labels[min(near)] if near else None


def _word_5_grams(prompt: Prompt) -> set[tuple[str, ...]]:
    """Give the 5-grams of a prompt's words; a shorter prompt is one gram."""
    return set(_grams(_words(" ".join(prompt.turns)), 5))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _grams(items: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    return [tuple(items[start : start + n]) for start in range(max(1, len(items) - n + 1))]


def repetition(token_ids: Sequence[int]) -> float:
    """Give the share of an answer's 4-grams that occurred in it before."""
    grams = _grams(token_ids, 4)
    return 1 - len(set(grams)) / len(grams)


def _answer(
    target: _Target,
    journal: _Journal,
    prompts: list[Prompt],
    arguments: RegenerateArguments,
    dropped: list[dict[str, str]],
) -> list[list[dict[str, Any]]]:
    """Answer the prompts in batches of similar length, and give the rows of each, in the order of the prompts."""
    lengths = [_longest(target, prompt) for prompt in prompts]
    fitting = []
    for index, length in enumerate(lengths):
        if target.max_length is not None and length > target.max_length:
            dropped.append(_drop(prompts[index], "longer than the model's context with its answers"))
        else:
            fitting.append(index)
    fitting.sort(key=lambda index: (len(prompts[index].turns), lengths[index]))
    batches = [fitting[start : start + arguments.batch_size] for start in range(0, len(fitting), arguments.batch_size)]

    def work(batch: list[int], name: str) -> list[list[dict[str, Any]]]:
        dialogues = [_Dialogue(prompts[index]) for index in batch]
        for turn in range(max(len(dialogue.prompt.turns) for dialogue in dialogues)):
            asked = [dialogue for dialogue in dialogues if turn < len(dialogue.prompt.turns)]
            for dialogue in asked:
                dialogue.ask(dialogue.prompt.turns[turn], target)
            answers = target.complete(
                [dialogue.input_ids for dialogue in asked], target.end_ids, arguments.temperature, f"{name} turn {turn}"
            )
            for dialogue, ids in zip(asked, answers, strict=True):
                dialogue.hear(ids, target)
        return [dialogue.close() for dialogue in dialogues]

    results = journal.run("Answering", batches, work)
    return [rows for _, rows in sorted(zip(fitting, results, strict=True), key=lambda pair: pair[0])]


def _longest(target: _Target, prompt: Prompt) -> int:
    """Give the tokens of a chat in which every answer is as long as it may be."""
    opening = target.render([*prompt.system, {"role": "user", "content": prompt.turns[0]}])
    later = sum(len(target.encode(turn)) for turn in prompt.turns[1:])
    return len(target.encode(opening)) + later + len(prompt.turns) * target.arguments.max_new_tokens


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

    def ask(self, turn: str, target: _Target) -> None:
        self.messages.append({"role": "user", "content": turn})
        text = target.render(self.messages)
        if not text.startswith(self.text):
            self._end_row(self.messages[:-1])
            self.text = ""
        new_ids = target.encode(text[len(self.text) :])
        self.input_ids = self.input_ids + new_ids
        self.loss_mask = self.loss_mask + [0] * len(new_ids)
        self.text = text

    def hear(self, ids: list[int], target: _Target) -> None:
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


def _is_sound(rows: list[dict[str, Any]], dropped: list[dict[str, str]]) -> bool:
    """Whether no answer of a chat is empty or looping; otherwise the chat is counted as dropped."""
    reason = ""
    if any(message["role"] == "assistant" and not message["content"] for message in rows[-1]["messages"]):
        reason = "an empty answer"
    elif any(repetition(answer) > MAX_REPETITION for row in rows for answer in learnt_spans(row)):
        reason = "a looping answer"
    if reason:
        dropped.append({"id": rows[0]["id"], "category": rows[0]["category"], "reason": reason})
    return not reason


def learnt_spans(row: dict[str, Any]) -> list[list[int]]:
    """Give the token ids of each answer in a row: its runs of loss mask 1."""
    spans = groupby(zip(row["loss_mask"], row["input_ids"], strict=True), key=itemgetter(0))
    return [[token_id for _, token_id in span] for learnt, span in spans if learnt]


def _drop(prompt: Prompt, reason: str) -> dict[str, str]:
    return {"id": prompt.id, "category": prompt.category, "reason": reason}


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
