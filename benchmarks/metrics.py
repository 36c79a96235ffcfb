"""What the counting costs: digits' throughput with metrics and without, in pairs.

    python benchmarks/metrics.py run --pairs 12
    python benchmarks/metrics.py show
    python benchmarks/metrics.py batch

`run` serves two versions of the same archive from one server, one of them with `handler: {metrics: off}`; 64 clients in
a closed loop ask one version after the other. A pair is on, off, off, on, the next one off, on, on, off, so that a
machine that grows slower or faster favours neither; and for each pair both workers are new, so that the luck of one
process is not taken for the cost. Each run is a line of benchmarks/results/metrics.csv; a new `run` replaces the file.
`batch` times the handling of single batches in this process, and how much of it is the counting.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from marwright import files
from marwright.packing import container
from marwright.release import paired
from marwright.release.client import Client
from marwright.release.loadtest import bodies, results, run
from marwright.release.loadtest.bodies import Body
from marwright.release.loadtest.checks import Checks
from marwright.release.loadtest.plan import Load
from marwright.release.server import Expected
from marwright.release.tokens import Tokens

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from handlers import metrics  # noqa: E402
from tests import archives as built_archives  # noqa: E402
from tests import torchserve, zoo  # noqa: E402
from tests.handlers import archives, conftest  # noqa: E402
from tests.handlers.context import KnownMetrics, Sent  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "metrics.csv"
VERSIONS = {"on": "1.0", "off": "1.1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="measure, and keep the results")
    verb.add_argument("--pairs", type=int, default=12)
    verb.add_argument("--seconds", type=float, default=6.0, help="of each half of a pair: two runs")
    verb.add_argument("--connections", type=int, default=64)
    verb.add_argument("--out", type=Path, default=RESULTS)
    for name, words in (("show", "print the table"), ("batch", "time single batches")):
        verbs.add_parser(name, help=words).add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.verb == "batch":
        batches()
        return
    if options.verb == "run":
        measure(options, "metrics", build)
    show(options.out, "metrics")


def measure(
    options: argparse.Namespace,
    what: str,
    build: Callable[[Path], tuple[Body, ...]],
    after: Callable[[str, dict[str, Any]], Mapping[str, Any]] = lambda kind, found: {},
) -> None:
    """Pairs of runs with `what` on and off. `build` makes the two archives; `after` adds columns to a run that counts
    or does not count, before the next one begins."""
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
        folder = Path(name)
        sent = build(folder)
        expected = {"digits": Expected(VERSIONS["on"])}
        with torchserve.home(folder, expected, archives=["digits-1.0.mar"], store=folder / "store") as home:
            home.bring_up()
            rows = []
            with home.client(timeout=60.0) as client:
                client.register("digits-1.1.mar", initial_workers=1, synchronous=True, timeout=120)
                for kind in VERSIONS:
                    found = once(home, client, sent, kind, 8.0, options.connections)  # not counted: Java begins slowly
                    after(kind, found)
                for number in range(options.pairs):
                    for kind in ("on", "off"):
                        renew(client, VERSIONS[kind])
                        found = once(home, client, sent, kind, 1.5, options.connections)  # nor this: new workers, too
                        after(kind, found)
                    order = ("on", "off", "off", "on") if number % 2 == 0 else ("off", "on", "on", "off")
                    for kind in order:
                        found = once(home, client, sent, kind, options.seconds / 2, options.connections)
                        rows.append({"pair": number, what: kind, **found, **after(kind, found)})
                        print(json.dumps(rows[-1]), flush=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    about = (
        f"# {platform.platform()}, {os.cpu_count()} cores, {options.connections} connections, {sys.version.split()[0]}"
    )
    options.out.parent.mkdir(exist_ok=True)
    files.write_text(options.out, f"{about}\n{text.getvalue()}")


def build(folder: Path) -> tuple[Body, ...]:
    """The two archives in `folder/store`, and what is sent: the golden examples."""
    return versions(folder, on={}, off={"metrics": False})


def versions(folder: Path, *, on: Mapping[str, Any], off: Mapping[str, Any]) -> tuple[Body, ...]:
    """The same archive twice, with these settings of the handler."""
    built = built_archives.build(built_archives.train("digits", folder), folder / "built", version="1.0")
    sent = bodies.golden(folder / "built", "digits")
    (folder / "store").mkdir()
    for kind, changes in {"on": on, "off": off}.items():
        root = folder / kind
        container.unpack(built.path, root)
        config = yaml.safe_load((root / "model-config.yaml").read_text())
        config["handler"].update(changes)
        (root / "model-config.yaml").write_text(yaml.safe_dump(config))
        manifest = json.loads((root / "MAR-INF" / "MANIFEST.json").read_text())
        manifest["model"]["modelVersion"] = VERSIONS[kind]
        (root / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
        archives.seal(root)
        members = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        container.write(folder / "store" / f"digits-{VERSIONS[kind]}.mar", members)
    return sent


def renew(client: Client, version: str) -> None:
    """Another process behind this version."""
    client.scale("digits", version, min_workers=0, synchronous=True)
    client.scale("digits", version, min_workers=1, synchronous=True)
    until = time.monotonic() + 60
    while client.describe("digits", version)[0].ready_workers < 1:
        if time.monotonic() > until:
            raise SystemExit(f"no worker of digits {version} became ready")
        time.sleep(0.1)


def once(
    home: torchserve.Home, client: Client, sent: tuple[Body, ...], kind: str, seconds: float, connections: int
) -> dict[str, Any]:
    """One run against one version: how many answers a second, and what they cost its worker and the server."""
    version = VERSIONS[kind]
    worker = psutil.Process(client.describe("digits", version)[0].workers[0].pid)
    running = home.server.find()
    assert running is not None
    load = Load(model="digits", seconds=seconds, arrivals="closed", connections=connections, pinned_share=1.0)
    raw = home.folder / "raw.csv"
    spent = cpu(worker), cpu(running.process)
    summary = run.run(
        home.config,
        Tokens(home.key_file, home.config),
        load,
        sent,
        Checks(sent, home.store, "digits"),
        raw,
        pinnable=lambda: (version,),
        progress=False,
    )
    spent = cpu(worker) - spent[0], cpu(running.process) - spent[1]
    latency = results.read(raw).latency * 1000
    raw.unlink()
    if summary.failed:
        raise SystemExit(f"{summary.failed} requests failed: {summary.failures[:3]}")
    return {
        "requests": summary.requests,
        "seconds": round(summary.seconds, 4),
        "per_second": round(summary.requests / summary.seconds, 2),
        "p50_ms": round(float(np.percentile(latency, 50)), 3),
        "p99_ms": round(float(np.percentile(latency, 99)), 3),
        "worker_cpu_us": round(spent[0] / summary.requests * 1e6, 2),
        "server_cpu_us": round(spent[1] / summary.requests * 1e6, 2),
        "load": round(os.getloadavg()[0], 2),
    }


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def show(path: Path, what: str) -> None:
    """On over off, each with its 95 % interval: paired by time, Student's t on the logarithms of the ratios."""
    lines = path.read_text().splitlines()
    print(lines[0].removeprefix("# "))
    rows = list(csv.DictReader(lines[1:]))
    table = Table(box=None, pad_edge=False)
    for title in ("", f"{what} on", f"{what} off", "on / off", "95 % interval"):
        table.add_column(title, justify="left" if not title else "right")
    figures = {"per_second": "requests a second", "p50_ms": "p50 ms", "p99_ms": "p99 ms"}
    figures |= {"worker_cpu_us": "worker, µs of CPU each", "server_cpu_us": "server, µs of CPU each"}
    for name, title in figures.items():
        values = {kind: halves(rows, what, kind, name) for kind in VERSIONS}
        ratios = np.log(values["on"] / values["off"])
        low, high = paired.means(ratios, 0.975)  # on each side
        interval = "" if low is None or high is None else f"{math.exp(low):.3f} to {math.exp(high):.3f}"
        medians = (f"{float(np.median(values[kind])):.1f}" for kind in VERSIONS)
        table.add_row(title, *medians, f"{math.exp(ratios.mean()):.3f}", interval)
    Console(width=120).print(table)
    print(f"{len(rows) // 4} pairs; the columns are medians, the ratio is the geometric mean of the pairs' ratios")


def halves(rows: list[dict[str, str]], what: str, kind: str, name: str) -> NDArray[np.float64]:
    """For each pair the mean of its two runs of that kind."""
    values = [float(row[name]) for row in rows if row[what] == kind]
    return np.array(values).reshape(-1, 2).mean(axis=1)


def batches() -> None:
    """Microseconds of this thread for a batch of 16 small pictures: all of it, and what the counting adds."""
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
        root = archives.write(Path(name) / "digits", "digits", "onnx")
        handler, context = conftest.begin(root, batch_size=16)
        picture = zoo.encoded(zoo.picture("L", (16, 16)))
        sent = [Sent({"body": bytearray(picture)}, {"Host": "localhost"})] * 16
        known = KnownMetrics(ROOT / "deploy" / "metrics.yaml")
        meters = metrics.Meters(known, handler.spec, model="digits", version="1.0")
        spent: dict[str, list[float]] = {"off": [], "on": [], "figures": []}
        for number in range(4000):
            for kind in ("on", "off") if number % 2 else ("off", "on"):
                handler.meters = meters if kind == "on" else metrics.Meters(None, handler.spec, model="", version="")
                begun = time.perf_counter()
                context.ask(handler, sent)
                spent[kind].append((time.perf_counter() - begun) * 1e6)
            if number % 200 == 199:  # what the other thread does once a second
                begun = time.perf_counter()
                meters.flush()
                spent["figures"].append((time.perf_counter() - begun) * 1e6 / 200)
    on, off, figures = (float(np.median(spent[kind])) for kind in ("on", "off", "figures"))
    print(
        f"a batch of 16: {off:.0f} µs without metrics, {on - off:+.1f} µs to keep it, {figures:.1f} µs for its figures"
    )


if __name__ == "__main__":
    main()
