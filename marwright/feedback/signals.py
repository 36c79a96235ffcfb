"""What the feedback store says, for Prometheus: labels, live accuracy, drift, the loop's last turn.

    with signals.watching(folder, url) as collector:        # a thread of its own reads the store
        registry.register(collector)

A scrape never waits for the database: it gets what was read last, at most a quarter of a minute ago. A store that
cannot be read is `marwright_feedback_up 0`, and nothing else is said then; one that is not there is no series at all.
Nothing is computed but counts: drift is what `marwright drift` or `marwright retrain` found last.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as Asked

from marwright.errors import MarwrightError
from marwright.feedback import trigger
from marwright.feedback.database import VARIABLE
from marwright.feedback.drift import Look
from marwright.feedback.store import ModelStatus, Store, Unknown

EVERY = 15.0
"""Seconds between two readings."""
LOOKS = 20
"""Of the latest notes, those that are asked for looks in a row."""
QUANTILES = (("0.5", "lag_median"), ("0.9", "lag_p90"))


@dataclass(frozen=True)
class Turn:
    """The last turn of `retrain`."""

    phase: str
    time: float


@dataclass(frozen=True)
class Said:
    """What the store says of one model."""

    status: ModelStatus
    looks: tuple[Look, ...] = ()
    """At one version, the newest first."""
    looked_at: float | None = None
    turn: Turn | None = None


@dataclass(frozen=True)
class Reading:
    """What the store says. Without `up` it could not be read."""

    up: bool
    models: Sequence[Said] = ()
    unknown: Unknown | None = None


def read(store: Store) -> Reading:
    """Everything that there is a metric for; DataError where the store fails."""
    found = []
    for status in store.status():
        notes = store.notes("drift", status.model, last=LOOKS)
        looks = [Look.from_dict(note) for note in notes]
        turns = store.notes("turn", status.model)
        found.append(
            Said(
                status,
                tuple(look for look in looks if look.version == looks[0].version),
                float(notes[0]["time"]) if notes else None,
                Turn(str(turns[0]["phase"]), float(turns[0]["time"])) if turns else None,
            )
        )
    return Reading(True, found, store.unknown())


def families(reading: Reading | None) -> list[Metric]:
    """The metrics; None is a store that is not there."""
    if reading is None:
        return []
    model, version = ["model_name"], ["model_name", "model_version"]
    up = GaugeMetricFamily("marwright_feedback_up", "1 while the feedback store can be read.", value=float(reading.up))
    if not reading.up:
        return [up]
    requests = GaugeMetricFamily("marwright_feedback_requests", "Captured requests in the store.", labels=model)
    labelled = GaugeMetricFamily("marwright_feedback_labelled", "Instances with a label that counts.", labels=model)
    unknown = GaugeMetricFamily("marwright_feedback_unknown_labels", "Labels whose request is not in the store.")
    newest = GaugeMetricFamily(
        "marwright_feedback_newest_request_timestamp_seconds",
        "When the newest request was answered, Unix time.",
        labels=model,
    )
    lag = GaugeMetricFamily(
        "marwright_feedback_label_lag_seconds", "From an answer to its label.", labels=[*model, "quantile"]
    )
    labels = GaugeMetricFamily("marwright_live_labels", "Labelled answers.", labels=version)
    accuracy = GaugeMetricFamily("marwright_live_accuracy", "Share of right labelled answers.", labels=version)
    low = GaugeMetricFamily("marwright_live_accuracy_low", "Lower end of its 95 % interval.", labels=version)
    high = GaugeMetricFamily("marwright_live_accuracy_high", "Upper end of its 95 % interval.", labels=version)
    error = GaugeMetricFamily("marwright_live_error", "A regressor's mean absolute error, labelled.", labels=version)
    p = GaugeMetricFamily(
        "marwright_drift_p", "p-value of each test of the last look, corrected for all.", labels=[*version, "test"]
    )
    alarm = GaugeMetricFamily("marwright_drift_alarm", "1 where the last look found drift.", labels=version)
    row = GaugeMetricFamily("marwright_drift_looks", "Looks in a row that found drift.", labels=version)
    looked = GaugeMetricFamily(
        "marwright_drift_look_timestamp_seconds", "When the last look was, Unix time.", labels=version
    )
    turn = GaugeMetricFamily(
        "marwright_turn_timestamp_seconds", "When the last turn of the loop was, Unix time.", labels=model
    )
    phase = GaugeMetricFamily("marwright_turn_phase", "1 for how that turn ended.", labels=[*model, "phase"])
    if reading.unknown is not None:
        unknown.add_metric([], reading.unknown.labels)
    for said in reading.models:
        name, status = said.status.model, said.status
        requests.add_metric([name], status.requests)
        labelled.add_metric([name], status.labelled)
        if status.last is not None:
            newest.add_metric([name], status.last)
        for quantile, field in QUANTILES:
            if (seconds := getattr(status, field)) is not None:
                lag.add_metric([name, quantile], seconds)
        for live in status.live:
            labels.add_metric([name, live.version], live.labels)
            for family, value in (
                (accuracy, live.accuracy), (low, live.low), (high, live.high), (error, live.error)
            ):  # fmt: skip
                if value is not None:
                    family.add_metric([name, live.version], value)
        if said.looks:
            look = said.looks[0]
            for test in look.tests:
                p.add_metric([name, look.version, test.name], test.adjusted)
            alarm.add_metric([name, look.version], float(look.drifted))
            row.add_metric([name, look.version], trigger.in_a_row(said.looks))
            if said.looked_at is not None:
                looked.add_metric([name, look.version], said.looked_at)
        if said.turn is not None:
            turn.add_metric([name], said.turn.time)
            phase.add_metric([name, said.turn.phase], 1)
    return [
        up, requests, labelled, unknown, newest, lag, labels, accuracy, low, high, error, p, alarm, row, looked, turn,
        phase,
    ]  # fmt: skip


class Collector(Asked):
    """What was read last."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self._folder = folder
        self._url = url
        self._reading: Reading | None = None
        self._store: Store | None = None

    def collect(self) -> Iterator[Metric]:
        yield from families(self._reading)

    def read(self) -> None:
        """Read anew. Trouble with the store is a reading, too."""
        if self._url is None and VARIABLE not in os.environ and not self._folder.is_dir():
            self._reading = None
            return
        try:
            if self._store is None:
                self._store = Store.open(self._folder, self._url)
            self._reading = read(self._store)
        except (MarwrightError, ValueError, TypeError, KeyError):  # a database that fails, a note of another version
            self.close()
            self._reading = Reading(False)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


@contextlib.contextmanager
def watching(folder: Path, url: str | None = None, *, every: float = EVERY) -> Iterator[Collector]:
    """A collector, and a thread that reads for it."""
    collector, over = Collector(folder, url), threading.Event()

    def run() -> None:
        while True:
            collector.read()
            if over.wait(every):
                collector.close()
                return

    # Of no use to anybody once the process ends: a database that hangs must not keep it.
    thread = threading.Thread(target=run, name="feedback", daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        over.set()
        thread.join(timeout=every)
