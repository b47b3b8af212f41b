"""How often the intervals of `peagle-hf evaluate` hold the true value, beside those of three bootstraps.

    python tests/benchmarks/interval_coverage.py            # docs/acceptance.md has a part of it; minutes
    python tests/benchmarks/interval_coverage.py --trials 200 --scenarios weak --prompts 6 --methods jackknife

Prompts are drawn from a population whose figures are known: answers have lengths that are skewed and cut off at a
limit; each prompt has its own probabilities of acceptance; two drafters that are equally good get the same prompts, so
an interval of their difference that leaves out 0 calls equals different. Every trial is an evaluation of its own, whose
intervals come from the code that makes the report.

- weak: a drafter like the demo's, 36 % of the drafts have their first token accepted and 0.02 % all four.
- strong: 72 % have the first token accepted, and prompts differ much.
- mixed: a weak drafter, and every seventh prompt or so has an answer that repeats itself, where nearly all is accepted.

Shape letters: D drafters, T trials, P prompts, K positions, B resamples.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from peagle_hf.data.prompts import Prompt
from peagle_hf.evaluation.figures import Trial, difference, figures
from peagle_hf.evaluation.runs import Run
from peagle_hf.serving.client import Answer

METHODS = ("jackknife", "percentile", "BCa", "bootstrap-t")
RESAMPLES = 1_000
POPULATION = 400
"""So many thousand prompts give the true values."""
NORMAL = NormalDist()


@dataclass(frozen=True)
class Scenario:
    """A population of prompts.

    Args:
        acceptance: of each position, given that all before it are accepted, for the prompt in the middle.
        scatter: standard deviation between prompts of the logits of these.
        median_length: tokens of an answer.
        longest: tokens at which answers are cut.
        repetitive: share of prompts with an answer that repeats itself.
    """

    acceptance: tuple[float, ...]
    scatter: float
    median_length: int
    longest: int
    repetitive: float = 0.0


SCENARIOS = {
    "weak": Scenario((0.36, 0.12, 0.09, 0.05), 0.4, 90, 128),
    "strong": Scenario((0.72, 0.65, 0.6, 0.55), 0.6, 150, 256),
    "mixed": Scenario((0.4, 0.3, 0.3, 0.3), 0.5, 90, 128, repetitive=0.15),
}
FIGURES = ("length", "difference", "position 1", "position 2", "position 3", "position 4", "tokens/s", "speed-up")


@dataclass(frozen=True)
class Sample:
    """What so many evaluations measured: tokens [T, P], drafts [D, T, P], accepted [D, T, P, K], seconds [2, T, P]."""

    tokens: np.ndarray
    drafts: np.ndarray
    accepted: np.ndarray
    seconds: np.ndarray

    def parts(self, figure: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """The numerators and denominators [T, P] of the ratios that a figure is made of."""
        if figure == "length":
            return [(self.accepted[0].sum(-1), self.drafts[0])]
        if figure == "difference":
            return [(self.accepted[one].sum(-1), self.drafts[one]) for one in (0, 1)]
        if figure.startswith("position"):
            return [(self.accepted[0][..., int(figure[-1]) - 1], self.drafts[0])]
        return [(self.tokens, self.seconds[one]) for one in ((0,) if figure == "tokens/s" else (0, 1))]


def draw(scenario: Scenario, trials: int, prompts: int, seed: int) -> Sample:
    """Draw prompts and let two equal drafters answer them."""
    rng = np.random.default_rng(seed)
    shape = (trials, prompts)
    lengths = np.exp(rng.normal(math.log(scenario.median_length), 0.9, shape))
    tokens = np.clip(lengths, 4, scenario.longest).astype(int)
    ease, repeats = rng.normal(size=shape), rng.random(shape) < scenario.repetitive
    middle = np.array([math.log(share / (1 - share)) for share in scenario.acceptance])
    drafts, accepted = [], []
    for _ in range(2):
        own_ease = 0.85 * ease + math.sqrt(1 - 0.85**2) * rng.normal(size=shape)
        chances = 1 / (1 + np.exp(-(middle + scenario.scatter * own_ease[..., None])))
        chances = np.where(repeats[..., None], np.maximum(chances, 0.93), chances)
        counts = generate(tokens, chances, rng)
        drafts.append(counts[0])
        accepted.append(counts[1])
    load = np.exp(rng.normal(0, 0.15, shape))  # other programs' load at the time
    passes = (0.026 * drafts[0], 0.02 * tokens)
    seconds = [(0.2 + one) * load * np.exp(rng.normal(0, 0.05, shape)) for one in passes]
    return Sample(tokens, np.stack(drafts), np.stack(accepted), np.stack(seconds))


def generate(tokens: np.ndarray, chances: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draft until every answer has its tokens; gives drafts [T, P] and accepted tokens by position [T, P, K]."""
    made, drafts = np.ones_like(tokens), np.zeros_like(tokens)
    accepted = np.zeros(chances.shape, int)
    while (unfinished := made < tokens).any():
        taken = np.cumprod(rng.random(chances.shape) < chances, axis=-1) * unfinished[..., None]
        drafts += unfinished
        accepted += taken
        made += taken.sum(-1) + 1
    return drafts, accepted


def value(figure: str, parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """A figure by the sums of its parts."""
    ratios = [numerator / denominator for numerator, denominator in parts]
    if figure == "difference":
        return ratios[0] - ratios[1]
    return ratios[0] / ratios[1] if figure == "speed-up" else ratios[0] + (figure == "length")


def reported(sample: Sample) -> Iterator[dict[str, list[float]]]:
    """The intervals of each trial, from the code that makes the report."""
    num_trials, num_prompts = sample.tokens.shape
    prompts = [Prompt(str(number), "chat", [], ["?"]) for number in range(num_prompts)]
    for trial in range(num_trials):
        drafted = [run_of(sample, trial, drafter, 0) for drafter in (0, 1)]
        found = figures([drafted[0]], [run_of(sample, trial, 0, 1)], prompts, None, is_greedy=True)["intervals"]
        one, other = (Trial(name, 4, [[run]]) for name, run in zip("ab", drafted, strict=True))
        length = difference(one, other, prompts, is_greedy=True)["acceptance_length"]
        yield {
            "length": found["acceptance_length"],
            "difference": length["interval"],
            **{f"position {place}": spread for place, spread in enumerate(found["per_position_acceptance"], 1)},
            "tokens/s": found["tokens_per_second"],
            "speed-up": found["speed_up"],
        }


def run_of(sample: Sample, trial: int, drafter: int, speed: int) -> Run:
    drafts, accepted = sample.drafts[drafter, trial], sample.accepted[drafter, trial]
    seconds = sample.seconds[speed, trial]
    chats = [
        [Answer("", [0] * length, "stop", 0.1, took, [count, 4 * count, int(taken.sum()), *map(int, taken)])]
        for length, took, count, taken in zip(
            sample.tokens[trial].tolist(), seconds.tolist(), drafts.tolist(), accepted, strict=True
        )
    ]
    return Run(1, chats, float(seconds.sum()))


def jackknife(sample: Sample) -> dict[str, np.ndarray]:
    """The intervals [T, 2] of the report by figure."""
    found = list(reported(sample))
    return {figure: np.array([intervals[figure] for intervals in found]) for figure in FIGURES}


def bootstrap(method: str, sample: Sample) -> dict[str, np.ndarray]:
    """The intervals [T, 2] of a bootstrap over prompts by figure."""
    prompts = sample.tokens.shape[1]
    rng = np.random.default_rng(5)
    weights_BP = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES).astype(float)
    intervals = {}
    for figure in FIGURES:
        parts = sample.parts(figure)
        resampled_BT = value(figure, [(weights_BP @ one.T, weights_BP @ two.T) for one, two in parts])
        found_T = value(figure, [(one.sum(-1), two.sum(-1)) for one, two in parts])
        intervals[figure] = BOOTSTRAPS[method](figure, parts, weights_BP, resampled_BT, found_T)
    return intervals


def percentile(figure, parts, weights_BP, resampled_BT, found_T) -> np.ndarray:
    return np.quantile(resampled_BT, (0.025, 0.975), axis=0).T


def bca(figure, parts, weights_BP, resampled_BT, found_T) -> np.ndarray:
    """Bias-corrected and accelerated (Efron 1987)."""
    below = (resampled_BT < found_T).mean(0) + (resampled_BT == found_T).mean(0) / 2
    bias = np.array([NORMAL.inv_cdf(min(max(share, 1 / RESAMPLES), 1 - 1 / RESAMPLES)) for share in below])
    left_out = [(one.sum(-1, keepdims=True) - one, two.sum(-1, keepdims=True) - two) for one, two in parts]
    values_TP = value(figure, left_out)
    away = values_TP.mean(-1, keepdims=True) - values_TP
    acceleration = (away**3).sum(-1) / np.maximum(6 * (away**2).sum(-1) ** 1.5, 1e-300)
    ordered, ends = np.sort(resampled_BT, axis=0), []
    for tail in (-1.959964, 1.959964):
        point = bias + (bias + tail) / (1 - acceleration * (bias + tail))
        rank = [round(NORMAL.cdf(one) * (RESAMPLES - 1)) for one in point]
        ends.append(ordered[rank, np.arange(len(found_T))])
    return np.stack(ends, axis=-1)


def bootstrap_t(figure, parts, weights_BP, resampled_BT, found_T) -> np.ndarray:
    """Each resample is studentized by the linearized standard error in it."""
    ones = np.ones((1, weights_BP.shape[1]))
    with np.errstate(all="ignore"):
        studentized = (resampled_BT - found_T) / _linearized_error(figure, parts, weights_BP)
        low, high = np.quantile(np.nan_to_num(studentized), (0.025, 0.975), axis=0)
    error = _linearized_error(figure, parts, ones)[0]
    return np.stack([found_T - high * error, found_T - low * error], axis=-1)


def _linearized_error(figure, parts, weights_BP) -> np.ndarray:
    """The standard error [B, T] to first order."""
    prompts = weights_BP.shape[1]
    sums = [(weights_BP @ one.T, weights_BP @ two.T) for one, two in parts]
    ratios = [one / two for one, two in sums]

    def mean_product(left: int, right: int) -> np.ndarray:
        (a, b), (c, d) = parts[left], parts[right]
        r, s = ratios[left], ratios[right]
        products = weights_BP @ (a * c).T - s * (weights_BP @ (a * d).T) - r * (weights_BP @ (b * c).T)
        products = products + r * s * (weights_BP @ (b * d).T)
        return products / (sums[left][1] / prompts) / (sums[right][1] / prompts)

    variance = mean_product(0, 0)
    if len(parts) == 2 and figure == "difference":
        variance = variance + mean_product(1, 1) - 2 * mean_product(0, 1)
    elif len(parts) == 2:
        r, s = ratios
        relative = mean_product(0, 0) / r**2 + mean_product(1, 1) / s**2 - 2 * mean_product(0, 1) / (r * s)
        variance = (r / s) ** 2 * relative
    return np.sqrt(np.maximum(variance, 0) / prompts / (prompts - 1))


BOOTSTRAPS: dict[str, Callable[..., np.ndarray]] = {
    "percentile": percentile,
    "BCa": bca,
    "bootstrap-t": bootstrap_t,
}


def coverage(scenario: str, prompts: int, trials: int, seed: int, methods=METHODS) -> dict[str, dict[str, float]]:
    """The share of trials whose interval holds the true value, in %, by method and figure."""
    sample = draw(SCENARIOS[scenario], trials, prompts, seed)
    found: dict[str, dict[str, float]] = {}
    for method in methods:
        intervals = jackknife(sample) if method == "jackknife" else bootstrap(method, sample)
        found[method] = {}
        for figure in FIGURES:
            truth = 0 if figure == "difference" else true_values(scenario)[figure]
            low, high = intervals[figure].T
            found[method][figure] = 100 * float(((low <= truth) & (truth <= high)).mean())
    return found


@cache
def true_values(scenario: str) -> dict[str, float]:
    """The figures of a very large sample."""
    sample = draw(SCENARIOS[scenario], POPULATION, 1_000, 99)
    sums = {figure: [(one.sum(), two.sum()) for one, two in sample.parts(figure)] for figure in FIGURES}
    return {figure: float(value(figure, parts)) for figure, parts in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2_000)
    parser.add_argument("--prompts", type=int, nargs="+", default=[6, 10, 20, 80])
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("| scenario | prompts | method | " + " | ".join(FIGURES) + " |")
    print("|---" * (3 + len(FIGURES)) + "|")
    for scenario in options.scenarios:
        for prompts in options.prompts:
            found = coverage(scenario, prompts, options.trials, options.seed, options.methods)
            for method, shares in found.items():
                cells = " | ".join(f"{shares[figure]:.1f}" for figure in FIGURES)
                print(f"| {scenario} | {prompts} | {method} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
