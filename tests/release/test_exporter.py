"""The exporter without a server: what it says of a journal and of statuses, and how it begins and ends."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest
import requests
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from marwright.errors import ServerError
from marwright.release import exporter, journal, properties
from marwright.release.answers import ModelStatus, WorkerStatus
from marwright.release.exporter import Collector, Said
from marwright.release.processes import Running
from marwright.release.server import Server
from tests import torchserve

Series = dict[tuple[str, ...], float]
READY, DYING = WorkerStatus("9000", 1, "READY", 0), WorkerStatus("9001", 2, "WORKER_STOPPED", 0)


def test_every_version_has_all_series() -> None:
    said = {"digits": Said(released="1.1", live=frozenset({"1.0", "1.1"}), outcomes={"settled": 3, "rolled back": 0})}
    held = {"digits": {"1.0": _status("1.0", default=True), "1.1": _status("1.1", workers=(READY, DYING), wanted=2)}}
    found = _series(exporter.families(said, held, {}))
    assert found["marwright_server_up",] == 1
    for version, should, does, ready, wanted in (("1.0", 0, 1, 1, 1), ("1.1", 1, 0, 1, 2)):
        assert found["marwright_journal_version", "digits", version] == should
        assert found["marwright_default_version", "digits", version] == does
        assert found["marwright_workers_ready", "digits", version] == ready
        assert found["marwright_workers_wanted", "digits", version] == wanted
    assert found["marwright_rollouts_total", "digits", "settled"] == 3
    assert found["marwright_rollouts_total", "digits", "rolled back"] == 0
    assert found["marwright_exporter_errors_total", "journal"] == 0
    assert not any(name == "marwright_rollout_phase" for name, *_ in found)


def test_a_released_version_that_is_not_loaded_has_none_of_its_workers() -> None:
    said = {"digits": Said(released="1.1", live=frozenset({"1.0", "1.1"}), wanted=2)}
    found = _series(exporter.families(said, {}, {}))
    assert found["marwright_default_version", "digits", "1.1"] == 0
    assert found["marwright_workers_ready", "digits", "1.1"] == 0
    assert found["marwright_workers_wanted", "digits", "1.1"] == 2
    assert ("marwright_workers_wanted", "digits", "1.0") not in found, "kept warm: no start brings it back"


def test_what_could_not_be_asked_is_not_made_up() -> None:
    said = {"digits": Said(released="1.0", live=frozenset({"1.0"}))}
    down = _series(exporter.families(said, None, {}))
    assert down["marwright_server_up",] == 0
    assert down["marwright_journal_version", "digits", "1.0"] == 1
    assert not {name for name, *_ in down} & {"marwright_default_version", "marwright_workers_ready"}
    unread = _series(exporter.families(None, {"digits": {"1.0": _status("1.0", default=True)}}, {"journal": 2}))
    assert unread["marwright_default_version", "digits", "1.0"] == 1
    assert unread["marwright_exporter_errors_total", "journal"] == 2
    assert not any(name == "marwright_journal_version" for name, *_ in unread)


def test_what_the_journal_says_of_rollouts(tmp_path: Path) -> None:
    def phase(number: int, name: str, step: str = "done", kind: str = "rollout") -> None:
        book.add("digits", "1.1", "rollout", id=number, kind=kind, phase=name, step=step, champion="1.0")

    with journal.open(tmp_path) as book:
        book.release("digits", "1.0", proven=False, why="first")
        phase(1, "verified", "begin")
        assert exporter.read(book)["digits"].rollout == ("1.1", "verified")
        phase(1, "verified")
        phase(1, "registered", "begin")
        assert exporter.read(book)["digits"].rollout == ("1.1", "registered")
        book.add("digits", "1.1", "rolling back", id=1, reason="it died", champion="1.0")
        assert exporter.read(book)["digits"].rollout == ("1.1", "rolling back")
        book.add("digits", "1.1", "rolled back", id=1, reason="it died", champion="1.0")
        for number in (2, 3):
            phase(number, "settled", "begin")
            phase(number, "settled")
        phase(4, "settled", kind="rollback")
        said = exporter.read(book)["digits"]
    assert said.rollout is None
    assert said.released == "1.0"
    assert said.outcomes == {"settled": 2, "rolled back": 1}


def test_a_scrape_without_a_server_has_the_journal(scrape: Callable[[], Series], store: Path) -> None:
    with journal.open(store) as book:
        book.release('odd "name"\n', "1.0", proven=False, why="test")
    found = scrape()
    assert found["marwright_server_up",] == 0
    assert found["marwright_journal_version", 'odd "name"\n', "1.0"] == 1
    with journal.open(store) as book:
        book.release('odd "name"\n', "1.1", proven=False, why="asked afresh each time")
    assert scrape()["marwright_journal_version", 'odd "name"\n', "1.1"] == 1


def test_a_journal_that_is_locked_is_counted(
    scrape: Callable[[], Series], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "JOURNAL_SECONDS", 0.1)
    with journal.open(store) as book:
        book.release("digits", "1.0", proven=False, why="test")
    other = sqlite3.connect(store / journal.FILE)
    try:
        other.execute("begin exclusive")
        assert scrape()["marwright_exporter_errors_total", "journal"] == 1
        found = scrape()
        assert found["marwright_exporter_errors_total", "journal"] == 2
        assert ("marwright_journal_version", "digits", "1.0") not in found
        other.rollback()
        found = scrape()
        assert found["marwright_exporter_errors_total", "journal"] == 2
        assert found["marwright_journal_version", "digits", "1.0"] == 1
    finally:
        other.close()


def test_a_journal_that_is_none_is_counted(scrape: Callable[[], Series], store: Path) -> None:
    (store / journal.FILE).write_bytes(b"no database at all" * 100)
    assert scrape()["marwright_exporter_errors_total", "journal"] == 1


def test_a_server_that_does_not_answer_is_down_and_counted(
    scrape: Callable[[], Series], config: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls, and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        torchserve.write_config(config, {"management_address": address, "disable_token_authorization": "true"})
        properties.write_serving(config, store, [])
        here = Running(psutil.Process(), tmp_path, None, tmp_path)
        monkeypatch.setattr(Server, "find", lambda self: here)
        monkeypatch.setattr(exporter, "CALL_SECONDS", 0.1)
        found = scrape()
    assert found["marwright_server_up",] == 0
    assert found["marwright_exporter_errors_total", "server"] == 1


def test_a_port_that_is_taken_is_said(collector: Collector) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken_words = f"port {port} of 127.0.0.1 cannot be had"
        with pytest.raises(ServerError, match=taken_words) as told, exporter.running(collector, port=port):
            pytest.fail("it runs")
    assert "--port N" in told.value.hint


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_cleanly(how: signal.Signals, config: Path, store: Path) -> None:
    command = [sys.executable, "-m", "scripts", "exporter", "--port", "0", "--store", store, "--config", config]
    environment = os.environ | {"PYTHONPATH": str(torchserve.PROJECT)}
    with subprocess.Popen(
        command, cwd=config.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        assert url.startswith("http://127.0.0.1:")
        assert "marwright_server_up 0.0" in requests.get(url, timeout=10).text
        process.send_signal(how)
        rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest, errors) == (0, "", "")
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=10)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    torchserve.write_config(tmp_path / "config.properties", {})
    return tmp_path / "config.properties"


@pytest.fixture
def store(tmp_path: Path, config: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    properties.write_serving(config, store, [])
    return store


@pytest.fixture
def collector(tmp_path: Path, store: Path) -> Collector:
    return Collector(store, Server(store / properties.SERVING, home=tmp_path, temp=tmp_path))


@pytest.fixture
def scrape(collector: Collector) -> Callable[[], Series]:
    """What Prometheus would read from a running exporter."""

    def read() -> Series:
        with exporter.running(collector, port=0) as url:
            return _series(text_string_to_metric_families(requests.get(url, timeout=10).text))

    return read


def _series(families: Iterable[Metric]) -> Series:
    """Value by (name, labels' values in order)."""
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def _status(
    version: str, *, default: bool = False, workers: tuple[WorkerStatus, ...] = (READY,), wanted: int = 1
) -> ModelStatus:
    return ModelStatus(
        name="digits",
        version=version,
        file=f"digits-{version}.mar",
        default=default,
        workers=workers,
        min_workers=wanted,
        max_workers=wanted,
        batch_size=8,
        batch_delay=5,
        response_timeout=30,
        startup_timeout=120,
        pending=0,
        queue_left=100,
        loaded_at_startup=True,
    )
