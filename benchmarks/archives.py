"""What an archive costs by its size: building, proving, checking, registering, and starting a worker from it.

    python benchmarks/archives.py run                          # 250 kB, 100 MB, 1 GB in ONNX and eager; some minutes
    python benchmarks/archives.py run --sizes small --formats onnx
    python benchmarks/archives.py show

The nets are real ones with random weights: lenet (62 k parameters, 250 kB), and small_cnn for pictures of 114×114 (25 M
parameters, 100 MB) and 364×364 (265 M, 1.06 GB). An archive is built by `archive.build` from an artifact that is there
already, in a process of its own, and its parts are timed inside of it; then a private TorchServe registers it. Memory
is the peak resident size of a process (VmHWM), so it includes pages of files that are mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import rows  # noqa: E402
from benchmarks.rows import Row  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "archives.csv"
SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "small": ("lenet", {"channels": 3, "height": 32, "width": 32, "classes": 10}),
    "100MB": ("small_cnn", {"channels": 3, "height": 114, "width": 114, "classes": 10}),
    "1GB": ("small_cnn", {"channels": 3, "height": 364, "width": 364, "classes": 10}),
}
FORMATS = ("onnx", "eager")
WHAT = (
    ("build", "`archive.build`, all of it"),
    ("build: digests", "… sha256 of members, and of the file beside the proof"),
    ("build: zip", "… the zip is written"),
    ("build: unpack", "… it is unpacked for the proof"),
    ("build: clean process", "… a clean process checks digests, loads, answers"),
    ("build: fsync", "… it is on the disk"),
    ("check", "`records.check_whole`: sha256 of the file"),
    ("register", "TorchServe: register to READY"),
    ("register: unpack", "… unpacked, and a process started"),
    ("register: digests", "… the worker checks digests"),
    ("register: load", "… the worker loads the artifact"),
    ("register: warm-up", "… first forward passes"),
)


DIGESTING = """
import sys, time
from pathlib import Path
from handlers.bundle import Bundle
began = time.perf_counter()
Bundle.verify(Path(sys.argv[1]))
print(time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="measure, and keep the results")
    verb.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    verb.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    verb.add_argument("--rounds", type=int, default=3)
    verb.add_argument("--out", type=Path, default=RESULTS)
    verbs.add_parser("show", help="print the tables").add_argument("--out", type=Path, default=RESULTS)
    verb = verbs.add_parser("build", help="(what `run` starts in a process of its own)")
    verb.add_argument("folder", type=Path)
    verb = verbs.add_parser("material", help="(likewise)")
    verb.add_argument("folder", type=Path)
    verb.add_argument("size")
    verb.add_argument("format")
    options = parser.parse_args()
    if options.verb == "build":
        print(json.dumps(built(options.folder)))
    elif options.verb == "material":
        material(options.folder, options.size, options.format)
    else:
        if options.verb == "run":
            rows.write(options.out, measured(options))
        print(section(options.out) or "nothing was measured yet")


def measured(options: argparse.Namespace) -> list[Row]:
    found = []
    for size in options.sizes:
        for format in options.formats:
            with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
                folder = Path(name)
                itself("material", str(folder), size, format)
                for number in range(options.rounds):
                    values = json.loads(itself("build", str(folder)).splitlines()[-1])
                    values |= registered(folder, f"{number}")
                    for what, value in values.items():
                        found.append({"round": number, "size": size, "format": format, "what": what, "value": value})
                        found[-1]["load"] = round(os.getloadavg()[0], 2)
                        print(json.dumps(found[-1]), flush=True)
    return found


def itself(*words: str) -> str:
    command = [sys.executable, str(Path(__file__)), *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=1800).stdout


def material(folder: Path, size: str, format: str) -> None:
    """What `archive.build` is given, in `folder/members`: artifact, spec, settings, golden examples."""
    import torch

    from handlers import nets
    from handlers.spec import ImageInput, ModelSpec
    from tests import zoo
    from tests.handlers import archives

    name, args = SIZES[size]
    torch.manual_seed(3)
    graph = nets.serving_graph(name, dict(args), task="classification").eval()
    graph.std.fill_(0.3)
    pictures = ImageInput(args["channels"], args["height"], args["width"])
    spec = ModelSpec(
        task="classification", net=name, net_args=args, input=pictures,
        classes=tuple("abcdefghij"), outputs=graph.outputs, format=format,
        artifact="weights.pt" if format == "eager" else "model.onnx", run="0123456789ab", data_digest="d" * 16,
    )  # fmt: skip
    to = folder / "members"
    (to / "golden").mkdir(parents=True)
    if format == "eager":
        torch.save(graph.state_dict(), to / spec.artifact)
    else:
        archives.export_onnx(graph, spec, to / spec.artifact)
    (to / "spec.json").write_text(spec.to_json(), encoding="utf-8")
    settings = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 1\nhandler:\n  threads: 1\n"
    (to / "model-config.yaml").write_text(settings)
    entries = []
    for number in range(16):
        picture = zoo.picture("RGB", (args["width"], args["height"])).rotate(number * 20)
        body = zoo.encoded(picture)
        (to / "golden" / f"{number:02}.png").write_bytes(body)
        given = torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())[None]
        with torch.inference_mode():
            answer = dict(zip(spec.classes, graph(given)[0][0].tolist(), strict=True))
        entries.append({"file": f"{number:02}.png", "kind": "image", "answer": answer})
    (to / "golden" / "golden.json").write_text(json.dumps(entries))


def built(folder: Path) -> dict[str, float]:
    """One archive, built and checked: seconds of it and of its parts, and peak memory."""
    from marwright import files
    from marwright.packing import archive, container, records, replay

    spent: dict[str, float] = {}

    def timed(module: Any, function: str, what: str) -> None:
        call: Callable[..., Any] = getattr(module, function)

        def wrapped(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                spent[what] = spent.get(what, 0.0) + time.perf_counter() - began

        setattr(module, function, wrapped)

    timed(files, "sha256", "build: digests")
    timed(container, "write", "build: zip")
    timed(container, "unpack", "build: unpack")
    timed(files, "_flush", "build: fsync")
    timed(replay, "_ask", "build: clean process")
    place, to = folder / "store", folder / "members"
    for old in place.glob("big-*"):
        old.unlink()
    body = archive.package() | {
        path.relative_to(to).as_posix(): path for path in sorted(to.rglob("*")) if path.is_file()
    }
    artifact = "model.onnx" if "model.onnx" in body else "weights.pt"
    facts = {"run": "0123456789ab", "format": "", "workers": 1, "metrics": {}}
    began = time.perf_counter()
    record, _ = archive.build(place, "big", body, facts, handler="handlers.image_classifier", artifact=artifact)
    spent["build"] = time.perf_counter() - began
    digests = spent["build: digests"]
    began = time.perf_counter()
    records.check_whole(record, place)
    spent["check"], spent["build: digests"] = time.perf_counter() - began, digests
    spent["bytes"] = record.size
    # ru_maxrss is in KiB.
    spent["build: memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    spent["build: memory of the clean process"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {name: round(value, 4) for name, value in spent.items()}


def registered(folder: Path, name: str) -> dict[str, float]:
    """Registered at a fresh TorchServe: seconds, the worker's and the server's peak memory, bytes on disk."""
    from benchmarks import startup
    from tests import torchserve

    place = folder / f"home-{name}"
    place.mkdir()
    with torchserve.home(place, {}, store=folder / "store") as home:
        running = home.bring_up()
        with home.client(timeout=300.0) as client:
            began, clock = time.perf_counter(), time.time()
            client.register("big-1.0.mar", initial_workers=1)
            while not (found := client.describe("big", "1.0")[0]).ready_workers:
                if time.perf_counter() - began > 300:
                    raise SystemExit("the worker did not become ready")
                time.sleep(0.02)
            ready = time.perf_counter()
            startup._SUMS.clear()
            load, warm = (startup.of_handler(client, what, "1.0") for what in ("load", "warm_up"))
            disk = sum(path.stat().st_size for path in (home.temp / "models").rglob("*") if path.is_file())
            digests = digesting(home.store / "big-1.0.mar")
            return {
                "register": round(ready - began, 4),
                "register: unpack": round(startup.born(found.workers[0].pid) - clock, 4),
                "register: digests": round(digests, 4),
                "register: load": round(load - digests, 4),
                "register: warm-up": round(warm, 4),
                "register: worker's memory": peak(found.workers[0].pid),
                "register: server's memory": peak(running.pid),
                "register: unpacked bytes": disk,
            }


def digesting(mar: Path) -> float:
    """Seconds of `Bundle.verify`, here: the handler's own figure is of that and of the loading together."""
    from marwright.packing import container

    with tempfile.TemporaryDirectory(dir=mar.parent) as name:
        root = Path(name)
        container.unpack(mar, root)
        environment = {**os.environ, "PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-P", "-c", DIGESTING, name]
        return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak(pid: int) -> int:
    """VmHWM of proc(5), bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def section(path: Path = RESULTS) -> str | None:
    """This benchmark's part of docs/performance.md; None before there is a raw file."""
    if not path.exists():
        return None
    about, found = rows.read(path)
    keys = list(dict.fromkeys((one["size"], one["format"]) for one in found))

    def median(key: tuple[str, str], what: str) -> float:
        values = [float(one["value"]) for one in found if (one["size"], one["format"]) == key and one["what"] == what]
        return statistics.median(values) if values else float("nan")

    rounds = 1 + max(int(one["round"]) for one in found)
    titles = ["seconds", *(f"{size} {format}" for size, format in keys)]
    table = [[line, *(f"{median(key, what):.2f}" for key in keys)] for what, line in WHAT]
    sizes = {"bytes": "bytes of the archive", "register: unpacked bytes": "bytes unpacked by the server",
             "build: memory": "peak memory: building",
             "build: memory of the clean process": "peak memory: the clean process",
             "register: worker's memory": "peak memory: the worker",
             "register: server's memory": "peak memory: TorchServe's JVM"}  # fmt: skip
    memory = [[line, *(f"{median(key, what) / 1e6:.1f}" for key in keys)] for what, line in sizes.items()]
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for format in dict.fromkeys(format for _, format in keys):
        mine = [key for key in keys if key[1] == format]
        at = [median(key, "bytes") / 1e6 for key in mine]
        for what in ("build", "check", "register"):
            lines[f"{what}, {format}"] = (at, [median(key, what) for key in mine])
    rows.plot(rows.PLOTS / "archives.svg", lines, x="MB of the archive", y="seconds")
    return (
        "\n\n".join(
            [
                "## Archives, by size",
                f"{about}; medians of {rounds}.",
                rows.markdown(titles, table),
                rows.markdown(["MB", *titles[1:]], memory),
                "![Seconds by size](performance/archives.svg)",
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
