"""Feedback's metrics: from values, from a real store, and from one that is not there, locked or damaged."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.metrics_core import Metric

from marwright.feedback import database, signals
from marwright.feedback.drift import Compared, Look
from marwright.feedback.signals import Collector, Reading, Said, Turn
from marwright.feedback.store import Label, Live, ModelStatus, Store, Unknown
from marwright.release import exporter
from scripts.exporter import All
from tests.feedback import spools
from tests.feedback.spools import Asked

Series = dict[tuple[str, ...], float]
STATUS = ModelStatus(
    model="digits", requests=9, instances=9, bodies=9, body_bytes=1, labelled=5, labels=5, repeated=0, invalid=0,
    conflicting=0, lag_median=60.0, lag_p90=600.0, live=(Live("1.0", 5, 4, 0.8, 0.4, 0.95, None),), last=77.0,
)  # fmt: skip


def series(collected: list[Metric]) -> Series:
    return {(sample.name, *sample.labels.values()): sample.value for family in collected for sample in family.samples}


def look(drifted: bool, until: float, version: str = "1.0") -> Look:
    test = Compared("brightness", "KS", 0.5, 0.001, 0.008 if drifted else 0.9, drifted)
    return Look(version, 500, 1000, until - 100, until, 0.05, (test,))


def test_everything_that_the_store_says_is_a_metric() -> None:
    said = Said(STATUS, (look(True, 3.0), look(True, 2.0), look(False, 1.0)), 99.0, Turn("settled", 123.0))
    found = series(signals.families(Reading(True, [said], Unknown(3, 2, 50.0))))
    assert found == {
        ("marwright_feedback_up",): 1,
        ("marwright_feedback_requests", "digits"): 9,
        ("marwright_feedback_labelled", "digits"): 5,
        ("marwright_feedback_unknown_labels",): 3,
        ("marwright_feedback_newest_request_timestamp_seconds", "digits"): 77,
        ("marwright_feedback_label_lag_seconds", "digits", "0.5"): 60,
        ("marwright_feedback_label_lag_seconds", "digits", "0.9"): 600,
        ("marwright_live_labels", "digits", "1.0"): 5,
        ("marwright_live_accuracy", "digits", "1.0"): 0.8,
        ("marwright_live_accuracy_low", "digits", "1.0"): 0.4,
        ("marwright_live_accuracy_high", "digits", "1.0"): 0.95,
        ("marwright_drift_p", "digits", "1.0", "brightness"): 0.008,
        ("marwright_drift_alarm", "digits", "1.0"): 1,
        ("marwright_drift_looks", "digits", "1.0"): 2,
        ("marwright_drift_look_timestamp_seconds", "digits", "1.0"): 99,
        ("marwright_turn_timestamp_seconds", "digits"): 123,
        ("marwright_turn_phase", "digits", "settled"): 1,
    }


def test_what_is_not_known_has_no_series() -> None:
    assert signals.families(None) == []
    assert series(signals.families(Reading(False))) == {("marwright_feedback_up",): 0}
    bare = ModelStatus(
        model="m", requests=0, instances=0, bodies=0, body_bytes=0, labelled=0, labels=0, repeated=0, invalid=0,
        conflicting=0, lag_median=None, lag_p90=None, live=(Live("1.0", 4, None, None, None, None, 2.5),),
    )  # fmt: skip
    names = {name for name, *_ in series(signals.families(Reading(True, [Said(bare)], Unknown(0, 0, None))))}
    assert "marwright_live_error" in names
    assert not names & {"marwright_live_accuracy", "marwright_feedback_label_lag_seconds", "marwright_drift_alarm"}


def test_a_real_store_is_read(tmp_path: Path) -> None:
    asked = Asked("r1", time=1000.0)
    with Store.open(tmp_path / "feedback") as store:
        spools.requests(tmp_path / "spool", [asked])
        store.ingest(tmp_path / "spool")
        store.add_labels(
            [
                Label("r1", 0, asked.answer(), "test", 1060.0, "u1"),
                Label("never asked", 0, "3", "test", 1060.0, "u2"),
            ]
        )
        store.note("drift", "digits", look(True, 1.0, version="0.9").to_dict())
        store.note("drift", "digits", look(True, 2.0).to_dict())
        store.note("turn", "digits", {"phase": "not yet", "steps": []})
        reading = signals.read(store)
    found = series(signals.families(reading))
    assert found["marwright_feedback_unknown_labels",] == 1
    assert found["marwright_live_accuracy", "digits", "1.0"] == 1
    assert found["marwright_feedback_label_lag_seconds", "digits", "0.5"] == 60
    assert found["marwright_drift_looks", "digits", "1.0"] == 1, "looks at another version are not counted"
    assert ("marwright_drift_alarm", "digits", "0.9") not in found
    assert found["marwright_turn_phase", "digits", "not yet"] == 1
    assert found["marwright_turn_timestamp_seconds", "digits"] == pytest.approx(time.time(), abs=600)


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    collector = Collector(tmp_path / "feedback")
    collector.read()
    assert list(collector.collect()) == []
    assert not (tmp_path / "feedback").exists()


def test_a_damaged_database_is_told_and_a_mended_one_read_again(tmp_path: Path) -> None:
    (tmp_path / database.FILE).write_bytes(b"this is no database" * 100)
    collector = Collector(tmp_path)
    for _ in range(2):
        collector.read()
        assert series(list(collector.collect())) == {("marwright_feedback_up",): 0}
    (tmp_path / database.FILE).unlink()
    collector.read()
    assert series(list(collector.collect()))["marwright_feedback_up",] == 1
    collector.close()


def test_a_locked_database_keeps_no_scrape_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    Store.open(tmp_path).close()
    other = sqlite3.connect(tmp_path / database.FILE)
    try:
        other.execute("pragma locking_mode = exclusive")
        other.execute("begin exclusive")
        with signals.watching(tmp_path, every=0.05) as collector:
            assert ("marwright_feedback_up",) in wait(collector, 0.0)
            other.rollback()
            other.close()
            wait(collector, 1.0)
    finally:
        other.close()


def test_the_exporter_has_both(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    feedback = Collector(tmp_path)
    feedback.read()
    both = All(feedback, prometheus_client.CollectorRegistry())
    with exporter.running(both, port=0) as url:
        assert url.startswith("http://127.0.0.1:")
    assert ("marwright_feedback_up",) in series(list(both.collect()))
    feedback.close()


def wait(collector: Collector, value: float) -> Series:
    """Until `marwright_feedback_up` is that."""
    until = time.monotonic() + 30
    while (found := series(list(collector.collect()))).get(("marwright_feedback_up",)) != value:
        assert time.monotonic() < until
        time.sleep(0.02)
    return found
