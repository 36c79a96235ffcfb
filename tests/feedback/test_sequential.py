"""The sequential test: its promise at the bound itself, looked at after each outcome, and how soon it finds worse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from marwright.feedback import sequential

STREAMS, LENGTH = 2000, 1000


@pytest.mark.parametrize("bound", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_false_alarms_at_the_bound_are_as_rare_as_promised(bound: float, alpha: float) -> None:
    outcomes = np.random.default_rng(0).random((STREAMS, LENGTH)) < bound
    alarms = int((sequential.log_wealth(outcomes, bound).max(axis=1) >= -np.log(alpha)).sum())
    assert alarms <= stats.binom.ppf(0.99, STREAMS, alpha)
    better = np.random.default_rng(1).random((STREAMS, 200)) < (1 + bound) / 2
    fewer = int((sequential.log_wealth(better, bound).max(axis=1) >= -np.log(alpha)).sum())
    assert fewer <= stats.binom.ppf(0.99, STREAMS, alpha), "nor above the bound"


def test_a_worse_stream_is_found_and_the_sooner_the_worse_it_is() -> None:
    medians = []
    for accuracy, most in ((0.85, 2000), (0.8, 400), (0.7, 120), (0.5, 30)):
        outcomes = np.random.default_rng(2).random((300, most)) < accuracy
        hit = sequential.log_wealth(outcomes, 0.9) >= -np.log(0.01)
        found = hit.any(axis=1)
        assert found.mean() > 0.95, f"{accuracy} within {most}"
        medians.append(float(np.median(hit.argmax(axis=1)[found] + 1)))
    assert all(later < earlier / 1.5 for earlier, later in itertools.pairwise(medians)), medians


def test_a_fall_after_a_long_good_time_is_found() -> None:
    random = np.random.default_rng(3)
    outcomes = np.concatenate([random.random((200, 2000)) < 0.95, random.random((200, 400)) < 0.7], axis=1)
    hit = sequential.log_wealth(outcomes, 0.9) >= -np.log(0.01)
    delay = hit.argmax(axis=1) - 2000
    assert hit.any(axis=1).mean() > 0.98
    assert 30 < np.median(delay) < 200


def test_one_stream_is_what_many_are() -> None:
    outcomes = np.random.default_rng(4).random(300) < 0.7
    log = sequential.log_wealth(outcomes[None], 0.9)[0]
    found = sequential.below(outcomes.tolist(), 0.9, 0.01)
    assert found.at == int(np.flatnonzero(log >= -np.log(0.01))[0]) + 1
    assert found.wealth == pytest.approx(np.exp(log.max()))


def test_what_was_found_stays_found_as_the_stream_grows() -> None:
    outcomes = (np.random.default_rng(5).random(100) < 0.5).tolist()
    first = sequential.below(outcomes, 0.9, 0.01)
    assert first.at is not None
    for more in (1, 50, 3000):
        assert sequential.below(outcomes + [True] * more, 0.9, 0.01).at == first.at


def test_the_wealth_of_a_short_stream_is_what_a_hand_computes() -> None:
    wrong = [(1 - 0.5 * share) / 0.5 for share in sequential.SHARES]
    one = 0.5 * np.mean(wrong) + 0.5
    two = np.mean([(0.5 * w + 1 / 6) * w for w in wrong]) + 1 / 3
    np.testing.assert_allclose(np.exp(sequential.log_wealth(np.array([[False, False]]), 0.5)[0]), [one, two])


def test_the_edges() -> None:
    assert sequential.below([], 0.9, 0.01) == sequential.Finding(1.0, None)
    assert sequential.below([False] * 50, 0.0, 0.01).at is None
    assert sequential.below([True] * 50, 1.0, 0.01).at is None
    assert sequential.below([True, True, False], 1.0, 0.01).at == 3
    assert np.isfinite(sequential.below([False] * 20_000, 0.9, 0.01).wealth)
    with pytest.raises(ValueError, match="alpha"):
        sequential.below([True], 0.9, 0.0)
