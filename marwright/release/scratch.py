"""A TorchServe of its own, for measurements: the project's settings, other ports, a temp folder that goes with it.

with scratch.server(Path("config.properties")) as server:      # holds no model yet
    server.bring_up({})
    ...                                                        # .mar files go into `server.serving.parent`
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from marwright import files
from marwright.release import properties
from marwright.release.server import Server

_ADDRESSES = {
    "inference_address": "http://127.0.0.1:{}",
    "management_address": "http://127.0.0.1:{}",
    "metrics_address": "http://127.0.0.1:{}",
    "grpc_inference_address": "127.0.0.1",
    "grpc_management_address": "127.0.0.1",
    "grpc_inference_port": "{}",
    "grpc_management_port": "{}",
}


@contextlib.contextmanager
def server(config: Path) -> Iterator[Server]:
    """Its folders and settings; starting it is up to the caller, and it is stopped and swept away in any case."""
    folder = Path(tempfile.mkdtemp(prefix="mw"))  # short: worker sockets are in it
    found: Server | None = None
    try:
        with terminable():
            store = folder / "store"
            store.mkdir()
            files.write_text(store / properties.SERVING, moved(properties.serving_text(config, store, ())))
            found = Server(store / properties.SERVING, home=folder, temp=folder, spool=folder / "spool")
            yield found
    finally:
        with uninterrupted():
            if found is not None:
                found.stop(timeout=20.0)
            shutil.rmtree(folder, ignore_errors=True)


def moved(text: str) -> str:
    """The same settings with loopback addresses and ports that nobody listens on now."""
    ports = iter(_free_ports(len(_ADDRESSES)))
    kept = [line for line in text.splitlines() if line.partition("=")[0] not in _ADDRESSES]
    return "\n".join([*kept, *(f"{key}={form.format(next(ports))}" for key, form in _ADDRESSES.items())]) + "\n"


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, and SIGHUP but under nohup, end what is inside as Ctrl-C does: with all that is to be cleaned up."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    hang_up = signal.getsignal(signal.SIGHUP)
    with (
        _handling(signal.SIGTERM, end),
        _handling(signal.SIGHUP, hang_up if hang_up is signal.SIG_IGN else end),
    ):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A second Ctrl-C does not stop the cleaning up after the first."""
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            stack.enter_context(_handling(number, signal.SIG_IGN))
        yield


@contextlib.contextmanager
def _handling(number: int, handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
