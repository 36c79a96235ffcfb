"""The estimate of label noise is near the truth, in all and by class, and difficulty is not taken for noise."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from marwright.learning import noise
from marwright.learning.noise import Noise

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
TEN = tuple(str(i) for i in range(10))


@cache
def digits(seed: int) -> tuple[Floats, Integers, Floats, Integers]:
    """Embeddings by a net that learned from 800 digits, and labels: of 600 that it has not seen, and 397 trusted."""
    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    pictures, labels = found.data[order] / 16, found.target[order].astype(np.int64)
    net = MLPClassifier((64,), max_iter=80, learning_rate_init=0.01, random_state=seed, tol=1e-2)
    net.fit(pictures[:800], labels[:800])
    embedded = np.maximum(pictures @ net.coefs_[0] + net.intercepts_[0], 0)
    return embedded[800:1400], labels[800:1400], embedded[1400:], labels[1400:]


def synthetic(
    count: int, *, classes: int = 5, apart: float = 4.0, seed: int = 0, centres: int = 7
) -> tuple[Floats, Integers]:
    """Gaussian clouds in 16 dimensions."""
    random = np.random.default_rng(seed)
    middle = np.random.default_rng(centres).normal(0, apart / np.sqrt(2), (classes, 16)) / np.sqrt(2)
    labels = random.integers(0, classes, count)
    return middle[labels] + random.normal(0, 1, (count, 16)), labels


def symmetric(labels: Integers, rate: float, classes: int, *, seed: int) -> Integers:
    """That share of all labels, each turned into any other."""
    random = np.random.default_rng(seed)
    chosen = random.choice(len(labels), round(rate * len(labels)), replace=False)
    noisy = labels.copy()
    noisy[chosen] = (noisy[chosen] + random.integers(1, classes, len(chosen))) % classes
    return noisy


def one_class(labels: Integers, of: int, to: int, share: float, *, seed: int) -> Integers:
    members = np.flatnonzero(labels == of)
    chosen = np.random.default_rng(seed).choice(members, round(share * len(members)), replace=False)
    noisy = labels.copy()
    noisy[chosen] = to
    return noisy


def estimated(features: Floats, labels: Integers, classes: tuple[str, ...] = TEN, **options: object) -> Noise:
    found = noise.estimate(features, labels, classes, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [300, 600])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_symmetric_noise_in_digits_is_estimated_within_five_points(rate: float, count: int, seed: int) -> None:
    features, labels, trusted, known = digits(seed)
    noisy = symmetric(labels[:count], rate, 10, seed=seed)
    found = estimated(features[:count], noisy, trusted=(trusted, known))
    assert found.rate == pytest.approx(rate, abs=0.05)
    suspects = set(found.suspects)
    wrong = set(np.flatnonzero(noisy != labels[:count]).tolist())
    assert len(suspects & wrong) >= 0.6 * len(wrong)
    assert len(suspects - wrong) <= 0.05 * count


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("of", "to"), [(3, 8), (1, 7), (4, 9)])
def test_a_class_that_is_flipped_is_named_and_measured(of: int, to: int, seed: int) -> None:
    features, labels, trusted, known = digits(seed)
    found = estimated(features, one_class(labels, of, to, 0.3, seed=seed), trusted=(trusted, known))
    assert found.by_class[str(of)].missed == pytest.approx(0.3, abs=0.12)
    assert found.by_class[str(to)].wrong == pytest.approx(0.3 / 1.3, abs=0.12)
    assert (found.by_class[str(of)].missed_at_least or 1.0) <= 0.3
    assert found.rate == pytest.approx(0.03, abs=0.03)
    doubted = {label for label, row in found.by_class.items() if (row.at_least or 0.0) > 0.075}
    assert str(of) in doubted
    assert doubted <= {str(of), str(to)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_symmetric_noise_in_clouds_is_estimated_without_trusted_examples(rate: float, seed: int) -> None:
    features, labels = synthetic(600, seed=seed, apart=6.0)
    found = estimated(features, symmetric(labels, rate, 5, seed=seed), TEN[:5])
    assert found.rate == pytest.approx(rate, abs=0.05)


def test_what_is_hard_to_tell_apart_is_noise_only_to_those_who_trust_nothing() -> None:
    features, labels = synthetic(1500, apart=1.0, seed=1)
    trusted = synthetic(1500, apart=1.0, seed=2)
    alone = estimated(features, labels, TEN[:5])
    assert alone.rate > 0.15
    helped = estimated(features, labels, TEN[:5], trusted=trusted)
    assert helped.rate < 0.05
    flipped = estimated(features, one_class(labels, 2, 3, 0.4, seed=0), TEN[:5], trusted=trusted)
    shares = {label: row.share or 0.0 for label, row in flipped.by_class.items()}
    assert max(shares, key=lambda label: shares[label]) == "2"
    assert shares["2"] == pytest.approx(0.4, abs=0.1)


def test_nothing_is_said_where_nobody_could_tell() -> None:
    features, labels = synthetic(600, apart=0.1)
    found = estimated(features, labels, TEN[:5], trusted=synthetic(600, apart=0.1, seed=1))
    assert all(row.share is None for row in found.by_class.values())


def test_few_labels_say_nothing() -> None:
    features, labels = synthetic(19)
    assert noise.estimate(features, labels, TEN[:5]) is None
    assert noise.estimate(np.zeros((50, 3)), np.zeros(50, dtype=np.int64), TEN[:5]) is None
    features, labels = synthetic(300, apart=6.0)
    rare = np.flatnonzero((labels != 4) | (np.arange(300) < 30))
    found = estimated(features[rare], labels[rare], TEN[:6])
    assert found.by_class["4"].share is None
    assert found.by_class["5"] == noise.ClassNoise("5", 0, None, None, None, None)
    assert found.by_class["0"].share is not None


def test_the_same_labels_give_the_same_estimate_also_through_json() -> None:
    features, labels = synthetic(300, apart=3.0)
    found = estimated(features, labels, TEN[:5])
    assert estimated(features.copy(), labels.copy(), TEN[:5]) == found
    assert Noise.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_feature_that_never_changes_and_a_scale_do_no_harm() -> None:
    features, labels = synthetic(300, apart=6.0)
    noisy = symmetric(labels, 0.1, 5, seed=0)
    plain = estimated(features, noisy, TEN[:5])
    scaled = estimated(np.column_stack([features * 1000 + 5, np.ones(300)]).astype(np.float16), noisy, TEN[:5])
    assert scaled.rate == pytest.approx(plain.rate, abs=0.02)


@pytest.mark.parametrize("seed", range(2))
def test_labels_that_are_all_wrong_in_one_way_do_not_pass_for_hard_ones(seed: int) -> None:
    features, labels, trusted, known = digits(seed)
    found = estimated(features, (labels + 1) % 10, trusted=(trusted, known))
    assert found.rate > 0.15
    assert max(row.at_least or 0.0 for row in found.by_class.values()) > 0.15


@pytest.mark.parametrize("trusted", [False, True])
def test_a_class_with_one_example_is_no_crash_and_no_noise(trusted: bool) -> None:
    random = np.random.default_rng(0)
    labels = np.array([0] * 19 + [1])
    features = random.normal(size=(20, 4)) + labels[:, None]
    known = (features[:12], np.array([0] * 11 + [1])) if trusted else None
    found = noise.estimate(features, labels, ("a", "b"), trusted=known)
    assert found is not None
    assert found.by_class["b"].share is None
    assert found.rate < 0.3
