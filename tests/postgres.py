"""A real PostgreSQL for a test: a cluster of its own in a temp folder, on loopback, ended by its pid.

    with postgres.running(tmp_path / "cluster") as url:
        Store.open(tmp_path, url)

The programs are those on PATH or in Debian's folder of them, else those of Debian's package, unpacked beside the
virtual environment: nothing is installed, no service is started. PostgreSQL refuses to run as root; there it is nobody.
Where it cannot be had, `programs()` skips the test and says why.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import filelock
import pg8000.native
import pytest

from tests import torchserve

PASSWORD = "not to be printed"
CACHE = torchserve.PROJECT / ".venv" / "postgres"
"""Git-ignored; `make` does not look into it."""
_DEBIAN = Path("/usr/lib/postgresql")
_NEEDED = ("initdb", "postgres")
_SECONDS = 180
"""For a download, and for another process's."""


def programs() -> Path:
    """Folder of `initdb` and `postgres`; skips the test where they cannot be had."""
    found, why = _found()
    if found is None:
        pytest.skip(f"no PostgreSQL: {why}")
    return found


@contextlib.contextmanager
def running(where: Path) -> Iterator[str]:
    """The URL of a new cluster's database, once it answers."""
    folder = programs()
    # Not below pytest's folder, which nobody else may enter.
    with tempfile.TemporaryDirectory(prefix="cluster-") as name:
        data, log = Path(name) / "data", where.with_suffix(".log")
        Path(name).chmod(0o755)
        data.mkdir()
        secret = Path(name) / "password"
        secret.write_text(PASSWORD)
        user = _user()
        if user:
            for path in (data, secret):
                shutil.chown(path, user)
        words = ["--username=wright", f"--pwfile={secret}", "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"]
        done = _run([str(folder / "initdb"), "-D", str(data), *words], Path(name), user=user)
        assert done.returncode == 0, done.stdout
        (port,) = torchserve.free_ports(1)
        command = [str(folder / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", "", "-F"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=name,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                user=user,
                env=_environment(),
            )
        try:
            until = time.monotonic() + 60
            while not _answers(port):
                ended = process.poll() is not None or time.monotonic() > until
                assert not ended, log.read_text(encoding="utf-8")[-3000:]
                time.sleep(0.1)
            password = PASSWORD.replace(" ", "%20")
            yield f"postgresql://wright:{password}@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGQUIT)  # at once: its data go with its folder
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int) -> bool:
    try:
        with contextlib.closing(
            pg8000.native.Connection(
                "wright", host="127.0.0.1", port=port, database="postgres", password=PASSWORD, timeout=10
            )
        ) as connection:
            return bool(connection.run("select 1") == [[1]])
    except (pg8000.native.InterfaceError, pg8000.native.DatabaseError, OSError):
        return False


def _user() -> str | None:
    """Whom it runs as."""
    return "nobody" if os.geteuid() == 0 else None


@cache
def _found() -> tuple[Path | None, str]:
    """The folder with the programs, or why there is none."""
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("nobody")
        except KeyError:
            return None, "it refuses to run as root, and there is no user nobody"
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(_DEBIAN.glob("*/bin"), reverse=True) + sorted(CACHE.glob("usr/lib/postgresql/*/bin"))
    for folder in folders:
        if _whole(folder):
            return folder, ""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None, "not on PATH, and this is no Debian to take its package from"
    CACHE.parent.mkdir(exist_ok=True)
    try:
        with filelock.FileLock(CACHE.with_suffix(".lock"), timeout=_SECONDS):
            return _fetch()
    except (filelock.Timeout, subprocess.TimeoutExpired) as error:  # a mirror that does not answer fails no test
        return None, f"its package cannot be had in {_SECONDS} s: {error}"


def _fetch() -> tuple[Path | None, str]:
    """Debian's package and the library that it brings, unpacked in CACHE."""
    there = sorted(CACHE.glob("usr/lib/postgresql/*/bin"))
    if there and _whole(there[-1]):
        return there[-1], ""
    with tempfile.TemporaryDirectory(dir=CACHE.parent, prefix="postgres-") as name:
        here = Path(name)
        depends = _run(["apt-cache", "depends", "postgresql"], here)
        if (depends.returncode or "postgresql-" not in depends.stdout) and os.geteuid() == 0:
            _run(["apt-get", "update"], here)  # the lists of packages may be missing
            depends = _run(["apt-cache", "depends", "postgresql"], here)
        package = next((word for word in depends.stdout.split() if word.startswith("postgresql-")), "")
        done = _run(["apt-get", "download", package or "postgresql", "libpq5"], here)  # anybody may
        packages = list(here.glob("*.deb"))
        if done.returncode or not packages:
            words = done.stdout.strip()[-300:]
            return None, f"`apt-get download postgresql` failed (`apt-get install postgresql` helps): {words}"
        for each in packages:
            done = _run(["dpkg-deb", "-x", each.name, "unpacked"], here)
            if done.returncode:
                return None, f"its package cannot be unpacked: {done.stdout.strip()[-300:]}"
        (here / "unpacked").chmod(0o755)
        (here / "unpacked").replace(CACHE)
    there = sorted(CACHE.glob("usr/lib/postgresql/*/bin"))
    if not there or _run([str(there[-1] / "postgres"), "--version"], CACHE).returncode:
        return None, "its package lacks libraries here (`apt-get install postgresql` helps)"
    return there[-1], ""


def _whole(folder: Path) -> bool:
    return all((folder / program).is_file() for program in _NEEDED)


def _run(command: list[str], cwd: Path, *, user: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
        check=False,
        user=user,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    """With the libraries of an unpacked package; C, since its words are looked at."""
    libraries = sorted({str(path.parent) for path in CACHE.glob("usr/lib/**/*.so*")})
    found = ":".join([*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    return {**os.environ, "LC_ALL": "C", **({"LD_LIBRARY_PATH": found} if libraries else {})}
