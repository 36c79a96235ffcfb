"""For Prometheus, until Ctrl-C: what the journal says should answer, beside what the server does."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from types import FrameType

from marwright.release import exporter
from marwright.release.exporter import Collector
from marwright.release.server import Server
from marwright.settings import ExporterSettings

SETTINGS = ExporterSettings


def main(settings: ExporterSettings) -> int:
    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    collector = Collector(settings.store, Server(settings.serving, home=settings.home))
    before = signal.signal(signal.SIGTERM, stop)
    try:
        # Ctrl-C and SIGTERM are the ways in which it is meant to end.
        with contextlib.suppress(KeyboardInterrupt), exporter.running(collector, port=settings.port) as url:
            print(json.dumps({"url": url}) if settings.json else f"{url}   (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
