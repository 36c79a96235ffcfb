"""What the handlers cannot count, for Prometheus: what the journal says should answer, and what the server does.

    with exporter.running(Collector(store, server), port=8083) as url:        # http://127.0.0.1:8083/metrics
        ...

Everything is asked when Prometheus scrapes, in bounded time and nothing is remembered but the number of looks that
failed, so that what it says is never older than the scrape. A server that is down is `marwright_server_up 0`, with
what the journal says still there; a journal that cannot be read is a count in `marwright_exporter_errors_total`, with
what the server says still there.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as Asked

from marwright.errors import ArchiveError, MarwrightError, ServerError, ServerRefused
from marwright.packing import records
from marwright.release import journal, rollout
from marwright.release.answers import ModelStatus
from marwright.release.client import Client
from marwright.release.journal import Entry, Journal
from marwright.release.server import Server

HOST = "127.0.0.1"
JOURNAL_SECONDS = 2.0
"""For a journal that another process holds for itself."""
CALL_SECONDS = 2.0
"""For one call to the server."""
SERVER_SECONDS = 4.0
"""After which no further call is made. All three together are less than Prometheus' own limit for a scrape, 10 s."""

Source = Literal["journal", "server"]
Held = Mapping[str, Mapping[str, ModelStatus]]
"""What the server has: model → version → as it describes it."""


@dataclass(frozen=True)
class Said:
    """What the journal says of one model."""

    released: str | None = None
    """The version that should answer."""
    live: frozenset[str] = frozenset()
    """The versions that the server should hold."""
    wanted: int = 0
    """Workers of the released version, as its record has them; 0 where that is lost."""
    rollout: tuple[str, str] | None = None
    """Version and phase of the rollout that is not ended."""
    outcomes: Mapping[str, int] = field(default_factory=dict)
    """Rollouts ended so far: settled, rolled back."""


class Collector(Asked):
    """Asked anew at each scrape."""

    def __init__(self, store: Path, server: Server) -> None:
        self._store = store
        self._server = server
        self._errors: collections.Counter[Source] = collections.Counter()
        self._lock = threading.Lock()  # two Prometheus may scrape at a time

    def collect(self) -> Iterator[Metric]:
        said, held = self._said(), self._held()
        with self._lock:
            errors = dict(self._errors)
        yield from families(said, held, errors)

    def _said(self) -> Mapping[str, Said] | None:
        """None where the journal cannot be read."""
        try:
            with journal.open(self._store, busy=JOURNAL_SECONDS) as book:
                return read(book)
        except MarwrightError:
            self._failed("journal")
            return None

    def _held(self) -> Held | None:
        """None where the server does not run or does not answer."""
        try:
            if self._server.find() is None:
                return None
            with self._server.client(timeout=CALL_SECONDS) as client:
                return ask(client, seconds=SERVER_SECONDS)
        except MarwrightError:
            self._failed("server")
            return None

    def _failed(self, source: Source) -> None:
        with self._lock:
            self._errors[source] += 1


@contextlib.contextmanager
def running(collector: Asked, *, port: int) -> Iterator[str]:
    """Answers scrapes on loopback, in threads of its own, at the URL that this gives; port 0 takes a free one.

    ServerError where the port is taken.
    """
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = prometheus_client.start_http_server(port, addr=HOST, registry=registry)
    except OSError as error:
        raise ServerError(
            f"port {port} of {HOST} cannot be had: {error.strerror}",
            hint="does another exporter run? Another one: --port N, and the same in deploy/prometheus.yml",
        ) from error
    try:
        yield f"http://{HOST}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read(book: Journal) -> dict[str, Said]:
    """What the journal says, by model."""
    found = {}
    for model in sorted({entry.model for entry in book.entries()}):
        released = book.released(model)
        left = rollout.unfinished(book, model)
        found[model] = Said(
            released=released.version if released else None,
            live=book.live(model),
            wanted=_workers(book.store, model, released.version) if released else 0,
            rollout=(left.version, "rolling back" if left.failing else left.next) if left else None,
            outcomes=_outcomes(book.entries(model)),
        )
    return found


def ask(client: Client, *, seconds: float) -> Held:
    """What the server has; ServerError where it does not answer, or has not said everything after `seconds`."""
    until = time.monotonic() + seconds
    found = {}
    for model in client.models():
        if time.monotonic() > until:
            raise ServerError(f"the server has not described its models after {seconds:g} s", hint="marwright status")
        try:
            found[model] = {status.version: status for status in client.describe(model, "all")}
        except ServerRefused as error:
            if error.status != 404:  # it went between the two calls
                raise
    return found


def families(said: Mapping[str, Said] | None, held: Held | None, errors: Mapping[Source, int]) -> list[Metric]:
    """The metrics. Each version that the journal or the server knows of has its series, with 0 for no; what could not
    be asked has none.
    """
    version = ["model_name", "model_version"]
    up = GaugeMetricFamily("marwright_server_up", "1 while TorchServe answers.", value=float(held is not None))
    should = GaugeMetricFamily("marwright_journal_version", "1 for the version that should answer.", labels=version)
    does = GaugeMetricFamily("marwright_default_version", "1 for the version that does answer.", labels=version)
    ready = GaugeMetricFamily("marwright_workers_ready", "Worker processes that can answer.", labels=version)
    wanted = GaugeMetricFamily("marwright_workers_wanted", "Worker processes that there should be.", labels=version)
    phase = GaugeMetricFamily(
        "marwright_rollout_phase", "1 for the phase that a rollout is in.", labels=[*version, "phase"]
    )
    ended = CounterMetricFamily(
        "marwright_rollouts", "Rollouts that ended, by outcome; from the journal.", labels=["model_name", "outcome"]
    )
    failed = CounterMetricFamily(
        "marwright_exporter_errors", "Looks that failed: into the journal, at the server.", labels=["source"]
    )
    for model in sorted((said or {}).keys() | (held or {}).keys()):
        words, there = (said or {}).get(model, Said()), (held or {}).get(model, {})
        for number in sorted(words.live | there.keys() | ({words.released} if words.released else set())):
            labels, status = [model, number], there.get(number)
            if said is not None:
                should.add_metric(labels, number == words.released)
            if held is None:
                continue
            does.add_metric(labels, status is not None and status.default)
            if status is not None or number == words.released:
                ready.add_metric(labels, status.ready_workers if status else 0)
                wanted.add_metric(labels, status.min_workers if status else words.wanted)
        if words.rollout:
            phase.add_metric([model, *words.rollout], 1)
        for outcome, count in words.outcomes.items():
            ended.add_metric([model, outcome], count)
    for source in ("journal", "server"):
        failed.add_metric([source], errors.get(source, 0))
    return [up, should, does, ready, wanted, phase, ended, failed]


# -------------------------------------------------------------------- private


def _outcomes(entries: Sequence[Entry]) -> dict[str, int]:
    """Rollouts that ended. One that was asked to lead back (`marwright rollback`) is none."""
    found = {"settled": 0, "rolled back": 0}
    kinds: dict[object, str] = {}
    for entry in entries:
        number = entry.detail.get("id")
        if entry.event == "rollout":
            kinds.setdefault(number, entry.detail.get("kind", "rollout"))
            if (entry.detail["phase"], entry.detail.get("step")) == ("settled", "done"):
                found["settled"] += kinds[number] == "rollout"
        elif entry.event == "rolled back":
            found["rolled back"] += kinds.get(number, "rollout") == "rollout"
    return found


def _workers(store: Path, model: str, version: str) -> int:
    try:
        return records.record(store, model, version).workers
    except ArchiveError:
        return 0
