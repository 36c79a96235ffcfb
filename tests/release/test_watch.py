"""`watch` on a real server: while a version is rolled out, while the server is away, and when a worker dies."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from marwright.errors import ServerRefused, SettingsError
from marwright.packing import golden
from marwright.release import measured
from marwright.settings import WatchSettings
from scripts import rollback as rollback_verb
from scripts import rollout as rollout_verb
from scripts import watch
from scripts.watch import Look, Row
from tests import rollouts, torchserve
from tests.archives import Built
from tests.faults import Trickle
from tests.rollouts import Stage


@pytest.fixture(scope="module")
def stage(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with rollouts.stage(tmp_path_factory.mktemp("watch"), digits) as made:
        yield made


@pytest.fixture
def settings(stage: Stage) -> WatchSettings:
    return WatchSettings(store=stage.store, config=stage.home.config_path, runs=stage.runs, every=0.2)


def when(seen: Iterator[Look], wanted: Callable[[Look], object], seconds: float = 60.0) -> Look:
    """The first look that is as wanted."""
    until = time.monotonic() + seconds
    for look in seen:
        if wanted(look):
            return look
        assert time.monotonic() < until, look
    raise AssertionError


def of(look: Look, version: str) -> Row:
    return next(row for row in look.versions if row.version == version)


@pytest.mark.server
def test_a_rollout_is_seen_as_it_goes(stage: Stage) -> None:
    """From another terminal, that of a person who ends it with Ctrl-C."""
    line = [sys.executable, "-m", "scripts", "watch", "--json", "--every", "0.2", "--model", "digits"]
    line += ["--store", str(stage.store), "--config", str(stage.home.config_path), "--runs", str(stage.runs)]
    path = stage.home.folder / "looks.jsonl"
    slow = stage.home.folder / "slow.toml"  # the watch lasts for some of the handlers' emissions
    slow.write_text(rollouts.QUICK.replace("[watch]\nseconds = 1.0", "[watch]\nseconds = 4.0"), encoding="utf-8")
    with path.open("wb") as stream, subprocess.Popen(line, stdout=stream, stderr=subprocess.PIPE, text=True) as watcher:
        while not path.read_text():
            time.sleep(0.1)
        with Trickle(stage) as asked:
            rollout_verb.rolled_out(stage.settings("1.1", policy=slow))
            told = path.read_text().count("\n")
            while path.read_text().count("\n") < told + 2:
                time.sleep(0.1)
        watcher.send_signal(signal.SIGINT)
        assert watcher.stderr is not None
        assert watcher.stderr.read() == "\ninterrupted\n"
        assert watcher.wait(20) == 130
    assert not asked.lost()
    seen: list[dict[str, Any]] = [json.loads(one) for one in path.read_text().splitlines()]
    rows = [{row["version"]: row for row in look["versions"]} for look in seen]
    answered = [next(version for version, row in look.items() if row["default"]) for look in rows]
    assert (answered[0], answered[-1]) == ("1.0", "1.1")
    assert answered == sorted(answered), "it switched once"
    assert all(look["running"] and not look["attention"] for look in seen)
    said = "\n".join(line for look in seen for line in look["rollouts"])
    held = r"for \d+ s, held by rollout of digits 1\.1, process \d+, since"
    assert re.search(rf"digits: rollout of 1\.1 \(was 1\.0\) in phase gated, {held}", said)
    assert re.search(rf"digits: rollout of 1\.1 \(was 1\.0\) in phase watched, {held}", said)
    assert seen[-1]["rollouts"][0].startswith("digits: the last rollout, of 1.1, settled, at ")
    assert re.match(r"digits: the gate on 1\.1: pass, ", seen[-1]["rollouts"][1])
    for version in ("1.0", "1.1"):
        own = [row[version] for row in rows if version in row]
        busy = [row for row in own if row["requests_per_second"]]
        assert busy
        assert all(row["ready"] == row["wanted"] == 1 and row["restarts"] == 0 for row in busy)
        assert {row["errors_per_second"] for row in busy} == {0.0}
        assert all(0 < row["p50_seconds"] <= row["p99_seconds"] for row in busy)
        assert all(0.5 < row["confidence"] <= 1 and row["batch_size"] >= 1 for row in busy)
        assert len({tuple(row["pids"]) for row in busy}) == 1
    assert rollback_verb.main(stage.rollback()) == 0


@pytest.mark.server
def test_what_was_sent_between_two_pages_is_their_difference(stage: Stage) -> None:
    bodies = [example.body for example in golden.read(stage.store / stage.record("1.0").file)]
    with stage.client() as client:
        before = measured.settled(client, "digits")
        for number in range(10):
            client.predict("digits", bodies[number], version="1.0" if number % 2 else None)
        with pytest.raises(ServerRefused):
            client.predict("digits", b"no picture")
        client.predict_grpc("digits", {"data": bodies[0]})
        client.describe("digits", "1.0", customized=True)
        page = measured.settled(client, "digits", seconds=10.0)
    between = page - before
    found = between.of("digits", "1.0")
    assert found is not None
    refused = {status: count for (call, status), count in found.requests.items() if call == "predict" and count}
    assert refused == {200: 11, 415: 1}
    assert (found.answered, found.failed, found.starts) == (12, 0, 0)
    assert {kind: count for (_, kind), count in found.errors.items() if count} == {"unsupported": 1}
    assert sum(found.classes.values()) == found.histogram("confidence").count == 11
    times = found.histogram("handle_seconds")
    assert times.count == 12
    assert 0 < times.quantile(0.5) <= times.quantile(0.99)
    assert between.asked_of("digits") == 12, "TorchServe counts them at once, whichever version they name"
    assert between.of("digits", "7.0") is None


@pytest.mark.server
def test_one_table_for_each_look(
    stage: Stage, settings: WatchSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watch.main(replace(settings, looks=2)) == 0
    said = capsys.readouterr().out
    assert said.count("TorchServe: running, pid ") == 2
    assert len(re.findall(r"^digits +1\.0 +answers +should answer +1/1 +\d+ ", said, flags=re.MULTILINE)) == 2
    assert watch.main(replace(settings, looks=1, model="cats")) == 0
    assert "nothing is loaded or released" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert watch.main(replace(settings, looks=2)) == 0
    assert "TorchServe: running, pid " in capsys.readouterr().out


@pytest.mark.server
def test_a_worker_that_died_is_counted(stage: Stage, settings: WatchSettings) -> None:
    seen = watch.looks(settings)
    before = of(next(seen), "1.0")
    psutil.Process(before.pids[0]).kill()
    after = of(when(seen, lambda look: of(look, "1.0").restarts and of(look, "1.0").ready), "1.0")
    assert (after.restarts, after.ready, after.wanted) == (1, 1, 1)
    assert after.pids != before.pids


@pytest.mark.server
def test_it_goes_on_without_the_server_and_with_the_next_one(stage: Stage, settings: WatchSettings) -> None:
    seen = watch.looks(settings)
    first = next(seen)
    assert (first.running, of(first, "1.0").default) == (True, True)
    stage.home.server.stop()
    away = next(seen)
    assert (away.running, away.pid) == (False, None)
    assert [(row.version, row.released, row.ready) for row in away.versions] == [("1.0", True, None)]
    stage.home.bring_up()
    back = when(seen, lambda look: look.running and look.versions and look.versions[0].ready)
    assert back.pid != first.pid
    assert of(back, "1.0").restarts == 0, "the workers of another server are none of its own"
    with stage.client() as client:
        client.set_default("digits", "1.0")
        client.register("digits-1.1.mar", initial_workers=1, synchronous=True, timeout=60)
        client.set_default("digits", "1.1")
        wrong = next(seen)
        assert "digits 1.1 answers, the journal says 1.0" in wrong.attention
        assert (of(wrong, "1.0").released, of(wrong, "1.1").default) == (True, True)


def row(**known: Any) -> Row:
    return Row("digits", "1.0", default=True, released=True, **known)


def drawn(look: Look, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(watch.page(look, width))
    return console.export_text()


@pytest.mark.parametrize(("width", "missing"), [(120, set()), (80, {"pids", "journal", "batch"})])
def test_a_narrow_terminal_has_fewer_columns_and_none_that_is_cut(width: int, missing: set[str]) -> None:
    busy = row(
        ready=1, wanted=1, pids=(31211,), requests_per_second=123.4, errors_per_second=12.5, p50_seconds=0.0123,
        p99_seconds=0.1234, confidence=0.934, batch_size=12.5,
    )  # fmt: skip
    said = drawn(Look("2026-11-21T15:27:34+00:00", True, True, 1, (busy,), (), ()), width)
    titles, cells = said.splitlines()[1:3]
    assert set(re.findall(r"pids|journal|batch|conf\.", titles)) == {"pids", "journal", "batch", "conf."} - missing
    assert "…" not in said
    assert re.search(r"^digits +1\.0 +answers .* 123\.4 +12\.5 +12\.3 +123\.4 +0\.934 ", cells)


def test_a_server_that_says_nothing_is_not_said_to_hold_nothing() -> None:
    at = "2026-11-21T15:27:34+00:00"
    assert " unknown " in drawn(Look(at, True, False, 1, (row(),), (), ("no answer within 3 s",)), 120)
    assert " not loaded " in drawn(Look(at, True, True, 1, (row(),), (), ()), 120)
    assert " not loaded " in drawn(Look(at, False, False, None, (row(),), (), ()), 120)


def test_without_a_server_or_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.properties"
    torchserve.write_config(config, {})
    settings = WatchSettings(store=tmp_path / "store", config=config, looks=2, every=0.01)
    assert watch.main(settings) == 0
    said = capsys.readouterr().out
    assert said.count("TorchServe: not running (make serve starts it)") == 2
    assert said.count("nothing is loaded or released") == 2
    assert watch.main(replace(settings, json=True)) == 0
    assert [json.loads(line)["running"] for line in capsys.readouterr().out.splitlines()] == [False, False]


@pytest.mark.parametrize("wrong", [{"every": 0.0}, {"every": float("nan")}, {"every": float("inf")}, {"looks": 0}])
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        watch.main(WatchSettings(**wrong))
