"""The rounds: each system is started, asked in every way, and stopped, one after the other, in another order each time.

A row of the raw file is written as soon as it is measured. What a row holds:

    round, system, mode   closed, open, start, done (all of a system's rows of a round are there), failed (says why)
    kind                  of body
    connections, rate     rate: requests a second that were due, 0 in a closed loop
    answered … hung       see load.c
    p50_us …              latencies of right answers
    cpu_us                processor time of all of the system's processes, for each answer
    rss_mb, pss_mb        of all of them, after the row; pss counts shared pages once
    first_seconds         from the start of its first process to its first right answer
    load_cpu              share of one core that the load generator took
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import http.client
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving import load, material, peers
from benchmarks.serving.load import Case
from benchmarks.serving.material import Material
from benchmarks.serving.systems import MARKER, SYSTEMS, Served, System

ALL: dict[str, System] = SYSTEMS | peers.SYSTEMS
CONNECTIONS = (8, 32, 128, 64, 1)
"""In this order: Java compiles itself for some ten seconds under load; what goals speak of comes after that."""
SHARES = (0.25, 0.5, 0.75, 0.9)
LIMIT = 256
"""Connections of an open loop at most."""
MEASURED = (
    "answered", "right", "bad_status", "wrong", "broken", "hung", "seconds", "p50_us", "p90_us", "p99_us", "p999_us",
    "max_us", "mean_us", "late", "complaint", "histogram",
)  # fmt: skip
COLUMNS = (
    "round", "system", "mode", "kind", "connections", "rate", "share", *MEASURED[:-2], "cpu_us", "rss_mb", "pss_mb",
    "first_seconds", "load_cpu", "load_average", *MEASURED[-2:],
)  # fmt: skip
PATIENCE = 120.0
"""Seconds until the first right answer."""


class Sheet:
    """The raw file, a row at a time."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = read(path) if resume and path.is_file() else []
        self.finished = {(row["round"], row["system"]) for row in self.rows if row["mode"] == "done"}
        self.rows = [row for row in self.rows if (row["round"], row["system"]) in self.finished]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as stream:
            stream.write(f"# {about()}\n")
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, COLUMNS).writerow(row)
        shown = {key: value for key, value in row.items() if key not in ("histogram", "max_us", "mean_us", "p90_us")}
        print(" ".join(f"{key}={value}" for key, value in shown.items() if value not in ("", 0, 0.0)), flush=True)


def read(path: Path) -> list[dict[str, str]]:
    """The rows, as text."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()[1:]))


def about() -> str:
    """Machine, cores and versions."""
    chip = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), "?")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchserve", "onnxruntime", "numpy"))
    machine = f"{platform.system()} {platform.machine()}, {chip}, {os.cpu_count()} cores"
    return f"{machine}, Python {sys.version.split()[0]}, {versions}; {datetime.now(UTC).date()}"


def _cpuinfo() -> list[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text().splitlines()
    return []


def main(options: argparse.Namespace) -> None:
    unknown = [name for name in options.systems or () if name not in ALL]
    if unknown:
        raise SystemExit(f"no system {', '.join(unknown)}; there are: {', '.join(ALL)}")
    names = list(options.systems or ALL)
    work = options.work
    program = load.build(work)
    made = material.make(work, options.data)
    if not options.no_install:
        for name in names:
            peers.install(name, work)
    sheet = Sheet(options.out, resume=options.resume)
    for number in range(options.rounds):
        order = list(names)
        random.Random(number).shuffle(order)
        for name in order:
            if (str(number), name) in sheet.finished:
                continue
            with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as folder:
                one(sheet, ALL[name], made, Path(folder), program, number, options)


def one(
    sheet: Sheet, system: System, made: Material, folder: Path, program: Path, number: int, options: argparse.Namespace
) -> None:
    """All rows of one system in one round; a `failed` row where it does not start or answers wrongly at first."""
    base = {"round": number, "system": system.name}
    marker = uuid.uuid4().hex
    problem = ""
    try:
        with system.open(made, folder, marker) as served:
            try:
                cases, first = first_answer(system, made, served)
            except TimeoutError as error:
                problem = f"{error} {last_line(served.log)}"
            else:
                sheet.add({**base, "mode": "start", "first_seconds": round(first, 3), **memory(marker)})
                asked = Asked(sheet, system, made, served, folder, program, base, marker, options)
                asked.all(cases)
    except Exception as error:  # one system's trouble is a row, not the end of the others
        problem = f"{type(error).__name__}: {error}"
    finally:
        end_all(marker)
    if problem:
        sheet.add({**base, "mode": "failed", "complaint": " ".join(problem.split())[:500]})
    sheet.add({**base, "mode": "done"})


class Asked:
    """One started system, and what it is asked."""

    def __init__(
        self,
        sheet: Sheet,
        system: System,
        made: Material,
        served: Served,
        folder: Path,
        program: Path,
        base: dict[str, Any],
        marker: str,
        options: argparse.Namespace,
    ) -> None:
        self.sheet, self.system, self.made, self.served = sheet, system, made, served
        self.folder, self.program, self.base, self.marker, self.options = folder, program, base, marker, options

    def all(self, cases: list[Case]) -> None:
        seconds = self.options.seconds
        manifest = load.write(self.folder / "asked", cases)
        load.warm(self.program, manifest, port=self.served.port, seconds=self.options.warm)
        fastest = 0.0
        counts = (64, 1) if self.system.short else CONNECTIONS
        if self.options.quick:
            counts = (64, 1)
        for connections in counts:
            fastest = max(fastest, self.row(manifest, "png32", connections, seconds))
        if not self.system.short and not self.options.quick:
            for share in SHARES:
                self.row(manifest, "png32", LIMIT, seconds, rate=fastest * share, share=share)
        for kind in () if self.options.quick else self.system.kinds:
            other = load.write(self.folder / kind, self.system.cases(self.made, kind, self.served))
            load.ask(self.program, other, port=self.served.port, connections=64, seconds=1.0)
            self.row(other, kind, 64, seconds)

    def row(
        self, manifest: Path, kind: str, connections: int, seconds: float, rate: float = 0.0, share: float = 0.0
    ) -> float:
        """Measure, write, and return right answers a second."""
        before = processor(self.marker)
        found = load.ask(
            self.program,
            manifest,
            port=self.served.port,
            connections=connections,
            seconds=seconds,
            arrivals="poisson" if rate else "closed",
            rate=round(rate, 1),
            seed=1 + self.base["round"],
        )
        spent = processor(self.marker) - before
        where = {"mode": "open" if rate else "closed", "kind": kind, "connections": connections}
        self.sheet.add(
            {
                **self.base,
                **where,
                "rate": round(rate, 1),
                "share": share,
                **{name: found[name] for name in MEASURED},
                "cpu_us": round(spent / max(1, found["answered"]) * 1e6, 1),
                **memory(self.marker),
                "load_cpu": round(found["load_cpu_seconds"] / found["seconds"], 3) if found["seconds"] else 0,
                "load_average": round(os.getloadavg()[0], 2),
            }
        )
        return float(found["right"] / found["seconds"]) if found["seconds"] else 0.0


def first_answer(system: System, made: Material, served: Served) -> tuple[list[Case], float]:
    """The cases of small PNGs, and the seconds from the start to the first answer with status 200."""
    until = served.begun + PATIENCE
    last = "no answer"
    while time.perf_counter() < until and not served.ended():
        with contextlib.suppress(Exception):  # keys that are not written yet, ports that are not bound
            cases = system.cases(made, "png32", served)
            status, body = once(served.port, cases[0].request)
            if status == 200:
                return cases, time.perf_counter() - served.begun
            last = f"{status} {body[:200]!r}"
        time.sleep(0.02)
    raise TimeoutError(f"no right status within {time.perf_counter() - served.begun:.0f} s; the last was: {last}.")


def once(port: int, request: bytes) -> tuple[int, bytes]:
    """One request as it is, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        connection.connect()
        connection.sock.sendall(request)
        answer = http.client.HTTPResponse(connection.sock, method="POST")
        answer.begin()
        return answer.status, answer.read()
    finally:
        connection.close()


def last_line(log: Path | None) -> str:
    if log is None or not log.is_file():
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"Its log ends: {lines[-1]}" if lines else ""


def family(marker: str) -> Iterator[psutil.Process]:
    """Every live process with this marker in its environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARKER) == marker and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def processor(marker: str) -> float:
    """Seconds of processor time that they, and children of theirs that have ended, took until now."""
    total = 0.0
    for process in family(marker):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory(marker: str) -> dict[str, float]:
    """Megabytes (10⁶ bytes) that they hold."""
    rss = pss = 0.0
    for process in family(marker):
        with contextlib.suppress(psutil.Error):
            found = process.memory_full_info()
            rss, pss = rss + found.rss, pss + found.pss
    return {"rss_mb": round(rss / 1e6, 1), "pss_mb": round(pss / 1e6, 1)}


def end_all(marker: str) -> None:
    """End what is left of a system: processes of our own marker, one by one."""
    left = list(family(marker))
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(left, timeout=8)
    for process in (*alive, *family(marker)):
        with contextlib.suppress(psutil.Error):
            process.kill()


def clean(work: Path) -> None:
    """Remove everything that `run` made but the raw file."""
    shutil.rmtree(work, ignore_errors=True)
