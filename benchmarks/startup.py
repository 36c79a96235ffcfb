"""Start-up by stage: from registering an archive to a READY worker, from nothing to a server's first answer, and how
long commands take before they do anything.

    python benchmarks/startup.py run --rounds 5        # some five minutes; replaces results/startup.csv
    python benchmarks/startup.py show

Ours (digits in ONNX, with and without explanations), the stock image_classifier with a small TorchScript net and an
echo handler are registered at one private server, one after the other and in another order each round. The
stages come from the worker itself: a `sitecustomize` on its path notes when the interpreter began, when certain modules
are first looked for, when the socket is bound and when `digests.json` and `spec.json` are opened (some microseconds for
each event); the handler's own metrics say how long loading and warm-up took. The kernel knows when a
process began, to 10 ms, and `describe`, asked every 20 ms, says READY.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import rows  # noqa: E402
from benchmarks.rows import Row  # noqa: E402
from marwright.release.client import Client  # noqa: E402
from marwright.release.server import Expected, Server  # noqa: E402
from tests import archives, torchserve, zoo  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "startup.csv"
OURS, EXPLAINING, STOCK, ECHO = "marwright", "marwright, explaining", "stock image_classifier", "echo handler"
ARCHIVES = {OURS: "digits-1.0.mar", EXPLAINING: "digits-1.1.mar", STOCK: "stock-1.0.mar", ECHO: "echo-1.0.mar"}
VERBS = ("--help", "stop", "token", "predict", "status", "releases", "rollback", "feedback status", "drift", "train")
STAGES = (
    ("unpack", "the frontend unpacks the archive and starts a process"),
    ("python", "Python starts"),
    ("before torch", "`ts` imports what it needs before torch"),
    ("torch", "`ts` imports torch, and the rest of itself"),
    ("asked", "the frontend connects and asks for the model"),
    ("imports", "the handler's imports"),
    ("digests", "digests of all members are checked"),
    ("onnxruntime", "onnxruntime is imported"),
    ("load", "artifact, and twin with captum where there is one"),
    ("warm-up", "first forward passes"),
    ("ready", "until the frontend says READY"),
)
SPY = """
import os, sys, time
folder = os.environ.get("MARWRIGHT_STAGES")
if folder and any(word.endswith("model_service_worker.py") for word in sys.orig_argv):
    file = os.open(f"{folder}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    seen = set()
    first = {"torch", "handlers.image_classifier", "ts.torch_handler.image_classifier", "echo_handler", "onnxruntime"}
    def mark(name, again=False):
        if again or name not in seen:
            seen.add(name)
            os.write(file, f"{time.time()} {name}\\n".encode())
    class Finder:  # finds nothing and notes what is looked for
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name in first:
                mark(name)
            if name.startswith("onnxruntime"):
                mark("onnxruntime's last", True)
    def look(event, given):
        if event == "open" and isinstance(given[0], (str, os.PathLike)):
            name = os.path.basename(os.fspath(given[0]))
            if name in ("digests.json", "spec.json"):
                mark(f"open {name}")
        elif event == "socket.bind":
            mark("bound")
    sys.meta_path.insert(0, Finder)
    with open("/proc/self/stat") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])  # since the machine began, when this process did
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    os.write(file, f"{time.time() - age} born\\n".encode())
    mark("python")
    sys.addaudithook(look)
"""
STOCK_NET = """
import torch
net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 6, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Conv2d(6, 16, 5), torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(5), torch.nn.Flatten(),
    torch.nn.Linear(400, 120), torch.nn.ReLU(), torch.nn.Linear(120, 10))
torch.jit.save(torch.jit.script(net.eval()), {path!r})
"""


class Watched(Server):
    """A server whose workers say when they are where."""

    spy: Path | None = None

    def _environment(self) -> dict[str, str]:
        told = {} if self.spy is None else {"PYTHONPATH": str(self.spy), "MARWRIGHT_STAGES": str(self.spy / "marks")}
        return super()._environment() | told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="measure, and keep the results")
    verb.add_argument("--rounds", type=int, default=5)
    verb.add_argument("--only", choices=("workers", "servers", "commands"))
    verb.add_argument("--out", type=Path, default=RESULTS)
    verbs.add_parser("show", help="print the tables").add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.verb == "run":
        measured: list[Row] = []
        with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
            folder = Path(name)
            if options.only != "commands":
                build(folder)
            if options.only in (None, "workers"):
                measured += workers(folder, options.rounds)
            if options.only in (None, "servers"):
                measured += servers(folder, options.rounds)
            if options.only in (None, "commands"):
                measured += commands(options.rounds)
        rows.write(options.out, measured)
    print(section(options.out) or "nothing was measured yet")


def row(number: int, kind: str, what: str, stage: str, seconds: float) -> Row:
    found = {"round": number, "kind": kind, "what": what, "stage": stage, "seconds": round(seconds, 4)}
    found["load"] = round(os.getloadavg()[0], 2)
    print(json.dumps(found), flush=True)
    return found


def build(folder: Path) -> None:
    """The four archives in `folder/store`, and the spy."""
    store = folder / "store"
    run = archives.train("digits", folder)
    archives.build(run, store, version="1.0")
    archives.build(run, store, version="1.1", explain=True)
    torchserve.write_archive(store, "echo", "1.0")
    net = folder / "model.pt"
    subprocess.run([sys.executable, "-c", STOCK_NET.format(path=str(net))], check=True)
    manifest = {"createdOn": "01/01/2000 00:00:00", "runtime": "python", "archiverVersion": "0.12.0"}
    manifest["model"] = {"modelName": "stock", "modelVersion": "1.0", "handler": "image_classifier",
                         "serializedFile": "model.pt", "configFile": "model-config.yaml"}  # type: ignore[assignment]  # fmt: skip
    with zipfile.ZipFile(store / ARCHIVES[STOCK], "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("model-config.yaml", "minWorkers: 1\nmaxWorkers: 1\n")
        archive.write(net, "model.pt")
    (folder / "spy" / "marks").mkdir(parents=True)
    (folder / "spy" / "sitecustomize.py").write_text(SPY)


# ------------------------------------------------------------------------------------------------------------- workers


def workers(folder: Path, rounds: int) -> Iterator[Row]:
    """A row for each stage of each registration."""
    order = random.Random(0)
    with torchserve.home(folder, {}, store=folder / "store") as home:
        home.server = Watched(home.server.serving, home=home.folder, temp=home.temp)
        home.server.spy = folder / "spy"
        home.bring_up()
        with home.client(timeout=60.0) as client:
            for number in range(-1, rounds):  # the first is not counted: nothing is in the page cache
                for what in order.sample(list(ARCHIVES), len(ARCHIVES)):
                    found = stages(client, what, folder / "spy" / "marks")
                    if number >= 0:
                        yield from (row(number, "worker", what, stage, seconds) for stage, seconds in found.items())


def stages(client: Client, what: str, marks: Path) -> dict[str, float]:
    """Register, wait for READY, unregister: seconds of each stage, and their sum as `all`."""
    model, _, version = ARCHIVES[what].removesuffix(".mar").partition("-")
    began = time.time()
    client.register(ARCHIVES[what], initial_workers=1)
    while not (found := client.describe(model, version)[0]).ready_workers:
        if time.time() - began > 120:
            raise SystemExit(f"{what} did not become ready")
        time.sleep(0.02)
    ready = time.time()
    pid = found.workers[0].pid
    at = {
        name: float(when)
        for when, _, name in (line.partition(" ") for line in (marks / str(pid)).read_text().splitlines())
    }
    times = [("unpack", at["born"]), ("python", at["python"]), ("before torch", at["torch"]), ("torch", at["bound"])]
    if model == "digits":
        begun = at["open digests.json"]
        loaded = begun + of_handler(client, "load", version)
        warm = loaded + of_handler(client, "warm_up", version)
        times += [("asked", at["handlers.image_classifier"]), ("imports", begun), ("digests", at["onnxruntime"]),
                  ("onnxruntime", at["onnxruntime's last"]), ("load", loaded), ("warm-up", warm)]  # fmt: skip
    else:
        times += [("asked", at["echo_handler" if model == "echo" else "ts.torch_handler.image_classifier"])]
        times += [("load", ready)]
    times.append(("ready", ready))
    client.unregister(model, version)
    time.sleep(1.0)  # until the frontend has ended the worker
    spent, before = {}, began
    for stage, when in times:
        spent[stage] = when - before
        before = when
    return spent | {"all": ready - began}


def of_handler(client: Client, what: str, version: str) -> float:
    """The handler's own figure of its last start, which reaches the metrics page within a second or two."""
    name = f"marwright_{what}_seconds"
    until = time.monotonic() + 20
    while True:
        lines = [line for line in client.metrics([f"{name}_sum"]).splitlines() if re.match(rf"{name}_sum\{{", line)]
        for line in lines:
            if f'"{version}"' in line:
                total = float(line.rsplit(" ", 1)[1])
                grown = total - _SUMS.get((name, version), 0.0)
                if grown > 0:
                    _SUMS[name, version] = total
                    return grown
        if time.monotonic() > until:
            raise SystemExit(f"{name} of version {version} is not on the metrics page")
        time.sleep(0.1)


_SUMS: dict[tuple[str, str], float] = {}
"""Metrics of a version go on through its restarts."""

# ------------------------------------------------------------------------------------------------------------- servers


def servers(folder: Path, rounds: int) -> Iterator[Row]:
    """From nothing to the first answer; the stock server with its own defaults and its own handler."""
    for number in range(rounds):
        for what in (OURS, STOCK) if number % 2 == 0 else (STOCK, OURS):
            place = folder / f"server-{number}-{what[:5]}"
            place.mkdir()
            found = server_start(place, folder, what)
            yield from (row(number, "server", what, stage, seconds) for stage, seconds in found.items())


def server_start(place: Path, folder: Path, what: str) -> dict[str, float]:
    """Seconds from the command to: the launcher's end, the JVM's birth, the port, READY, the first answer."""
    model, _, version = ARCHIVES[what].removesuffix(".mar").partition("-")
    with torchserve.home(place, {model: Expected(version)}, archives=[ARCHIVES[what]], store=folder / "store") as home:
        if what == STOCK:
            plain(home)
        port = home.config.ports["inference_address"]
        body = zoo.encoded(zoo.picture("RGB", (32, 32)))
        times: list[tuple[str, float]] = []
        began = time.time()
        running = home.server.start()
        times.append(("the launcher returns", time.time()))
        begun = born(running.pid)
        _wait(lambda: _open(port))
        times.append(("the port is open", time.time()))
        with home.client(timeout=30.0) as client:
            _wait(lambda: _ready(client, model, version))
            times.append(("READY", time.time()))
            _wait(lambda: _answers(client, model, body))
            times.append(("the first answer", time.time()))
    return {"the JVM's process": begun - began} | {name: when - began for name, when in times}


def born(pid: int) -> float:
    """When a process began, in `time.time()`'s seconds, to 10 ms. psutil goes by a clock that was set since."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def plain(home: torchserve.Home) -> None:
    """The configuration of a server that nobody has configured, but for ports and one model."""
    kept = [
        line
        for line in home.config_path.read_text().splitlines()
        if re.match(r"(inference|management|metrics)_address|grpc_\w+_port", line)
    ]
    kept += ["disable_token_authorization=true", "enable_model_api=true", "default_workers_per_model=1"]
    home.config_path.write_text("\n".join(kept) + "\n")
    home.release(ARCHIVES[STOCK])


def _wait(done: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            raise SystemExit("the server did not start")
        time.sleep(0.02)


def _open(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _ready(client: Client, model: str, version: str) -> bool:
    try:
        return client.describe(model, version)[0].ready_workers > 0
    except Exception:  # not there yet, in whatever way
        return False


def _answers(client: Client, model: str, body: bytes) -> bool:
    return bool(client.predict(model, body).body)


# ------------------------------------------------------------------------------------------------------------ commands


def commands(rounds: int) -> Iterator[Row]:
    """Seconds of `marwright VERB --help`: everything that it imports, and nothing that it does."""
    for number in range(-1, rounds):
        for verb in VERBS:
            words = verb.split() + ([] if verb == "--help" else ["--help"])
            began = time.time()
            subprocess.run([sys.executable, "-m", "scripts", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            if number >= 0:
                yield row(number, "command", verb, "all", time.time() - began)


# ------------------------------------------------------------------------------------------------------------ the page


def section(path: Path = RESULTS) -> str | None:
    """This benchmark's part of docs/performance.md; None before there is a raw file."""
    if not path.exists():
        return None
    about, found = rows.read(path)
    median: dict[tuple[str, str, str], float] = {}
    spread: dict[tuple[str, str, str], tuple[float, float]] = {}
    for key in {(one["kind"], one["what"], one["stage"]) for one in found}:
        values = [float(one["seconds"]) for one in found if (one["kind"], one["what"], one["stage"]) == key]
        median[key], spread[key] = statistics.median(values), (min(values), max(values))
    rounds = 1 + max(int(one["round"]) for one in found)
    said = [
        "## Start-up, stage by stage",
        f"{about}; medians of {rounds} rounds, interleaved, smallest and largest in brackets.",
    ]

    def cell(kind: str, what: str, stage: str, form: str) -> str:
        key = (kind, what, stage)
        return form.format(median[key]) if key in median else ""

    if any(one["kind"] == "worker" for one in found):
        table = [[line, *(cell("worker", what, stage, "{:.3f}") for what in ARCHIVES)] for stage, line in STAGES]
        whole = [("worker", what, "all") for what in ARCHIVES]
        table.append(
            ["**all**", *(f"**{median[key]:.2f}** ({spread[key][0]:.2f} to {spread[key][1]:.2f})" for key in whole)]
        )
        said += ["### From registering to READY, seconds", rows.markdown(["", *ARCHIVES], table), NOTE]
    if any(one["kind"] == "server" for one in found):
        names = ["the JVM's process", "the launcher returns", "the port is open", "READY", "the first answer"]
        table = [[name, *(cell("server", what, name, "{:.2f}") for what in (OURS, STOCK))] for name in names]
        said += [
            "### From the command to the first answer, seconds since the command",
            rows.markdown(["", OURS, STOCK], table),
        ]
    if any(one["kind"] == "command" for one in found):
        table = [
            [f"`marwright {verb}`", cell("command", verb, "all", "{:.2f}")]
            for verb in VERBS
            if ("command", verb, "all") in median
        ]
        said += ["### What a command imports, seconds of its `--help`", rows.markdown(["", "seconds"], table)]
    return "\n\n".join(said) + "\n"


NOTE = (
    "torch is imported by TorchServe's own worker (`ts/protocol/otf_message_handler.py`) before it knows of any model, "
    "so no handler can do without it or have it later; the same holds for the interpreter and for the JVM. For "
    "handlers other than ours, loading is all of what follows the import."
)  # fmt: skip


if __name__ == "__main__":
    main()
