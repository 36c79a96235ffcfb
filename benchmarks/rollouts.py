"""Rollouts under load: what callers notice of 50 promotions and 10 rollbacks, and of the same switches done naively.

    python benchmarks/rollouts.py run --promotions 50 --rollbacks 10
    python benchmarks/rollouts.py naive --promotions 10
    python benchmarks/rollouts.py cost --promotions 3       # some four minutes: latency at rest and by phase
    python benchmarks/rollouts.py show

A private server on free ports serves the digits recipe. Its capacity is measured first, with 64 connections in a closed
loop; then an open-loop load of half of that (Poisson; REST and gRPC; the default URL and the pinned URLs of versions
that the journal calls live) goes on while versions are rolled out and rolled back. `cost` is a short run in which the
old version is retired at once, with moments of rest before, between and after. Results are kept in
benchmarks/results/rollouts-<what>.json, with the journal, and a page with the time line beside it; the raw file of
every single request, some hundred bytes each, stays where --raw says.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from marwright import files
from marwright.errors import MarwrightError, RolledBack
from marwright.packing import records
from marwright.release import journal
from marwright.release.client import Client
from marwright.release.journal import Entry
from marwright.release.loadtest import report
from marwright.release.loadtest import results as raw_results
from marwright.release.loadtest.results import Results
from marwright.release.server import Expected
from marwright.settings import RollbackSettings, RolloutSettings
from scripts import rollback, rollout

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import markdown  # noqa: E402
from tests import archives, torchserve  # noqa: E402

RESULTS = Path(__file__).parent / "results"
POLICY = """
[shadow]
requests = 50
[gate]
margin = 0.02
looks = 1
[watch]
seconds = 2.0
[settle]
idle_seconds = 1.0
warm_seconds = 600.0
"""
"""The limits of policies/digits.toml; less to replay and a shorter watch, so that sixty rollouts fit into an hour."""
COST_POLICY = POLICY.replace("warm_seconds = 600.0", "warm_seconds = 0.0")
PHASES = {
    "rest": "at rest",
    "verified": "proof: a clean process loads the archive",
    "register": "register: a worker starts, until READY",
    "shadowed": "shadow: requests go to both",
    "gated": "gate: the holdout goes to both",
    "promoted": "the switch",
    "watched": "watch",
    "retire": "the old version is drained and unregistered",
}
"""What is under way, in the order in which it happens."""
PAUSE = 5.0
"""Seconds of rest before, between and after what `cost` does."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    every = (
        ("run", "roll out and back by marwright", 50, 10),
        ("naive", "set-default, then unregister", 50, 10),
        ("cost", "a few promotions, and latency by phase", 3, 0),
    )
    for name, words, promotions, rollbacks in every:
        verb = verbs.add_parser(name, help=words)
        verb.add_argument("--promotions", type=int, default=promotions)
        verb.add_argument("--rollbacks", type=int, default=rollbacks)
        verb.add_argument("--share", type=float, default=0.5, help="of the capacity")
        verb.add_argument("--rate", type=float, help="instead of a share of the capacity")
        verb.add_argument("--raw", type=Path, default=Path("rollouts-raw.csv"))
        verb.add_argument("--name", help="of the result; the verb when not given")
    verbs.add_parser("show", help="print the tables")
    options = parser.parse_args()
    # Started in the background of a script this process ignores Ctrl-C, and so would the load test that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.verb != "show":
        measure(options)
    show()


def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
        folder = Path(name)
        store = folder / "store"
        versions = build(folder, store)
        (folder / "policies").mkdir()
        (folder / "policies" / "digits.toml").write_text(COST_POLICY if options.verb == "cost" else POLICY)
        with journal.open(store) as book:
            book.release("digits", versions[0], proven=False, why="benchmark")
        expected = {"digits": Expected(versions[0])}
        with torchserve.home(folder, expected, archives=[f"digits-{versions[0]}.mar"], store=store) as home:
            home.bring_up()
            capacity = closed(home, folder)
            rate = options.rate or options.share * capacity
            print(f"capacity {capacity:.0f} requests/s; load {rate:.0f} requests/s", flush=True)
            raw = folder / "raw.csv"
            load = loadtest(home, raw, rate)
            try:
                time.sleep(5.0)
                turns = operations(options.promotions, options.rollbacks)
                done = []
                for what in turns:
                    if options.verb == "cost":
                        time.sleep(PAUSE)
                    done.append(operate(options.verb, home, folder, versions, what))
                time.sleep(5.0)
            finally:
                load.send_signal(signal.SIGINT)
                load.wait(60)
            keep(options, home, raw, capacity, rate, done)
            shutil.move(raw, options.raw)


def build(folder: Path, store: Path) -> list[str]:
    """Four archives of two trainings."""
    made = []
    for seed in (0, 1):
        run = archives.train("digits", folder, epochs=10, seed=seed)
        made += [archives.build(run, store, threads=threads).record.version for threads in (1, 2)]
    return made


def closed(home: torchserve.Home, folder: Path) -> float:
    """Requests a second that 64 clients get who each wait for their answer; the median of three."""
    found = []
    for number in range(3):
        out = folder / f"closed-{number}.csv"
        words = ["--arrivals", "closed", "--connections", "64", "--seconds", "10", "--json", "--out", str(out)]
        said = subprocess.run(command(home, words), capture_output=True, text=True, check=True, timeout=120).stdout
        value = json.loads(said.splitlines()[-1])
        found.append(sum(value["counts"].values()) / value["seconds"])
        time.sleep(1.0)
    return sorted(found)[1]


def loadtest(home: torchserve.Home, out: Path, rate: float) -> subprocess.Popen[bytes]:
    words = ["--rate", f"{rate:.0f}", "--seconds", "100000", "--grpc-share", "0.2", "--pinned-share", "0.2"]
    words += ["--json", "--out", str(out)]
    started = subprocess.Popen(command(home, words), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not out.exists() or out.stat().st_size < 10_000:
        if started.poll() is not None or time.monotonic() > until:
            raise SystemExit("the load test did not begin")
        time.sleep(0.2)
    return started


def command(home: torchserve.Home, words: list[str]) -> list[str]:
    places = ["--store", str(home.store), "--config", str(home.config_path)]
    return [sys.executable, "-m", "scripts", "loadtest", "--model", "digits", *places, *words]


def operations(promotions: int, rollbacks: int) -> list[str]:
    """Rollbacks spread evenly between the promotions."""
    every = promotions // rollbacks if rollbacks else promotions + 1
    found: list[str] = []
    for number in range(1, promotions + 1):
        found.append("promotion")
        if rollbacks and number % every == 0 and found.count("rollback") < rollbacks:
            found.append("rollback")
    return found


def operate(verb: str, home: torchserve.Home, folder: Path, versions: list[str], what: str) -> dict[str, Any]:
    """One promotion or rollback; how it ended, and how long it took."""
    with journal.open(home.store) as book:
        released = book.released("digits")
    assert released is not None
    target = versions[(versions.index(released.version) + 1) % len(versions)]
    row: dict[str, Any] = {"what": what, "was": released.version, "began": time.time()}
    places = {"store": home.store, "config": home.config_path, "runs": folder / "runs"}
    try:
        if verb == "naive":
            with home.client(timeout=60.0) as client:
                naive(client, home.store, released.version, target)
            row |= {"ended": "switched", "version": target}
        elif what == "rollback":
            rollback.main(RollbackSettings(**places, model="digits"))  # type: ignore[arg-type]
            row |= {"ended": "settled"}
        else:
            outcome = rollout.rolled_out(RolloutSettings(**places, model="digits", version=target))  # type: ignore[arg-type]
            row |= {"ended": outcome.phase, "version": outcome.version}
    except RolledBack as back:
        row |= {"ended": "rolled back", "why": back.reason}
    except MarwrightError as error:
        row |= {"ended": "error", "why": str(error)}
    row["seconds"] = round(time.time() - row["began"], 2)
    print(json.dumps(row), flush=True)
    return row


def naive(client: Client, store: Path, was: str, target: str) -> None:
    """As scripts with curl do it: register and wait, set-default, unregister the old one."""
    client.register(f"digits-{target}.mar", initial_workers=1, synchronous=True, timeout=120)
    with journal.open(store) as book:
        book.add("digits", target, "switching", why="naive")
        client.set_default("digits", target)
        book.release("digits", target, proven=False, why="naive", running=True)
        book.add("digits", was, "retiring", why="naive")
        client.unregister("digits", was)
        book.add("digits", was, "retired", why="naive")


def keep(
    options: argparse.Namespace,
    home: torchserve.Home,
    raw: Path,
    capacity: float,
    rate: float,
    done: list[dict[str, Any]],
) -> None:
    read = raw_results.read(raw)
    with journal.open(home.store) as book:
        entries, spans = book.entries("digits"), book.spans("digits")
    found = report.findings(read, entries=entries, spans=spans)
    name = options.name or options.verb
    RESULTS.mkdir(exist_ok=True)
    files.write_text(RESULTS / f"rollouts-{name}.html", report.page(read, found))
    document = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()[1]},
        "archives": [record.version for record in records.records(home.store, "digits")],
        "capacity": round(capacity, 1),
        "rate": round(rate, 1),
        "operations": done,
        "found": asdict(found),
        "phases": phases(read, entries),
        "journal": [[entry.at, entry.version, entry.event, _brief(entry.detail)] for entry in entries],
    }
    files.write_json(RESULTS / f"rollouts-{name}.json", document)


def _brief(detail: Any) -> dict[str, Any]:
    return {key: value for key, value in detail.items() if key in ("phase", "step", "why", "reason", "id", "kind")}


def phases(read: Results, entries: Sequence[Entry]) -> dict[str, dict[str, float]]:
    """Latencies in milliseconds, from when a request was due, by what was under way then."""
    spans: list[tuple[str, float, float]] = []
    begun: dict[str, float] = {}
    names = {"registered": "register", "ready": "register"}
    for entry in entries:
        if entry.event == "rollout" and entry.detail.get("step") in ("begin", "done"):
            phase = str(entry.detail["phase"])
            begun.setdefault(phase, entry.time)
            if entry.detail["step"] == "done":
                spans.append((names.get(phase, phase), begun.pop(phase), entry.time))
        elif entry.event == "retiring":
            begun["retire"] = entry.time
        elif entry.event == "retired" and "retire" in begun:
            spans.append(("retire", begun.pop("retire"), entry.time))
    taken = np.full(len(read), "rest", dtype="U16")
    for phase, since, until in sorted(spans, key=lambda span: span[0] == "retire"):  # which is within `settled`
        taken[(read.due >= since) & (read.due < until)] = phase
    if spans:
        first, last = min(span[1] for span in spans), max(span[2] for span in spans)
        edge = (read.due < first - 2 * PAUSE) | (read.due > last + 2 * PAUSE)
        taken[edge] = ""  # a server that has just begun is no server at rest
    found = {}
    for phase in PHASES:
        latency = (read.done - read.due)[(taken == phase) & (read.outcome == "ok")] * 1000
        if len(latency):
            p50, p99, p999 = np.percentile(latency, (50, 99, 99.9))
            values = {"p50": p50, "p99": p99, "p99.9": p999, "max": latency.max()}
            found[phase] = {"requests": len(latency), **{name: round(float(each), 2) for name, each in values.items()}}
            found[phase]["failed"] = int(((taken == phase) & (read.outcome != "ok")).sum())
    return found


def section() -> str | None:
    """This benchmark's part of docs/performance.md; None before `cost` was run."""
    path = RESULTS / "rollouts-cost.json"
    if not path.exists():
        return None
    value = json.loads(path.read_text())
    rest = value["phases"]["rest"]
    rows = []
    for phase, line in PHASES.items():
        if phase in value["phases"]:
            one = value["phases"][phase]
            figures = [f"{one[name]:.1f}" for name in ("p50", "p99", "p99.9", "max")]
            rows.append([line, f"{one['requests']}", str(one["failed"]), *figures, f"{one['p99'] / rest['p99']:.1f}"])
    titles = ["what is under way", "requests", "failed", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "p99 to p99 at rest"]
    machine = value["machine"]
    done = sum(one["ended"] in ("settled", "switched") for one in value["operations"])
    return (
        "## What a rollout costs those who ask meanwhile\n\n"
        f"{machine['platform']}, {machine['cores']} cores for server, workers and load; {value['measured']}; {done} "
        f"promotions under an open-loop load of {value['rate']:.0f} requests/s, of {value['capacity']:.0f} that 64 "
        f"clients get. Latency counts from when a request was due.\n\n{markdown(titles, rows)}\n"
    )


def show() -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("what", "load/s", "promotions", "rollbacks", "requests", "refused", "broken", "hung", "wrong"):
        table.add_column(title, justify="left" if title == "what" else "right")
    for title in ("not allowed", "p50 ms", "p99 ms", "max ms", "longest pause s"):
        table.add_column(title, justify="right")
    for path in sorted(RESULTS.glob("rollouts-*.json")):
        value = json.loads(path.read_text())
        ended = [(one["what"], one["ended"]) for one in value["operations"]]
        everything = value["found"]["lines"][0]
        counts, percentiles = everything["counts"], everything["percentiles"]
        table.add_row(
            path.stem.removeprefix("rollouts-"),
            f"{value['rate']:.0f} of {value['capacity']:.0f}",
            str(sum(one in (("promotion", "settled"), ("promotion", "switched")) for one in ended)),
            str(ended.count(("rollback", "settled"))),
            str(sum(counts.values())),
            *(str(counts[name]) for name in ("refused", "broken", "hung", "wrong")),
            str(value["found"]["not_allowed"]),
            *(f"{percentiles[name]:.1f}" for name in ("p50", "p99", "max")),
            f"{value['found']['pause']['seconds']:.3f}",
        )
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
