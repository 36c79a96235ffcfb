"""A real Prometheus for a test: on a free loopback port, its data in a temp folder, ended by its pid.

    with prometheus.running(config, data=tmp_path / "data") as server:
        server.query("up")                                  # [({"job": "torchserve"}, 1.0)]

The binaries are those on PATH, else those of Debian's package `prometheus`, unpacked beside the virtual environment:
nothing is installed, no service is started. Where neither can be had, `folder()` skips the test and says why.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import pytest
import requests

from tests import torchserve

PROGRAMS = ("prometheus", "promtool")
CACHE = torchserve.PROJECT / ".venv" / "prometheus"
"""Git-ignored; `make` does not look into it."""
_SECONDS = 120
"""For a download, and for another process's."""

Sample = tuple[dict[str, str], float]


def folder() -> Path:
    """Where `prometheus` and `promtool` are; skips the test where they cannot be had."""
    found, why = _found()
    if found is None:
        pytest.skip(f"no Prometheus: {why}")
    return found


def promtool(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`promtool …`; stdout has both outputs."""
    command = [str(folder() / "promtool"), *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
    )


@dataclass(frozen=True)
class Running:
    """A Prometheus that answers at `url`."""

    url: str
    process: subprocess.Popen[bytes]

    def query(self, expression: str) -> list[Sample]:
        """The instant vector that an expression has now: labels and value; a refused one fails with its reason."""
        result = self._ask("query", query=expression)
        if result["resultType"] == "scalar":
            return [({}, float(result["result"][1]))]
        return [(each["metric"], float(each["value"][1])) for each in result["result"]]

    def targets(self) -> dict[str, str]:
        """`up`, `down` or `unknown` by job."""
        return {each["labels"]["job"]: each["health"] for each in self._ask("targets")["activeTargets"]}

    def firing(self) -> list[dict[str, str]]:
        """The labels of every alert that fires now."""
        return [each["labels"] for each in self._ask("alerts")["alerts"] if each["state"] == "firing"]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule as Prometheus sees it: name, query, type, health, lastError."""
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def _ask(self, what: str, **parameters: str) -> Any:
        response = requests.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=10)
        assert response.ok, response.text
        return response.json()["data"]


@contextlib.contextmanager
def running(config: Path, *, data: Path) -> Iterator[Running]:
    """Prometheus with that configuration, once it is ready."""
    (port,) = torchserve.free_ports(1)
    log = data.with_suffix(".log")
    command = [
        str(folder() / "prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={data}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    server = Running(f"http://127.0.0.1:{port}", process)
    try:
        until = time.monotonic() + 60
        while not _ready(server.url):
            ended = process.poll() is not None or time.monotonic() > until
            assert not ended, log.read_text(encoding="utf-8")[-3000:]
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/-/ready", timeout=5).ok
    except requests.RequestException:
        return False


@cache
def _found() -> tuple[Path | None, str]:
    """The folder with both programs, or why there is none."""
    there = [shutil.which(program) for program in PROGRAMS]
    if all(there):
        return Path(str(there[0])).parent, ""
    if _whole(CACHE):
        return CACHE, ""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None, "not on PATH, and this is no Debian to take its package from"
    CACHE.parent.mkdir(exist_ok=True)
    try:
        with filelock.FileLock(CACHE.with_suffix(".lock"), timeout=_SECONDS):
            return (CACHE, "") if _whole(CACHE) else _fetch()
    except (filelock.Timeout, subprocess.TimeoutExpired) as error:  # a mirror that does not answer fails no test
        return None, f"its package cannot be had in {_SECONDS} s: {error}"


def _fetch() -> tuple[Path | None, str]:
    """Both programs of Debian's package, in CACHE."""
    with tempfile.TemporaryDirectory(dir=CACHE.parent, prefix="prometheus-") as name:
        here = Path(name)
        download = ["apt-get", "download", "prometheus"]
        done = _run(download, here)  # anybody may
        if done.returncode and os.geteuid() == 0:  # the lists of packages may be missing or older than the mirror
            _run(["apt-get", "update"], here)
            done = _run(download, here)
        packages = list(here.glob("prometheus_*.deb"))
        if done.returncode or len(packages) != 1:
            words = done.stdout.strip()[-300:]
            return None, f"`apt-get download prometheus` failed (`apt-get install prometheus` helps): {words}"
        done = _run(["dpkg-deb", "-x", packages[0].name, "unpacked"], here)
        if done.returncode:
            return None, f"its package cannot be unpacked: {done.stdout.strip()[-300:]}"
        CACHE.mkdir(exist_ok=True)
        for program in PROGRAMS:
            (here / "unpacked" / "usr" / "bin" / program).replace(CACHE / program)
    return CACHE, ""


def _whole(there: Path) -> bool:
    return all((there / program).is_file() for program in PROGRAMS)


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_SECONDS, check=False
    )
