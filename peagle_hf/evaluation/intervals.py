"""95 % confidence intervals of figures measured on prompts, for other prompts of the same kind.

One prompt is one observation, because tokens and drafts of one prompt resemble each other. All figures are ratios of
sums over prompts, such as accepted tokens / drafts. The standard error is the jackknife's, from the figures with one
prompt left out at a time (Tukey 1958). The degrees of freedom of Student's t are the number of prompts of equal size,
minus one; a few long answers among short ones have more weight, so that fewer prompts count (Carter, Schnepel and
Steigerwald 2017).

`tests/benchmarks/interval_coverage.py` measures how often such intervals hold the true value; docs/acceptance.md has
the result.

Shape letters: P prompts, K positions of a draft.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
METHOD = "jackknife over prompts, Student's t"
MIN_PROMPTS = 6
"""With fewer prompts there is no interval: six are the fewest for which the coverage was measured."""

_ANGLES = np.linspace(0, math.pi / 2, 20_001)
_MIDDLES = (_ANGLES[1:] + _ANGLES[:-1]) / 2
_NORMAL = 1.959964
"""The 97.5 % point of the normal distribution."""


def all_and_leave_one_out(num_prompts: int) -> NDArray[np.int64]:
    """How often each of P prompts counts: once each in the first row, then all but one; int64 [1 + P, P].

    With fewer than `MIN_PROMPTS` there is only the first row, [1, P].
    """
    everyone = np.ones((1, num_prompts), np.int64)
    if num_prompts < MIN_PROMPTS:
        return everyone
    return np.concatenate([everyone, 1 - np.eye(num_prompts, dtype=np.int64)])


def degrees_of_freedom(sizes: Sequence[ArrayLike]) -> float:
    """The number of prompts of equal size that would vary as much as these, minus one; at least 1.

    Args:
        sizes: the denominators [P] of the figure, such as drafts by prompt; of a comparison those of both sides, of
            which the one with fewer degrees counts.
    """
    counts = []
    for size in sizes:
        size_P = np.asarray(size, np.float64)
        counts.append(size_P.sum() ** 2 / max(float((size_P**2).sum()), 1e-300))
    return max(min(counts) - 1, 1.0)


def difference_interval(values: NDArray[np.float64], degrees: float) -> list[float]:
    """The interval [low, high] of a difference of figures, by its values [1 + P] for `all_and_leave_one_out`."""
    half = student_t(degrees) * float(_standard_error(values))
    return [float(values[0]) - half, float(values[0]) + half]


def ratio_interval(values: NDArray[np.float64], degrees: float) -> list[float]:
    """The interval of a positive figure without an upper limit, such as a speed: that of its logarithm."""
    low, high = difference_interval(np.log(values), degrees)
    return [math.exp(low), math.exp(high)]


def share_interval(values: NDArray[np.float64], degrees: float, count: float) -> Any:
    """The interval of a share, which is in 0 .. 1 (Wilson 1927, with the effective number of observations).

    The effective number is that of independent observations which would vary as much as the jackknife finds, but at
    most `count` (Korn and Graubard 1998). So the interval of a share of 0 has a width too.

    Args:
        values: [1 + P], or by position [1 + P, K].
        count: observations behind the share, such as drafts; above 0.

    Returns:
        [low, high], or a list of K such pairs.
    """
    share = values[0]
    variance = share * (1 - share)
    error = np.maximum(_standard_error(values) * student_t(degrees) / _NORMAL, 1e-12)
    observations = np.where(variance > 0, np.minimum(variance / error**2, count), count)
    pseudo = _NORMAL**2 / observations
    centre = (share + pseudo / 2) / (1 + pseudo)
    half = np.sqrt(pseudo * share * (1 - share) + pseudo**2 / 4) / (1 + pseudo)
    low, high = np.clip(np.minimum(centre - half, share), 0, 1), np.clip(np.maximum(centre + half, share), 0, 1)
    return np.stack([low, high], axis=-1).tolist()


def is_difference(interval: list[float] | None, neutral: float) -> bool | None:
    """Whether an interval excludes the value for "no difference"; None if there is no interval."""
    return None if interval is None else not interval[0] <= neutral <= interval[1]


def student_t(degrees: float) -> float:
    """The 97.5 % point of Student's t for 1 or more degrees of freedom, which need not be a whole number.

    With t = sqrt(degrees) * tan(angle) the density of the angle is proportional to cos(angle) ** (degrees - 1), which
    is summed here.
    """
    mass = np.concatenate([[0.0], np.cumsum(np.cos(_MIDDLES) ** (degrees - 1))])
    return math.sqrt(degrees) * math.tan(float(np.interp(CONFIDENCE * mass[-1], mass, _ANGLES)))


def _standard_error(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """By the jackknife, from values [1 + P] or [1 + P, K]."""
    left_out = values[1:]
    num_prompts = len(left_out)
    return np.asarray(np.sqrt((num_prompts - 1) / num_prompts * ((left_out - left_out.mean(0)) ** 2).sum(0)))
