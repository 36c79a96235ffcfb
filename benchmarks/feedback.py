"""What the feedback store takes: requests a second in, seconds for each question, at 10³ to 10⁵ requests.

    python benchmarks/feedback.py run                    # SQLite; adds lines to results/feedback-store.csv
    python benchmarks/feedback.py run --database URL     # another, empty, database
    python benchmarks/feedback.py show

Requests are what a worker captures of digits: a 16×16 PNG, ten probabilities, an embedding of 64, 64 requests in a
frame; every other one is labelled. The spool is written beforehand and not timed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats  # noqa: F401  (imported late by the store: its second is no row's)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from handlers import spool  # noqa: E402
from marwright.feedback.store import Store  # noqa: E402
from tests.feedback import spools  # noqa: E402
from tests.feedback.spools import Asked  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "feedback-store.csv"
SIZES = (1_000, 10_000, 100_000)
FIELDS = ("at", "database", "requests", "what", "seconds", "cpu", "rows", "bytes", "load")
FRAME = 64
EMBEDDING = 64


def written(folder: Path, count: int) -> None:
    """A spool of so many requests and half as many labels."""
    head = {"v": 1, "model": "digits", "version": "1.0", "bundle": "b" * 16}
    spec = spools.DIGITS
    writer = spool.Writer(folder, "requests", head | {"spec": json.loads(spec.to_json())})
    for start in range(0, count, FRAME):
        asked = [Asked(f"{start + n:036d}", time=float(start)) for n in range(min(FRAME, count - start))]
        header, payload = spools.frame(asked)
        embedding = np.random.default_rng(start).normal(size=(len(asked), EMBEDDING)).astype(np.float16)
        header["outputs"]["embedding"] = [len(payload), *embedding.shape, "float16"]
        writer.append(header, payload + embedding.tobytes())
    writer.close()
    labels = spool.Writer(folder, "labels", {"v": 1, "collector": "1.0"})
    for start in range(0, count, 2 * FRAME):
        some = [
            spools.said(f"{n:036d}", spec.classes[n % 10], uid=f"u{n}")
            for n in range(start, min(count, start + 2 * FRAME), 2)
        ]
        labels.append({"received": start + 60.0, "labels": some})
    labels.close()


def measured(count: int, database: str | None) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=".") as name, Store.open(Path(name), database) as store:
        written(Path(name) / "spool", count)

        def timed(what: str, call: Callable[[], Any]) -> dict[str, Any]:
            began, used = time.perf_counter(), time.process_time()
            found = call()
            seconds, cpu = time.perf_counter() - began, time.process_time() - used
            return {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "database": "sqlite" if store.database.sqlite else "postgresql",
                "requests": count,
                "what": what,
                "seconds": round(seconds, 4),
                "cpu": round(cpu, 4),
                "rows": len(found) if isinstance(found, list) else "",
                "bytes": store.database.bytes,
                "load": round(os.getloadavg()[0], 1),
            }

        yield timed("ingest", lambda: store.ingest(Path(name) / "spool"))
        yield timed("status", store.status)
        yield timed("unknown", store.unknown)
        yield timed("labelled", lambda: store.labelled("digits"))
        yield timed("labelled, majority", lambda: store.labelled("digits", conflict="majority"))
        yield timed("answered, last 500", lambda: store.answered("digits", version="1.0", last=500))
        yield timed("forget", lambda: store.forget(f"{0:036d}"))
        yield timed("prune half", lambda: store.prune(days=1, now=count / 2 + 86_400.0))


def run(sizes: list[int], database: str | None) -> None:
    new = not RESULTS.exists()
    for count in sizes:
        for row in measured(count, database):
            with RESULTS.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, FIELDS)
                if new:
                    writer.writeheader()
                    new = False
                writer.writerow(row)
            print(row, flush=True)


def run_within(sizes: list[int], seconds: float) -> None:
    """Sizes of SQLite that are not in the raw file yet, smallest first, as long as they should fit into `seconds`: a
    size takes as long for each request as the one before it took, and half as much again."""
    began = time.monotonic()
    each = 0.0
    for count in sorted(sizes):
        if RESULTS.exists():
            with RESULTS.open(encoding="utf-8") as file:
                there = [row for row in csv.DictReader(file) if row["database"] == "sqlite"]
            mine = [float(row["seconds"]) for row in there if int(row["requests"]) == count]
            if mine:
                each = max(each, sum(mine) / count)
                continue
        expected = 1.5 * each * count
        left = seconds - (time.monotonic() - began)
        if expected > left:
            print(f"{count} requests would take {expected / 60:.0f} minutes, {left / 60:.0f} are left", flush=True)
            return
        before = time.monotonic()
        run([count], None)
        each = (time.monotonic() - before) / count


def show() -> None:
    """The last measurement of each, as a table."""
    with RESULTS.open(encoding="utf-8") as file:
        latest = {(row["database"], row["what"], int(row["requests"])): row for row in csv.DictReader(file)}
    sizes = sorted({size for _, _, size in latest})
    print("| database | seconds for | " + " | ".join(f"{size} requests" for size in sizes) + " |")
    print("|---|---|" + "---|" * len(sizes))
    for database, what in dict.fromkeys((database, what) for database, what, _ in latest):
        rows = [latest.get((database, what, size)) for size in sizes]
        cells = ["" if row is None else f"{float(row['seconds']):.2f}" for row in rows]
        if what == "ingest":
            cells = [
                f"{cell} ({size / float(row['seconds']):.0f}/s)" if row else ""
                for cell, size, row in zip(cells, sizes, rows, strict=True)
            ]
        print(f"| {database} | {what} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--database")
    given = parser.parse_args()
    if given.what == "run":
        run(given.sizes, given.database)
    else:
        show()


if __name__ == "__main__":
    main()
