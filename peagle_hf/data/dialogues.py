"""The verifier answers prompts, turn by turn, and invents prompts: the conversations of `peagle-hf regenerate`."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..console import number_of, progress_bar
from ..errors import PeagleError
from .answer_journal import Journal
from .chat_models import Batch, ChatModel, Sampling
from .chats import Unlearnable
from .errors import EndpointError, RefusedEndpointError
from .prompts import Prompt, words

if TYPE_CHECKING:
    from .regenerate import RegenerateArguments

logger = logging.getLogger(__name__)

_MIN_INVENTED_WORDS = 3
_MAX_REFUSED_AT_FIRST = 100
"""Stop when the servers have refused this many prompts and answered none: they would refuse the others too."""


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Answers:
    """The verifier's answers to token ids, from the journal if it has them, otherwise from the verifier.

    Args:
        settings: the settings that an answer depends on, for its key in the journal.
        temperature: of these answers.
        end_ids: an answer ends with one of these token ids.
    """

    def __init__(
        self,
        verifier: ChatModel,
        journal: Journal,
        settings: dict[str, Any],
        arguments: "RegenerateArguments",
        temperature: float,
        end_ids: set[int],
    ):
        self.verifier, self.journal, self.end_ids, self.seed = verifier, journal, end_ids, arguments.seed
        self.sampling = Sampling(temperature, arguments.top_p, arguments.top_k, arguments.min_p)
        drawing = asdict(self.sampling) if temperature > 0 else "greedy"
        same = [settings[name] for name in ("backend", "model", "dtype", "max_new_tokens")]
        self._key_parts = [*same, drawing, sorted(end_ids)]

    def has(self, question: list[int], number: int = 0) -> bool:
        """Whether the journal has the answer.

        Args:
            number: tells draws for the same question from each other.
        """
        return self._key(question, number) in self.journal

    def get(self, question: list[int], number: int = 0) -> list[int]:
        """An answer that the journal has, as token ids."""
        return self.journal.get(self._key(question, number))

    def ask(self, questions: list[list[int]], numbers: Sequence[int] | None = None) -> list[list[int]]:
        """The answer to each question as token ids; the verifier is asked once, for all that aren't in the journal."""
        numbers = [0] * len(questions) if numbers is None else numbers
        keys = [self._key(*one) for one in zip(questions, numbers, strict=True)]
        new = {key: place for place, key in enumerate(keys) if key not in self.journal}
        if new:
            asked = [questions[place] for place in new.values()]
            seeds = [self._draw(questions[place], numbers[place]) for place in new.values()]
            answers = self.verifier.complete(asked, self.end_ids, self.sampling, seeds)
            self.journal.add(dict(zip(new, answers, strict=True)))
        return [self.journal.get(key) for key in keys]

    def _key(self, question: list[int], number: int) -> str:
        draw = self._draw(question, number) if self.sampling.temperature > 0 else None
        return _digest(self._key_parts, draw, question)[:32]

    def _draw(self, question: list[int], number: int) -> int:
        """Seed of an answer, 0 .. 2^63 - 1: from its question alone, wherever the prompt stands in its file."""
        return int(_digest(self.seed, number, question)[:16], 16) >> 1


def _run_batches(
    verifier: ChatModel, step: str, batches: list[Batch], work: Callable[[Batch], None], total: int
) -> None:
    waiting = sum(map(len, batches))
    with progress_bar(total=total, initial=total - waiting, desc=step, unit="chat") as progress:
        for batch in verifier.run_batches(batches, work):
            progress.update(len(batch))


def _batches(items: Sequence[int], size: int) -> list[Batch]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def invent_prompts(
    verifier: ChatModel,
    journal: Journal,
    settings: dict[str, Any],
    arguments: "RegenerateArguments",
    dropped: list[dict[str, str]],
) -> list[Prompt]:
    """Let the verifier invent prompts: it continues the tag that opens a user's turn (Magpie, arXiv 2406.08464).

    Args:
        settings: see `Answers`.
        dropped: receives an entry (`Prompt.dropped`) for each prompt that no user would write.
    """
    if not arguments.invent:
        return []
    prefix, end_ids = verifier.user_turn()
    answers = Answers(verifier, journal, settings, arguments, arguments.invent_temperature, end_ids)

    def work(batch: Batch) -> None:
        answers.ask([prefix] * len(batch), batch)

    missing = [number for number in range(arguments.invent) if not answers.has(prefix, number)]
    _run_batches(verifier, "Inventing", _batches(missing, verifier.batch_size), work, arguments.invent)
    prompts = []
    for number in range(arguments.invent):
        ids = answers.get(prefix, number)
        ended = ids[-1] in end_ids
        text = verifier.decode(ids[:-1] if ended else ids, skip_special_tokens=False).strip()
        prompt = Prompt(f"invented-{number}", "invented", [], [text])
        if not ended:
            dropped.append(prompt.dropped("the invented prompt did not end"))
        elif len(words(text)) < _MIN_INVENTED_WORDS:
            dropped.append(prompt.dropped("the invented prompt is too short"))
        elif not all(character.isprintable() or character in "\n\t" for character in text) or "\ufffd" in text:
            dropped.append(prompt.dropped("the invented prompt is not text"))
        elif not verifier.tokenizer.added_tokens_decoder.keys().isdisjoint(ids[:-1]):
            dropped.append(prompt.dropped("the invented prompt holds a special token"))
        else:
            prompts.append(prompt)
    return prompts


def fitting_prompts(
    verifier: ChatModel, prompts: list[Prompt], dropped: list[dict[str, str]]
) -> tuple[list[Prompt], list[int]]:
    """Keep the prompts that the chat template accepts and that fit the verifier's context with their answers.

    Args:
        dropped: receives an entry (`Prompt.dropped`) for each of the others.

    Returns:
        The prompts, and the tokens of each with its answers at most.
    """
    fitting, lengths = [], []
    for prompt in progress_bar(prompts, desc="Measuring", unit="chat"):
        try:
            length = _longest(verifier, prompt)
            if verifier.max_length is not None and length > verifier.max_length:
                raise Unlearnable("longer than the model's context with its answers")
        except Unlearnable as reason:
            dropped.append(prompt.dropped(str(reason)))
        else:
            fitting.append(prompt)
            lengths.append(length)
    return fitting, lengths


def _longest(verifier: ChatModel, prompt: Prompt) -> int:
    """Tokens of a chat in which every answer is as long as it may be."""
    messages = [*prompt.system, {"role": "user", "content": prompt.turns[0]}]
    for turn in prompt.turns[1:]:
        messages += [{"role": "assistant", "content": "."}, {"role": "user", "content": turn}]
    num_tokens = len(verifier.encode(verifier.renderer.prompt(messages, prompt.tools)))
    return num_tokens + len(prompt.turns) * verifier.max_new_tokens


def answer_prompts(answers: Answers, prompts: list[Prompt], lengths: list[int]) -> dict[int, str]:
    """Have every prompt answered, those of similar length together, and the answers kept in the journal.

    Args:
        lengths: tokens of each prompt with its answers at most, as `fitting_prompts` gives them.

    Returns:
        The prompts that can't be answered, by index, and why.

    Raises:
        PeagleError: the servers failed a request, or refused the first `_MAX_REFUSED_AT_FIRST` prompts.
    """
    verifier = answers.verifier
    unanswerable: dict[int, str] = {}
    waiting = _without_answers(answers, prompts, unanswerable)
    # Which prompts share a batch changes rounding, so a run that continues another must form the same batches: the
    # order of the prompts doesn't depend on the file. All prompts of a batch have equally many turns, so that a batch
    # is finished as a whole.
    waiting.sort(key=lambda index: (len(prompts[index].turns), lengths[index], prompts[index].digest))
    groups = groupby(waiting, key=lambda index: len(prompts[index].turns))
    batches = [batch for _, group in groups for batch in _batches(list(group), verifier.batch_size)]
    num_refused, has_answers = 0, len(waiting) < len(prompts)

    def work(batch: Batch) -> None:
        nonlocal num_refused, has_answers
        dialogues = {index: Dialogue(prompts[index], verifier) for index in batch}
        for turn in range(len(prompts[batch[0]].turns)):
            for index in batch:
                try:
                    if index in dialogues:
                        dialogues[index].ask(turn)
                # The template refuses the chat because of an answer in it.
                except Unlearnable as reason:
                    unanswerable[index] = str(reason)
                    del dialogues[index]
            try:
                replies = answers.ask([dialogue.input_ids for dialogue in dialogues.values()])
            except RefusedEndpointError as error:
                unanswerable.update(dict.fromkeys(dialogues, f"the server refuses it: {str(error)[:300]}"))
                num_refused += len(dialogues)
                if num_refused >= _MAX_REFUSED_AT_FIRST and not has_answers:
                    raise PeagleError(
                        f"The servers refused the first {num_refused} prompts, the latest with: {error}. Check the "
                        "servers and the arguments, and run the same command again."
                    ) from error
                return
            except EndpointError as error:
                names = ", ".join(f"prompt {prompts[index].id} ({prompts[index].place})" for index in dialogues)
                raise EndpointError(f"{names}: {error.url or 'the servers'}: {error.reason}", error.advice) from error
            for dialogue, ids in zip(dialogues.values(), replies, strict=True):
                dialogue.hear(ids)
        has_answers = True

    _run_batches(verifier, "Answering", batches, work, len(prompts))
    return unanswerable


def _without_answers(answers: Answers, prompts: list[Prompt], unanswerable: dict[int, str]) -> list[int]:
    """Indices of the prompts that the journal doesn't answer in full.

    Args:
        unanswerable: receives the prompts, by index, that the chat template refuses because of an answer, and why.
    """
    if not len(answers.journal):
        return list(range(len(prompts)))
    waiting = []
    for index, prompt in enumerate(progress_bar(prompts, desc="Looking up", unit="chat")):
        try:
            if replay(answers, prompt) is None:
                waiting.append(index)
        except Unlearnable as reason:
            unanswerable[index] = str(reason)
    if len(waiting) < len(prompts):
        logger.info(
            "%s has answers to %d of %s already; still to be asked for: %d.",
            *(answers.journal.path, len(prompts) - len(waiting), number_of(len(prompts), "prompt"), len(waiting)),
        )
    return waiting


def replay(answers: Answers, prompt: Prompt) -> list[dict[str, Any]] | None:
    """The samples of a chat if all of its answers are in the journal, otherwise None.

    Raises:
        Unlearnable: the chat template refuses the chat because of an answer in it.
    """
    dialogue = Dialogue(prompt, answers.verifier)
    for turn in range(len(prompt.turns)):
        dialogue.ask(turn)
        if not answers.has(dialogue.input_ids):
            return None
        dialogue.hear(answers.get(dialogue.input_ids))
    return dialogue.close()


class Dialogue:
    """A chat while it is being held: its messages, and the token ids that the verifier read and wrote.

    Answers keep the token ids that the verifier wrote; only the template's text between them is encoded. If the
    template renders an earlier answer in other words than the verifier's, the history is encoded again and starts
    another sample.
    """

    def __init__(self, prompt: Prompt, verifier: ChatModel):
        self.prompt, self.verifier = prompt, verifier
        self.messages: list[dict[str, Any]] = list(prompt.system)
        self.text = ""  # the chat as text, up to the end of the last answer
        self.end = ""  # the token that ended the last answer, if the tokens so far end with it
        self.is_without_text = False  # whether the last answer has no text that a later turn could follow
        self.input_ids: list[int] = []
        self.loss_mask: list[int] = []
        self.finish_reason = ""
        self.samples: list[dict[str, Any]] = []

    def ask(self, turn: int) -> None:
        """Add the user's message of a turn, and the template's text up to the answer, to `input_ids`.

        Raises:
            Unlearnable: the chat template refuses the chat, or the last answer has no text for a later turn.
        """
        if self.is_without_text:
            raise Unlearnable("an answer has no text, only reasoning or a tool call, so no user turn can follow it")
        self.messages.append({"role": "user", "content": self.prompt.turns[turn]})
        text = self.verifier.renderer.prompt(self.messages, self.prompt.tools)
        if not text.startswith(self.text):
            self._end_sample(self.messages[:-1])
            self.text = self.end = ""
        new_ids = self.verifier.encode_after(self.end, text[len(self.text) :])
        self.input_ids = self.input_ids + new_ids
        self.loss_mask = self.loss_mask + [0] * len(new_ids)
        self.text = text

    def hear(self, ids: list[int]) -> None:
        """Add the verifier's answer, as token ids."""
        ended = ids[-1] in self.verifier.end_ids
        self.finish_reason = "stop" if ended else "length"
        before = ids[:-1] if ended else ids
        content = written = self.verifier.content(before)
        whole = self.verifier.decode(before, skip_special_tokens=False)
        text = self.verifier.renderer.content_of(whole, bool(self.prompt.tools))
        if text is not None:
            content, written = text or whole.strip(), whole
            self.is_without_text = not text and bool(content)
        self.messages.append({"role": "assistant", "content": content})
        self.end = self.verifier.decode(ids[-1:], skip_special_tokens=False) if ended else ""
        self.text += written + self.end
        self.input_ids = self.input_ids + ids
        self.loss_mask = self.loss_mask + [1] * len(ids)

    def close(self) -> list[dict[str, Any]]:
        """End the chat and return its samples, as `regenerate` writes them."""
        self._end_sample(self.messages)
        return self.samples

    def _end_sample(self, messages: list[dict[str, Any]]) -> None:
        """Append a sample of the tokens so far, and begin another one."""
        self.samples.append(
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
