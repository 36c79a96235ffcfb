"""What can go wrong while a version is rolled out, made to go wrong at a named point of a real command.

    names = faults.points(stage, ["rollout", "1.1"], new="1.1")             # a pass without a fault
    done = faults.command(stage, ["rollout", "1.1"], new="1.1", fault=Fault(names[7], "kill"))
    done.status, done.said                                                  # -9, what it printed

A command is `marwright …` itself, in a process of its own. It passes a point before and after each write to the
journal, each call to the server and each renewal of `serving.properties`: "ready: before GET /models/digits/new". A
call that is repeated in a loop counts once in each phase. Nothing in the product knows of any of this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from marwright import files
from marwright.errors import MarwrightError
from marwright.packing import replay
from marwright.release import journal, loading, properties, reconcile, rollout, serving, tokens
from marwright.release.grpc_api import GrpcApi
from marwright.release.journal import Journal
from marwright.release.rest_api import RestApi
from marwright.release.server import Expected, Server
from scripts import __main__ as marwright
from tests.rollouts import Stage

CHANGING = ("RegisterModel", "UnregisterModel", "set-default")
"""Calls in the middle of which a client may die, too: the server goes on with them."""

_PROCESSES = multiprocessing.get_context("forkserver")  # one import of everything for all commands
_PROCESSES.set_forkserver_preload(["tests.faults", "scripts.rollout", "scripts.rollback", "scripts.reconcile"])


@dataclass(frozen=True)
class Fault:
    """`deed` is done when the command passes the point `at` for the first time; see `_DEEDS`."""

    at: str
    deed: str = "kill"


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit status (-9 where it was killed), what it said, the points that it passed."""

    status: int
    said: str
    points: tuple[str, ...]


@dataclass(frozen=True)
class Detour:
    """Where management calls go instead: to a proxy that has faults."""

    management_url: str
    grpc_management: str


def command(
    stage: Stage,
    words: Sequence[str],
    *,
    new: str,
    fault: Fault | None = None,
    detour: Detour | None = None,
    refused_once: bool = False,
    proved: bool = False,
    seconds: float = 150.0,
) -> Done:
    """Run `marwright words…` on that stage to its end, with at most one fault.

    `refused_once`: every single call finds its token expired; `proved`: the clean process, which takes longer than all
    the rest and sees neither journal nor server, is left out. AssertionError when it has not ended after `seconds`.
    """
    folder = stage.home.folder / "commands"
    folder.mkdir(exist_ok=True)
    number = len(list(folder.iterdir()))
    said, passed = folder / f"{number:03}.said", folder / f"{number:03}.passed"
    places = stage.places
    argv = [*words, "--store", places.store, "--config", places.config, "--runs", places.runs]
    job = _Job([str(word) for word in argv], new, fault, detour, refused_once, proved, said, passed)
    process = _PROCESSES.Process(target=_perform, args=(job,))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"marwright {' '.join(words)} has no end after {seconds:g} s:\n{said.read_text()}")
    assert process.exitcode is not None
    points = passed.read_text(encoding="utf-8").splitlines() if passed.exists() else []
    return Done(process.exitcode, said.read_text(encoding="utf-8"), tuple(points))


def agreed(stage: Stage) -> str:
    """The one version that answers, as journal, server and `serving.properties` agree; AssertionError where not."""
    released = stage.released()
    stage.home.server.wait_ready({"digits": Expected(released.version)})  # its worker may just have been replaced
    with stage.client() as client, journal.open(stage.store) as book:
        held = loading.versions(client, "digits")
        assert rollout.unfinished(book, "digits") is None
        assert [version for version, status in held.items() if status.default] == [released.version]
        assert reconcile.differences(book, "digits", held) == []
    read = properties.read(stage.home.server.serving)["load_models"]
    assert read == f"digits-{released.version}.mar"
    assert stage.answers() == released.version
    return released.version


# -------------------------------------------------------------------- requests meanwhile


@dataclass(frozen=True)
class Asked:
    """One request on the default URL: Unix seconds, and the version that answered or what went wrong."""

    sent: float
    received: float
    version: str = ""
    error: str = ""


class Trickle:
    """Requests on the default URL, some twenty a second, for as long as the block lasts; none is sent twice."""

    def __init__(self, stage: Stage) -> None:
        self.asked: list[Asked] = []
        self._stage = stage
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def lost(self) -> list[Asked]:
        """Requests without an answer."""
        return [each for each in self.asked if each.error]

    def wrong(self) -> list[Asked]:
        """Answers by a version that the journal does not allow at that time."""
        with journal.open(self._stage.store) as book:
            spans = [span for span in book.spans("digits") if span.default]
        return [
            each
            for each in list(self.asked)
            if each.version
            and not any(
                span.version == each.version
                and span.since <= each.received
                and (span.until is None or each.sent <= span.until)
                for span in spans
            )
        ]

    def _ask(self) -> None:
        stage = self._stage
        body = next((stage.runs / stage.record("1.0").run / "golden").glob("*.png")).read_bytes()
        with stage.home.client(timeout=5.0) as client:
            while not self._over.wait(0.05):
                sent = time.time()
                try:
                    version, error = client.predict("digits", body).version, ""
                except MarwrightError as trouble:
                    version, error = "", trouble.message
                self.asked.append(Asked(sent, time.time(), version, error))


# -------------------------------------------------------------------- in the command's process


@dataclass(frozen=True)
class _Job:
    argv: Sequence[str]
    new: str
    fault: Fault | None
    detour: Detour | None
    refused_once: bool
    proved: bool
    said: Path
    passed: Path


@dataclass
class _Watcher:
    """Says which points are passed, and does what the fault wants at its own."""

    job: _Job
    phase: str = "start"
    full: bool = False
    """The disk is."""
    seen: set[str] = field(default_factory=set)

    def passes(self, when: str, what: str) -> None:
        what = re.sub(rf"\b{re.escape(self.job.new)}\b", "new", what)
        point = f"{self.phase}: {when} {re.sub(r'[0-9]+[.][0-9]+', 'old', what)}"
        if point in self.seen:
            return
        self.seen.add(point)
        with self.job.passed.open("a", encoding="utf-8") as stream:
            print(point, file=stream)
        if self.job.fault is not None and point == self.job.fault.at:
            _DEEDS[self.job.fault.deed](self)

    def server(self) -> Server:
        store = Path(self.job.argv[self.job.argv.index("--store") + 1])
        config = Path(self.job.argv[self.job.argv.index("--config") + 1])
        return Server(store / properties.SERVING, home=config.parent)


def _perform(job: _Job) -> None:
    said = os.open(job.said, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout.reconfigure(line_buffering=True)
    _watch(_Watcher(job))
    if job.detour is not None:
        _take(job.detour)
    if job.refused_once:
        _let_tokens_expire()
    if job.proved:
        replay.prove = lambda _: None
    sys.exit(marwright.main(job.argv))


def _watch(watcher: _Watcher) -> None:
    """Put the points around what changes or asks anything outside of the process."""

    def around(owner: Any, name: str, what: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def wrapped(*given: Any, **more: Any) -> Any:
            said = what(*given, **more)
            watcher.passes("before", said)
            if any(each in said for each in CHANGING):
                watcher.passes("amid", said)
            done = original(*given, **more)
            watcher.passes("after", said)
            return done

        setattr(owner, name, wrapped)

    def rest(api: RestApi, method: str, port: str, path: str, *_: object) -> str:
        return f"{method} {path}"

    def grpc(api: GrpcApi, kind: str, path: str, request: Any, *_: object) -> str:
        names = [getattr(request, name, "") for name in ("url", "model_name", "model_version")]
        return " ".join(filter(None, ["gRPC", path.rpartition("/")[2], *names]))

    def entry(book: Journal, model: str, version: str, event: str, **detail: Any) -> str:
        if event == "rollout" and detail["step"] == "begin":
            watcher.phase = detail["phase"]
        elif event == "rolling back":
            watcher.phase = "going back"
        return " ".join(["journal:", event, version, *(str(detail[key]) for key in ("phase", "step") if key in detail)])

    add = Journal.add

    def add_on_a_disk(book: Journal, model: str, version: str, event: str, **detail: Any) -> None:
        if watcher.full:  # SQLite's own error: the file may not grow, and the entry does not fit into what it has
            book._database.execute("pragma max_page_count = 1")
            detail["ballast"] = "x" * 10**5
        add(book, model, version, event, **detail)

    @contextlib.contextmanager
    def replacing_on_a_disk(path: Path) -> Iterator[Path]:
        if watcher.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        with replacing(path) as temporary:
            yield temporary

    replacing = files.replacing
    files.replacing = replacing_on_a_disk
    Journal.add = add_on_a_disk  # type: ignore[method-assign]
    around(Journal, "add", entry)
    around(RestApi, "_once", rest)
    around(GrpcApi, "_call", grpc)
    around(serving, "refresh", lambda *_: "serving.properties")


def _take(detour: Detour) -> None:
    config = Server.config

    def elsewhere(server: Server) -> properties.ServerConfig:
        return dataclasses.replace(config(server), **dataclasses.asdict(detour))

    Server.config = elsewhere  # type: ignore[method-assign]


def _let_tokens_expire() -> None:
    """Another process renews the key of each call between the moment it is read and the moment it is sent."""
    key = tokens.Tokens.key

    def expired(of: tokens.Tokens, kind: tokens.Kind) -> str:
        found = key(of, kind)
        tokens.Tokens(of.key_file, of._config).renew(kind)
        return found

    tokens.Tokens.key = expired  # type: ignore[method-assign]


def _kill(_: _Watcher) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # in a thread other than the main one: until it has arrived


def _kill_soon(_: _Watcher) -> None:
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()


def _kill_server(watcher: _Watcher) -> None:
    found = watcher.server().find()
    assert found is not None
    workers = found.process.children()
    found.process.kill()
    psutil.wait_procs([found.process, *workers], timeout=10.0)


def _kill_all(watcher: _Watcher) -> None:
    _kill_server(watcher)
    _kill(watcher)


def _kill_worker(watcher: _Watcher, *, new: bool) -> None:
    """The worker of one version dies; TorchServe starts another one."""
    found = watcher.server().find()
    assert found is not None
    killed = []
    for worker in found.process.children():
        manifest = json.loads((Path(worker.cwd()) / "MAR-INF" / "MANIFEST.json").read_text(encoding="utf-8"))
        if (manifest["model"]["modelVersion"] == watcher.job.new) == new:
            worker.kill()
            killed.append(worker)
    assert killed
    psutil.wait_procs(killed, timeout=10.0)


def _fill_disk(watcher: _Watcher) -> None:
    watcher.full = True


_DEEDS: Mapping[str, Callable[[_Watcher], None]] = {
    "kill": _kill,
    "kill soon": _kill_soon,
    "kill the server": _kill_server,
    "kill all": _kill_all,
    "kill the new worker": lambda watcher: _kill_worker(watcher, new=True),
    "kill the old worker": lambda watcher: _kill_worker(watcher, new=False),
    "fill the disk": _fill_disk,
}
