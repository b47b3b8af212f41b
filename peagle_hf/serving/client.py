"""A client of a vLLM server: streamed answers with their times, and the server's counters of drafts."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..console import number_of
from ..data.endpoint import NO_TOKEN_IDS, Server, endpoint_urls
from ..data.errors import EndpointError
from ..errors import PeagleError

DRAFT_COUNTERS = ("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
POSITION_COUNTER = "spec_decode_num_accepted_tokens_per_pos"
TIMEOUT_SECONDS = 600.0
"""How long to wait for the next part of an answer."""
IF_SLOW = "ask the server when it is less busy, or start it again if it hangs"
SETTLE_SECONDS = 5.0
"""How long to wait until the counters include an answer."""
_SAMPLE = re.compile(r'^vllm:(\w+)_total\{(?:.*\bposition="(\d+)")?.*\} ([\d.eE+]+)$', re.M)


@dataclass(frozen=True)
class Counters:
    """The totals of a server since its start, over all its engines.

    Args:
        generated: generated tokens.
        drafting: drafts, drafted tokens, accepted tokens, then accepted tokens by position; empty without a drafter.
    """

    generated: int
    drafting: list[int]


@dataclass
class Answer:
    """An answer, with its times and the counts of its drafts.

    Args:
        first_token_seconds: from the request to the first token.
        seconds: from the request to the last token.
        drafting: `Counters.drafting` of this answer alone; None if vLLM doesn't count per request.
        drafts: for each of its drafts, in order, the number of accepted and of drafted tokens; None if vLLM doesn't
            count per draft.
        num_prompt_tokens: None if the server doesn't say it.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    drafting: list[int] | None = None
    drafts: list[list[int]] | None = None
    num_prompt_tokens: int | None = None


class Client:
    """A vLLM server that answers chat messages.

    Args:
        endpoint: its URL, with or without `/v1`.

    Raises:
        PeagleError: nothing answers there, or openai isn't installed.
    """

    def __init__(self, endpoint: str):
        urls = endpoint_urls(endpoint)
        if len(urls) > 1:
            raise PeagleError(f"{endpoint} names {len(urls)} servers, and each has its own counters. Name one.")
        (self.url,) = urls
        self._server = Server(self.url, TIMEOUT_SECONDS, max_retries=0, if_slow=IF_SLOW)
        try:
            self.model = self._server.model
        except EndpointError as error:
            advice = error.advice or "start one and wait until it is ready, or correct the endpoint"
            raise PeagleError(
                f"The vLLM server {self.url} can't be asked which model it runs: {error.reason}. "
                f"{advice[:1].upper()}{advice[1:]}. peagle-hf serve starts such a server."
            ) from error

    def version(self) -> str:
        """The version of vLLM."""
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
        """The counts since `earlier`; waits until they include `num_tokens` generated tokens.

        Raises:
            PeagleError: the counters don't continue from the earlier ones.
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
                    f"{self.url} generated {number_of(num_tokens, 'token')} but counted {difference.generated}: it was "
                    "restarted in between, or several servers answer there. Measure one server that keeps running."
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
            on_text: called with every part of the answer, reasoning included, as it arrives.

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
                    stream_options={"include_usage": True},  # the counts of drafts come with the usage
                    extra_body={"return_token_ids": True, **(extra or {})},
                )
                with stream:
                    for chunk in stream:
                        if chunk.usage is not None:
                            answer.num_prompt_tokens = chunk.usage.prompt_tokens
                        if counted := (getattr(chunk, "metrics", None) or {}).get("speculative_decoding"):
                            histogram, drafted = counted["acceptance_histogram"], counted["num_draft_tokens"]
                            answer.drafting = drafting_counts(histogram, drafted)
                            steps = counted.get("per_step_accepted"), counted.get("per_step_drafted")
                            answer.drafts = drafts_in_order(histogram, *steps)
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
                raise EndpointError(NO_TOKEN_IDS)
        except EndpointError as error:
            raise PeagleError(f"The vLLM server {self.url} failed: {error}.") from error
        return answer

    def _get(self, page: str, kind: Any, read: Callable[[Any], Any]) -> Any:
        try:
            with self._server.reasons():
                return read(self._server.client.get(f"{self.url.removesuffix('/v1')}/{page}", cast_to=kind))
        except EndpointError as error:
            raise PeagleError(f"The vLLM server {self.url} gave no usable /{page}: {error}.") from error


def drafting_counts(histogram: Sequence[int], num_draft_tokens: int) -> list[int]:
    """Convert vLLM's counts of a request to those of `Counters.drafting`.

    Args:
        histogram: number of drafts with 0, 1, 2 … accepted tokens.
    """
    accepted = sum(number * count for number, count in enumerate(histogram))
    by_position = [sum(histogram[position + 1 :]) for position in range(len(histogram) - 1)]
    return [sum(histogram), num_draft_tokens, accepted, *by_position]


def drafts_in_order(
    histogram: Sequence[int], accepted: Sequence[int] | None, drafted: Sequence[int] | None
) -> list[list[int]] | None:
    """Convert vLLM's counts per verify step of a request to `Answer.drafts`.

    Args:
        histogram: see `drafting_counts`.
        accepted: accepted tokens by step; empty or None if vLLM counts with `summary`, or drafted nothing.
        drafted: drafted tokens by step.
    """
    drafts = [list(step) for step in zip(accepted or [], drafted or [], strict=True)]
    return drafts if len(drafts) == sum(histogram) else None


def acceptance_rates(counts: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Acceptance length, rate and rate by position from counts [..., 3 + K] (see `Counters.drafting`)."""
    drafts, drafted, accepted = np.moveaxis(counts[..., :3], -1, 0)
    return {
        "acceptance_length": 1 + accepted / np.maximum(drafts, 1),
        "acceptance_rate": accepted / np.maximum(drafted, 1),
        "per_position_acceptance": counts[..., 3:] / np.maximum(drafts, 1)[..., None],
    }


def conditional_acceptance(by_position: Sequence[float], has_drafts: bool = True) -> list[float | None]:
    """Of the drafts that reach a position, the share that is accepted there; None where none reaches it.

    Args:
        by_position: of all drafts the share that is accepted at each position.
        has_drafts: whether there is any draft.
    """
    reached = [float(has_drafts), *by_position]
    return [rate / before if before else None for before, rate in zip(reached, by_position, strict=False)]


def summarize(counters: Sequence[list[int]]) -> dict[str, Any]:
    """Acceptance and counts from vLLM's counters, summed over runs.

    Args:
        counters: for each run, drafts, drafted tokens, accepted tokens, then accepted tokens by position.
    """
    counts = np.sum(list(counters), axis=0)
    rates = {name: values.tolist() for name, values in acceptance_rates(counts).items()}
    return {
        **rates,
        "conditional_acceptance": conditional_acceptance(rates["per_position_acceptance"], counts[0] > 0),
        **dict(zip(("num_drafts", "num_draft_tokens", "num_accepted_tokens"), counts[:3].tolist(), strict=True)),
    }
