"""Rollouts under load: what callers notice of 50 promotions and 10 rollbacks, and of the same switches done naively.

    python benchmarks/rollouts.py run --promotions 50 --rollbacks 10
    python benchmarks/rollouts.py naive --promotions 10
    python benchmarks/rollouts.py show

A private server on free ports serves the digits recipe. Its capacity is measured first, with 64 connections in a closed
loop; then an open-loop load of half of that (Poisson; REST and gRPC; the default URL and the pinned URLs of versions
that the journal calls live) goes on while versions are rolled out and rolled back. Results are kept in
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
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from marwright import files
from marwright.errors import MarwrightError, RolledBack
from marwright.packing import records
from marwright.release import journal
from marwright.release.client import Client
from marwright.release.loadtest import report
from marwright.release.loadtest import results as raw_results
from marwright.release.server import Expected
from marwright.settings import RollbackSettings, RolloutSettings
from scripts import rollback, rollout

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, words in (("run", "roll out and back by marwright"), ("naive", "set-default, then unregister")):
        verb = verbs.add_parser(name, help=words)
        verb.add_argument("--promotions", type=int, default=50)
        verb.add_argument("--rollbacks", type=int, default=10)
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
        (folder / "policies" / "digits.toml").write_text(POLICY)
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
                done = [operate(options.verb, home, folder, versions, what) for what in turns]
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
        "journal": [[entry.at, entry.version, entry.event, _brief(entry.detail)] for entry in entries],
    }
    files.write_json(RESULTS / f"rollouts-{name}.json", document)


def _brief(detail: Any) -> dict[str, Any]:
    return {key: value for key, value in detail.items() if key in ("phase", "step", "why", "reason", "id", "kind")}


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
