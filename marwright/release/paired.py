"""Intervals and exact tests for two versions that answered the same examples. Pure numpy and scipy.

    paired.proportions(lost=4, won=1, examples=359, confidence=0.95)     # (-0.0221, 0.0029)

Bounds are one-sided, each at the given confidence; None where the examples are too few for one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

RESAMPLES = 1000


def proportions(lost: int, won: int, examples: int, confidence: float) -> tuple[float, float]:
    """Bounds of a difference of proportions: Tango's score interval (Statistics in Medicine 17, 1998, 891–908).

    `lost` examples had only the first right, `won` only the second; the difference is second minus first. Right where
    hardly any pair differs, and also where none does: the bounds are then ±z²/(examples + z²).
    """
    from scipy import optimize, special

    z = float(special.ndtri(confidence))
    estimate = (won - lost) / examples

    def score(difference: float) -> float:
        """Standardised distance of what was counted from `difference`, of which it is a falling function."""
        return (won - lost - examples * difference) / math.sqrt(_variance(lost, won, examples, difference))

    inner = 1 - 1e-12  # at ±1 itself the variance is zero
    low, high = -1.0, 1.0
    if estimate > -inner and score(-inner) > z:
        low = float(optimize.brentq(lambda at: score(at) - z, -inner, min(estimate, inner), xtol=1e-10))
    if estimate < inner and score(inner) < -z:
        high = float(optimize.brentq(lambda at: score(at) + z, max(estimate, -inner), inner, xtol=1e-10))
    return low, high


def examples_needed(disagreement: float, margin: float, confidence: float, *, power: float = 0.9) -> int:
    """How many examples until the lower bound of `proportions` lies above −margin for two that are equally good.

    `disagreement` is the share of examples that exactly one of them has right; `power` how often that succeeds. The
    usual normal approximation, with the variance of the score interval.
    """
    from scipy import special

    under_loss = math.sqrt(_variance(disagreement / 2, disagreement / 2, 1, -margin))
    z, z_power = float(special.ndtri(confidence)), float(special.ndtri(power))
    return math.ceil(((z * under_loss + z_power * math.sqrt(disagreement)) / margin) ** 2)


def means(differences: Floats, confidence: float) -> tuple[float | None, float | None]:
    """Bounds of the mean difference: Student's t, so for a mean of many or of roughly normal values."""
    if len(differences) < 2:
        return None, None
    from scipy import special, stats

    half = float(special.stdtrit(len(differences) - 1, confidence) * stats.sem(differences))
    mean = float(differences.mean())
    return mean - half, mean + half


def medians(values: Floats, confidence: float) -> tuple[float | None, float | None]:
    """Bounds of the median: order statistics, exact whatever the distribution."""
    from scipy import stats

    place = int(stats.binom.ppf(1 - confidence, len(values), 0.5))
    if place < 1:
        return None, None
    ordered = np.sort(values)
    return float(ordered[place - 1]), float(ordered[-place])


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p of the exact test that neither is better; 1 where no pair differs."""
    from scipy import stats

    return float(stats.binomtest(won, lost + won).pvalue) if lost + won else 1.0


def drops(lost: Integers, won: Integers) -> Floats:
    """p of a drop in each of several groups: exact one-sided McNemar, adjusted by Holm over all of them.

    A group whose p is at most α may be called worse; that any is called so wrongly has probability α at most.
    """
    from scipy import stats

    single = stats.binom.sf(lost - 1, lost + won, 0.5)
    order = np.argsort(single, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(single[order] * factors))
    return adjusted


def calibration_rise(first: Calibration, second: Calibration, confidence: float) -> tuple[float, float]:
    """Bounds of the rise of the expected calibration error, by resampling the examples: the basic bootstrap, seeded.

    Twice the estimate minus the quantile, because an error that is a sum of absolute values grows when resampled.
    """
    examples = len(first.bins)
    generator = np.random.default_rng(0)
    rises = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = np.bincount(generator.integers(0, examples, examples), minlength=examples)
        rises[i] = second.error_of(drawn) - first.error_of(drawn)
    estimate = second.error - first.error
    lower, upper = np.quantile(rises, [1 - confidence, confidence])
    return 2 * estimate - float(upper), 2 * estimate - float(lower)


class Calibration:
    """How far confidence and correctness are apart, in bins of equal width (Guo et al. 2017)."""

    def __init__(self, confidence: Floats, right: NDArray[np.bool_], count: int) -> None:
        """N confidences of 0…1 and whether each answer was right, in `count` bins."""
        self.count = count
        self.bins: Integers = np.clip((confidence * count).astype(np.int64), 0, count - 1)
        self.gaps: Floats = right - confidence
        """By example; what remains of their sum in a bin is its error."""

    @property
    def error(self) -> float:
        """The expected calibration error."""
        return self.error_of(np.ones(len(self.bins), dtype=np.int64))

    def error_of(self, drawn: Integers) -> float:
        """The same of a resample that has example i `drawn[i]` times."""
        return float(np.abs(np.bincount(self.bins, drawn * self.gaps, self.count)).sum() / drawn.sum())


def _variance(lost: float, won: float, examples: float, difference: float) -> float:
    """Of won − lost, were `difference` the truth, at the likeliest rate of losses under it."""
    a = 2 * examples
    b = (2 * examples - won + lost) * difference - won - lost
    c = -lost * difference * (1 - difference)
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    # Two forms of the same root; each loses its digits where the other keeps them.
    losses = (root - b) / (2 * a) if b <= 0 else -2 * c / (root + b)
    # A rate of losses is at least 0, and at least −difference, as wins cannot be fewer than none.
    losses = max(losses, 0.0, -difference)
    return max(examples * (2 * losses + difference * (1 - difference)), 1e-300)
