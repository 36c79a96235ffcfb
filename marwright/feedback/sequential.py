"""Whether a stream of right and wrong answers holds its accuracy: a test that may be looked at as often as one likes.

    sequential.below([True, False, …], bound=0.9, alpha=0.01).at     # the outcome at which it was refuted, or None

The null hypothesis is that each answer is right with a probability of at least `bound`, whatever came before it.
Evidence is a wealth that starts at 1 and is multiplied, at each outcome, by how much likelier a worse accuracy q
makes it than `bound` does: q/bound for a right answer, (1-q)/(1-bound) for a wrong one. Under the null hypothesis
that is a supermartingale, and so is a mean of several with weights fixed in advance: over values of q, and over the
outcome from which the answers are worse. By Ville's inequality (1939) its wealth ever reaches 1/alpha with a
probability of at most alpha. Looking costs nothing, and neither does a stream that does not end.

Such tests by betting: Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting"; the
mixture over alternatives: Robbins (1970). The weight of start k is 1/(k(k+1)), so that a fall after n outcomes costs no
more than a factor n² in wealth.

What was promised holds for a stream that only grows at its end: in the order in which the labels came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHARES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.94, 0.97)
"""The alternatives: this share of `bound`."""
_CERTAIN = 1 - 1e-9


@dataclass(frozen=True)
class Finding:
    """What the stream says against the bound."""

    wealth: float
    """The most that it ever was; under the null hypothesis 1/w or more with a probability of at most w."""
    at: int | None
    """How many outcomes it took to refute the bound; None while it stands."""


def below(outcomes: Sequence[bool] | NDArray[np.bool_], bound: float, alpha: float) -> Finding:
    """Whether the accuracy of these outcomes, the oldest first, is below `bound`: at error probability `alpha`, however
    often it is asked. A bound of 0 is never refuted, one of 1 by the first wrong answer."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}, not between 0 and 1")
    if not len(outcomes) or bound <= 0:
        return Finding(1.0, None)
    log = log_wealth(np.asarray(outcomes, dtype=bool)[None], bound)[0]
    over = np.flatnonzero(log >= -np.log(alpha))
    return Finding(float(np.exp(min(700.0, max(0.0, log.max())))), int(over[0]) + 1 if len(over) else None)


def log_wealth(outcomes: NDArray[np.bool_], bound: float) -> NDArray[np.float64]:
    """S×N outcomes of S streams → S×N: the logarithm of the wealth after each."""
    bound = min(bound, _CERTAIN)
    alternatives = bound * np.array(SHARES)
    right, wrong = np.log(alternatives / bound), np.log((1 - alternatives) / (1 - bound))
    streams, count = outcomes.shape
    started = np.full((streams, len(SHARES)), -np.inf)
    found = np.empty((streams, count))
    for n in range(count):
        # A start at this outcome joins those before it: 1/(k(k+1)) of the wealth, k = n + 1.
        started = np.logaddexp(started, -np.log((n + 1) * (n + 2)))
        started += np.where(outcomes[:, n, None], right, wrong)
        highest = started.max(axis=1)
        mixed = highest + np.log(np.exp(started - highest[:, None]).mean(axis=1))
        found[:, n] = np.logaddexp(mixed, -np.log(n + 2))  # the starts to come hold 1/(n + 2)
    return found
