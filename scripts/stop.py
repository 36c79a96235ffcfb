"""Stop TorchServe; returns when it and its workers have ended."""

from __future__ import annotations

from marwright.release.server import Server
from marwright.settings import StopSettings

SETTINGS = StopSettings


def main(settings: StopSettings) -> int:
    ended = Server(settings.serving, home=settings.home).stop(timeout=settings.timeout)
    print("TorchServe has ended." if ended else "TorchServe is not running.")
    return 0
