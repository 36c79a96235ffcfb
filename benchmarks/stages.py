"""Where a request's time goes inside a worker: microseconds of one core for each stage, in this process.

    python benchmarks/stages.py run [--profile]
    python benchmarks/stages.py show

The frames that TorchServe's frontend would send (a 32×32 PNG over HTTP with the usual headers) go through the wire
codec, the handler and back, at several batch sizes, for cifar10's small net in ONNX. `ts`'s own codec reads and writes
the same frames beside it. Each figure is the median over the repeats. `run` replaces benchmarks/results/stages.csv.
"""

from __future__ import annotations

import argparse
import cProfile
import csv
import io
import os
import platform
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from handlers import metrics, wire  # noqa: E402
from marwright import files  # noqa: E402
from tests import zoo  # noqa: E402
from tests.handlers import archives, conftest  # noqa: E402
from tests.handlers.context import KnownMetrics  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "stages.csv"
SIZES = (1, 4, 8, 16, 32)
HEADERS = {"Host": "127.0.0.1:8080", "User-Agent": "wrk", "Accept": "*/*", "Content-Type": "image/png",
           "Authorization": "Bearer 0123456789abcdef"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="measure, and keep the results")
    verb.add_argument("--seconds", type=float, default=2.0, help="of each batch size")
    verb.add_argument("--profile", action="store_true", help="print the functions that cost most, at batch 16")
    verb.add_argument("--out", type=Path, default=RESULTS)
    verbs.add_parser("show", help="print the table").add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.verb == "run":
        measure(options)
    print(section(options.out) or "nothing was measured yet")


class Service:
    """What `wire.predict` asks of TorchServe's service."""

    def __init__(self, handler: Any, context: Any) -> None:
        self.context, self._entry_point, self.cl_socket = context, handler.handle, None


class Quiet:
    """Metrics as TorchServe gives them, of which nothing is printed here."""

    def __init__(self) -> None:
        self._known = KnownMetrics(ROOT / "deploy" / "metrics.yaml")
        self.get_metric = self._known.get_metric

    def add_time(self, name: str, value: float) -> None: ...


def measure(options: argparse.Namespace) -> None:
    from ts.context import Context  # TorchServe's own

    rows = []
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
        root = archives.write(Path(name) / "cifar10", "cifar10", "onnx")
        handler, _ = conftest.begin(root, batch_size=max(SIZES))
        pictures = [zoo.encoded(natural(seed)) for seed in range(16)]
        context = Context("cifar10", str(root), None, 16, None, "0.12.0", True, Quiet())
        service = Service(handler, context)
        counted = metrics.Meters(context.metrics, handler.spec, model="cifar10", version="1.0")
        handler.meters = counted
        for size in SIZES:
            message = frame(pictures, size)
            if options.profile and size == 16:
                profile(lambda message=message: whole(service, message))
            spent: dict[str, list[float]] = {}
            until = time.perf_counter() + options.seconds
            while time.perf_counter() < until:
                once(service, handler, message, spent)
                for stage, microseconds in stock(message).items():
                    spent.setdefault(stage, []).append(microseconds)
                counted._batches.clear()
                counted._taken = counted._put
            for stage, values in spent.items():
                rows.append({"batch": size, "stage": stage, "us": round(float(np.median(values)) / size, 3)})
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    about = f"# {platform.platform()}, {os.cpu_count()} cores, {sys.version.split()[0]}, load {os.getloadavg()[0]:.1f}"
    files.write_text(options.out, f"{about}\n{text.getvalue()}")


def natural(seed: int) -> Image.Image:
    """Clouds with some grain: compresses about as well as a photograph of that size (2 kB)."""
    drawn = np.random.default_rng(seed)
    clouds = Image.fromarray(drawn.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (32, 32), Image.Resampling.BICUBIC
    )
    grain = drawn.normal(0, 4, (32, 32, 1))
    return Image.fromarray((np.asarray(clouds) + grain).clip(0, 255).astype(np.uint8))


def frame(pictures: list[bytes], size: int) -> bytes:
    """One batch as the frontend writes it."""
    requests = []
    for index in range(size):
        body = pictures[index % len(pictures)]
        headers = {**HEADERS, "content-length": str(len(body)), "explain": "False"}
        requests.append(wire.frame(f"0f8fad5b-d9cb-469f-a165-{index:012d}", headers, [("body", "image/png", body)]))
    return b"I" + b"".join(requests) + b"\xff\xff\xff\xff"


def whole(service: Service, message: bytes) -> Any:
    _, read = wire.Messages().retrieve(wire.Pieces(message, 1 << 16))
    return wire.predict(service, read)


def once(service: Service, handler: Any, message: bytes, spent: dict[str, list[float]]) -> None:
    """One batch, stage by stage as `handle` goes."""
    clock = time.perf_counter
    begun = clock()
    _, read = wire.Messages().retrieve(wire.Pieces(message, 1 << 16))
    marks = [("read", clock())]
    context = service.context
    context.request_ids, context.request_processor = read.ids, read.slots
    batch = handler.preprocess(read.fields, context)
    marks.append(("parse, decode", clock()))
    outputs = handler.inference(batch)
    marks.append(("forward pass", clock()))
    handler.explain(batch, outputs)
    bodies = handler.postprocess(batch, outputs, context)
    marks.append(("answers", clock()))
    handler.meters.batch(batch.requests, batch.array, outputs, 0.001, 0.001)
    handler.recorder.batch(read.fields, batch.requests, outputs, context)
    marks.append(("metrics", clock()))
    wire.respond(bodies, read.ids, read.slots)
    marks.append(("write", clock()))
    for stage, at in marks:
        spent.setdefault(stage, []).append((at - begun) * 1e6)
        begun = at
    begun = clock()
    assert whole(service, message)[:4] == b"\x00\x00\x00\xc8"
    spent.setdefault("all of it", []).append((clock() - begun) * 1e6)


def stock(message: bytes) -> dict[str, float]:
    """`ts`'s own codec on the same frame, from memory: its system calls come on top."""
    from ts.context import Context, RequestProcessor
    from ts.protocol import otf_message_handler
    from ts.service import Service as Stock

    begun = time.perf_counter()
    _, read = otf_message_handler.retrieve_msg(wire.Pieces(message, 1 << 16))
    headers, _, ids = Stock.retrieve_data_for_inference(read)
    reading = time.perf_counter() - begun
    context = Context("m", "", None, 1, None, "0.12.0")
    context.request_processor = [RequestProcessor(one.get_request_properties()) for one in headers]
    for index in ids:
        for name in ("X-Model-Name", "X-Model-Version", "X-Bundle-Digest", "X-Worker-Pid"):
            context.set_response_header(index, name, "0123456789")
        context.set_response_content_type(index, "application/json")
    body = [b"x" * 150] * len(ids)
    begun = time.perf_counter()
    otf_message_handler.create_predict_response(body, ids, "Prediction success", 200, context)
    return {"(ts: read)": reading * 1e6, "(ts: write)": (time.perf_counter() - begun) * 1e6}


def profile(work: Callable[[], Any]) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(2000):
        work()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def section(path: Path = RESULTS) -> str | None:
    """A table of stages by batch size."""
    if not path.is_file():
        return None
    about, *lines = path.read_text().splitlines()
    rows = list(csv.DictReader(lines))
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figures = {(row["stage"], int(row["batch"])): float(row["us"]) for row in rows}
    out = ["## Inside a worker", "", f"Microseconds of one core for each request, by batch size ({about[2:]}).", ""]
    out += ["| stage | " + " | ".join(f"batch {size}" for size in SIZES) + " |", "|---|" + "---:|" * len(SIZES)]
    for stage in stages:
        out.append(f"| {stage} | " + " | ".join(f"{figures[stage, size]:.1f}" for size in SIZES) + " |")
    parts = [stage for stage in stages if not stage.startswith(("(", "all"))]
    whole = sum(figures[stage, 8] for stage in parts)
    needed = figures["forward pass", 8] + figures["parse, decode", 8]
    saved = figures["(ts: read)", 8] + figures["(ts: write)", 8] - figures["read", 8] - figures["write", 8]
    out += [
        "",
        f"At batch 8 the stages add up to {whole:.0f} µs. Decoding and the forward pass, which no handler can leave "
        f"out, are {needed / whole:.0%} of it: a worker in which all else cost nothing would answer "
        f"{whole / needed:.2f} times as many. `ts`'s own codec would add {saved:.0f} µs, {saved / whole:.0%}. System "
        "calls, the frontend's own work and waking one another come on top: see what an empty handler reaches in the "
        "tables above and below.",
    ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
