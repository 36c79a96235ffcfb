"""How cost grows: models on one server, versions of one model, connections, rows of the feedback store.

    python benchmarks/growth.py run                              # all of it: an hour, most of it feedback
    python benchmarks/growth.py run --only models versions       # each may be run by itself; the others' rows stay
    python benchmarks/growth.py run --only feedback --minutes 20 # sizes that are there already are not measured again
    python benchmarks/growth.py show

A private server on free ports serves digits. `models` and `versions` register the same archive under other names, one
worker each, and look at 1, 2, 5, … of them: memory is proportional set size, so pages that workers share count once.
`connections` are closed-loop clients of load.c, every answer checked. Rows of the feedback store are measured by
benchmarks/feedback.py, in its own raw file; a size is left out where the last one says that it would not fit into what
is left of `--minutes`. Exponents are those of y = a·xᵇ through all points: 1 is growth in step, 0 is none.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import feedback, rows  # noqa: E402
from benchmarks.rows import Row  # noqa: E402
from benchmarks.serving import load  # noqa: E402
from marwright.packing import container, golden  # noqa: E402
from marwright.release import journal, reconcile  # noqa: E402
from marwright.release.client import Client  # noqa: E402
from marwright.release.server import Expected  # noqa: E402
from marwright.release.tokens import Tokens  # noqa: E402
from tests import archives as built_archives  # noqa: E402
from tests import torchserve  # noqa: E402
from tests.handlers import archives  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "growth.csv"
KINDS = ("models", "versions", "connections", "feedback")
COUNTS = {"models": (1, 2, 5, 10, 20), "versions": (1, 2, 4, 7, 10), "connections": (1, 3, 10, 30, 100, 300, 1000)}
FEEDBACK = (1_000, 10_000, 100_000, 1_000_000)
LINES = {
    "register": "seconds: register the last one",
    "describe all": "seconds: list and describe all",
    "metrics page": "seconds: read the metrics page",
    "metrics bytes": "bytes of the metrics page",
    "journal": "seconds: what the journal says against the server",
    "answer p50": "ms: p50 of the first one, 8 connections",
    "answer p99": "ms: p99 of the first one, 8 connections",
    "workers' memory": "bytes: all workers, shared pages once",
    "server's memory": "bytes: the JVM",
    "per second": "answers a second",
    "p50": "ms: p50",
    "p99": "ms: p99",
    "failed": "requests without a right answer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="measure, and keep the results")
    verb.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    verb.add_argument("--most", type=int, default=10**9, help="models, versions or connections; more are left out")
    verb.add_argument("--rows", type=int, nargs="+", default=list(FEEDBACK), help="of the feedback store")
    verb.add_argument("--minutes", type=float, default=45.0, help="for the feedback store")
    verb.add_argument("--seconds", type=float, default=5.0, help="of each look at answers")
    verb.add_argument("--out", type=Path, default=RESULTS)
    verbs.add_parser("show", help="print the tables").add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.verb == "run":
        kinds = [kind for kind in options.only if kind != "feedback"]
        kept = [row for row in rows.read(options.out)[1] if row["kind"] not in kinds] if options.out.exists() else []
        if kinds:
            with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
                measured = list(server(Path(name), kinds, options))
            rows.write(options.out, [*kept, *measured])
        if "feedback" in options.only:
            feedback.run_within(options.rows, options.minutes * 60)
    print(section(options.out) or "nothing was measured yet")


def server(folder: Path, kinds: list[str], options: argparse.Namespace) -> Iterator[Row]:
    """What `kinds` ask of a server, each of a fresh one."""
    built = built_archives.build(built_archives.train("digits", folder), folder / "built", version="1.0")
    program = load.build(folder / "program")
    measures: dict[str, Callable[..., Iterator[Row]]] = {"connections": connections}
    for kind in kinds:
        place = folder / kind
        store = place / "store"
        store.mkdir(parents=True)
        counts = [count for count in COUNTS[kind] if count <= options.most]
        for number in range(counts[-1] if kind != "connections" else 1):
            again(built.path, store, *named(kind, number), place / "unpacked")
        with torchserve.home(place, {"digits": Expected("1.0")}, archives=["digits-1.0.mar"], store=store) as home:
            home.bring_up()
            with home.client(timeout=120.0) as client:
                asked = manifest(home, client, built.golden, place / "cases")
                yield from measures.get(kind, several)(kind, counts, home, client, program, asked, options.seconds)


def named(kind: str, number: int) -> tuple[str, str]:
    """Name and version of the archive of that number."""
    if kind == "versions":
        return "digits", f"1.{number}"
    return ("digits" if number == 0 else f"digits-{number}"), "1.0"


def again(mar: Path, store: Path, model: str, version: str, root: Path) -> None:
    """The same archive under another name or number."""
    if not root.exists():
        container.unpack(mar, root)
    path = root / "MAR-INF" / "MANIFEST.json"
    document = json.loads(path.read_text())
    document["model"] |= {"modelName": model, "modelVersion": version}
    path.write_text(json.dumps(document))
    archives.seal(root)
    members = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    container.write(store / f"{model}-{version}.mar", members)


def manifest(home: torchserve.Home, client: Client, examples: tuple[golden.Golden, ...], folder: Path) -> Path:
    """What load.c sends and expects: golden pictures, and their best labels. Where labels that are nearly as likely may
    change places, a picture is left out."""
    key = Tokens(home.key_file, home.config).key("inference")
    head = f"POST /predictions/digits HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
    cases = []
    for example in examples:
        count = len(client.predict("digits", example.body).json())
        best = sorted(example.answer.items(), key=lambda pair: -pair[1])
        values = [value for _, value in best[: count + 1]]
        if all(first - second > 1e-4 for first, second in itertools.pairwise(values[:3])):
            more = f"Content-Type: image/png\r\nContent-Length: {len(example.body)}\r\n\r\n"
            cases.append(load.Case(f"{head}{more}".encode() + example.body, "labels", load.pairs(dict(best[:count]))))
    return load.write(folder, cases)


def row(kind: str, count: int, what: str, value: float) -> Row:
    found = {"kind": kind, "count": count, "what": what, "value": f"{value:.6g}", "load": round(os.getloadavg()[0], 2)}
    print(json.dumps(found), flush=True)
    return found


def several(
    kind: str, counts: list[int], home: torchserve.Home, client: Client, program: Path, asked: Path, seconds: float
) -> Iterator[Row]:
    """One after the other is registered; at each of `counts` everything is looked at."""
    running = home.server.find()
    assert running is not None
    spent = 0.0
    for count in range(1, counts[-1] + 1):
        model, version = named(kind, count - 1)
        if count > 1:
            began = time.perf_counter()
            client.register(f"{model}-{version}.mar", initial_workers=1, synchronous=True, timeout=120)
            while not client.describe(model, version)[0].ready_workers:
                time.sleep(0.05)
            spent = time.perf_counter() - began
        with journal.open(home.store) as book:
            book.release(model, version, proven=False, why="benchmark")
        if count not in counts:
            continue
        if count > 1:
            yield row(kind, count, "register", spent)
        time.sleep(2.0)  # the worker's first metrics
        times: dict[str, list[float]] = {"describe all": [], "metrics page": [], "journal": []}
        for _ in range(5):
            began = time.perf_counter()
            held = {name: {one.version: one for one in client.describe(name, "all")} for name in client.models()}
            times["describe all"].append(time.perf_counter() - began)
            began = time.perf_counter()
            page = client.metrics()
            times["metrics page"].append(time.perf_counter() - began)
            began = time.perf_counter()
            with journal.open(home.store) as book:
                for name in book.releases():
                    reconcile.differences(book, name, held.get(name, {}))
            times["journal"].append(time.perf_counter() - began)
        for what, values in times.items():
            yield row(kind, count, what, statistics.median(values))
        yield row(kind, count, "metrics bytes", len(page.encode()))
        answered = load.ask(program, asked, port=home.config.ports["inference_address"], connections=8, seconds=seconds)
        yield row(kind, count, "answer p50", answered["p50_us"] / 1000)
        yield row(kind, count, "answer p99", answered["p99_us"] / 1000)
        workers = [worker.pid for versions in held.values() for one in versions.values() for worker in one.workers]
        yield row(kind, count, "workers' memory", sum(psutil.Process(pid).memory_full_info().pss for pid in workers))
        yield row(kind, count, "server's memory", running.process.memory_info().rss)


def connections(
    kind: str, counts: list[int], home: torchserve.Home, client: Client, program: Path, asked: Path, seconds: float
) -> Iterator[Row]:
    """Clients that each wait for their answer, and ask again at once."""
    running = home.server.find()
    assert running is not None
    port = home.config.ports["inference_address"]
    load.ask(program, asked, port=port, connections=64, seconds=seconds)  # not counted: Java begins slowly
    for count in counts:
        answered = load.ask(program, asked, port=port, connections=count, seconds=seconds)
        yield row(kind, count, "per second", answered["right"] / answered["seconds"])
        yield row(kind, count, "p50", answered["p50_us"] / 1000)
        yield row(kind, count, "p99", answered["p99_us"] / 1000)
        yield row(kind, count, "failed", load.failures(answered))
        yield row(kind, count, "server's memory", running.process.memory_info().rss)


def section(path: Path = RESULTS) -> str | None:
    """This benchmark's part of docs/performance.md; None before there is a raw file."""
    if not path.exists() and not feedback.RESULTS.exists():
        return None
    about, found = rows.read(path) if path.exists() else ("", [])
    said = [
        "## How cost grows",
        *([about] if about else []),
        "The last column is the exponent: 1 is growth in step, 0 none.",
    ]
    for kind in [kind for kind in KINDS if any(row["kind"] == kind for row in found)]:
        mine = [row for row in found if row["kind"] == kind]
        counts = sorted({int(row["count"]) for row in mine})
        values = {(row["what"], int(row["count"])): float(row["value"]) for row in mine}
        table, lines = [], {}
        for what in [what for what in LINES if any(row["what"] == what for row in mine)]:
            at = [count for count in counts if (what, count) in values]
            y = [values[what, count] for count in at]
            grown = rows.exponent(at, y)
            cells = [f"{values[what, count]:.4g}" if (what, count) in values else "" for count in counts]
            table.append([LINES[what], *cells, "" if what == "failed" or math.isnan(grown) else f"{grown:.2f}"])
            if what not in ("failed", "metrics bytes") and "memory" not in what:
                lines[LINES[what].removeprefix("seconds: ")] = (at, y)
        said += [f"### {kind.capitalize()}", rows.markdown([kind, *map(str, counts), "exponent"], table)]
        rows.plot(rows.PLOTS / f"growth-{kind}.svg", lines, x=kind, y="seconds or ms")
        said.append(f"![{kind}](performance/growth-{kind}.svg)")
    if feedback.RESULTS.exists():
        said += of_feedback()
    return "\n\n".join(said) + "\n"


def of_feedback() -> list[str]:
    """SQLite's rows, the last measurement of each."""
    with feedback.RESULTS.open(encoding="utf-8") as file:
        latest = {
            (row["what"], int(row["requests"])): row for row in csv.DictReader(file) if row["database"] == "sqlite"
        }
    sizes = sorted({size for _, size in latest})
    table, lines = [], {}
    for what in dict.fromkeys(what for what, _ in latest):
        at = [size for size in sizes if (what, size) in latest]
        y = [float(latest[what, size]["seconds"]) for size in at]
        cells = [f"{float(latest[what, size]['seconds']):.2f}" if (what, size) in latest else "" for size in sizes]
        table.append([what, *cells, f"{rows.exponent(at, y):.2f}"])
        lines[what] = (at, y)
    stored = [float(latest["ingest", size]["bytes"]) for size in sizes]
    table.append(["MB of the database", *(f"{one / 1e6:.0f}" for one in stored), f"{rows.exponent(sizes, stored):.2f}"])
    rows.plot(rows.PLOTS / "growth-feedback.svg", lines, x="requests in the store", y="seconds")
    titles = ["seconds for", *(f"{size:,}".replace(",", " ") for size in sizes), "exponent"]
    return ["### Feedback, SQLite", rows.markdown(titles, table), "![feedback](performance/growth-feedback.svg)"]


if __name__ == "__main__":
    main()
