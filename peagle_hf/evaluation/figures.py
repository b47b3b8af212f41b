"""Figures from the runs of an evaluation: acceptance, speed, differences and their intervals (see `intervals`).

Shape letters: P prompts, W rows of weights that say how often each prompt counts, K positions of a draft.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.prompts import Prompt
from ..serving.client import acceptance_rates, summarize
from .answer_parts import Contexts, Division, counts_by_part
from .intervals import (
    MIN_PROMPTS,
    all_and_leave_one_out,
    degrees_of_freedom,
    difference_interval,
    is_difference,
    ratio_interval,
    share_interval,
)
from .runs import Run

UNCERTAIN = 1.1
"""The break-even length is left out if its greatest possible value is more than this many times its least."""
SPEEDS = ("tokens_per_second", "tokens_per_second_without", "speed_up", "break_even_length")


@dataclass(frozen=True)
class Trial:
    """The runs of one drafter with one K.

    Args:
        runs: for each concurrency, by round.
    """

    drafter: str
    num_speculative_tokens: int
    runs: list[list[Run]]


def entry(
    trial: Trial,
    without: list[list[Run]] | None,
    prompts: Sequence[Prompt],
    is_greedy: bool,
    segmenter: Division | None = None,
) -> dict[str, Any]:
    """The entry of a trial in the report.

    Args:
        without: the runs without a drafter, in the order of those of the trial; None if there are none.
        is_greedy: greedy decoding: texts are compared, and only the first round is counted, as all draft the same.
        segmenter: of the chat template; None if that marks no segments: then the entry has no `by_segment`.
    """
    pairs: list[tuple[list[Run], list[Run] | None]]
    pairs = list(zip(trial.runs, without, strict=True)) if without else [(runs, None) for runs in trial.runs]
    last, baseline = pairs[-1]
    alone = next((runs for runs in trial.runs if runs[0].concurrency == 1), None)
    return {
        "num_speculative_tokens": trial.num_speculative_tokens,
        **figures(last, baseline, prompts, None, is_greedy, alone),
        **compare(prompts, baseline[0] if baseline and is_greedy else None, last[0]),
        "by_category": {
            name: figures(last, baseline, prompts, name, is_greedy, alone)
            for name in sorted({prompt.category for prompt in prompts})
        },
        **({} if segmenter is None else {"by_segment": part_figures(last, segmenter, is_greedy)}),
        "by_context": part_figures(last, Contexts(), is_greedy),
        "by_concurrency": [
            {
                "concurrency": runs[0].concurrency,
                "chats_at_a_time": min(runs[0].concurrency, len(prompts)),
                **figures(runs, others, prompts, None, is_greedy, alone),
                "latency_seconds": _latency(runs),
                "latency_seconds_without": others and _latency(others),
            }
            for runs, others in pairs
        ],
    }


def figures(
    runs: list[Run],
    without: list[Run] | None,
    prompts: Sequence[Prompt],
    category: str | None,
    is_greedy: bool,
    alone: list[Run] | None = None,
) -> dict[str, Any]:
    """The figures of a category, or of all prompts (None), with intervals.

    Args:
        runs: by round.
        without: the same without a drafter.
        is_greedy: count only the first round, as all draft the same; else the counts of all rounds are added.
        alone: like `runs`, with one chat at a time, by which the `break_even_length` is known better; None if it wasn't
            measured.
    """
    indices, counted = _indices(prompts, category), runs[:1] if is_greedy else runs
    weights_WP = all_and_leave_one_out(len(indices))
    enough = len(indices) >= MIN_PROMPTS
    intervals: dict[str, Any] = {}
    counts_PC, lengths_W = _counts(counted, indices), None
    if counts_PC is not None:
        summary, intervals = summarize(counts_PC.tolist()), _acceptance_intervals(counts_PC)
        lengths_W = acceptance_rates(weights_WP @ counts_PC)["acceptance_length"]
    else:
        summary = summarize(_totals(counted, category))
    pairs: list[tuple[Run, Run | None]]
    pairs = list(zip(runs, without, strict=True)) if without else [(run, None) for run in runs]
    speeds = [_speeds(run, baseline, indices, weights_WP) for run, baseline in pairs]
    if without:
        lengths = summary["acceptance_length"] if lengths_W is None else lengths_W
        bounds = [_prompt_seconds(run, one, indices, weights_WP) for run, one in zip(runs, alone or runs, strict=True)]
        pays = [_break_even(lengths, speed, *each) for speed, each in zip(speeds, bounds, strict=True)]
        for speed, length_W in zip(speeds, pays, strict=True):
            if length_W is not None and all(each is not None for each in pays):
                speed["break_even_length"] = length_W
    if enough:
        degrees = [_speed_degrees([run, baseline], indices) for run, baseline in pairs]
        unknown = {"break_even_length"} if lengths_W is None else set()
        for name in speeds[0].keys() - unknown:
            intervals[name] = _over_rounds(
                [ratio_interval(each[name], one) for each, one in zip(speeds, degrees, strict=True)]
            )
    medians = {
        name: float(np.median([each[name][0] for each in speeds])) if name in speeds[0] else None for name in SPEEDS
    }
    # An acceptance length is at least 1, so a break-even length below that becomes 1.
    if (length := medians["break_even_length"]) is not None:
        medians["break_even_length"] = max(1.0, length)
        if spread := intervals.get("break_even_length"):
            intervals["break_even_length"] = [max(1.0, end) for end in spread]
    return {
        "num_prompts": len(indices),
        **summary,
        **medians,
        "is_speed_up_or_down": is_difference(intervals.get("speed_up"), 1) if len(runs) > 1 else None,
        "intervals": intervals,
    }


def part_figures(runs: list[Run], division: Division, is_greedy: bool) -> dict[str, Any] | None:
    """The acceptance within each part of the answers, with intervals, over the prompts that have a draft there.

    Args:
        runs: by round.
        is_greedy: see `figures`.

    Returns:
        None if vLLM doesn't count per draft.
    """
    counts = [counts_by_part(run, division) for run in (runs[:1] if is_greedy else runs)]
    by_part = {}
    for name in division.names:
        of_rounds = [by_name[name] for by_name in counts if by_name is not None]
        if len(of_rounds) < len(counts):
            return None
        counts_PC = np.sum(of_rounds, axis=0)
        drafted_PC = counts_PC[counts_PC[:, 0] > 0]
        by_part[name] = {
            "num_prompts": len(drafted_PC),
            **summarize(counts_PC.tolist()),
            "intervals": _acceptance_intervals(drafted_PC),
        }
    return by_part


def difference(trial: Trial, other: Trial, prompts: Sequence[Prompt], is_greedy: bool) -> dict[str, Any]:
    """The difference of acceptance lengths of two trials on the same prompts, and the ratio of their speeds."""

    def acceptance_length(category: str | None) -> dict[str, Any]:
        indices = _indices(prompts, category)
        both = [each.runs[-1][:1] if is_greedy else each.runs[-1] for each in (trial, other)]
        one, reference = (_counts(runs, indices) for runs in both)
        if one is None or reference is None:
            lengths = [summarize(_totals(runs, category))["acceptance_length"] for runs in both]
            return {"value": lengths[0] - lengths[1], "interval": None, "is_difference": None}
        weights_WP = all_and_leave_one_out(len(indices))
        values_W = (
            acceptance_rates(weights_WP @ one)["acceptance_length"]
            - acceptance_rates(weights_WP @ reference)["acceptance_length"]
        )
        degrees = degrees_of_freedom([one[:, 0], reference[:, 0]])
        spread = difference_interval(values_W, degrees) if len(indices) >= MIN_PROMPTS else None
        return {"value": float(values_W[0]), "interval": spread, "is_difference": is_difference(spread, 0)}

    def speed_ratio(runs: list[Run], references: list[Run]) -> dict[str, Any]:
        indices = _indices(prompts, None)
        weights_WP = all_and_leave_one_out(len(indices))
        pairs = list(zip(runs, references, strict=True))
        ratios = [_speed(run, indices, weights_WP) / _speed(other, indices, weights_WP) for run, other in pairs]
        spread = None
        if len(indices) >= MIN_PROMPTS:
            degrees = [_speed_degrees(pair, indices) for pair in pairs]
            spread = _over_rounds([ratio_interval(ratio, one) for ratio, one in zip(ratios, degrees, strict=True)])
        known = is_difference(spread, 1) if len(runs) > 1 else None
        return {"value": float(np.median([ratio[0] for ratio in ratios])), "interval": spread, "is_difference": known}

    return {
        "acceptance_length": acceptance_length(None),
        "by_category": {
            category: acceptance_length(category) for category in sorted({prompt.category for prompt in prompts})
        },
        "by_concurrency": [
            {"concurrency": runs[0].concurrency, "tokens_per_second_ratio": speed_ratio(runs, references)}
            for runs, references in zip(trial.runs, other.runs, strict=True)
        ],
    }


def compare(prompts: Sequence[Prompt], without: Run | None, drafted: Run) -> dict[str, Any]:
    """The first differing token of each prompt; turns and tokens count from 0.

    Args:
        without: the run without a drafter; None if there is none or its texts are sampled.
    """
    if without is None:
        return {"text_identical": None, "num_identical": None, "differences": None}
    differences = []
    for prompt, chat, other in zip(prompts, without.chats, drafted.chats, strict=True):
        for turn, (answer, drafted_answer) in enumerate(zip(chat, other, strict=True)):
            one, two = answer.token_ids, drafted_answer.token_ids
            if one != two:
                pairs = enumerate(zip(one, two, strict=False))
                token = next((place for place, (here, there) in pairs if here != there), min(len(one), len(two)))
                differences.append({"id": prompt.id, "turn": turn, "token": token})
                break
    return {
        "text_identical": not differences,
        "num_identical": len(prompts) - len(differences),
        "differences": differences,
    }


def _indices(prompts: Sequence[Prompt], category: str | None) -> list[int]:
    return [index for index, prompt in enumerate(prompts) if category in (None, prompt.category)]


def _counts(runs: list[Run], indices: list[int]) -> NDArray[np.int64] | None:
    """The counters [P, 3 + K] of each prompt, summed over rounds; None if vLLM doesn't count per request."""
    counts = [run.drafting for run in runs]
    if any(count is None for count in counts):
        return None
    return np.sum([np.array(count, np.int64)[indices] for count in counts], axis=0)


def _totals(runs: list[Run], category: str | None) -> list[list[int]]:
    """vLLM's total counters of a category, or of all (None), where it doesn't count per request."""
    by_category = chain.from_iterable((run.counters or {}).items() for run in runs)
    return [counts for name, counts in by_category if category in (None, name)]


def _acceptance_intervals(counts_PC: NDArray[np.int64]) -> dict[str, Any]:
    """The intervals of the figures of `acceptance_rates`; none with too few prompts or without drafts.

    The acceptance length is 1 + K times a share: accepted tokens among the K of each draft.
    """
    if len(counts_PC) < MIN_PROMPTS or not counts_PC[:, 0].any():
        return {}
    weights_WP = all_and_leave_one_out(len(counts_PC))
    rates, degrees = acceptance_rates(weights_WP @ counts_PC), degrees_of_freedom([counts_PC[:, 0]])
    drafts, drafted = counts_PC[:, :2].sum(0).tolist()
    most = counts_PC.shape[1] - 3
    low, high = share_interval((rates["acceptance_length"] - 1) / most, degrees, most * drafts)
    return {
        "acceptance_length": [1 + most * low, 1 + most * high],
        "acceptance_rate": share_interval(rates["acceptance_rate"], degrees, drafted),
        "per_position_acceptance": share_interval(rates["per_position_acceptance"], degrees, drafts),
    }


def _seconds(run: Run) -> NDArray[np.float64]:
    """Wall time of each prompt [P], in proportion to the seconds of its answers, as many run side by side."""
    in_flight = np.array([sum(answer.seconds for answer in chat) for chat in run.chats])
    return np.asarray(in_flight * (run.seconds / in_flight.sum()))


def _speed(run: Run, indices: list[int], weights_WP: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tokens per second [W] of these prompts."""
    tokens = np.array([sum(len(answer.token_ids) for answer in chat) for chat in run.chats])
    return np.asarray((weights_WP @ tokens[indices]) / (weights_WP @ _seconds(run)[indices]))


def _speeds(
    run: Run, without: Run | None, indices: list[int], weights_WP: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """The `SPEEDS` [W] of these prompts; without a baseline only the first."""
    speed = _speed(run, indices, weights_WP)
    if without is None:
        return {"tokens_per_second": speed}
    baseline = _speed(without, indices, weights_WP)
    return {"tokens_per_second": speed, "tokens_per_second_without": baseline, "speed_up": speed / baseline}


def _prompt_seconds(
    run: Run, alone: Run, indices: list[int], weights_WP: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and the greatest time [W] that the prompts' own passes can have taken, for each generated token.

    With one chat at a time it is the time to the first tokens. With several, other answers go on meanwhile, or several
    prompts are read together; it is at most the sum of these times, and at most what it is with one chat at a time.

    Args:
        alone: the run with one chat at a time, or else `run` itself.
    """
    of_runs = []
    for one in (run, alone):
        in_flight, chats = sum(answer.seconds for chat in one.chats for answer in chat), one.chats
        first_P = np.array([sum(answer.first_token_seconds for answer in chat) for chat in chats])[indices]
        tokens_P = np.array([sum(len(answer.token_ids) for answer in chat) for chat in chats])[indices]
        is_alone = min(one.concurrency, len(chats)) == 1
        scale = one.seconds / in_flight if is_alone else 1.0
        of_runs.append(scale * (weights_WP @ first_P) / (weights_WP @ tokens_P))
    most_W = np.minimum(*of_runs)
    return (most_W if min(run.concurrency, len(run.chats)) == 1 else np.zeros_like(most_W)), most_W


def _break_even(
    lengths: float | NDArray[np.float64],
    speed: dict[str, NDArray[np.float64]],
    least_W: NDArray[np.float64],
    most_W: NDArray[np.float64],
) -> NDArray[np.float64] | None:
    """The acceptance length [W] from which the drafter pays; None if it isn't known to 5 %.

    With it, the rounds of drafting and verifying would take the time that the verifier alone needs, less that of the
    prompts' own passes: L (t - p) / (t0 - p), with t and t0 the seconds of a token with and without the drafter, p
    those of the prompts, and L the acceptance length.
    """
    seconds_W, without_W = 1 / speed["tokens_per_second"], 1 / speed["tokens_per_second_without"]
    if (most_W >= np.minimum(seconds_W, without_W)).any():
        return None
    one, other = (lengths * (seconds_W - prompt_W) / (without_W - prompt_W) for prompt_W in (least_W, most_W))
    if max(one[0] / other[0], other[0] / one[0]) > UNCERTAIN:
        return None
    return np.asarray(np.sqrt(one * other))


def _speed_degrees(runs: Sequence[Run | None], indices: list[int]) -> float:
    return degrees_of_freedom([_seconds(run)[indices] for run in runs if run is not None])


def _over_rounds(intervals: list[list[float]]) -> list[float]:
    """The union of the intervals of all rounds."""
    lows, highs = zip(*intervals, strict=True)
    return [min(lows), max(highs)]


def _latency(runs: list[Run]) -> dict[str, dict[str, float] | None]:
    """See `Run.latency`, of the answers of all rounds."""
    return Run(runs[0].concurrency, list(chain.from_iterable(run.chats for run in runs)), 0.0).latency()
