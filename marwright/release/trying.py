"""The real bench of `tuning`: variants of one archive, loaded into a scratch server and put under load.

    with scratch.server(config) as server:
        server.bring_up({})
        with Trying(server, sources, target=Target.parse("p99=20ms"), connections=128) as bench:
            tuning.search(bench, …)

A variant is loaded when it is tried and taken out when it is dropped; its workers' memory is free again then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import numpy as np

from marwright.errors import MarwrightError
from marwright.packing import container, golden, variants
from marwright.packing.records import ArchiveRecord
from marwright.release import loading, proof
from marwright.release.contenders import Measured, Setting, Target
from marwright.release.loadtest.lean import Outcome, Plan, Sender
from marwright.release.server import Server
from marwright.release.tokens import Tokens

_SECONDS = 120.0
"""For a worker to start."""
_PERCENTILES = (50.0, 90.0, 99.0, 99.9)


@dataclass(frozen=True)
class Source:
    """An archive of one format: its record, and the file."""

    record: ArchiveRecord
    path: Path


class Trying:
    """`sources` has, for each format, a function that gives its archive; asked once, when that format is tried first.

    It may raise a MarwrightError: then the format cannot be served.
    """

    def __init__(
        self,
        server: Server,
        sources: Mapping[str, Callable[[], Source]],
        *,
        target: Target,
        connections: int,
    ) -> None:
        self._server = server
        self._sources = sources
        self._percentiles = sorted({*_PERCENTILES, target.percentile})
        self._connections = connections
        self._store = server.serving.parent
        self._unpacked: dict[str, tuple[ArchiveRecord, Path]] = {}
        self._loaded: dict[Setting, ArchiveRecord] = {}
        self._sender: Sender | None = None
        self._made = 0
        self._runs = 0
        self.busiest = 0.0
        """The largest share of a core that the sender needed: near 1, it and not the server was measured."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._sender is not None:
            self._sender.close()

    def now(self) -> float:
        return time.monotonic()

    def load(self, setting: Setting) -> None:
        """Built, registered, READY, and shown to answer its golden examples rightly."""
        source, folder = self._source(setting.format)
        self._made += 1
        numbers = {
            "workers": setting.workers,
            "batch_size": setting.batch_size,
            "max_batch_delay": setting.max_batch_delay,
            "threads": setting.threads,
        }
        record = variants.write(source, folder, self._store, f"{self._made}.0", numbers)
        examples = golden.read(folder)
        try:
            with self._server.client(timeout=15.0) as client:
                loading.bring_in(client, record, server=self._server, call_seconds=_SECONDS, ready_seconds=_SECONDS)
                proof.prove(client, record, examples)
        except BaseException:
            with contextlib.suppress(MarwrightError):
                self._remove(record)
            raise
        self._loaded[setting] = record
        if self._sender is None:
            address = urlsplit(self._server.config().inference_url)
            self._sender = Sender(str(address.hostname), int(address.port or 80), examples)

    def drop(self, setting: Setting) -> None:
        """What cannot be taken out stays loaded, idle: no reason to end a search."""
        record = self._loaded.pop(setting, None)
        if record is not None:
            with contextlib.suppress(MarwrightError):
                self._remove(record)

    def closed(self, setting: Setting, connections: int | None, seconds: float) -> Measured:
        outcome = self._send(setting, 0.0, seconds, connections or self._connections)
        return self._measured(outcome, len(outcome.latencies) / max(outcome.seconds, 1e-9))

    def open(self, setting: Setting, rate: float, seconds: float) -> Measured:
        return self._measured(self._send(setting, rate, seconds, self._connections), rate)

    def _send(self, setting: Setting, rate: float, seconds: float, connections: int) -> Outcome:
        assert self._sender is not None, "load a setting first"
        record = self._loaded[setting]
        found, config = self._server.find(), self._server.config()
        key = Tokens(found.key_file, config).key("inference") if found and config.token_auth else ""
        self._runs += 1
        outcome = self._sender.run(
            Plan(f"/predictions/{record.model}/{record.version}", rate, seconds, connections, key, seed=self._runs)
        )
        self.busiest = max(self.busiest, outcome.cpu)
        return outcome

    def _measured(self, outcome: Outcome, rate: float) -> Measured:
        some = len(outcome.latencies) > 0
        values = np.percentile(outcome.latencies, self._percentiles, method="higher") if some else ()
        return Measured(
            rate=rate,
            requests=outcome.requests,
            failed=sum(outcome.failures.values()),
            percentiles={each: float(value) for each, value in zip(self._percentiles, values, strict=some)},
            why=next(iter(outcome.failures), ""),
            overloaded=outcome.overloaded,
        )

    def _source(self, format: str) -> tuple[ArchiveRecord, Path]:
        if format not in self._unpacked:
            source = self._sources[format]()
            folder = self._server.home / "unpacked" / format
            folder.mkdir(parents=True)
            container.unpack(source.path, folder)
            self._unpacked[format] = source.record, folder
        return self._unpacked[format]

    def _remove(self, record: ArchiveRecord) -> None:
        try:
            with self._server.client(timeout=15.0) as client:
                loading.remove(client, record.model, record.version)
        finally:
            (self._store / record.file).unlink(missing_ok=True)
