"""The load test: arrivals by their statistics, verdicts, servers that misbehave, the real one, and the report.

`Odd` is a server that does what a request's body says: it hangs, resets, talks garbage, stalls. What it saw and when is
held against what the load test wrote down.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import html
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marwright.errors import DataError, ServerError, SettingsError
from marwright.packing import golden as golden_examples
from marwright.release import journal
from marwright.release.client import Client
from marwright.release.journal import Entry, Span
from marwright.release.loadtest import bodies, calls, plan, report, results, run, watch
from marwright.release.loadtest.bodies import Body
from marwright.release.loadtest.calls import Call
from marwright.release.loadtest.checks import Checks
from marwright.release.loadtest.plan import Load
from marwright.release.loadtest.results import Results
from marwright.release.properties import ServerConfig
from marwright.release.server import Expected
from marwright.release.tokens import Tokens
from tests import archives, torchserve
from tests.archives import Built

# ---------------------------------------------------------------- arrivals


def due_times(**load: Any) -> np.ndarray:
    return np.array([shot.after for shot in plan.shots(Load(model="m", **load), 4)])


def test_poisson_arrivals_have_the_rate_and_the_dispersion_of_a_poisson_process() -> None:
    times = due_times(rate=1000, seconds=100, seed=3)
    assert abs(len(times) - 100_000) < 4 * 100_000**0.5
    counts = np.histogram(times, np.arange(0, 100.01, 0.1))[0]
    assert abs(counts.var(ddof=1) / counts.mean() - 1) < 4 * (2 / len(counts)) ** 0.5  # index of dispersion, 4 sigma
    gaps = np.diff(times)
    assert abs((gaps > 1 / 1000).mean() - np.exp(-1)) < 0.01  # memoryless: a gap outlives its mean in 1/e of all cases
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.02


def test_constant_arrivals_are_even_and_stop_in_time() -> None:
    assert np.array_equal(due_times(rate=8, seconds=2, arrivals="constant"), np.arange(16) / 8)


def test_closed_arrivals_never_end() -> None:
    endless = plan.shots(Load(model="m", arrivals="closed", seconds=0.001), 4)
    assert all(next(endless).after == 0 for _ in range(10_000))


def test_a_seed_gives_the_same_plan_and_another_rate_keeps_the_mix() -> None:
    load = Load(model="m", rate=5000, seconds=2, grpc_share=0.3, pinned_share=0.2, seed=7)
    first, again = (list(plan.shots(load, 16)) for _ in range(2))
    assert first == again
    slower = list(plan.shots(replace(load, rate=2500), 16))
    assert [shot[1:] for shot in slower] == [shot[1:] for shot in first[: len(slower)]]
    assert list(plan.shots(replace(load, seed=8), 16)) != first


def test_shares_are_kept_and_every_body_is_sent() -> None:
    load = Load(model="m", rate=5000, seconds=4, grpc_share=0.3, pinned_share=0.2)
    shots = list(plan.shots(load, 16))
    assert abs(np.mean([shot.grpc for shot in shots]) - 0.3) < 0.02
    assert abs(np.mean([shot.pin is not None for shot in shots]) - 0.2) < 0.02
    both = np.mean([shot.grpc and shot.pin is not None for shot in shots])
    assert abs(both - 0.06) < 0.01  # neither follows from the other
    counts = Counter(shot.body for shot in shots)
    assert sorted(counts) == list(range(16))
    assert min(counts.values()) > 0.8 * len(shots) / 16


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"seconds": -1}, {"hung": float("nan")}, {"grpc_share": 1.2}])
def test_an_impossible_load_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        Load(model="m", **wrong)
    assert next(iter(wrong)) in str(caught.value)


@pytest.mark.parametrize("timerfd", [True, False])
def test_an_alarm_rings_once_and_never_early(timerfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not timerfd:
        monkeypatch.setattr(calls.ctypes, "CDLL", lambda _: object())

    async def rings() -> list[float]:
        rung: list[float] = []
        alarm = calls.Alarm(asyncio.get_running_loop(), lambda: rung.append(calls.now()))
        began = calls.now()
        alarm.set(0.01)
        alarm.set(0.05)  # the earlier setting is forgotten
        while not rung:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        alarm.close()
        return [at - began for at in rung]

    (after,) = asyncio.run(rings())
    assert after > 0.048  # asyncio's own timers may be a clock tick early


# ---------------------------------------------------------------- verdicts


def call(body: int = 0, version: str | None = None, grpc: bool = False) -> Call:
    made = Call(0.0, grpc, None, body)
    made.version = version
    return made


def headers(version: str, bundle: str) -> dict[bytes, bytes]:
    return {b"x-model-version": version.encode(), b"x-bundle-digest": bundle.encode()}


@pytest.fixture
def known(digits: Built) -> tuple[Checks, Built, tuple[Body, ...]]:
    sent = (*bodies.golden(digits.store, "digits"), Body("other.png", b"not one of the golden examples"))
    return Checks(sent, digits.store, "digits"), digits, sent


def envelope(built: Built, prediction: Any, **other: Any) -> bytes:
    whole = {"prediction": prediction, "status": 200, "model": "digits", "version": "1.0"}
    return json.dumps({**whole, "bundle": built.record.bundle, "request_id": "x", **other}).encode()


def test_the_golden_answer_is_right_over_both_ways(known: tuple[Checks, Built, tuple[Body, ...]]) -> None:
    checks, built, sent = known
    by_body = {example.body: example for example in built.golden}
    assert len(sent) == len(by_body) + 1
    for place, body in enumerate(sent[:-1]):
        answer = dict(sorted(by_body[body.data].answer.items(), key=lambda item: -item[1]))
        best = dict([next(iter(answer.items()))])
        rest = checks.rest(call(place), 200, headers("1.0", built.record.bundle), json.dumps(answer).encode())
        grpc = checks.grpc(call(place, grpc=True), envelope(built, best))
        assert rest == grpc == (200, "1.0", "ok", "")


def test_a_wrong_label_is_wrong_however_often(known: tuple[Checks, Built, tuple[Body, ...]]) -> None:
    checks, built, _ = known
    right = max(built.golden[0].answer.items(), key=lambda item: item[1])
    other = next(label for label in built.golden[0].answer if label != right[0])
    body = json.dumps({other: right[1]}).encode()
    for _ in range(2):  # the second time from memory
        verdict = checks.rest(call(), 200, headers("1.0", built.record.bundle), body)
        assert verdict.outcome == "wrong"
        assert other in verdict.detail
    assert checks.grpc(call(grpc=True), envelope(built, {other: right[1]})).outcome == "wrong"


def test_a_version_a_bundle_or_a_body_that_should_not_be_is_wrong(
    known: tuple[Checks, Built, tuple[Body, ...]],
) -> None:
    checks, built, _ = known
    best = dict([max(built.golden[0].answer.items(), key=lambda item: item[1])])
    body = json.dumps(best).encode()
    bundle = built.record.bundle
    wrong = {
        "answered a request for 1.1": checks.rest(call(version="1.1"), 200, headers("1.0", bundle), body),
        "not one that was built": checks.rest(call(), 200, headers("9.9", bundle), body),
        "without a name": checks.rest(call(), 200, {}, body),
        "the record of 1.0 says": checks.rest(call(), 200, headers("1.0", "0" * 16), body),
        "not JSON": checks.rest(call(), 200, headers("1.0", bundle), b"<html>"),
        "not {label: number}": checks.rest(call(), 200, headers("1.0", bundle), b'{"7": "high"}'),
        "nobody answered a request for 1.0": checks.grpc(call(version="1.0", grpc=True), body),
    }
    for words, verdict in wrong.items():
        assert verdict.outcome == "wrong", words
        assert words in verdict.detail
    assert checks.rest(call(version="1.0"), 200, headers("1.0", bundle), body).outcome == "ok"


def test_a_refusal_is_refused_over_both_ways(known: tuple[Checks, Built, tuple[Body, ...]]) -> None:
    checks, built, _ = known
    refusal = {"code": 503, "reason": "the queue is full"}
    assert checks.rest(call(), 503, {}, json.dumps(refusal).encode())[:3] == (503, "", "refused")
    for body in (envelope(built, None, status=503, reason="the queue is full"), json.dumps(refusal).encode()):
        verdict = checks.grpc(call(grpc=True), body)
        assert (verdict.status, verdict.outcome, verdict.detail) == (503, "refused", "the queue is full")


def test_another_body_is_held_against_the_first_answer_of_that_version(
    known: tuple[Checks, Built, tuple[Body, ...]],
) -> None:
    checks, built, sent = known
    other = call(len(sent) - 1)

    def judged(answer: Mapping[str, float]) -> str:
        return checks.rest(other, 200, headers("1.0", built.record.bundle), json.dumps(answer).encode()).outcome

    assert judged({"3": 0.5, "1": 0.4996}) == "ok"
    assert judged({"3": 0.5004, "1": 0.4996}) == "ok"
    assert judged({"1": 0.5, "3": 0.4999}) == "ok"  # as good as equal
    assert judged({"3": 0.502}) == "wrong"
    assert judged({"7": 0.5}) == "wrong"
    assert checks.grpc(other, envelope(built, {"3": 0.5})).outcome == "ok"  # one answer, whichever way it came
    assert checks.grpc(other, envelope(built, {"7": 0.5})).outcome == "wrong"


def test_a_version_built_during_a_run_is_known_when_it_answers(digits: Built, tmp_path: Path) -> None:
    first = archives.build(digits.run, tmp_path)
    checks = Checks(bodies.golden(tmp_path, "digits"), tmp_path, "digits")
    second = archives.build(digits.run, tmp_path, "eager")
    assert second.record.version == "1.1"
    example = second.golden[0]
    place = [body.data for body in bodies.golden(tmp_path, "digits")].index(example.body)
    best = dict([max(example.answer.items(), key=lambda item: item[1])])
    verdict = checks.rest(call(place), 200, headers("1.1", second.record.bundle), json.dumps(best).encode())
    assert verdict == (200, "1.1", "ok", "")
    assert checks.rest(call(place), 200, headers("1.1", first.record.bundle), b"{}").outcome == "wrong"


def test_regressors_are_held_to_their_value(regressor: Built) -> None:
    sent = bodies.golden(regressor.store, "diabetes-mlp")
    assert all(body.content_type == "application/json" for body in sent)
    checks = Checks(sent, regressor.store, "diabetes-mlp")
    ((name, value),) = golden_examples.read(regressor.path)[0].answer.items()
    for off, outcome in ((0.0, "ok"), (0.0005, "ok"), (0.01, "wrong")):
        body = json.dumps({name: value * (1 + off)}).encode()
        assert checks.rest(call(), 200, headers("1.0", regressor.record.bundle), body).outcome == outcome


def test_a_folder_of_bodies_is_read_in_order_and_an_empty_one_refused(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.json", ".hidden", "b/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert [body.name for body in bodies.folder(tmp_path)] == ["a.json", "b/2.png"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError) as caught:
        bodies.folder(tmp_path / "none")
    assert "one file for each request" in caught.value.hint
    with pytest.raises(DataError) as caught:
        bodies.golden(tmp_path / "none", "digits")
    assert "--images" in caught.value.hint


# ---------------------------------------------------------------- servers that misbehave


class Odd:
    """An HTTP server on sockets, a thread for each connection, that does what a request's body says."""

    def __init__(self) -> None:
        self.connections = 0
        self.bodies: list[bytes] = []
        self.stalled: tuple[float, float] | None = None
        self.stall_after: int | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listening.settimeout(0.1)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def config(self) -> ServerConfig:
        port = self._listening.getsockname()[1]
        closed = torchserve.free_ports(1)[0]
        return ServerConfig(
            Path("none"),
            inference_url=f"http://127.0.0.1:{port}",
            grpc_inference=f"127.0.0.1:{closed}",
            token_auth=False,
        )

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._listening.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listening.accept()
                self.connections += 1
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(0.1)
        with connection, contextlib.suppress(ConnectionError):
            while (body := self._request(connection)) is not None:
                self.bodies.append(body)
                with self._lock:  # everybody waits while the server stalls
                    if self.stall_after is not None and len(self.bodies) > self.stall_after:
                        self.stall_after = None
                        began = time.time()
                        time.sleep(1.0)
                        self.stalled = (began, time.time())
                if not self._answer(connection, body.decode()):
                    return

    def _request(self, connection: socket.socket) -> bytes | None:
        got = b""
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                data = connection.recv(65536)
                if not data:
                    return None
                got += data
                head, found, body = got.partition(b"\r\n\r\n")
                length = re.search(rb"Content-Length: (\d+)", head)
                if found and length and len(body) >= int(length[1]):
                    assert len(body) == int(length[1]), "pipelined"
                    return body
        return None

    def _answer(self, connection: socket.socket, wish: str) -> bool:
        """Whether the connection stays open."""
        value = b'{"3":0.9}'
        head = b"HTTP/1.1 200 OK\r\nX-MODEL-VERSION: 1.0\r\ncontent-length: %d\r\n\r\n" % len(value)
        match wish:
            case "hang":
                self._stop.wait()
            case "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            case "close":
                return False
            case "garbage":
                connection.sendall(b"\x00\x01\x02 this is no HTTP\r\n\r\n")
            case "half":
                connection.sendall((head + value)[:-4])
                return False
            case "half and hang":
                connection.sendall((head + value)[:-4])
                self._stop.wait()
            case "no json":
                connection.sendall(head.replace(b"9", b"4") + b"oops")
            case "refuse":
                connection.sendall(b"HTTP/1.1 503 No\r\ncontent-length: 13\r\n\r\nqueue is, ful")
            case "twice":
                connection.sendall((head + value) * 2)
            case "chunked":
                connection.sendall(b"HTTP/1.1 200 OK\r\nx-model-version: 1.0\r\ntransfer-encoding: chunked\r\n\r\n")
                for piece in (value[:3], value[3:], b""):
                    connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            case "last":
                connection.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + value)
                return False
            case "in drops":
                for at in range(0, len(head + value), 7):
                    connection.sendall((head + value)[at : at + 7])
            case _:
                connection.sendall(head + value)
        return True


@pytest.fixture
def odd() -> Iterator[Odd]:
    server = Odd()
    yield server
    server.close()


def fire(
    config: ServerConfig, wishes: Sequence[str], out: Path, tokens: Tokens | None = None, **load: Any
) -> tuple[run.Summary, Results]:
    """Run a load of bodies that are wishes, against a model that was not built here."""
    sent = tuple(Body(f"{wish}.txt", wish.encode()) for wish in wishes)
    checks = Checks(sent, out.parent / "empty", load.setdefault("model", "m"))
    summary = run.run(config, tokens, Load(**load), sent, checks, out, progress=False)
    return summary, results.read(out)


def rows(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


OUTCOME_OF = {
    "ok": "ok",
    "chunked": "ok",
    "in drops": "ok",
    "last": "ok",
    "twice": "ok",
    "hang": "hung",
    "half and hang": "hung",
    "reset": "broken",
    "close": "broken",
    "garbage": "broken",
    "half": "broken",
    "no json": "wrong",
    "refuse": "refused",
}


def test_each_misbehaviour_has_its_outcome_and_harms_no_other_request(odd: Odd, tmp_path: Path) -> None:
    out = tmp_path / "raw.csv"
    summary, read = fire(odd.config, list(OUTCOME_OF), out, rate=150, seconds=1.5, hung=1.0)
    found = {(row["body"].removesuffix(".txt"), row["outcome"]) for row in rows(out)}
    assert found == set(OUTCOME_OF.items())
    assert summary.requests == len(read) == len(odd.bodies)  # nothing was sent twice, nothing forgotten
    assert summary.counts == {outcome: int((read.outcome == outcome).sum()) for outcome in summary.counts}
    assert set(read.version[read.outcome == "ok"].tolist()) == {"1.0"}  # headers in any case
    assert (read.latency[read.outcome == "hung"] >= 1.0).all()
    details = {row["body"].removesuffix(".txt"): row["detail"] for row in rows(out)}
    assert "before an answer" in details["close"]
    assert "in the middle" in details["half"]
    assert "not an HTTP answer" in details["garbage"]
    assert details["refuse"] == "queue is, ful"
    with pytest.raises(ServerError) as caught:
        summary.raise_for_failures()
    assert f"{summary.counts['hung']} hung" in str(caught.value)
    assert str(out) in caught.value.hint


def test_nobody_listening_is_broken_over_both_ways(tmp_path: Path) -> None:
    rest, grpc = torchserve.free_ports(2)
    config = ServerConfig(
        Path("none"), inference_url=f"http://127.0.0.1:{rest}", grpc_inference=f"127.0.0.1:{grpc}", token_auth=False
    )
    summary, read = fire(config, ["ok"], tmp_path / "raw.csv", rate=300, seconds=1, grpc_share=0.5)
    assert summary.counts["broken"] == summary.requests > 0
    assert set(read.kind.tolist()) == {"rest", "grpc"}
    assert any("no connection" in detail for detail in read.detail)
    assert any("UNAVAILABLE" in detail for detail in read.detail)


def test_closed_clients_keep_their_connections_and_wait_for_their_answers(odd: Odd, tmp_path: Path) -> None:
    summary, read = fire(odd.config, ["ok"], tmp_path / "raw.csv", arrivals="closed", connections=4, seconds=1)
    assert summary.counts["ok"] == len(odd.bodies) > 100
    assert odd.connections == summary.most_connections == 4
    flying = np.concatenate(
        [np.stack([read.sent, read.sent * 0 + 1]), np.stack([read.done, read.done * 0 - 1])], axis=1
    )
    assert flying[1][np.lexsort((flying[1], flying[0]))].cumsum().max() <= 4


def test_a_stall_is_charged_to_every_request_that_was_due_in_it(odd: Odd, tmp_path: Path) -> None:
    odd.stall_after = 60
    _, read = fire(odd.config, ["ok"], tmp_path / "raw.csv", rate=200, seconds=2, arrivals="constant")
    assert odd.stalled is not None
    began, ended = odd.stalled
    assert set(read.outcome.tolist()) == {"ok"}
    assert np.allclose(np.diff(read.due), 1 / 200, atol=2e-6)  # the plan, whatever the server did
    assert len(read) == 400  # all of them, not the few that a client waiting for its answers would have sent
    inside = (read.due > began + 0.01) & (read.due < ended)
    assert inside.any()
    assert (read.done[inside] >= ended - 0.001).all()
    found = report.findings(read)
    assert found.pause is not None
    assert found.pause.at <= ended <= found.pause.at + found.pause.seconds + 0.001
    longest = np.sort((ended - read.due[inside]) * 1000)[-4]  # p99 of 400 is the fifth of the longest
    assert found.lines[0].percentiles["p99"] is not None
    assert found.lines[0].percentiles["p99"] > longest - 6


def test_connections_have_a_limit_and_requests_wait_their_turn(odd: Odd, tmp_path: Path, monkeypatch: Any) -> None:
    made = run.Pool
    monkeypatch.setattr(run, "Pool", lambda *a, **k: made(*a, **k, limit=3))
    odd.stall_after = 20
    summary, read = fire(odd.config, ["ok"], tmp_path / "raw.csv", rate=100, seconds=1)
    assert summary.most_connections == odd.connections == 3
    assert summary.counts["ok"] == summary.requests == len(odd.bodies)
    assert (read.sent - read.due).max() > 0.5


def test_an_error_of_our_own_ends_the_run(odd: Odd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(Checks, "rest", broken)
    with pytest.raises(ZeroDivisionError):
        fire(odd.config, ["ok"], tmp_path / "raw.csv", rate=50, seconds=60)


def test_a_journal_that_fails_during_a_run_ends_it(odd: Odd, tmp_path: Path) -> None:
    sent = (Body("ok", b"ok"),)
    with journal.open(tmp_path) as book:
        book.release("m", "1.0", proven=False, why="test")
    with watch.Watch(tmp_path, "m") as watched:
        assert watched() == {"1.0"}
        watched._error = SettingsError("the disk is gone")
        with pytest.raises(SettingsError, match="the disk is gone"):
            run.run(
                odd.config,
                None,
                Load(model="m", seconds=60, pinned_share=1),
                sent,
                Checks(sent, tmp_path / "none", "m"),
                tmp_path / "raw.csv",
                pinnable=watched,
                progress=False,
            )


def test_the_watch_follows_the_journal(tmp_path: Path) -> None:
    with journal.open(tmp_path) as book:
        book.release("m", "1.0", proven=False, why="test")
        with watch.Watch(tmp_path, "m") as watched:
            book.release("m", "1.1", proven=False, why="test", running=True)
            until = time.monotonic() + 20
            while watched() != {"1.0", "1.1"}:
                assert time.monotonic() < until
                time.sleep(0.02)


PROGRAM = """
import sys
from pathlib import Path
from marwright.release.properties import ServerConfig
from marwright.release.loadtest import run
from marwright.release.loadtest.bodies import Body
from marwright.release.loadtest.checks import Checks
from marwright.release.loadtest.plan import Load
url, out = sys.argv[1:]
config = ServerConfig(Path("none"), inference_url=url, token_auth=False)
sent = (Body("ok", b"ok"), Body("hang", b"hang"))
run.run(config, None, Load(model="m", rate=100, seconds=600, hung=2), sent, Checks(sent, Path("none"), "m"), Path(out))
"""


@contextlib.contextmanager
def running(odd: Odd, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A load test in a process of its own, once some of its results are in the file."""
    command = [sys.executable, "-c", PROGRAM, odd.config.inference_url, str(out)]
    with subprocess.Popen(command, cwd=torchserve.PROJECT, stderr=subprocess.PIPE, text=True) as process:
        try:
            until = time.monotonic() + 30
            while not out.is_file() or out.read_text().count("\n") < 50:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


def test_ctrl_c_stops_the_sending_waits_for_what_flies_and_keeps_the_file(odd: Odd, tmp_path: Path) -> None:
    out = tmp_path / "raw.csv"
    with running(odd, out) as process:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in said
    assert "/s  in flight" in said  # progress, line by line where there is no terminal
    assert "\r" not in said
    read = results.read(out)
    assert read.end is not None
    assert read.end["interrupted"] is True
    assert len(read) == len(odd.bodies) == sum(read.end["counts"].values())
    assert {row["body"]: row["outcome"] for row in rows(out)} == {"ok": "ok", "hang": "hung"}


def test_a_killed_run_leaves_what_it_had_written(odd: Odd, tmp_path: Path) -> None:
    out = tmp_path / "raw.csv"
    with running(odd, out) as process:
        process.kill()
    read = results.read(out)
    assert len(read) >= 40
    assert read.end is None
    assert "was killed" in " ".join(report.sentences(report.findings(read)))


# ---------------------------------------------------------------- the real server


@pytest.mark.server
def test_a_run_outlives_its_token_without_one_refusal(echo_home: torchserve.Home, tmp_path: Path) -> None:
    tokens = Tokens(echo_home.key_file, echo_home.config)  # whose keys last three seconds here
    summary, read = fire(
        echo_home.config, ["a", "b"], tmp_path / "raw.csv", tokens, model="echo", rate=30, seconds=7, grpc_share=0.5
    )
    assert sum(event["event"] == "renewing the token" for event in read.events) >= 2
    assert summary.counts == {"ok": summary.requests, "refused": 0, "broken": 0, "hung": 0, "wrong": 0}
    assert set(read.kind.tolist()) == {"rest", "grpc"}
    assert set(read.version.tolist()) == {"1.0"}


@pytest.mark.server
def test_refused_and_hung_requests_are_told_over_both_ways(echo_home: torchserve.Home, tmp_path: Path) -> None:
    tokens = Tokens(echo_home.key_file, echo_home.config)
    load = {"model": "echo", "seconds": 1, "grpc_share": 0.5}
    summary, read = fire(echo_home.config, ['{"refuse": 415}'], tmp_path / "refused.csv", tokens, rate=40, **load)
    assert summary.counts["refused"] == summary.requests
    assert set(zip(read.kind.tolist(), read.status.tolist(), strict=True)) == {("rest", 415), ("grpc", 415)}
    summary, read = fire(echo_home.config, ['{"sleep": 1.5}'], tmp_path / "hung.csv", tokens, rate=6, hung=0.7, **load)
    assert summary.counts["hung"] == summary.requests > 0
    assert set(read.kind.tolist()) == {"rest", "grpc"}
    with echo_home.client() as client:  # the worker has slept enough when it answers again
        client.predict("echo", b"x", timeout=60)


@pytest.mark.server
def test_pinned_requests_go_to_versions_that_may_be_pinned_by_then(echo_home: torchserve.Home, tmp_path: Path) -> None:
    sent = (Body("a", b"a"),)
    config = echo_home.config
    asked: list[float] = []

    def pinnable() -> tuple[str, ...]:
        asked.append(time.time())
        return ("1.0",) if len(asked) % 2 else ()

    summary = run.run(
        config,
        Tokens(echo_home.key_file, config),
        Load(model="echo", rate=60, seconds=1, pinned_share=1, grpc_share=0.3),
        sent,
        Checks(sent, tmp_path, "echo"),
        tmp_path / "raw.csv",
        pinnable=pinnable,
        progress=False,
    )
    assert summary.counts["ok"] == summary.requests
    targets = Counter(results.read(tmp_path / "raw.csv").target.tolist())
    assert abs(targets["1.0"] - targets["default"]) <= 1
    assert len(asked) == summary.requests + 1


@pytest.fixture(scope="module")
def home(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[torchserve.Home]:
    """digits 1.0 (onnx, the default) and 1.1 (eager) on one server, and a journal that knows both as live."""
    folder = tmp_path_factory.mktemp("load")
    store = folder / "store"
    first = archives.build(digits.run, store)
    archives.build(digits.run, store, "eager")
    with torchserve.home(folder, {"digits": Expected("1.0")}, archives=[first.record.file], store=store) as home:
        home.bring_up()
        with home.client() as client:
            client.register("digits-1.1.mar", initial_workers=1, synchronous=True, timeout=90)
        with journal.open(store) as book:
            book.release("digits", "1.0", proven=False, why="test")
            book.release("digits", "1.1", proven=False, why="test", running=True)
            book.release("digits", "1.0", proven=False, why="test", running=True, back=True)
        yield home


def command(home: torchserve.Home, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(home.temp))}
    environment |= {"PYTHONPATH": str(torchserve.PROJECT), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "scripts", words[0], "--store", str(home.store), *words[1:]],
        cwd=home.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(home: torchserve.Home, *words: str) -> tuple[int, str, str]:
    with command(home, *words) as process:
        out, error = process.communicate(timeout=120)
    return process.returncode, out, error


@pytest.mark.server
def test_a_switch_under_load_loses_nothing_and_the_report_shows_it(home: torchserve.Home, tmp_path: Path) -> None:
    out = tmp_path / "raw.csv"

    def switch() -> None:
        with home.client() as client, journal.open(home.store) as book:
            for version in ("1.1", "1.0"):
                until = time.monotonic() + 60
                while not out.is_file() or len(rows(out)) < (100 if version == "1.1" else 500):
                    assert time.monotonic() < until
                    time.sleep(0.05)
                book.add("digits", version, "switching")
                client.set_default("digits", version)
                book.release("digits", version, proven=True, why="test", running=True, back=version == "1.0")

    switching = threading.Thread(target=switch)
    switching.start()
    words = ("--rate", "200", "--seconds", "6", "--grpc-share", "0.3", "--pinned-share", "0.3", "--out", str(out))
    code, told, error = said(home, "loadtest", *words)
    switching.join()
    assert (code, "in flight" in error) == (0, True), error
    assert "of a core" in told
    read = results.read(out)
    assert set(read.outcome.tolist()) == {"ok"}
    assert read.about["serving"].keys() == {"1.0", "1.1"}
    seen = set(zip(read.kind.tolist(), read.target.tolist(), read.version.tolist(), strict=True))
    assert seen == {
        (kind, target, version)
        for kind in ("rest", "grpc")
        for target in ("default", "1.0", "1.1")
        for version in ("1.0", "1.1")
        if target in ("default", version)
    }
    html_path = tmp_path / "page.html"
    code, told, _ = said(home, "loadreport", str(out), "--json", "--html", str(html_path))
    assert code == 0
    found = json.loads(told)
    assert found["not_allowed"] == 0
    labels = [label for _, label in found["switches"]]
    assert [label for label in labels if not label.startswith("switching")] == ["released 1.1", "back to 1.0"]
    assert sum(one["default"] + one["pinned"] for one in found["versions"]) == len(read)
    assert html_path.read_text().startswith("<!doctype html>")
    code, told, _ = said(home, "loadreport", str(out))
    assert (code, "could not answer then: 0" in told) == (0, True)


@pytest.mark.server
def test_ctrl_c_on_the_command_is_130_and_a_second_run_keeps_the_first_ones_file(
    home: torchserve.Home, tmp_path: Path
) -> None:
    out = tmp_path / "raw.csv"
    with command(home, "loadtest", "--arrivals", "closed", "--connections", "4", "--out", str(out)) as process:
        until = time.monotonic() + 60
        while not out.is_file() or len(rows(out)) < 50:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    read = results.read(out)
    assert set(read.outcome.tolist()) == {"ok"}
    assert read.end is not None
    before = out.read_bytes()
    code, _, error = said(home, "loadtest", "--out", str(out))
    assert (code, "--out" in error) == (2, True)
    assert out.read_bytes() == before


@pytest.mark.server
def test_a_failed_run_is_1_with_its_counts(home: torchserve.Home, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "no picture.png").write_bytes(b"no picture")
    words = ("--images", str(tmp_path / "pictures"), "--seconds", "1", "--out", str(tmp_path / "raw.csv"))
    code, told, error = said(home, "loadtest", *words)
    assert code == 1
    assert "refused" in error
    assert "loadreport" in error
    assert "requests" in told
    code, told, _ = said(home, "loadtest", *words[:-1], str(tmp_path / "again.csv"), "--json")
    assert code == 1
    assert json.loads(told)["counts"]["refused"] == json.loads(told)["failed"] > 0


# ---------------------------------------------------------------- the raw file and the report


def write(path: Path, lines: Sequence[str], about: Mapping[str, Any] | None = None) -> Results:
    first = json.dumps({"model": "m", "arrivals": "constant", "rate": 2, "seconds": 5, **(about or {})})
    path.write_text("\n".join([f"# {first}", results.HEADER, *lines, ""]))
    return results.read(path)


BY_HAND = (
    # due, sent, done, kind, target, version, status, outcome, body, detail: in the order of their ends
    "1000.0,1000.0,1000.010,rest,default,1.0,200,ok,a,",
    "1000.5,1000.5,1000.520,grpc,default,1.0,200,ok,a,",
    "1001.0,1001.0,1001.001,rest,1.1,,503,refused,a,full",
    "1001.5,1001.6,1001.530,rest,1.1,1.1,200,ok,a,",
    '1002.5,1002.5,1003.500,rest,default,1.1,200,wrong,a,"7 first, 3 before"',
    "1003.0,1003.0,1003.600,grpc,1.0,,,broken,a,UNAVAILABLE: gone",
    "1003.5,1003.5,1003.900,rest,default,1.1,200,ok,a,",
    "1002.0,,1007.000,rest,default,,,hung,a,no answer",
)


def test_the_numbers_of_a_report_are_those_of_the_file(tmp_path: Path) -> None:
    found = report.findings(write(tmp_path / "raw.csv", BY_HAND))
    lines = {line.name: line for line in found.lines}
    assert found.seconds == 7.0
    assert lines["all"].counts == {"ok": 4, "refused": 1, "broken": 1, "hung": 1, "wrong": 1}
    assert lines["all"].rate == pytest.approx(4 / 7)
    # 10, 20, 30, 400, 1000 and, hung, 5000 ms: neither the refused nor the broken one
    assert lines["all"].percentiles == pytest.approx({"p50": 30, "p90": 5000, "p99": 5000, "p99.9": 5000, "max": 5000})
    assert lines["grpc"].percentiles["max"] == pytest.approx(20)
    assert {name: line.requests for name, line in lines.items()} == {
        "all": 8,
        "rest": 6,
        "grpc": 2,
        "default": 5,
        "pinned": 3,
    }
    assert found.pause is not None
    assert found.pause.seconds == pytest.approx(1.97)  # from 1001.53 to 1003.5
    assert (found.pause.at, found.pause.after) == pytest.approx((1001.53, 1.53))
    assert found.pause.by_chance is None
    assert [(one.version, one.default, one.pinned) for one in found.versions] == [("1.0", 2, 0), ("1.1", 2, 1)]
    assert found.not_allowed is None
    assert found.late["max"] == pytest.approx(100)
    assert [one["outcome"] for one in found.failures] == ["refused", "hung", "wrong", "broken"]
    assert found.failures[2]["detail"] == "7 first, 3 before"
    assert json.loads(json.dumps(asdict(found)))["lines"][0]["percentiles"]["p50"] == pytest.approx(30)


def test_percentiles_are_measured_values(tmp_path: Path) -> None:
    lines = [f"{1000 + n},{1000 + n},{1000 + n + (n + 1) / 1000:.6f},rest,default,1.0,200,ok,a," for n in range(1000)]
    found = report.findings(write(tmp_path / "raw.csv", lines)).lines[0].percentiles
    assert found == pytest.approx({"p50": 500, "p90": 900, "p99": 990, "p99.9": 999, "max": 1000})


def test_an_answer_is_allowed_if_its_version_could_answer_at_some_moment_of_the_request(tmp_path: Path) -> None:
    read = write(
        tmp_path / "raw.csv",
        [
            "1000,1000,1001,rest,default,1.0,200,ok,a,",  # within the default span of 1.0
            "1009,1009,1012,rest,default,1.0,200,ok,a,",  # sent in it, answered after it
            "1011,1011,1012,rest,default,1.0,200,ok,a,",  # after it, on the default URL: no
            "1012,1012,1013,rest,1.0,1.0,200,ok,a,",  # pinned, and 1.0 may still be asked by name
            "1021,1021,1022,rest,1.0,1.0,200,ok,a,",  # retired: no
            "1008,1008,1009,rest,default,1.1,200,ok,a,",  # not yet: no
            "1030,1030,1031,rest,default,1.1,200,ok,a,",  # in a span without an end
            "1032,1032,1033,rest,1.1,1.1,200,ok,a,",  # the default version asked by name
            "1034,1034,1035,rest,default,2.0,200,ok,a,",  # never heard of: no
            "1036,1036,1037,rest,default,,503,refused,a,",  # nobody answered
        ],
    )
    spans = [Span("1.0", True, 990, 1010), Span("1.0", False, 990, 1020), Span("1.1", True, 1010)]
    fine = report.allowed(read, spans)
    refused = {1011, 1021, 1008, 1034, 1036}
    assert {due for due, allowed in zip(read.due.tolist(), fine.tolist(), strict=True) if not allowed} == refused
    found = report.findings(read, spans=spans)
    assert found.not_allowed == 4  # the last one has no version that could have been wrong
    assert {one.version: one.not_allowed for one in found.versions} == {"1.0": 2, "1.1": 1, "2.0": 1}


def entry(at: str, version: str, event: str, **detail: Any) -> Entry:
    return Entry(1, at, "m", version, event, detail)


def test_the_page_needs_nothing_else_and_takes_no_markup_from_a_server(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    lines = [*BY_HAND, f"1004,1004,1004.1,rest,default,{evil},200,wrong,a,{evil} $x_ from the server"]
    read = write(tmp_path / "raw.csv", lines, {"model": f"m{evil}"})
    entries = [
        entry("1970-01-01T00:16:41.400+00:00", "1.1", "switching"),
        entry("1970-01-01T00:16:41.500+00:00", "1.1", "released"),
        entry("1970-01-01T00:16:43.000+00:00", "1.0", "released", back=True),
        entry("1970-01-01T00:16:42.000+00:00", "1.1", "rolled back"),
        entry("1970-01-01T00:16:42.000+00:00", "1.1", "archived"),
        entry("1970-01-01T01:00:00.000+00:00", "1.2", "switching"),
    ]
    found = report.findings(read, entries=entries)
    assert [label for _, label in found.switches] == [
        "switching to 1.1",
        "released 1.1",
        "back to 1.0",
        "rolled back 1.1",
    ]
    assert found.pause is not None
    assert found.pause.beside == (
        "switching 1.1 -0.13 s",
        "released 1.1 -0.03 s",
        "archived 1.1 +0.47 s",
        "rolled back 1.1 +0.47 s",
        "released 1.0 +1.47 s",
    )
    text = report.page(read, found)
    assert evil not in text
    assert html.escape(evil) in text
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text)
    assert "http://" not in re.sub(r"data:[^\"]+", "", text)
    assert text.count("data:image/svg+xml;base64,") == 3
    assert text == report.page(read, found)  # same content, same bytes


def test_a_file_without_requests_has_a_report(tmp_path: Path) -> None:
    read = write(tmp_path / "raw.csv", [])
    found = report.findings(read)
    assert (found.lines[0].requests, found.pause, found.versions) == (0, None, ())
    assert "<h1>" in report.page(read, found)


def test_a_cut_off_line_is_left_out_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "raw.csv"
    write(path, BY_HAND)
    whole = path.read_text()
    for cut in (len(whole) - 1, len(whole) - 30):
        path.write_text(whole[:cut])
        assert len(results.read(path)) == len(BY_HAND) - 1
    for text in ("", "a,b\n1,2\n", whole.replace("hung", "sung"), whole.replace("1000.5", "soon"), whole[5:]):
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            results.read(path)
        assert str(path) in str(caught.value)
    with pytest.raises(DataError):
        results.read(tmp_path / "none.csv")


def test_pinned_requests_need_a_version_that_the_journal_calls_live(tmp_path: Path, odd: Odd) -> None:
    with pytest.raises(SettingsError) as caught:
        fire(odd.config, ["ok"], tmp_path / "raw.csv", pinned_share=0.5)
    assert "live" in str(caught.value)
    assert not (tmp_path / "raw.csv").exists()


def test_the_load_test_is_not_a_client_of_the_client(echo: Client) -> None:
    """Its answers are read without `client.Client`: one real answer through both must agree on who gave it."""
    answer = echo.predict("echo", b"a")
    checks = Checks((Body("a", b"a"),), Path("none"), "echo")
    verdict = checks.rest(call(), 200, headers(answer.version, answer.bundle), answer.body)
    assert verdict == (200, "1.0", "ok", "")
