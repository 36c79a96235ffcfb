"""load.c as two functions: build it once, ask a server for some seconds.

program = load.build(folder)
answered = load.ask(program, manifest, port=8080, connections=64, seconds=3.0)
answered["right"] / answered["seconds"]
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SOURCE = Path(__file__).parent / "load.c"
FAILED = ("bad_status", "wrong", "broken", "hung")
"""What may become of a request that has no right answer."""

PIECE = 4.0
"""Seconds after which `warm` looks whether it still gets faster."""

Arrivals = Literal["closed", "constant", "poisson"]


@dataclass(frozen=True)
class Case:
    """One request as it is sent, and what is right for an answer: see load.c."""

    request: bytes
    kind: Literal["exact", "labels", "inside"]
    wanted: bytes
    """The body, or `cat=0.51,dog=0.2`."""


def build(folder: Path) -> Path:
    """The program in `folder`; SystemExit where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("the load generator needs a C compiler (cc): apt-get install gcc libc6-dev")
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "load"
    subprocess.run([compiler, "-O2", "-o", str(program), str(SOURCE), "-lm"], check=True)
    return program


def pairs(answer: dict[str, float]) -> bytes:
    """A top k as `Case.wanted`."""
    return ",".join(f"{label}={probability:.9g}" for label, probability in answer.items()).encode()


def write(folder: Path, cases: list[Case]) -> Path:
    """The manifest of these cases, and their files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, case in enumerate(cases):
        sent = folder / f"{number}.request"
        sent.write_bytes(case.request)
        wanted = case.wanted.decode(errors="strict") if case.kind != "exact" else str(folder / f"{number}.answer")
        if case.kind == "exact":
            Path(wanted).write_bytes(case.wanted)
        lines.append(f"{sent}\t{case.kind}\t{wanted}\n")
    manifest = folder / "manifest"
    manifest.write_text("".join(lines), encoding="utf-8")
    return manifest


def ask(
    program: Path,
    manifest: Path,
    *,
    port: int,
    connections: int,
    seconds: float,
    arrivals: Arrivals = "closed",
    rate: float = 0.0,
    seed: int = 1,
) -> dict[str, Any]:
    """What load.c prints; latencies in microseconds."""
    words = [program, port, connections, seconds, rate, arrivals, seed, manifest]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=seconds + 60)
    if done.returncode:
        raise RuntimeError(f"the load generator failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def warm(program: Path, manifest: Path, *, port: int, seconds: float, most: float = 40.0) -> None:
    """Load from 64 connections that is not counted: for so long, and on until it no longer gets faster.

    Java compiles what is used often while it runs, and on two busy cores that takes half a minute: a server that is
    measured before is measured at half its speed. Done when a piece answered less than 5 % more than the best one, or
    after `most` seconds.
    """
    best, spent = 0.0, 0.0
    while spent < most:
        found = ask(program, manifest, port=port, connections=64, seconds=PIECE)
        spent += PIECE
        rate = found["right"] / found["seconds"]
        if spent >= seconds and rate < 1.05 * best:
            return
        best = max(best, rate)


def failures(answered: dict[str, Any]) -> int:
    """Requests without a right answer."""
    return sum(int(answered[name]) for name in FAILED)
