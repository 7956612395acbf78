"""Means with standard errors or 95 % intervals, and win rates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Estimate(NamedTuple):
    """A mean, and of how many values."""

    mean: float
    error: float  # standard error
    pairs: int

    def text(self, sign: str = "") -> str:
        """Mean and standard error as far as there are any."""
        mean = shown(self.mean, sign)
        return mean if math.isnan(self.error) else f"{mean} ± {self.error:.3f}"


def estimate(values: Tensor) -> Estimate:
    """Mean and standard error of values (N,)."""
    n = len(values)
    error = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(values.mean()) if n else math.nan, error, n)


def shown(value: float, sign: str = "") -> str:
    """Three decimals; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:{sign}.3f}"


RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_interval(values: np.ndarray) -> Interval:  # (P,) one value a prompt
    """By Student's t, which holds for a few prompts too, where a bootstrap is too narrow; of one prompt NaN."""
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    half = student(n - 1) * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Interval(mean, mean - half, mean + half)


def student(freedom: int) -> float:
    """Quantile .975 of Student's t, to 4e-4: Abramowitz and Stegun 26.7.5, up to 4 degrees of freedom a table."""
    if freedom <= 4:
        return (12.7062, 4.3027, 3.1824, 2.7764)[freedom - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**k for k, term in enumerate(terms, 1))


def bootstrap(values: np.ndarray, seed: int) -> Interval:  # (P,) one value a prompt
    """Percentiles 2.5 and 97.5 of the means of RESAMPLES draws of the prompts, with replacement.

    One seed and number of prompts, one draw: intervals of differences of two contenders are paired.
    """
    if len(values) == 0:
        return Interval(math.nan, math.nan, math.nan)
    places = np.random.default_rng([seed, len(values)]).integers(0, len(values), (RESAMPLES, len(values)))
    means = values.astype(np.float64)[places].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))


def win_rate(ours: np.ndarray, theirs: np.ndarray, seed: int) -> Interval:  # (P,), (P,)
    """Share of the prompts where ours is higher; a tie is half a win."""
    return bootstrap(np.sign(ours - theirs) / 2 + 0.5, seed)
