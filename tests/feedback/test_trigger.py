"""The trigger: every combination of its facts, the floor, looks in a row, and what it says."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from marwright.feedback import changes, trigger
from marwright.feedback.drift import Compared, Look
from marwright.feedback.trigger import DAY, Facts
from marwright.release.policy import TriggerPolicy
from tests.feedback.answers import labelled

POLICY = TriggerPolicy(min_labels=200, floor=30, days=7.0, min_accuracy=0.9)
NOW = 100 * DAY
QUIET = Facts(labels=0, folder=0, own=False, released_at=NOW - DAY, now=NOW)
STEADY = (([True] * 19 + [False]) * 20)[:380]
FALLEN = STEADY + ([True, False] * 100)
EVENLY_LOW = [True, True, True, False] * 100


def look(drifted: bool, until: float) -> Look:
    test = Compared("brightness", "KS", 0.5, 0.001, 0.01 if drifted else 0.9, drifted)
    return Look("1.0", 500, 1000, until - 100, until, 0.05, (test,))


DRIFTED = (look(True, 3.0), look(True, 2.0), look(False, 1.0))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("folder", [0, 3])
@pytest.mark.parametrize("labels", [0, 29, 30, 199, 200])
@pytest.mark.parametrize(
    ("late", "fallen", "drifted"), list(itertools.product([False, True], repeat=3)), ids=lambda given: str(int(given))
)
def test_every_combination(own: bool, folder: int, labels: int, late: bool, fallen: bool, drifted: bool) -> None:
    facts = Facts(
        labels=labels,
        folder=folder,
        own=own,
        released_at=NOW - (8 if late else 1) * DAY,
        now=NOW,
        outcomes=FALLEN if fallen else STEADY,
        looks=DRIFTED if drifted else (look(False, 4.0), *DRIFTED),
    )
    decision = trigger.should_retrain(facts, POLICY)
    asked = own + bool(folder) + (labels >= 200)
    said = late + 2 * fallen + drifted  # a fall is found twice: below the bound, and a rise of wrong answers
    assert len(decision.reasons) == asked + (said if labels >= 30 else 0)
    assert len(decision.waiting) == (0 if labels >= 30 else said)
    assert decision.retrain == bool(decision.reasons)


def test_nothing_is_no_reason() -> None:
    decision = trigger.should_retrain(QUIET, POLICY)
    assert not decision.retrain
    assert decision.reasons == decision.waiting == ()


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"own": True}, ["own data are others"]),
        ({"folder": 1}, ["1 new example in the folder"]),
        ({"labels": 240}, ["240 new examples", "200 are reason enough"]),
        ({"labels": 30, "released_at": NOW - 8.25 * DAY}, ["8.2 days ago", "says 7"]),
        ({"labels": 30, "outcomes": EVENLY_LOW}, ["below 0.9", "0.750 of 400 labelled answers", "rate of 0.01"]),
        ({"labels": 30, "looks": DRIFTED}, ["2 looks in a row found drift", "brightness"]),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_a_reason_says_its_numbers(facts: dict[str, object], says: list[str]) -> None:
    (reason,) = trigger.should_retrain(dataclasses.replace(QUIET, **facts), POLICY).reasons  # type: ignore[arg-type]
    for words in says:
        assert words in reason


def test_below_the_floor_it_says_what_it_waits_for() -> None:
    decision = trigger.should_retrain(dataclasses.replace(QUIET, labels=12, looks=DRIFTED), POLICY)
    assert not decision.retrain
    (waiting,) = decision.waiting
    assert "2 looks in a row found drift" in waiting
    assert "12 new examples with a label, 30 are needed" in waiting


@pytest.mark.parametrize(("vain", "needed"), [(0, 30), (1, 60), (2, 120), (3, 200), (40, 200)])
def test_after_each_time_in_vain_it_takes_twice_the_labels(vain: int, needed: int) -> None:
    facts = dataclasses.replace(QUIET, looks=DRIFTED, vain=vain, tried_at=NOW - DAY)
    assert trigger.floor(facts, POLICY) == needed
    assert trigger.should_retrain(dataclasses.replace(facts, labels=needed), POLICY).retrain
    decision = trigger.should_retrain(dataclasses.replace(facts, labels=needed - 1), POLICY)
    assert not decision.retrain
    assert f"{needed} are needed" in decision.waiting[0]
    assert ("in vain" in decision.waiting[0]) == bool(vain)


def test_the_floor_is_never_below_what_the_policy_says() -> None:
    facts = dataclasses.replace(QUIET, vain=3)
    assert trigger.floor(facts, TriggerPolicy(min_labels=10, floor=30)) == 30


@pytest.mark.parametrize(("tried", "due"), [(None, True), (8, True), (6, False)])
def test_the_schedule_counts_from_the_last_try(tried: int | None, due: bool) -> None:
    facts = dataclasses.replace(QUIET, labels=100, released_at=NOW - 30 * DAY)
    facts = dataclasses.replace(facts, tried_at=None if tried is None else NOW - tried * DAY)
    assert trigger.should_retrain(facts, POLICY).retrain == due


def test_what_the_policy_does_not_ask_is_no_reason() -> None:
    facts = dataclasses.replace(QUIET, labels=50, released_at=0.0, outcomes=EVENLY_LOW)
    assert not trigger.should_retrain(facts, TriggerPolicy()).retrain
    never = dataclasses.replace(QUIET, labels=50, released_at=None)
    assert not trigger.should_retrain(never, POLICY).retrain


@pytest.mark.parametrize(
    ("looks", "count"),
    [
        ((), 0),
        ((look(False, 5), look(True, 4)), 0),
        ((look(True, 5), look(False, 4), look(True, 3)), 1),
        ((look(True, 5), look(True, 5), look(True, 5)), 1),
        ((look(True, 5), look(True, 5), look(True, 4)), 2),
        ((look(True, 5), look(True, 4), look(True, 3)), 3),
    ],
)
def test_looks_in_a_row_are_counted_from_the_newest_and_the_same_requests_once(
    looks: tuple[Look, ...], count: int
) -> None:
    assert trigger.in_a_row(looks) == count


def test_a_rise_of_wrong_answers_is_found_where_it_is_and_a_fall_is_not_one() -> None:
    random = np.random.default_rng(0)
    good, bad = random.random(1000) < 0.95, random.random(1000) < 0.6
    found = changes.rises(np.concatenate([good, bad]).tolist())
    assert 1000 < found.adwin[0] < 1200
    assert 1000 < found.page_hinkley[0] < 1400
    assert found.first == found.adwin[0]
    assert changes.rises(np.concatenate([bad, good]).tolist()) == changes.Rises()


def test_streams_that_do_not_change_seldom_alarm() -> None:
    random = np.random.default_rng(1)
    alarms = sum(changes.rises((random.random(1500) < 0.9).tolist()).first is not None for _ in range(100))
    assert alarms <= 3


def test_signals_are_plain_values() -> None:
    facts = dataclasses.replace(QUIET, labels=5, outcomes=FALLEN, looks=DRIFTED)
    signals = trigger.should_retrain(facts, POLICY).signals.to_dict()
    assert signals["labels"] == 5
    assert signals["days"] == 1
    assert signals["accuracy"] == pytest.approx(sum(FALLEN) / len(FALLEN))
    assert signals["accuracy_below_at"] > len(STEADY)
    assert signals["accuracy_wealth"] > 100
    assert signals["adwin"]
    assert signals["looks"] == 2
    assert signals["drifted"] == ["brightness"]


def test_outcomes_are_those_of_one_version_as_their_labels_came() -> None:
    rows = labelled([True, True, False, True], order=[3, 0, 1, 2])
    others = labelled([False] * 3, version="1.1")
    assert trigger.outcomes([*rows, *others], "1.0") == [True, False, True, True]
