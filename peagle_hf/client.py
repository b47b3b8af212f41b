"""A vLLM server from outside: answers that come in a stream, what its counters say of them, and how fast they came."""

import re
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .data.endpoint import PLAIN_SAMPLING, EndpointError, Server, concurrently, endpoint_urls
from .data.prompts import Prompt
from .errors import PeagleError

DRAFT_COUNTERS = ("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
POSITION_COUNTER = "spec_decode_num_accepted_tokens_per_pos"
TIMEOUT_SECONDS = 600.0
"""Longest pause of an answer."""
SETTLE_SECONDS = 5.0
"""How long after an answer a server may take to count it."""
_SAMPLE = re.compile(r'^vllm:(\w+)_total\{(?:.*\bposition="(\d+)")?.*\} ([\d.eE+]+)$', re.M)


@dataclass(frozen=True)
class Counters:
    """What a server has counted since it started, over all its engines.

    Args:
        generated: tokens.
        drafting: drafts, draft tokens, accepted tokens, then accepted tokens by position; empty without a drafter.
    """

    generated: int
    drafting: list[int]


@dataclass
class Answer:
    """An answer, why it ends, when it came and what was drafted for it.

    Args:
        first_token_seconds: from the request to the first token.
        seconds: from the request to the last token.
        drafting: what `Counters.drafting` would be of this answer alone; None where vLLM doesn't count by request.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    drafting: list[int] | None = None


@dataclass(frozen=True)
class Run:
    """The answers to all prompts, so many chats at a time.

    Args:
        chats: of each prompt its answers by turn.
        seconds: of the whole.
        counters: what the server as a whole counted (see `Counters.drafting`) by category of prompts, where answers
            have no counts of their own.
    """

    concurrency: int
    chats: list[list[Answer]]
    seconds: float
    counters: dict[str, list[int]] | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Run":
        """The run of which `dataclasses.asdict` gave these fields."""
        chats = [[Answer(**answer) for answer in chat] for chat in fields["chats"]]
        return cls(**{**fields, "chats": chats})

    @property
    def texts(self) -> list[list[str]]:
        return [[answer.text for answer in chat] for chat in self.chats]

    @property
    def drafting(self) -> list[list[int]] | None:
        """What was drafted for each prompt, all turns together; None where vLLM doesn't count by request."""
        counts = [[answer.drafting for answer in chat if answer.drafting is not None] for chat in self.chats]
        if any(len(chat) < len(answers) for chat, answers in zip(counts, self.chats, strict=True)):
            return None
        return [np.sum(chat, axis=0).tolist() for chat in counts]

    def latency(self) -> dict[str, dict[str, float] | None]:
        """Mean, median and p99 in seconds of `request`, `first_token` and, after it, `output_token`."""
        answers = [answer for chat in self.chats for answer in chat]
        values = {
            "request": [answer.seconds for answer in answers],
            "first_token": [answer.first_token_seconds for answer in answers],
            "output_token": [
                (answer.seconds - answer.first_token_seconds) / (len(answer.token_ids) - 1)
                for answer in answers
                if len(answer.token_ids) > 1
            ],
        }
        return {name: _distribution(seconds) if seconds else None for name, seconds in values.items()}


class Client:
    """A server that is asked by chat messages.

    Args:
        endpoint: its address, with or without `/v1`.

    Raises:
        PeagleError: nothing answers there, or openai isn't installed.
    """

    def __init__(self, endpoint: str):
        urls = endpoint_urls(endpoint)
        if len(urls) > 1:
            raise PeagleError(f"{endpoint} names {len(urls)} servers; each has counters of its own. Name one.")
        (self.url,) = urls
        self._server = Server(self.url, TIMEOUT_SECONDS, max_retries=0)
        try:
            self.model = self._server.model
        except EndpointError as error:
            raise PeagleError(
                f"The vLLM server {self.url} can't be asked for its model: {error}. Start one with peagle-hf serve and "
                "wait until it is ready, or correct the endpoint."
            ) from error

    def version(self) -> str:
        """Of vLLM."""
        return str(self._get("version", dict[str, object], lambda page: page["version"]))

    def counters(self) -> Counters:
        """Read the Prometheus counters.

        Raises:
            PeagleError: the server has none.
        """
        counts: dict[str, int] = {}
        for name, position, value in self._get("metrics", str, _SAMPLE.findall):
            counts[name + position] = counts.get(name + position, 0) + int(float(value))
        if "generation_tokens" not in counts:
            raise PeagleError(
                f"{self.url} counts no tokens, so acceptance can't be measured there. Start vLLM without "
                "--disable-log-stats, and name its own address, not that of a proxy."
            )
        if DRAFT_COUNTERS[0] not in counts:
            return Counters(counts["generation_tokens"], [])
        positions = sum(name.startswith(POSITION_COUNTER) for name in counts)
        names = [*DRAFT_COUNTERS, *(f"{POSITION_COUNTER}{position}" for position in range(positions))]
        return Counters(counts["generation_tokens"], [counts[name] for name in names])

    def since(self, earlier: Counters, num_tokens: int) -> Counters:
        """What was counted since, once these tokens at least are.

        Raises:
            PeagleError: the counters don't go on from the earlier ones.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            now = self.counters()
            drafting = [after - before for after, before in zip(now.drafting, earlier.drafting, strict=False)]
            difference = Counters(now.generated - earlier.generated, drafting)
            started_anew = len(now.drafting) != len(earlier.drafting) or min(difference.generated, *drafting, 0) < 0
            late = time.monotonic() > deadline
            if started_anew or (late and difference.generated < num_tokens):
                raise PeagleError(
                    f"{self.url} generated {num_tokens} tokens but counted {difference.generated}: it was started anew "
                    "in between, or several servers answer there. Measure one server that keeps running."
                )
            if difference.generated >= num_tokens:
                return difference
            time.sleep(0.02)

    def ask(
        self,
        messages: Sequence[dict[str, Any]],
        max_tokens: int,
        temperature: float | None = None,
        extra: dict[str, Any] | None = None,
        on_text: Callable[[str], object] = lambda text: None,
    ) -> Answer:
        """Send a chat and wait for its answer.

        Args:
            temperature: default: the server's.
            extra: more fields of vLLM's request.
            on_text: called with every piece of the answer, reasoning included, as it comes.

        Raises:
            PeagleError: no answer came, or only a part.
        """
        request: dict[str, Any] = {"model": self.model["id"], "messages": messages, "max_tokens": max_tokens}
        if temperature is not None:
            request["temperature"] = temperature
        answer = Answer()
        try:
            with self._server.reasons():
                started = time.perf_counter()
                stream = self._server.client.chat.completions.create(
                    **request,
                    stream=True,
                    stream_options={"include_usage": True},  # what is drafted comes with it
                    extra_body={"return_token_ids": True, **(extra or {})},
                )
                with stream:
                    for chunk in stream:
                        answer.drafting = answer.drafting or _drafting(getattr(chunk, "metrics", None))
                        for choice in chunk.choices:
                            token_ids = getattr(choice, "token_ids", None) or []
                            answer.seconds = time.perf_counter() - started
                            if token_ids and not answer.token_ids:
                                answer.first_token_seconds = answer.seconds
                            answer.token_ids += token_ids
                            answer.text += choice.delta.content or ""
                            on_text(choice.delta.content or getattr(choice.delta, "reasoning", None) or "")
                            answer.finish_reason = choice.finish_reason or answer.finish_reason
            if answer.finish_reason is None:
                raise EndpointError("the answer breaks off")
            if not answer.token_ids:
                raise EndpointError("it gives no token ids with its answer, as vLLM 0.11 and later do")
        except EndpointError as error:
            raise PeagleError(f"The vLLM server {self.url} failed: {error}.") from error
        return answer

    def _get(self, page: str, kind: Any, read: Callable[[Any], Any]) -> Any:
        try:
            with self._server.reasons():
                return read(self._server.client.get(f"{self.url.removesuffix('/v1')}/{page}", cast_to=kind))
        except EndpointError as error:
            raise PeagleError(f"The vLLM server {self.url} can't be asked for its {page}: {error}.") from error


def measure(
    client: Client,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]] | None,
    max_tokens: int,
    temperature: float,
    concurrency: int,
    report_progress: Callable[[int], object],
    by_category: bool = False,
    extra: dict[str, Any] | None = None,
) -> Run:
    """Ask all prompts, so many chats at a time; nothing comes from the server's prefix cache.

    Args:
        answers: of each prompt by turn, for later turns to follow; default: the server's own.
        by_category: end the chats of a category before the next begins, and read the server's counters in between.
        extra: more fields of each request.

    Raises:
        PeagleError: the server fails, or generates more than it was asked for here: then others use it too.
    """

    def converse(index: int) -> list[Answer]:
        prompt, given = prompts[index], [] if answers is None else answers[index]
        messages, said = list(prompt.system), []
        for turn, question in enumerate(prompt.turns):
            messages.append({"role": "user", "content": question})
            fields = {**PLAIN_SAMPLING, "cache_salt": secrets.token_hex(8), **(extra or {})}
            if prompt.tools:  # which the model is told of; what it calls stays the text of its answer
                fields |= {"tools": prompt.tools, "tool_choice": "none"}
            try:
                answer = client.ask(messages, max_tokens, temperature, fields)
            except PeagleError as error:
                raise PeagleError(f"Turn {turn} of prompt {prompt.id} got no answer. {error}") from error
            if answer.finish_reason == "length" and len(answer.token_ids) < max_tokens:
                raise PeagleError(
                    f"{client.url} cut the answer to turn {turn} of prompt {prompt.id} after {len(answer.token_ids)} "
                    f"of {max_tokens} tokens: prompt and answer are longer than its --max-model-len. Start it with "
                    "more, ask for fewer with --max-tokens, or take the prompt out."
                )
            said.append(answer)
            messages.append({"role": "assistant", "content": answer.text if answers is None else given[turn]})
        return said

    before = client.counters()
    warmed_up = client.ask([{"role": "user", "content": prompts[0].turns[0]}], 8, temperature, extra)
    client.since(before, len(warmed_up.token_ids))
    chats: list[list[Answer]] = [[] for _ in prompts]
    counters, seconds = {}, 0.0
    groups: dict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[prompt.category if by_category else ""].append(index)
    for category, indices in groups.items():
        before, started = client.counters(), time.perf_counter()
        for index, result in concurrently(converse, indices, min(concurrency, len(indices))):
            if isinstance(result, BaseException):
                raise result
            chats[index] = result
            report_progress(1)
        seconds += time.perf_counter() - started
        answered = [answer for index in indices for answer in chats[index]]
        asked = sum(len(answer.token_ids) for answer in answered)
        counted = client.since(before, asked)
        if counted.generated > asked:
            raise PeagleError(
                f"{client.url} generated {counted.generated} tokens while {asked} were asked for here: others use it "
                "too, and its counters don't tell whose tokens they count. Measure when nobody else does."
            )
        if by_category:
            counters[category] = counted.drafting
        elif counted.drafting:  # it drafts
            check_counts(answered, counted.drafting)
    return Run(concurrency, chats, seconds, counters if by_category else None)


def drafting_counts(histogram: Sequence[int], num_draft_tokens: int) -> list[int]:
    """The counts of `Counters.drafting` from those that vLLM keeps of a request.

    Args:
        histogram: how many drafts had none, one, two … tokens accepted.
    """
    accepted = sum(number * count for number, count in enumerate(histogram))
    by_position = [sum(histogram[position + 1 :]) for position in range(len(histogram) - 1)]
    return [sum(histogram), num_draft_tokens, accepted, *by_position]


def check_counts(answers: Sequence[Answer], counted: Sequence[int]) -> None:
    """Make sure that what vLLM counts of each request adds up to what it counts of all.

    Raises:
        PeagleError: it doesn't.
    """
    added = np.sum([answer.drafting for answer in answers if answer.drafting is not None], axis=0).tolist()
    if added != list(counted):
        raise PeagleError(
            f"vLLM's counts of single requests add up to {added} (drafts, draft tokens, accepted tokens, and these by "
            f"position), but its counters say {list(counted)}. This vLLM counts otherwise than 0.32; use that one."
        )


def _drafting(metrics: dict[str, Any] | None) -> list[int] | None:
    counts = (metrics or {}).get("speculative_decoding")
    return counts and drafting_counts(counts["acceptance_histogram"], counts["num_draft_tokens"])


def _distribution(values: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "p99": float(np.percentile(values, 99)),
    }
