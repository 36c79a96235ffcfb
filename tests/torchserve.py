"""A real TorchServe for a test: on ports that the system gave, in a short temp folder of its own, gone afterwards.

    with torchserve.home(tmp_path, {"echo": Expected("1.0")}) as home:      # home.store holds the .mar files
        home.bring_up()
        with home.client() as client:
            client.predict("echo", b"...")

The configuration is the project's own `config.properties`, with other ports and whatever a test adds.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from marwright.release import properties
from marwright.release.client import Client
from marwright.release.processes import Running
from marwright.release.properties import ServerConfig
from marwright.release.server import Expected, Server

PROJECT = Path(__file__).parent.parent
ECHO = (Path(__file__).parent / "release" / "echo_handler.py").read_text(encoding="utf-8")
PORTS = {
    "inference_address": "http://127.0.0.1:{}",
    "management_address": "http://127.0.0.1:{}",
    "metrics_address": "http://127.0.0.1:{}",
    "grpc_inference_port": "{}",
    "grpc_management_port": "{}",
}


@dataclass
class Home:
    """One server's folders and settings. Starting it is up to the test; it is stopped in any case."""

    folder: Path
    temp: Path
    store: Path
    config_path: Path
    server: Server
    expected: Mapping[str, Expected]

    @property
    def config(self) -> ServerConfig:
        return ServerConfig.from_file(self.config_path)

    @property
    def key_file(self) -> Path:
        return self.folder / "key_file.json"

    def release(self, *archives: str) -> None:
        """Let exactly these files of the store be loaded at the next start."""
        properties.write_serving(self.config_path, self.store, archives)

    def bring_up(self, *, timeout: float = 90.0) -> Running:
        return self.server.bring_up(self.expected, timeout=timeout)

    def client(self, *, timeout: float = 15.0) -> Client:
        return self.server.client(timeout=timeout)


@contextlib.contextmanager
def home(
    folder: Path,
    expected: Mapping[str, Expected],
    *,
    archives: Sequence[str] = (),
    store: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Home]:
    """A home in `folder` that serves `archives` of `store` (default: `folder/store`).

    `settings` come on top of the project's. The temp folder is under /tmp and short, because unix sockets are in it.
    """
    store = store or folder / "store"
    store.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix="mw", dir="/tmp"))
    config_path = folder / "config.properties"
    write_config(config_path, settings or {})
    made = Home(
        folder=folder,
        temp=temp,
        store=store,
        config_path=config_path,
        server=Server(store / properties.SERVING, home=folder, temp=temp),
        expected=expected,
    )
    made.release(*archives)
    try:
        yield made
    finally:
        made.server.stop(timeout=20.0)
        shutil.rmtree(temp, ignore_errors=True)


def write_config(path: Path, settings: Mapping[str, str]) -> None:
    """The project's config.properties at `path`, with free ports, and `deploy/` beside it."""
    values = properties.read(PROJECT / "config.properties")
    values |= {key: form.format(port) for (key, form), port in zip(PORTS.items(), free_ports(len(PORTS)), strict=True)}
    values |= settings
    path.write_text("".join(f"{key}={value}\n" for key, value in values.items()), encoding="utf-8")
    shutil.copytree(PROJECT / "deploy", path.parent / "deploy", dirs_exist_ok=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def write_archive(
    store: Path, name: str, version: str, *, handler: str = ECHO, batch_size: int = 8, workers: int = 1
) -> str:
    """A hand-zipped `.mar` around one handler file; returns its bare file name."""
    manifest = {
        "createdOn": "01/01/2000 00:00:00",
        "runtime": "python",
        "model": {
            "modelName": name,
            "modelVersion": version,
            "handler": "echo_handler.py",
            "configFile": "model-config.yaml",
        },
        "archiverVersion": "0.12.0",
    }
    store.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(store / f"{name}-{version}.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("echo_handler.py", handler)
        archive.writestr(
            "model-config.yaml",
            f"minWorkers: {workers}\nmaxWorkers: {workers}\nbatchSize: {batch_size}\nmaxBatchDelay: 5\n",
        )
    return f"{name}-{version}.mar"
