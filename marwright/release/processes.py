"""TorchServe's processes and what they leave behind: found, named and ended only where they are provably ours."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SERVER = "org.pytorch.serve.ModelServer"
_WORKER = "model_service_worker.py"
_TMPDIR = "-Djava.io.tmpdir="


@dataclass(frozen=True)
class Running:
    """One TorchServe: its Java process, where it runs and what it was told to read."""

    process: psutil.Process
    home: Path
    """Its working directory: `key_file.json` and `logs/` are there."""
    serving: Path | None
    temp: Path

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def key_file(self) -> Path:
        return self.home / "key_file.json"


def running(process: psutil.Process) -> Running | None:
    """`process` as a TorchServe of this user; None when it is something else, or has ended."""
    try:
        line = process.cmdline()
        if _SERVER not in line or process.uids().real != os.getuid() or ended(process):
            return None
        home = Path(process.cwd())
    except psutil.Error:
        return None
    serving = line[line.index("-f") + 1] if "-f" in line[:-1] else None
    temp = next((part.removeprefix(_TMPDIR) for part in line if part.startswith(_TMPDIR)), "/tmp")
    return Running(process, home, None if serving is None else home / serving, home / temp)


def servers() -> Iterator[Running]:
    """Every TorchServe of this user."""
    for process in psutil.process_iter():
        found = running(process)
        if found is not None:
            yield found


def ended(process: psutil.Process) -> bool:
    """Gone, or a zombie that only waits to be read by a parent that may never do so."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_ended(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for all of them; returns those that have not ended by then."""
    until = time.monotonic() + seconds
    left = list(processes)
    while left := [process for process in left if not ended(process)]:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return left


def end(processes: Iterable[psutil.Process], *, grace: float) -> list[psutil.Process]:
    """Terminate each, kill what has not ended after `grace` seconds; returns what even that did not end."""
    for action, seconds in (("terminate", grace), ("kill", 5.0)):
        processes = [process for process in processes if not ended(process)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, action)()
        processes = wait_ended(processes, seconds)
    return list(processes)


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def orphans(temp: Path) -> list[psutil.Process]:
    """Workers whose socket is in `temp` and whose server is gone: this user's, by name, socket and parent."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if process.uids().real != os.getuid() or not any(part.endswith(_WORKER) for part in line):
                continue
            name = line[line.index("--sock-name") + 1] if "--sock-name" in line[:-1] else ""
            parent = process.parent()
        except psutil.Error:
            continue
        if Path(name).parent == temp and (parent is None or running(parent) is None) and not ended(process):
            found.append(process)
    return found


def busy(ports: Mapping[str, int]) -> dict[str, int]:
    """Those of the ports that somebody else listens on."""
    taken = {}
    for key, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                taken[key] = port
    return taken


def holder(port: int) -> str:
    """Who listens on a port, in words."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                process = psutil.Process(connection.pid)
                line = " ".join(process.cmdline())
                return f"process {process.pid}, {process.name()}: {line if len(line) < 120 else line[:119] + '…'}"
    return "a process of another user"


def sweep(temp: Path) -> list[str]:
    """Remove what dead servers left in `temp`: sockets, unpacked archives. Nothing while any TorchServe uses it."""
    if any(_same(server.temp, temp) for server in servers()):
        return []
    swept = []
    for path in temp.glob(".ts.sock.*"):
        if re.fullmatch(r"\.ts\.sock\.\d+", path.name) and path.is_socket() and path.lstat().st_uid == os.getuid():
            path.unlink(missing_ok=True)
            swept.append(path.name)
    used = _working_directories()
    for folder in sorted((temp / "models").glob("*")):
        if _is_leaked(folder) and not any(where.is_relative_to(folder.resolve()) for where in used):
            shutil.rmtree(folder, ignore_errors=True)
            swept.append(f"models/{folder.name}")
    return swept


def _is_leaked(folder: Path) -> bool:
    """An archive as TorchServe unpacks it, or the empty folder that it leaves where it could not."""
    if not re.fullmatch(r"[0-9a-f]{32}", folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    if folder.stat().st_uid != os.getuid():
        return False
    return (folder / "MAR-INF" / "MANIFEST.json").is_file() or not any(folder.iterdir())


def _working_directories() -> Sequence[Path]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found.append(Path(process.cwd()))
    return found


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
