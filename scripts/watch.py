"""A live view: models, versions, workers, rates, latencies, and the rollout that runs."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from marwright import cli
from marwright.errors import MarwrightError, SettingsError
from marwright.release import journal, loading, measured, rollout, turns
from marwright.release.answers import ModelStatus
from marwright.release.journal import Journal, Release
from marwright.release.measured import Figures, Snapshot
from marwright.release.server import Server
from marwright.settings import WatchSettings
from scripts import live, status

SETTINGS = WatchSettings
WINDOW = 10.0
"""Seconds that rates and latencies are taken over: handlers tell their counts once a second."""
_PATIENCE = 3.0
"""Seconds for one call."""
_TITLES = (
    "model", "version", "server", "journal", "workers", "pids", "req/s", "5xx/s", "p50 ms", "p99 ms", "conf.", "batch",
    "restarts",
)  # fmt: skip
_LEFT_OUT = ("pids", "journal", "batch", "conf.")
"""Where a terminal is too narrow for all columns; where the journal and the server differ, a line below says so."""


@dataclass(frozen=True)
class Row:
    """One version. None is not known: not loaded, not counted, or nothing was asked."""

    model: str
    version: str
    default: bool
    """The server answers with it by default."""
    released: bool
    """The journal says that it should."""
    ready: int | None = None
    wanted: int | None = None
    pids: tuple[int, ...] = ()
    requests_per_second: float | None = None
    errors_per_second: float | None = None
    p50_seconds: float | None = None
    p99_seconds: float | None = None
    confidence: float | None = None
    batch_size: float | None = None
    restarts: int = 0
    """Workers that went since this began to watch."""


@dataclass(frozen=True)
class Look:
    """All that is shown at one time."""

    at: str
    """UTC."""
    running: bool
    answered: bool
    """The server has said what it holds."""
    pid: int | None
    versions: tuple[Row, ...]
    rollouts: tuple[str, ...]
    attention: tuple[str, ...]


def main(settings: WatchSettings) -> int:
    if not settings.every > 0 or not math.isfinite(settings.every):
        raise SettingsError(f"--every is {settings.every:g}; allowed: seconds, more than 0", hint="--every 1")
    if settings.looks is not None and settings.looks < 1:
        raise SettingsError(f"--looks is {settings.looks}; allowed: 1 or more", hint="leave it out to go on for ever")
    if settings.json:
        for look in looks(settings):
            print(json.dumps(asdict(look)), flush=True)
    elif sys.stdout.isatty():
        with Live(auto_refresh=False) as shown:
            for look in looks(settings):
                shown.update(page(look, shown.console.width), refresh=True)
    else:
        console = Console(width=1000)
        for look in looks(settings):
            console.print(page(look))
            sys.stdout.flush()
    return 0


def looks(settings: WatchSettings) -> Iterator[Look]:
    """One look after another, `settings.every` seconds from the beginning of one to that of the next."""
    eye = Eye(settings)
    for number in itertools.count(1):
        began = time.monotonic()
        yield eye.look()
        if number == settings.looks:
            return
        time.sleep(max(0.0, settings.every - (time.monotonic() - began)))


@dataclass
class Eye:
    """Looks, and remembers what rates and restarts are reckoned from. Whatever does not answer is said, and looked for
    again the next time.
    """

    settings: WatchSettings
    _pages: deque[Snapshot] = field(default_factory=deque)
    _pids: dict[tuple[str, str], frozenset[int]] = field(default_factory=dict)
    _restarts: dict[tuple[str, str], int] = field(default_factory=dict)
    _server: int | None = None

    def look(self) -> Look:
        settings = self.settings
        attention: list[str] = []
        serving: dict[tuple[str, str], ModelStatus] = {}
        running = None
        asked = False
        try:
            running = Server(settings.serving, home=settings.home).find()
            self._begin_with(running.pid if running else None)
            if running is not None:
                serving = self._ask()
                asked = True
        except MarwrightError as error:
            attention.append(str(error))
        released: dict[str, Release] = {}
        rollouts: list[str] = []
        try:
            with journal.open(settings.store) as book:
                released = {name: one for name, one in book.releases().items() if self._wanted(name)}
                rollouts = [line for model in released for line in self._rollout(book, model)]
            if asked:
                attention += status.against_journal(settings, serving, changing=False)
        except MarwrightError as error:
            attention.append(str(error))
        mine = {key: one for key, one in serving.items() if self._wanted(key[0])}
        keys = sorted(mine.keys() | {(model, one.version) for model, one in released.items()}, key=_numerically)
        rows = tuple(self._row(key, mine.get(key), released.get(key[0])) for key in keys)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        pid = running.pid if running else None
        return Look(now, running is not None, asked, pid, rows, tuple(rollouts), tuple(attention))

    def _wanted(self, model: str) -> bool:
        return self.settings.model in (None, model)

    def _begin_with(self, pid: int | None) -> None:
        """Another server, or none: what was counted and who worked before belongs to the one that went."""
        if pid != self._server:
            self._server = pid
            self._pages.clear()
            self._pids.clear()

    def _ask(self) -> dict[tuple[str, str], ModelStatus]:
        with live.client(self.settings, timeout=_PATIENCE, starting=0) as client:
            serving = {
                (model, version): held
                for model in client.models()
                for version, held in loading.versions(client, model).items()
            }
            self._pages.append(measured.read(client))
        while len(self._pages) > 2 and self._pages[1].at < self._pages[-1].at - WINDOW:
            self._pages.popleft()
        for key, held in serving.items():
            pids = frozenset(loading.ready_pids(held))
            self._restarts[key] = self._restarts.get(key, 0) + len(self._pids.get(key, frozenset()) - pids)
            self._pids[key] = pids
        for key in self._pids.keys() - serving.keys():  # taken out: its workers are meant to be gone
            del self._pids[key]
        return serving

    def _row(self, key: tuple[str, str], held: ModelStatus | None, release: Release | None) -> Row:
        model, version = key
        row = Row(model, version, held is not None and held.default, release is not None and release.version == version)
        if held is None:
            return row
        figures: Figures | None = None
        if len(self._pages) > 1:
            between = self._pages[-1] - self._pages[0]
            figures = between.of(model, version)
        rates: dict[str, Any] = {}
        if figures is not None:
            times = figures.histogram("handle_seconds")
            rates = {
                "requests_per_second": figures.answered / between.at,
                "errors_per_second": figures.failed / between.at,
                "p50_seconds": _known(times.quantile(0.5)),
                "p99_seconds": _known(times.quantile(0.99)),
                "confidence": _known(figures.histogram("confidence").bucket_mean),
                "batch_size": _known(figures.histogram("batch_size").whole_bucket_mean),
            }
        return replace(
            row,
            ready=held.ready_workers,
            wanted=held.min_workers,
            pids=tuple(worker.pid for worker in held.workers if worker.pid > 0),  # none before it has started
            restarts=self._restarts.get(key, 0),
            **rates,
        )

    def _rollout(self, book: Journal, model: str) -> Iterator[str]:
        """The one that runs, else the last one: how far it is, since when, who holds it, and what the gate said."""
        entries = [one for one in book.entries(model) if one.event in ("rollout", "rolling back", "rolled back")]
        left = rollout.unfinished(book, model)
        holder = turns.holder(self.settings.store, model)
        if not entries:
            if holder:
                yield f"{model}: held by {holder}"
            return
        last = entries[-1]
        if left is None:
            how = f"rolled back: {last.detail['reason']}" if last.event == "rolled back" else "settled"
            said = f"{model}: the last {last.detail.get('kind', 'rollout')}, of {last.version}, {how.splitlines()[0]}"
        elif left.failing:
            said = f"{model}: the {left.kind} of {left.version} is on its way back: {left.failing.splitlines()[0]}"
        else:
            said = f"{model}: {left.kind} of {left.version} (was {left.champion}) in phase {left.next}"
        seconds = max(0.0, time.time() - last.time)
        when = f"for {seconds:.0f} s" if left else f"at {last.at[:19].replace('T', ' ')} UTC"
        held = f", held by {holder}" if holder else ""
        if left is not None and not holder:
            held = f", held by nobody: marwright rollout --resume --model {model}"
        yield f"{said}, {when}{held}"
        verdict = rollout.last_verdict(book, model, last.version)
        if verdict is not None:
            yield f"{model}: the gate on {last.version}: {verdict.outcome}, {verdict.reason}"


def page(look: Look, width: int = 1000) -> Group:
    """What one look is for people, in so many columns of a terminal."""
    server = f"running, pid {look.pid}" if look.running else "not running (make serve starts it)"
    lines = [f"{look.at[:19].replace('T', ' ')} UTC   TorchServe: {server}"]
    below = [*look.rollouts, *(f"attention: {line}" for line in look.attention)]
    if not look.versions:
        below.insert(0, "nothing is loaded or released")
    unknown = "unknown" if look.running and not look.answered else "not loaded"
    cells = [_cells(row, unknown) for row in look.versions]
    rows = cli.table(*_fitting(cells, width)) if cells else Text("")
    return Group(*map(Text, lines), rows, *map(Text, below), Text(""))


def _fitting(rows: list[tuple[str, ...]], width: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Titles and cells of the columns that there is room for."""
    columns = dict(zip(_TITLES, zip(*rows, strict=True), strict=True))
    for title in _LEFT_OUT:
        if sum(2 + max(map(len, (name, *cells))) for name, cells in columns.items()) - 2 > width:
            del columns[title]
    return tuple(columns), list(zip(*columns.values(), strict=True))


def _cells(row: Row, unknown: str) -> tuple[str, ...]:
    held = row.ready is not None
    return (
        row.model,
        row.version,
        ("answers" if row.default else "loaded") if held else unknown,
        "should answer" if row.released else "",
        f"{row.ready}/{row.wanted}" if held else "",
        " ".join(map(str, row.pids)),
        _number(row.requests_per_second, 1),
        _number(row.errors_per_second, 1),
        _number(row.p50_seconds, 1, 1000),
        _number(row.p99_seconds, 1, 1000),
        _number(row.confidence, 3),
        _number(row.batch_size, 1),
        str(row.restarts) if held else "",
    )


def _number(value: float | None, digits: int, times: float = 1.0) -> str:
    return "-" if value is None else f"{value * times:.{digits}f}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _numerically(key: tuple[str, str]) -> tuple[str, list[str]]:
    """1.10 after 1.9; a foreign archive may call its version anything."""
    return key[0], [part.zfill(12) for part in key[1].split(".")]
