"""For Prometheus, until Ctrl-C: what the journal says should answer, what the server does, what feedback says."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as Asked

from marwright.feedback import signals
from marwright.release import exporter
from marwright.release.exporter import Collector
from marwright.release.server import Server
from marwright.settings import ExporterSettings

SETTINGS = ExporterSettings


class All(Asked):
    """Several collectors as one."""

    def __init__(self, *collectors: Asked) -> None:
        self._collectors = collectors

    def collect(self) -> Iterator[Metric]:
        for each in self._collectors:
            yield from each.collect()


def main(settings: ExporterSettings) -> int:
    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    collector = Collector(settings.store, Server(settings.serving, home=settings.home))
    before = signal.signal(signal.SIGTERM, stop)
    try:
        # Ctrl-C and SIGTERM are the ways in which it is meant to end.
        with (
            contextlib.suppress(KeyboardInterrupt),
            signals.watching(settings.feedback, settings.database) as feedback,
            exporter.running(All(collector, feedback), port=settings.port) as url,
        ):
            print(json.dumps({"url": url}) if settings.json else f"{url}   (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
