"""How far a figure would be off with other prompts of the same kind: bootstrap over prompts.

The prompts that were run are drawn from anew, with replacement, as many as there are; the figure's spread over such
resamples is its interval (Efron 1979, percentile method). Figures of the same prompts that are taken from the same
resamples are paired: the interval of their difference leaves out what easy and hard prompts do to both.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000
MIN_PROMPTS = 6
"""Fewer have no interval: of n pairs of equals all differ the same way by chance in 2 / 2^n, for 5 above 1 - 0.95."""


def resample(num_prompts: int, seed: int) -> NDArray[np.int64]:
    """How often each of P prompts is in each of B resamples, int64 [B, P]; the same for the same number and seed."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=RESAMPLES)


def interval(values_B: NDArray[np.float64]) -> Any:
    """The middle `CONFIDENCE` of the resamples: [low, high], or for values [B, K] a list of K such pairs."""
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(values_B, (tail, 1 - tail), axis=0).T.tolist()


def is_difference(interval: list[float] | None, neutral: float) -> bool | None:
    """Whether an interval leaves out the value that stands for no difference; None if there is no interval."""
    return None if interval is None else not interval[0] <= neutral <= interval[1]
