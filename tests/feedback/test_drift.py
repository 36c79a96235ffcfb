"""Drift: calibrated on what has not changed, awake to what has, and each piece against its textbook form."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import spatial, stats

from marwright.feedback import drift
from marwright.feedback.drift import Look
from marwright.learning import data, recipe, training
from marwright.learning.corruptions import corrupt
from marwright.learning.reference import Reference
from marwright.release.policy import TriggerPolicy
from tests.archives import ROOT, Built
from tests.feedback.answers import part, rows, seen, window

POLICY = TriggerPolicy()
WINDOWS = 200
ALLOWED = int(stats.binom.ppf(0.99, WINDOWS, POLICY.drift_false_alarm))
"""Of so many windows without drift, alarms at the promised rate are no more than this with 99 %."""


@pytest.fixture(scope="module")
def pool(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """All digits as a trained net sees them, clean and dark: more than one window and its reference need."""
    chosen = recipe.load("digits", recipes_dir=ROOT / "recipes")
    examples = data.load(chosen, cache=tmp_path_factory.mktemp("cache"), progress=False)
    pictures = torch.cat([each.take(torch.arange(len(each)))[0] for each in examples.parts]).numpy()
    graph = training.load_graph(digits.run)
    return {
        "clean": seen(graph, pictures),
        **{name: seen(graph, corrupt(pictures[:300], name, 3)) for name in ("noise", "contrast", "darkness")},
    }


def synthetic(random: np.random.Generator, count: int) -> Reference:
    """Ties in the confidence, as saturated nets have them, and an embedding of few real dimensions."""
    hidden = random.normal(size=(count, 3))
    embedding = np.maximum(0, hidden @ random.normal(size=(3, 32)) + random.normal(size=(count, 32)) / 4)
    confidence = np.minimum(1.0, np.round(1 - random.exponential(0.02, count).clip(0, 0.9), 2))
    return Reference(embedding.astype(np.float16), {"confidence": confidence, "brightness": random.normal(size=count)})


# -------------------------------------------------------------------- calibrated


@pytest.fixture
def quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """As valid with fewer permutations, and less sharp."""
    monkeypatch.setattr(drift, "PERMUTATIONS", 399)


@pytest.mark.usefixtures("quicker")
def test_windows_of_digits_without_drift_alarm_no_more_than_promised(pool: dict[str, Reference]) -> None:
    """Each with a reference of its own: with one for all, one that is not typical would count 200 times."""
    random, alarms = np.random.default_rng(0), 0
    for number in range(WINDOWS):
        places = random.permutation(len(pool["clean"]))
        reference, requests = part(pool["clean"], places[:180]), window(pool["clean"], places[180:330])
        alarms += drift.look(reference, requests, POLICY, seed=number).drifted
    assert 1 <= alarms <= ALLOWED, "a test that never alarms is not calibrated either"


@pytest.mark.usefixtures("quicker")
def test_made_up_windows_without_drift_alarm_no_more_than_promised() -> None:
    alarms = 0
    for number in range(WINDOWS):
        whole = synthetic(np.random.default_rng([1, number]), 260)
        places = np.arange(260)
        alarms += drift.look(part(whole, places[:160]), window(whole, places[160:]), POLICY, seed=number).drifted
    assert 1 <= alarms <= ALLOWED


# -------------------------------------------------------------------- awake


@pytest.mark.parametrize("name", ["noise", "contrast", "darkness"])
def test_corrupted_digits_are_found(pool: dict[str, Reference], name: str) -> None:
    reference = part(pool["clean"], np.arange(0, 1797, 10))
    look = drift.look(reference, window(pool[name], np.arange(150)), POLICY)
    assert look.drifted
    assert {test.name for test in look.tests} == {
        "brightness", "contrast", "sharpness", "confidence", "embedding", "component 1", "component 2", "component 3",
    }  # fmt: skip
    found = {test.name: test for test in look.tests}
    if name == "darkness":
        assert found["brightness"].drifted
        assert found["brightness"].now is not None
        assert found["brightness"].before is not None
        assert found["brightness"].now < 0.7 * found["brightness"].before
        assert found["embedding"].drifted


def test_the_same_seed_gives_the_same_look(pool: dict[str, Reference]) -> None:
    reference, requests = part(pool["clean"], np.arange(100)), window(pool["clean"], np.arange(100, 200))
    assert drift.look(reference, requests, POLICY, seed=3) == drift.look(reference, requests, POLICY, seed=3)


def test_a_strict_policy_gets_permutations_enough_to_alarm(pool: dict[str, Reference]) -> None:
    strict = TriggerPolicy(drift_false_alarm=0.001)
    rounded = Reference(None, {"confidence": np.full(100, 0.5)})
    look = drift.look(rounded, rows([0.9] * 100), strict)
    assert look.drifted
    assert look.tests[0].p < 0.001


# -------------------------------------------------------------------- what is compared


def test_a_window_without_bodies_is_compared_by_what_is_there(pool: dict[str, Reference]) -> None:
    requests = rows(pool["clean"].values["confidence"][:60])
    look = drift.look(part(pool["clean"], np.arange(100, 300)), requests, POLICY)
    assert [test.name for test in look.tests] == ["confidence"]
    assert any(line.startswith("brightness: 0 requests and 200 examples") for line in look.skipped)
    assert any(line.startswith("embedding: 0 requests") for line in look.skipped)


def test_few_requests_say_nothing(pool: dict[str, Reference]) -> None:
    look = drift.look(pool["clean"], window(pool["darkness"], np.arange(drift.LEAST - 1)), POLICY)
    assert not look.drifted
    assert look.tests == ()
    assert "20 are needed" in look.skipped[0]
    nothing = drift.look(pool["clean"], [], POLICY)
    assert (nothing.requests, nothing.since, nothing.drifted) == (0, None, False)


def test_a_regressor_is_compared_by_its_values() -> None:
    random = np.random.default_rng(0)
    reference = Reference(None, {"value": random.normal(150, 40, 200), "feature_0": random.normal(size=200)})
    requests = [
        dataclasses.replace(row, confidence=None, value=200 + row.time % 50, statistics={"feature_0": row.confidence})
        for row in rows(random.normal(size=100))
    ]
    look = drift.look(reference, requests, POLICY)
    assert [(test.name, test.drifted) for test in look.tests] == [("value", True), ("feature_0", False)]


def test_an_embedding_of_another_width_and_values_that_are_not_finite_are_left_out() -> None:
    random = np.random.default_rng(0)
    reference = Reference(random.normal(size=(50, 8)).astype(np.float16), {"confidence": random.random(50)})
    look = drift.look(reference, rows([np.nan] * 50, embedding=random.normal(size=(50, 9))), POLICY)
    assert look.tests == ()
    assert [line.split(":")[0] for line in look.skipped] == ["confidence", "embedding"]


def test_a_look_survives_being_written_down(pool: dict[str, Reference]) -> None:
    look = drift.look(part(pool["clean"], np.arange(90)), window(pool["darkness"], np.arange(60)), POLICY)
    written = json.loads(json.dumps({**look.to_dict(), "time": 12.5}))
    assert Look.from_dict(written) == look


# -------------------------------------------------------------------- the pieces


def test_ks_without_ties_is_scipys() -> None:
    random = np.random.default_rng(0)
    old, new = random.normal(size=80), random.normal(0.3, 1, size=60)
    found, known = drift.ks(old, new, random=random), stats.ks_2samp(old, new)
    assert (found.statistic, found.p) == (known.statistic, known.pvalue)


def test_ks_by_permutation_agrees_with_scipy_where_both_hold() -> None:
    random = np.random.default_rng(0)
    old, new = random.normal(size=80), random.normal(0.25, 1, size=60)
    tied_old, tied_new = np.append(old, 50.0), np.append(new, 50.0)  # one tie, far out: all but the same samples
    found = drift.ks(tied_old, tied_new, random=random, permutations=9999)
    assert found.p == pytest.approx(stats.ks_2samp(old, new, method="asymp").pvalue, abs=0.04)
    assert len(found.null) == 9999


def test_ks_of_many_ties_is_exact_where_scipy_is_not() -> None:
    """Coins: the p-values of 400 pairs of samples that do not differ are below 0.3 in about 0.3 of them."""
    random, found, known = np.random.default_rng(0), [], []
    for _ in range(400):
        old, new = np.round(random.random(60), 1), np.round(random.random(60), 1)
        found.append(drift.ks(old, new, random=random, permutations=299).p)
        known.append(stats.ks_2samp(old, new, method="asymp").pvalue)
    assert abs(np.mean(np.array(found) <= 0.3) - 0.3) < 0.08
    assert np.mean(np.array(known) <= 0.3) < 0.2


def test_mmd_is_its_textbook_form() -> None:
    random = np.random.default_rng(0)
    old, new = random.normal(size=(30, 4)), random.normal(1.0, 1, size=(20, 4))
    distances = spatial.distance.cdist(*(2 * [np.concatenate([old, new])]), "sqeuclidean")
    width = np.median(distances[np.triu_indices(50, 1)])
    kernel = np.exp(-distances / (2 * width)) - np.eye(50)
    wanted = kernel[:30, :30].sum() / (30 * 29) + kernel[30:, 30:].sum() / (20 * 19) - 2 * kernel[:30, 30:].mean()
    found = drift.mmd(old, new, random=random)
    assert found.statistic == pytest.approx(wanted, abs=1e-6)
    assert abs(found.null.mean()) < 0.005, "unbiased: 0 on average where nothing differs"
    assert found.p < 0.01


def test_mmd_of_equal_rows_finds_nothing_and_large_samples_are_drawn_from() -> None:
    random = np.random.default_rng(0)
    assert drift.mmd(np.ones((30, 4)), np.ones((20, 4)), random=random).p == 1.0
    large = drift.mmd(np.zeros((900, 2)), np.ones((700, 2)), random=random, permutations=99)
    assert large.p == 0.01


@pytest.mark.parametrize("width", [6, 200])
def test_components_are_those_of_both_samples(width: int) -> None:
    random = np.random.default_rng(0)
    scale = np.concatenate([[9.0, 5.0, 3.0], np.ones(width - 3)])
    old, new = (random.normal(size=(40, width)) * scale, random.normal(size=(30, width)) * scale)
    both = np.concatenate([old, new])
    _, _, directions = np.linalg.svd(both - both.mean(axis=0), full_matrices=False)
    found = drift.components(old, new)
    assert len(found) == 3
    for (one, other), direction in zip(found, directions, strict=False):
        assert (len(one), len(other)) == (40, 30)
        along = (both - both.mean(axis=0)) @ direction
        assert abs(np.corrcoef(np.concatenate([one, other]), along)[0, 1]) > 0.9999
    flat = drift.components(np.outer(old[:, 0], np.ones(width)), np.outer(new[:, 0], np.ones(width)))
    assert len(flat) == 1, "one direction has all the spread"
    assert drift.components(np.ones((30, 3)), np.ones((30, 3))) == []


def test_holms_adjusted_p_values() -> None:
    np.testing.assert_allclose(drift.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert drift.holm([]) == []
    assert drift.holm([0.9, 0.8]) == [1.0, 1.0]
