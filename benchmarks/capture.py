"""What capturing costs: digits' throughput with every request captured and with none, in pairs.

    python benchmarks/capture.py run --pairs 12
    python benchmarks/capture.py show
    python benchmarks/capture.py batch

`run` is that of benchmarks/metrics.py, with two versions of the same archive on one server that has a spool: one with
`handler: {capture: 1.0}`, one without. After each run the spool is counted and emptied: `captured` and `dropped` are
columns of benchmarks/results/capture.csv. `batch` times the handling of single batches in this process, how much of
that is the capturing, and what the other thread spends.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import metrics  # noqa: E402
from handlers import spool  # noqa: E402
from handlers.capture import Recorder  # noqa: E402
from handlers.settings import WorkerSettings  # noqa: E402
from marwright.release.loadtest.bodies import Body  # noqa: E402
from tests import zoo  # noqa: E402
from tests.handlers import archives, conftest  # noqa: E402
from tests.handlers.context import Sent  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "capture.csv"


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
        with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
            folder = Path(name)
            os.environ["MARWRIGHT_SPOOL"] = str(folder)
            metrics.measure(options, "capture", build, lambda kind, found: counted(folder, kind, found))
    metrics.show(options.out, "capture")


def build(folder: Path) -> tuple[Body, ...]:
    """The two archives, and what is sent: the golden examples."""
    return metrics.versions(folder, on={"capture": 1.0}, off={})


def counted(folder: Path, kind: str, found: dict[str, Any]) -> dict[str, int]:
    """Requests in the spool and requests that are missing there; the spool is empty afterwards."""
    captured, size, until = 0, 0, time.monotonic() + 15
    while captured < found["requests"] and time.monotonic() < until if kind == "on" else not size:
        time.sleep(0.5)
        size = 1
        for path in spool.finished(folder, "requests"):
            captured += sum(len(frame.header.get("requests", ())) for frame in spool.frames(path))
            path.unlink()
    wanted = found["requests"] if kind == "on" else 0
    return {"captured": captured, "dropped": wanted - captured}


def batches() -> None:
    """Microseconds of CPU of this thread for a batch of 16 small pictures: all of it, and what the capturing adds."""
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
        root = archives.write(Path(name) / "digits", "digits", "onnx")
        handler, context = conftest.begin(root, batch_size=16)
        picture = zoo.encoded(zoo.picture("L", (16, 16)))
        sent = [Sent({"body": bytearray(picture)}, {"Host": "localhost", "body": {"content-type": "image/png"}})] * 16
        counts: Counter[str] = Counter()
        recorders = {}
        for kind, settings in {
            "off": WorkerSettings(),
            "on": WorkerSettings(capture=1.0, spool=Path(name) / "spool"),
            "a tenth": WorkerSettings(capture=0.1, spool=Path(name) / "tenth"),
        }.items():
            recorders[kind] = Recorder(
                settings, handler.spec, model="digits", version="1.0", bundle="b" * 16,
                count=lambda number, reason: counts.update({reason: number}),
            )  # fmt: skip
        spent: dict[str, list[float]] = {kind: [] for kind in recorders}
        written: dict[str, list[float]] = {kind: [] for kind in recorders}
        kinds = list(recorders)
        for number in range(3000):
            for kind in kinds[number % 3 :] + kinds[: number % 3]:
                handler.recorder = recorders[kind]
                context.get_request_id = lambda index=0, number=number: f"{number:08x}-51b3-4a8e-9a57-{index:012x}"  # type: ignore[method-assign]
                begun = time.thread_time()
                context.ask(handler, sent)
                spent[kind].append((time.thread_time() - begun) * 1e6)
            if number % 20 == 19:  # what the other thread does ten times a second
                for kind, recorder in recorders.items():
                    begun = time.thread_time()
                    recorder.flush()
                    written[kind].append((time.thread_time() - begun) * 1e6 / 20)
        for recorder in recorders.values():
            recorder.close()
    off = float(np.median(spent["off"]))
    for kind in ("on", "a tenth"):
        kept, wrote = float(np.median(spent[kind])) - off, float(np.median(written[kind]))
        share = "every request" if kind == "on" else "a tenth of them"
        print(f"a batch of 16: {off:.0f} µs; {share}: {kept:+.1f} µs to keep them, {wrote:.1f} µs of CPU to write them")
    print(f"captured {counts['']}, dropped {sum(counts.values()) - counts['']}")


if __name__ == "__main__":
    main()
