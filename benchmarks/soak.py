"""The loop for half an hour, fast, while its tool, its workers and its server are killed at random.

    python benchmarks/soak.py run --minutes 30
    python benchmarks/soak.py show

Callers send digits that grow darker and noisier, label what they sent, and say it again until the server takes it.
Beside them a process turns `marwright retrain` round after round. Every answer and every label is written into a ledger
(`ledger.csv` in the soak's folder) by those who sent them. At the end the ledger is held against the database, read
with plain SQL: each label that the server took is there exactly once, and nothing that nobody said. Sizes of folders
and processes are sampled all the while into benchmarks/results/soak.csv; what came out is in soak.json beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from marwright import files  # noqa: E402
from marwright.errors import MarwrightError  # noqa: E402
from marwright.learning import corruptions  # noqa: E402
from marwright.release.client import Client  # noqa: E402
from marwright.release.server import Server  # noqa: E402
from marwright.settings import Places  # noqa: E402
from scripts import demo  # noqa: E402

RESULTS = Path(__file__).parent / "results"
FOLDER = ROOT / "runs" / "soak"
CALLERS = 2
RATE = 5.0
"""Requests a second of each caller."""
POLICY = """[shadow]
requests = 20
max_latency_ratio = 20.0

[gate]
margin = 0.05
looks = 1
max_latency_ratio = 20.0

[watch]
seconds = 2.0
max_worker_restarts = 1000
max_latency_ratio = 100.0
max_p99_ratio = 1000.0

[settle]
drain_seconds = 5.0
warm_seconds = 5.0

[trigger]
min_labels = 120
floor = 60

[judge]
min_examples = 20
max_forgetting = 0.1

[keep]
versions = 3
days = 0.007
unlabelled_days = 0.007
"""
"""Ten minutes of requests are kept: what is older goes, so that the size of the store can be seen to stay."""


class Ledger:
    """What callers know to have happened, in one file, a line as it happens."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._lock = threading.Lock()
        self._rows = csv.writer(self._file)
        self.counts: Counter[str] = Counter()

    def note(self, what: str, *values: object) -> None:
        with self._lock:
            self._rows.writerow([f"{time.time():.3f}", what, *values])
            self._file.flush()
            self.counts[what] += 1

    def close(self) -> None:
        self._file.close()


@dataclass
class Soak:
    """Threads that send, label, retrain, kill and measure until `over`."""

    places: Places
    ledger: Ledger
    began: float
    seconds: float
    random: random.Random
    over: threading.Event = field(default_factory=threading.Event)
    calm: threading.Event = field(default_factory=threading.Event)
    """No more kills."""
    due: deque[tuple[float, dict[str, Any]]] = field(default_factory=deque)
    tool: subprocess.Popen[bytes] | None = None
    seen: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Every label that was ever in the database, by its uid: retention takes the old ones away."""
    changed: int = 0
    """Labels that were there otherwise before, or two of one request at a time."""

    @property
    def share(self) -> float:
        """Of the time."""
        return min(1.0, (time.monotonic() - self.began) / self.seconds)

    def verb(self, *words: str) -> list[str]:
        at = self.places
        named = {"store": at.store, "config": at.config, "runs": at.runs, "recipes": at.recipes}
        options = [word for name, path in named.items() for word in (f"--{name}", str(path))]
        options += ["--feedback", str(at.feedback)]
        return [sys.executable, "-m", "scripts", *words, *options]

    def client(self) -> Client:
        return Server(self.places.serving, home=self.places.home).client(timeout=10.0)

    def send(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        found, own = load_digits(), np.random.default_rng(seed)
        client = self.client()
        while not self.over.wait(1 / RATE):
            i = int(own.integers(len(found.target)))
            grey = np.rint(found.images[i] * 255 / 16).astype(np.uint8)[np.newaxis, np.newaxis]
            severity = 1 + int(3 * self.share * own.random())
            for name, by in (("darkness", severity), ("noise", 1)):
                grey = corruptions.corrupt(grey, name, by, seed=int(own.integers(2**31)))
            stream = io.BytesIO()
            Image.fromarray(grey[0, 0]).save(stream, format="PNG")
            try:
                answer = client.predict("digits", stream.getvalue())
            except MarwrightError as error:
                self.ledger.note("failed", str(error).splitlines()[0][:120])
                client.close()
                client = self.client()  # its token may be of a server that was killed
                continue
            except OSError as error:
                self.ledger.note("failed", str(error)[:120])
                continue
            label = str(int(found.target[i]))
            self.ledger.note("answered", answer.request_id, answer.version, next(iter(answer.json())), label)
            said = {"request": answer.request_id, "label": label, "source": f"caller{seed}", "uid": uuid.uuid4().hex}
            self.due.append((time.monotonic() + own.exponential(2.0), said))
        client.close()

    def label(self) -> None:
        """At least once: what the server did not say yes to is sent again, with the same uid."""
        client = self.client()
        own = random.Random(1)
        while not self.over.is_set() or self.due:
            time.sleep(0.2)
            if self.over.is_set() and time.monotonic() - self.began > self.seconds + 180:
                break
            now = time.monotonic()
            batch = [one for one in list(self.due) if one[0] <= now or self.over.is_set()][:50]
            if not batch:
                continue
            for _, said in batch:
                self.ledger.note("sent", said["uid"], said["request"], said["label"])
            try:
                client.predict("feedback", {"labels": [said for _, said in batch]})
            except (MarwrightError, OSError) as error:
                self.ledger.note("refused", str(error).splitlines()[0][:120])
                client.close()
                client = self.client()
                continue
            for one in batch:
                self.ledger.note("taken", one[1]["uid"], one[1]["request"], one[1]["label"])
                if own.random() > 0.05:  # now and then somebody says the same twice
                    self.due.remove(one)
        client.close()

    def turn(self) -> None:
        while not self.over.is_set():
            words = self.verb("retrain", "--recipe", "digits", "--epochs", "2")
            words += ["--policy", str(self.places.home / "policy.toml")]
            with (self.places.home / "turns.log").open("ab") as log:
                self.tool = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT)
                try:
                    code = self.tool.wait(timeout=300)
                except subprocess.TimeoutExpired:
                    self.tool.kill()
                    code = self.tool.wait()
                    self.ledger.note("hung")
            self.ledger.note("turn", code)
            self.over.wait(1.0)

    def kill(self) -> None:
        while not self.calm.wait(self.random.uniform(12.0, 45.0)):
            what = self.random.choices(("tool", "worker", "server"), (4, 3, 2))[0]
            server = Server(self.places.serving, home=self.places.home)
            found = server.find()
            tool = self.tool
            if what == "tool" and tool is not None and tool.poll() is None:
                tool.send_signal(signal.SIGKILL)
                self.ledger.note("killed", "tool")
            elif found is None:
                self._serve()
            elif what == "worker":
                workers = [child for child in found.process.children() if "python" in child.name()]
                if workers:
                    self.random.choice(workers).kill()
                    self.ledger.note("killed", "worker")
            elif what == "server":
                found.process.kill()
                self.ledger.note("killed", "server")
                self._serve()

    def _serve(self) -> None:
        with (self.places.home / "serve.log").open("ab") as log:
            done = subprocess.run(
                self.verb("serve", "--recipe", "digits"), stdout=log, stderr=log, cwd=ROOT, timeout=300, check=False
            )
        self.ledger.note("served", done.returncode)

    def look(self) -> None:
        """At all labels, with plain SQL; much more often than retention removes any."""
        path = self.places.feedback / "feedback.sqlite"
        while not self.over.wait(20.0):
            if path.is_file():
                self._look(path)

    def _look(self, path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as opened:
            found = opened.execute("select uid, request, label from labels").fetchall()
        self.changed += len(found) - len({request for _, request, _ in found})
        for uid, request, label in found:
            self.changed += self.seen.setdefault(uid, (request, label)) != (request, label)

    def measure(self, rows: Any) -> None:
        while not self.over.wait(10.0):
            found = Server(self.places.serving, home=self.places.home).find()
            memory = {"java": 0, "workers": 0}
            if found is not None:
                try:
                    memory["java"] = found.process.memory_info().rss
                    memory["workers"] = sum(child.memory_info().rss for child in found.process.children(recursive=True))
                except psutil.Error:
                    continue
            folders = {
                name: _size(self.places.home / name)
                for name in ("feedback", "feedback/spool", "feedback/bodies", "runs", "model_store", "logs")
            }
            temp = _size(Path(os.environ["TMPDIR"]))
            for name, value in {**memory, **folders, "temp": temp}.items():
                rows.writerow([round(time.monotonic() - self.began, 1), name, value])


def run(minutes: float, seed: int) -> int:
    RESULTS.mkdir(exist_ok=True)
    with demo.places(FOLDER) as places, (RESULTS / "soak.csv").open("w", newline="", encoding="utf-8") as stream:
        files.write_text(places.home / "policy.toml", POLICY)
        demo.own_data(FOLDER)
        ledger = Ledger(FOLDER / "ledger.csv")
        soak = Soak(places, ledger, time.monotonic(), 60 * minutes, random.Random(seed))
        rows = csv.writer(stream)
        rows.writerow(["second", "what", "bytes"])
        try:
            subprocess.run(soak.verb("serve", "--recipe", "digits"), cwd=ROOT, timeout=600, check=True)
            subprocess.run(soak.verb("feedback", "collector"), cwd=ROOT, timeout=300, check=True)
            soak.began = time.monotonic()
            workers = [threading.Thread(target=soak.send, args=(n,)) for n in range(CALLERS)]
            workers += [threading.Thread(target=work) for work in (soak.turn, soak.kill)]
            workers += [threading.Thread(target=soak.measure, args=(rows,)), threading.Thread(target=soak.look)]
            last = threading.Thread(target=soak.label)
            for thread in (*workers, last):
                thread.start()
            while time.monotonic() - soak.began < soak.seconds:
                time.sleep(5.0)
                print(f"{soak.share:6.1%}  {dict(ledger.counts)}", end="\r", flush=True)
            soak.calm.set()
            workers[CALLERS + 1].join()
            if Server(places.serving, home=places.home).find() is None:
                soak._serve()
            soak.over.set()
            for thread in (*workers, last):
                thread.join()
        finally:
            soak.calm.set()
            soak.over.set()
            subprocess.run(soak.verb("stop"), cwd=ROOT, timeout=300, check=False)
            ledger.close()
        subprocess.run(soak.verb("feedback", "ingest"), cwd=ROOT, timeout=300, check=True)
        soak._look(places.feedback / "feedback.sqlite")
        outcome = judged(FOLDER / "ledger.csv", places.feedback / "feedback.sqlite", soak)
        outcome |= {"minutes": minutes, "seed": seed, "unsent": len(soak.due), "counts": dict(ledger.counts)}
        outcome["kills"] = dict(Counter(row[2] for row in _rows(FOLDER / "ledger.csv") if row[1] == "killed"))
        outcome["versions"] = sorted({row[3] for row in _rows(FOLDER / "ledger.csv") if row[1] == "answered"})
        files.write_json(RESULTS / "soak.json", outcome)
    return show()


def judged(ledger: Path, database: Path, soak: Soak) -> dict[str, Any]:
    """The ledger against the database. All that is not 0 under `wrong` is a fault."""
    rows = _rows(ledger)
    sent = {row[2]: tuple(row[3:5]) for row in rows if row[1] == "sent"}
    taken = {row[2] for row in rows if row[1] == "taken"}
    answered = {row[2] for row in rows if row[1] == "answered"}
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as opened:
        requests = {row[0] for row in opened.execute("select id from requests")}
        oldest = opened.execute("select min(time) from requests").fetchone()[0] or 0.0
    kept = {row[2] for row in rows if row[1] == "answered" and float(row[0]) > oldest + 30}
    return {
        "answered": len(answered),
        "labels taken by the server": len(taken),
        "labels ever seen in the database": len(soak.seen),
        "requests that retention has left": len(kept),
        "of them lost with a killed worker": len(kept - requests),
        "wrong": {
            "taken and never seen": len(taken - soak.seen.keys()),
            "twice, or changed": soak.changed,
            "seen and never sent": len(soak.seen.keys() - sent.keys()),
            "seen otherwise than sent": sum(sent.get(uid) != said for uid, said in soak.seen.items()),
        },
        "captured, and the answer lost with a killed server": len(requests - answered),
    }


def show() -> int:
    outcome = files.read_json(RESULTS / "soak.json")
    console = Console()
    table = Table("what", "count")
    for name, value in outcome.items():
        table.add_row(name, json.dumps(value))
    console.print(table)
    sizes: dict[str, list[tuple[float, int]]] = {}
    with (RESULTS / "soak.csv").open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            sizes.setdefault(row["what"], []).append((float(row["second"]), int(row["bytes"])))
    table = Table("MB", "first third, mean", "second", "last", "largest")
    for name, points in sizes.items():
        end = points[-1][0]
        thirds = [[b for s, b in points if end * k / 3 <= s <= end * (k + 1) / 3] for k in range(3)]
        means = [f"{np.mean(part) / 1e6:.1f}" if part else "–" for part in thirds]
        table.add_row(name, *means, f"{max(b for _, b in points) / 1e6:.1f}")
    console.print(table)
    return 1 if any(outcome["wrong"].values()) else 0


def _rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    runs = parts.add_parser("run")
    runs.add_argument("--minutes", type=float, default=30.0)
    runs.add_argument("--seed", type=int, default=0)
    parts.add_parser("show")
    options = parser.parse_args()
    return run(options.minutes, options.seed) if options.part == "run" else show()


if __name__ == "__main__":
    sys.exit(main())
