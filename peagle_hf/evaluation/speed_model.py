"""A model of speed by acceptance length: from which length a drafter pays, and which K is the fastest.

A generated token takes a + b / L seconds, L being the acceptance length: b is the time of one round of drafting and
verifying for each chat, and a what doesn't depend on the drafts, such as the prompt's own pass.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SpeedModel:
    """The speed of one drafter and K at one concurrency; times are in seconds for each generated token.

    Args:
        without: without a drafter.
        outside: a, what doesn't depend on the acceptance length.
        rounds: b, what is divided by it.
        error: the greatest deviation of a measured time from the model, as a share of the measured one.
    """

    without: float
    outside: float
    rounds: float
    error: float

    @classmethod
    def fit(cls, without: float, measured: Sequence[tuple[float, float]]) -> "SpeedModel":
        """Fit the model by least squares of the relative deviations, with no negative time.

        Args:
            without: seconds a token without a drafter.
            measured: acceptance lengths and seconds a token with one; at least two different lengths.
        """
        lengths, seconds = np.array(measured, np.float64).T
        terms = np.stack([np.ones_like(lengths), 1 / lengths], axis=1) / seconds[:, None]
        ones = np.ones_like(seconds)
        times = np.linalg.lstsq(terms, ones, rcond=None)[0]
        if times.min() < 0:
            positive = times > 0
            times = np.zeros_like(times)
            times[positive] = np.linalg.lstsq(terms[:, positive], ones, rcond=None)[0]
        error = np.abs(terms @ times - 1).max()
        return cls(without, float(times[0]), float(times[1]), float(error))

    @property
    def break_even_length(self) -> float | None:
        """The acceptance length, at least 1, from which the drafter pays; None if none is high enough."""
        saved = self.without - self.outside
        return max(1.0, self.rounds / saved) if saved > 0 else None

    def speed_up(self, length: float) -> float:
        """Tokens per second at this acceptance length, divided by those without a drafter."""
        return self.without / (self.outside + self.rounds / length)


def median_break_even(models: Sequence[SpeedModel]) -> float | None:
    """The median of the rounds' break-even lengths; None if that is a round in which no length is high enough."""
    lengths = [model.break_even_length for model in models]
    median = float(np.median([math.inf if length is None else length for length in lengths]))
    return median if math.isfinite(median) else None


def median_speed_up(models: Sequence[SpeedModel], length: float) -> float:
    """The median of the rounds' speed-ups at this acceptance length."""
    return float(np.median([model.speed_up(length) for model in models]))


def geometric_length(rate: float, num_tokens: int) -> float:
    """The acceptance length with K tokens, of which each is accepted at this rate if all before it are."""
    return float(sum(rate**position for position in range(num_tokens + 1)))


def geometric_rate(length: float, num_tokens: int) -> float:
    """The inverse of `geometric_length`: the rate, from 0 to 1, that gives this length, which is at most K + 1."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if geometric_length(middle, num_tokens) < length else (low, middle)
    return (low + high) / 2


def fastest(models: Mapping[int, Sequence[SpeedModel]], length: float) -> tuple[int | None, float, float]:
    """The K that is the fastest for a drafter which has this acceptance length with the largest K.

    With fewer tokens its length is lower, as if each token were accepted at the same rate once all before it are.

    Args:
        models: of each round, by K.
        length: at most the largest K + 1.

    Returns:
        K, the acceptance length with it, and the speed-up; None, 1 and 1 if no K is faster than no drafter.
    """
    rate = geometric_rate(length, max(models))
    lengths = {number: geometric_length(rate, number) for number in models}
    speed_ups = {number: median_speed_up(models[number], lengths[number]) for number in models}
    best = max(models, key=lambda number: speed_ups[number])
    speed_up = speed_ups[best]
    return (best, lengths[best], speed_up) if speed_up > 1 else (None, 1.0, 1.0)
