"""K, the number of tokens to draft at a time, by the number of chats at a time.

`peagle-hf evaluate` recommends for each load what was fastest; `peagle-hf serve --num-speculative-tokens auto` has vLLM
do so, which can change K with the number of requests that it runs (`num_speculative_tokens_per_batch_size`).
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..console import number_of
from ..errors import PeagleError

logger = logging.getLogger(__name__)

AUTO = "auto"
SCHEDULE = "num_speculative_tokens_per_batch_size"
"""vLLM's field of `--speculative-config`: [first batch size, last batch size, K] by load."""
REPORT, EVALUATION = "evaluation.json", "evaluation"
"""The report's file, and the folder that the examples of the documentation give it."""
RECOMMENDED = "recommended_num_speculative_tokens"
"""The field of that report with the recommendation."""
MARGIN = 0.05
"""By which share the verifier alone must be faster at a load for vLLM to be told to draft nothing there."""

NOT_COMPARED = (
    "The report has no speed of the verifier alone, so K is chosen as if the drafter paid at every load. Evaluate "
    "without --endpoint, or with --baseline-endpoint, to know where it doesn't."
)


def recommend(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The fastest K at each number of chats at a time; 0, no drafter, if that was faster.

    Loads for which there were too few prompts (see `not_reached`) are left out.

    Args:
        entries: of one drafter in the report of an evaluation, one for each K.

    Returns:
        for each concurrency: `concurrency`, `num_speculative_tokens`, its `tokens_per_second` and `speed_up`, and
        `tokens_per_second_by_k`: of each K that was measured, and of "0", the verifier alone, if that was.
    """
    recommended = []
    too_many = not_reached(entries[0])
    for number, first in enumerate(entries[0]["by_concurrency"]):
        if first["concurrency"] in too_many:
            continue
        speeds = {
            entry["num_speculative_tokens"]: entry["by_concurrency"][number]["tokens_per_second"] for entry in entries
        }
        alone = first["tokens_per_second_without"]
        if alone is not None:
            speeds[0] = alone
        best = max(speeds, key=lambda tokens: (speeds[tokens], -tokens))
        recommended.append(
            {
                "concurrency": first["concurrency"],
                "num_speculative_tokens": best,
                "tokens_per_second": speeds[best],
                "speed_up": None if alone is None else speeds[best] / alone,
                "tokens_per_second_by_k": {str(tokens): speeds[tokens] for tokens in sorted(speeds)},
            }
        )
    return recommended


def not_reached(entry: Mapping[str, Any]) -> list[int]:
    """The numbers of chats at a time for which an evaluation had too few prompts: fewer ran at the same time."""
    rows = entry["by_concurrency"]
    return [row["concurrency"] for row in rows if row["chats_at_a_time"] < row["concurrency"]]


def describe_not_reached(report: Mapping[str, Any]) -> str:
    """Which numbers of chats at a time weren't reached, in a sentence; "" if all were."""
    loads = " ".join(map(str, not_reached(report)))
    if not loads:
        return ""
    return (
        f"Only {number_of(report['num_prompts'], 'chat')} ran at a time at --concurrency {loads}, as there are no more "
        "prompts. K by load is recommended without these loads."
    )


def describe(recommended: Sequence[Mapping[str, Any]]) -> str:
    """The recommendation in a sentence; "" if there was nothing to choose from."""
    if all(len(row["tokens_per_second_by_k"]) == 1 for row in recommended):
        return ""
    parts: list[str] = []
    for row in recommended:
        tokens = row["num_speculative_tokens"]
        what = f"K {tokens}" if tokens else "no drafter"
        gain = f" ({row['speed_up']:.2f} times as fast as without)" if tokens and row["speed_up"] is not None else ""
        load = row["concurrency"] if parts else f"{number_of(row['concurrency'], 'chat')} at a time"
        parts.append(f"{what} with {load}{gain}")
    return f"Fastest: {', '.join(parts)}."


def scheduled(recommended: Sequence[Mapping[str, Any]], takes_schedule: bool) -> dict[str, Any]:
    """The fields of vLLM's `--speculative-config` for a recommendation; logs what they mean.

    vLLM 0.26 to 0.33 gives the drafts of a batch to the wrong requests if it drafts fewer tokens in parallel than it
    was started with, unless it drafts none. So one K is taken, the one with the highest speeds over all loads, and
    none where the verifier alone was faster by more than `MARGIN`: vLLM still runs the drafter there, and with a
    schedule it takes piecewise CUDA graphs at every load. Between two loads that were measured the border is their
    geometric mean.

    Args:
        takes_schedule: whether this vLLM can choose by load.

    Raises:
        PeagleError: the drafter paid at no load, or nothing is recommended.
    """
    if not recommended:
        raise PeagleError(
            "--num-speculative-tokens is auto, but the evaluation recommends nothing: it had fewer prompts than chats "
            "at a time. Evaluate with more prompts or a lower --concurrency, or name a number."
        )
    speeds = [{int(tokens): speed for tokens, speed in row["tokens_per_second_by_k"].items()} for row in recommended]
    fastest = {max(by_k, key=lambda tokens: (by_k[tokens], -tokens)) for by_k in speeds}
    candidates = sorted({tokens for by_k in speeds for tokens in by_k} - {0})
    if fastest == {0}:
        raise PeagleError(
            "--num-speculative-tokens is auto, but the drafter was slower than the verifier alone at each load of the "
            f"evaluation (chats at a time: {', '.join(str(row['concurrency']) for row in recommended)}). Serve the "
            "verifier without it, or name a number."
        )
    best = max(candidates, key=lambda tokens: sum(math.log(max(by_k[tokens], by_k.get(0, 0.0))) for by_k in speeds))
    if len(fastest - {0}) > 1:
        logger.info(
            "K %d is drafted at every load at which it is faster than no drafter: vLLM can't draft with several K in "
            "parallel.",
            best,
        )
    if any(0 not in by_k for by_k in speeds):
        logger.warning("%s", NOT_COMPARED)
    loads = [row["concurrency"] for row in recommended]
    gains = [by_k.get(0, 0.0) / by_k[best] - 1 for by_k in speeds]  # how much faster vLLM is without a drafter
    pays = [gain <= MARGIN for gain in gains]
    if close := [str(load) for load, gain in zip(loads, gains, strict=True) if 0 < gain <= MARGIN]:
        logger.info(
            "No drafter was faster by at most %.0f %% with so many chats at a time: %s. vLLM drafts there too, because "
            "a schedule with K 0 costs time itself.",
            100 * MARGIN,
            ", ".join(close),
        )
    fields: dict[str, Any] = {"num_speculative_tokens": best}
    if all(pays):
        logger.info("K is %d at any load.", best)
        return fields
    if not takes_schedule:
        logger.warning("This vLLM can't choose K by load (%s), so K is %d at any.", SCHEDULE, best)
        return fields
    fields[SCHEDULE] = list(_ranges(loads, [best if pay else 0 for pay in pays]))
    said = ", ".join(f"{tokens} from {first} requests on" for first, _, tokens in fields[SCHEDULE])
    logger.info("K by the number of requests that vLLM runs at a time: %s.", said)
    return fields


def _ranges(loads: Sequence[int], tokens: Sequence[int]) -> Iterator[list[int]]:
    """[first, last, K] for successive loads, neighbours of the same K as one; vLLM goes on with the last one."""
    first = 1
    for number, (load, here) in enumerate(zip(loads, tokens, strict=True)):
        is_last = number + 1 == len(loads)
        if not is_last and tokens[number + 1] == here:
            continue
        last = max(first, load) if is_last else max(first, math.isqrt(load * loads[number + 1]))
        yield [first, last, here]
        first = last + 1


def reports_beside(folder: Path, link: Path | None) -> list[Path]:
    """The reports of evaluations in a drafter's folder and, where a user named a folder, in the three above it.

    In each of these it may be in a folder `evaluation` too, as in `--output out/evaluation`.

    Args:
        folder: of the drafter, with all links followed.
        link: the folder that the user named; None for a drafter of the hub, above whose folder is the hub's cache.

    Raises:
        PeagleError: no report is in any of these folders.
    """
    folders = [folder] if link is None else [one for start in (link, folder) for one in (start, *start.parents[:3])]
    places = dict.fromkeys(place for one in folders for place in (one / REPORT, one / EVALUATION / REPORT))
    found = [place for place in places if place.is_file()]
    if not found:
        raise PeagleError(
            f"--num-speculative-tokens is auto, which needs the report of peagle-hf evaluate, but there is no {REPORT} "
            f"in {folder}{'' if link is None else ' or the three folders above it'}, nor in a folder {EVALUATION} "
            "there. Name it with --evaluation, or name a number."
        )
    return found
