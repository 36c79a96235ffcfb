"""Which settings of the server and of a model matter, and why no single one is best for few clients and for many.

    python benchmarks/levers.py grid --data cifar10.zip      # workers × batch, at 1, 8, 64 and 128 connections
    python benchmarks/levers.py server --data cifar10.zip    # logging, metrics, JVM, threads: each alone
    python benchmarks/levers.py asynchronous                 # what becomes of requests in that mode of TorchServe's
    python benchmarks/levers.py show

All of it with cifar10's small net as we serve it, 32×32 PNGs, every answer checked (`serving/load.c`). `grid` has all
settings side by side in one server, as versions of one model, and goes through them in another order each round;
`server` starts a server for each lever in each round. Each verb replaces its own file in benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import rows  # noqa: E402
from benchmarks.serving import load, material, systems  # noqa: E402
from benchmarks.serving.material import Material  # noqa: E402
from marwright.learning import recipe  # noqa: E402
from marwright.packing import archive, container  # noqa: E402
from marwright.release import properties  # noqa: E402
from marwright.release.server import Expected  # noqa: E402
from marwright.release.tokens import Tokens  # noqa: E402
from tests import torchserve  # noqa: E402

RESULTS = Path(__file__).parent / "results"
WORK = ROOT / "runs" / "serving"
CONNECTIONS = (1, 8, 64, 128)
GRID = ((1, 1), (2, 1), (1, 8), (2, 4), (2, 8), (2, 12), (2, 16), (2, 32), (1, 32))
"""(workers, batch), delay 1 ms, one thread each."""
GATHERING = (4, 8, 16)
"""Workers with batch 1 and one process behind them, which forms the batches: the experiment of `gathering.py`."""
EMPTY = (1, 2, 4)
"""Workers with batch 1 around a handler that does nothing: what the frontend can do one by one, whatever is behind."""

KINDS = {"cifar10": "", "nothing": ", nothing in it", "gathering": ", batches formed in the worker"}
"""Models of the grid, as the table says them."""

POOL = "-Djava.util.concurrent.ForkJoinPool.common.parallelism="
LEVERS: dict[str, dict[str, str]] = {
    "as shipped": {},
    "default logging": {"vmargs": f"{POOL}8"},
    "metrics_mode=log": {"metrics_mode": "log"},
    "async_logging=true": {"async_logging": "true"},
    "one netty thread": {"number_of_netty_threads": "1", "netty_client_threads": "1"},
    "prefer_direct_buffer=true": {"prefer_direct_buffer": "true"},
    "use_native_io=false": {"use_native_io": "false"},
    "system metrics off": {"disable_system_metrics": "true"},
    "fork-join pool as Java chooses": {"vmargs": "-Dlog4j.configurationFile=deploy/log4j2.xml"},
    "fork-join pool of 2": {"vmargs": f"-Dlog4j.configurationFile=deploy/log4j2.xml {POOL}2"},
    "SerialGC, 256 MB": {"vmargs": "+-XX:+UseSerialGC -Xmx256m"},
    "ParallelGC": {"vmargs": "+-XX:+UseParallelGC"},
    "C1 compiler alone": {"vmargs": "+-XX:TieredStopAtLevel=1"},
    "keys not checked": {"disable_token_authorization": "true"},
    "job_queue_size=100": {"job_queue_size": "100"},
}
"""Settings beside those of config.properties; a `+` adds to what is there."""

NOTHING = """
from handlers import wire

class Nothing:
    def initialize(self, context):
        wire.install(on=True)

    def handle(self, data, context):
        return [b'{"a": 1}'] * len(data)
"""
SLOW = """
import asyncio

class Slow:
    def initialize(self, context):
        pass

    async def handle(self, data, context):
        await asyncio.sleep(2)
        return [b"{}"] * len(data)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("grid", "server"):
        verb = verbs.add_parser(name)
        verb.add_argument("--data", type=Path, help="cifar10 as a zip or folder")
        verb.add_argument("--rounds", type=int, default=3)
        verb.add_argument("--seconds", type=float, default=3.0, help="of each row")
    verbs.add_parser("asynchronous")
    verbs.add_parser("show")
    options = parser.parse_args()
    if options.verb == "grid":
        grid(options)
    elif options.verb == "server":
        server(options)
    elif options.verb == "asynchronous":
        asynchronous()
    print(section() or "nothing was measured yet")


def grid(options: argparse.Namespace) -> None:
    made, out = material.make(WORK, options.data), RESULTS / "levers-grid.csv"
    out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
        folder = Path(name)
        program, store = load.build(folder), folder / "store"
        named = {f"1.{n}": (workers, batch, "cifar10") for n, (workers, batch) in enumerate(GRID)}
        named |= {f"2.{n}": (workers, 1, "nothing") for n, workers in enumerate(EMPTY)}
        named |= {f"3.{n}": (workers, 1, "gathering") for n, workers in enumerate(GATHERING)}
        for version, (workers, batch, model) in named.items():
            if model == "nothing":
                nothing(store, version, workers)
            elif model == "gathering":
                gathering(made, store, version, workers)
            else:
                ours(made, store, version, workers=workers, batch_size=batch)
        first = next(iter(named))
        expected = {"cifar10": Expected(first, GRID[0][0])}
        with torchserve.home(folder, expected, archives=[f"cifar10-{first}.mar"], store=store) as home:
            home.bring_up()
            with home.client(timeout=120.0) as client:
                for version, (workers, _, model) in list(named.items())[1:]:
                    client.register(f"{model}-{version}.mar", initial_workers=workers, synchronous=True, timeout=120)
            keys = Tokens(home.key_file, home.config)
            port = int(home.config.inference_url.rpartition(":")[2])
            for number in range(-1, options.rounds):  # the first round is not counted: Java begins slowly
                order = list(named.items())
                random.Random(number).shuffle(order)
                for version, (workers, batch, model) in order:
                    sent = cases(made, port, f"/predictions/{model}/{version}", keys, exact=model == "nothing")
                    manifest = load.write(folder / "sent", sent)
                    for connections in CONNECTIONS:
                        seconds = options.seconds if number >= 0 else 1.0
                        found = load.ask(program, manifest, port=port, connections=connections, seconds=seconds)
                        if number >= 0:
                            where = {"round": number, "model": model, "workers": workers, "batch": batch}
                            rows.add(out, {**where, "connections": connections, **figures(found)})


def server(options: argparse.Namespace) -> None:
    made, out = material.make(WORK, options.data), RESULTS / "levers-server.csv"
    out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
        program = load.build(Path(name))
        for number in range(options.rounds):
            order = list(LEVERS)
            random.Random(number).shuffle(order)
            for lever in order:
                with opened(made, Path(name) / f"{number}-{order.index(lever)}", LEVERS[lever]) as (port, keys, folder):
                    manifest = load.write(folder / "sent", cases(made, port, "/predictions/cifar10", keys))
                    load.warm(program, manifest, port=port, seconds=8.0)
                    for connections in (64, 1):
                        found = load.ask(program, manifest, port=port, connections=connections, seconds=options.seconds)
                        rows.add(out, {"round": number, "lever": lever, "connections": connections, **figures(found)})


def figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """One row; SystemExit where an answer was not right."""
    if load.failures(found):
        print(f"{load.failures(found)} requests without a right answer: {found['complaint']}", flush=True)
    return {
        "per_second": round(found["right"] / found["seconds"], 1),
        "p50_ms": round(found["p50_us"] / 1000, 3),
        "p99_ms": round(found["p99_us"] / 1000, 3),
        "failed": load.failures(found),
    }


@contextlib.contextmanager
def opened(
    made: Material,
    folder: Path,
    lever: Mapping[str, str],
    *,
    workers: int = 2,
    batch_size: int = 16,
    model: str = "cifar10",
) -> Iterator[tuple[int, Tokens, Path]]:
    """A server of its own with this lever, the workers of `model` ready: cifar10, or gathering."""
    folder.mkdir(parents=True)
    if model == "gathering":
        gathering(made, folder / "store", "1.0", workers)
    else:
        ours(made, folder / "store", "1.0", workers=workers, batch_size=batch_size)
    shipped = properties.read(ROOT / "config.properties")
    settings = {key: f"{shipped[key]} {value[1:]}" if value.startswith("+") else value for key, value in lever.items()}
    expected = {model: Expected("1.0", workers)}
    with torchserve.home(folder, expected, archives=[f"{model}-1.0.mar"], settings=settings) as home:
        home.bring_up()
        yield int(home.config.inference_url.rpartition(":")[2]), Tokens(home.key_file, home.config), folder


def ours(made: Material, store: Path, version: str, **serving: object) -> None:
    given: dict[str, object] = {"data.path": "-", "serving.explain": False, "serving.max_batch_delay": 1}
    given |= {f"serving.{name}": value for name, value in serving.items()}
    net = made.nets["small"]
    chosen = recipe.load("cifar10", recipes_dir=ROOT / "recipes", overrides=given)
    archive.write(net.run, net.artifact, chosen.model_copy(update={"name": "cifar10"}), store, version=version)


def gathering(made: Material, store: Path, version: str, workers: int) -> None:
    """Our archive with the experiment's handler in the place of its own."""
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
        ours(made, Path(name), version, workers=workers, batch_size=1)
        with zipfile.ZipFile(Path(name) / f"cifar10-{version}.mar") as opened:
            members = {one: opened.read(one) for one in opened.namelist()}
    manifest = json.loads(members[archive.MANIFEST])
    manifest["model"] |= {"modelName": "gathering", "handler": "answers.py"}
    members |= {
        archive.MANIFEST: json.dumps(manifest).encode(),
        "gathering.py": (Path(__file__).parent / "gathering.py").read_bytes(),
        "answers.py": b"import gathering\n\n\nclass Answers(gathering.Gathering):\n    pass\n",
    }
    digests = {one: hashlib.sha256(content).hexdigest() for one, content in members.items() if one != archive.DIGESTS}
    members[archive.DIGESTS] = (json.dumps(digests, indent=2, sort_keys=True) + "\n").encode()
    store.mkdir(parents=True, exist_ok=True)
    container.write(store / f"gathering-{version}.mar", members)


def nothing(store: Path, version: str, workers: int) -> None:
    """Our codec around a handler that does nothing, batch 1."""
    by_hand(store, "nothing", version, NOTHING, f"minWorkers: {workers}\nmaxWorkers: {workers}\nbatchSize: 1\n")


def by_hand(store: Path, name: str, version: str, handler: str, config: str) -> None:
    manifest = {"modelName": name, "modelVersion": version, "handler": "answers.py", "configFile": "model-config.yaml"}
    document = {"runtime": "python", "model": manifest, "archiverVersion": "0.12.0", "createdOn": "01/01/2000 00:00:00"}
    store.mkdir(parents=True, exist_ok=True)
    members = {**archive.package(), "answers.py": handler.encode(), "model-config.yaml": config.encode()}
    container.write(store / f"{name}-{version}.mar", members | {"MAR-INF/MANIFEST.json": json.dumps(document).encode()})


def cases(made: Material, port: int, path: str, keys: Tokens, *, exact: bool = False) -> list[load.Case]:
    served = systems.Served(port, 0.0, lambda: {"Authorization": f"Bearer {keys.key('inference')}"})
    system = replace(systems.SYSTEMS["marwright-throughput"], path=path)
    found = system.cases(made, "png32", served)
    return [load.Case(one.request, "exact", b'{"a": 1}') for one in found] if exact else found


def asynchronous() -> None:
    """Twenty requests wait in a worker that is killed: who hears of it, in TorchServe's two ways of talking to it?"""
    out = RESULTS / "levers-asynchronous.csv"
    out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
        store = Path(name) / "store"
        for version, mode in (("1.0", "true"), ("1.1", "false")):
            handler = (
                SLOW
                if mode == "true"
                else SLOW.replace("async def", "def").replace("await asyncio", "import time; time")
            )
            # Its aggregator fails on any batch of more than one (it changes the list that it goes through).
            batch = 1 if mode == "true" else 20
            config = f"minWorkers: 1\nmaxWorkers: 1\nbatchSize: {batch}\nasyncCommunication: {mode}\n"
            by_hand(store, "slow", version, handler, config)
        with torchserve.home(Path(name), {}, store=store) as home:
            home.bring_up()
            with home.client(timeout=60.0) as client:
                for version, mode in (("1.0", "asynchronous"), ("1.1", "as usual")):
                    client.register(f"slow-{version}.mar", initial_workers=1, synchronous=True, timeout=60)
                    for kill in (False, True):
                        worker = psutil.Process(client.describe("slow", version)[0].workers[0].pid)
                        rows.add(out, {"mode": mode, "killed": kill, **fate(home, worker if kill else None, version)})


def fate(home: torchserve.Home, worker: psutil.Process | None, version: str) -> dict[str, int]:
    """What becomes of twenty requests whose worker (where one is given) is killed while it has them."""
    url = f"{home.config.inference_url}/predictions/slow/{version}"
    headers = {"Authorization": f"Bearer {Tokens(home.key_file, home.config).key('inference')}"}

    def ask(number: int) -> str:
        try:
            return str(requests.post(url, data=b"x", headers=headers, timeout=20).status_code)
        except requests.Timeout:
            return "never"

    if worker is not None:
        threading.Timer(0.7, worker.kill).start()
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(20)))
    refused = sum(one.startswith("5") for one in found)
    return {"answered": found.count("200"), "refused": refused, "never_told": found.count("never")}


def section() -> str | None:
    """What was measured, as tables."""
    parts = [_grid(), _server(), _asynchronous()]
    return "\n".join(part for part in parts if part) or None


def _grid() -> str:
    path = RESULTS / "levers-grid.csv"
    if not path.is_file():
        return ""
    about, found = rows.read(path)
    cells: dict[tuple[str, str, str], dict[int, list[tuple[float, float]]]] = {}
    for row in found:
        place = cells.setdefault((row["model"], row["workers"], row["batch"]), {})
        place.setdefault(int(row["connections"]), []).append((float(row["per_second"]), float(row["p50_ms"])))
    middle = {
        key: {n: tuple(float(np.median(column)) for column in zip(*values, strict=True)) for n, values in place.items()}
        for key, place in cells.items()
    }
    real = {key: place for key, place in middle.items() if key[0] != "nothing"}
    best = {n: max(place[n][0] for place in real.values()) for n in CONNECTIONS}
    table = []
    for (model, workers, batch), place in middle.items():
        what = f"{workers} × batch {batch}{KINDS[model]}"
        shares = [place[n][0] / best[n] for n in CONNECTIONS]
        worst = "" if model == "nothing" else f"{min(shares):.2f}"
        table.append([what, *(f"{place[n][0]:.0f} ({place[n][1]:.2f})" for n in CONNECTIONS), worst])
    good = [key for key, place in real.items() if all(place[n][0] >= 0.75 * best[n] for n in CONNECTIONS)]
    said = (
        "Within 25 % of the best everywhere: " + ", ".join(f"{w} × batch {b}{KINDS[m]}" for m, w, b in good) + "."
        if good
        else "No setting is within 25 % of the best at 1, 8, 64 and 128 connections at once."
    )
    titles = ["workers × batch", *(f"{n} connections" for n in CONNECTIONS), "worst share of the best"]
    return "\n".join(
        ["## Workers and batches", "", f"Answers a second, p50 in ms in brackets; medians of the rounds ({about}).", "",
         rows.markdown(titles, table), "", said, ""]
    )  # fmt: skip


def _server() -> str:
    path = RESULTS / "levers-server.csv"
    if not path.is_file():
        return ""
    about, found = rows.read(path)
    values: dict[tuple[str, str], dict[int, float]] = {}
    for row in found:
        values.setdefault((row["lever"], row["connections"]), {})[int(row["round"])] = float(row["per_second"])
    table = []
    for lever in LEVERS:
        cells = [lever]
        for n in ("64", "1"):
            here, base = values.get((lever, n), {}), values[("as shipped", n)]
            ratios = sorted(here[number] / base[number] for number in here if number in base)
            cells.append(
                f"{np.median(list(here.values())):.0f}, {np.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
        table.append(cells)
    return "\n".join(
        ["## The server's levers", "",
         f"Answers a second, and their ratio to what is shipped: median and range of the rounds ({about}).", "",
         rows.markdown(["lever", "64 connections", "1 connection"], table), ""]
    )  # fmt: skip


def _asynchronous() -> str:
    path = RESULTS / "levers-asynchronous.csv"
    if not path.is_file():
        return ""
    _, found = rows.read(path)
    table = [list(row.values()) for row in found]
    return "\n".join(
        [
            "### Twenty requests, and a worker that is killed while it has them",
            "",
            rows.markdown([name.replace("_", " ") for name in found[0]], table),
            "",
        ]
    )


if __name__ == "__main__":
    main()
