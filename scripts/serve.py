"""Train, export, archive, start TorchServe, wait for a real answer, show it, and say what to type next.

While the server is running this only checks. After a crash it first clears what the crash left behind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

from marwright import cli
from marwright.packing import golden, records
from marwright.packing.records import ArchiveRecord
from marwright.release import journal, loading, proof
from marwright.release.proof import Proof
from marwright.release.server import Expected, Server
from marwright.settings import Places, ServeSettings
from scripts import archive, live

SETTINGS = ServeSettings


def main(settings: ServeSettings) -> int:
    record, built, standing = archive.archived(settings)
    _say(settings, f"built {record.file}" if built else f"unchanged: {record.file}")
    if standing.sentence:
        _say(settings, standing.sentence)
    spool = settings.spool if settings.feedback != Places.feedback else None
    server = Server(settings.serving, home=settings.home, spool=spool)
    with server.lock(settings.store / ".start.lock", progress=lambda line: _say(settings, line)):
        released = _released(settings)
        running = server.find() is not None
        for each in released:
            records.check_whole(each, settings.store)
        if running:
            _load_new_models(server, released, settings.timeout)
        expected = {each.model: Expected(each.version, each.workers) for each in released}
        server.bring_up(expected, timeout=settings.timeout, progress=lambda line: _say(settings, line))
        if not running:
            _forget_others(settings)
    with live.client(settings) as client:
        proofs = [proof.prove(client, each, _golden(settings, each), pinned=False) for each in released]
    _show(settings, record, released, proofs, running=running)
    return 0


def _released(places: Places) -> list[ArchiveRecord]:
    with journal.open(places.store) as book:
        releases = book.releases().values()
    return [records.record(places.store, release.model, release.version) for release in releases]


def _forget_others(places: Places) -> None:
    """A server that was just started holds the released versions alone."""
    with journal.open(places.store) as book:
        for model, release in book.releases().items():
            for version in sorted(book.live(model) - {release.version}):
                book.add(model, version, "retired", why="the server was started again")


def _load_new_models(server: Server, released: Iterable[ArchiveRecord], seconds: float) -> None:
    """A model of which the running server knows no version is no risk to anybody: load it.

    Not by a REST call that waits for its workers: that one stalls the inference port for as long.
    """
    server.wait_ready({}, timeout=seconds)
    with server.client() as client:
        known = client.models()
        for each in released:
            if each.model not in known:
                loading.bring_in(client, each, server=server, call_seconds=seconds, ready_seconds=seconds)


def _golden(places: Places, record: ArchiveRecord) -> tuple[golden.Golden, ...]:
    return golden.read(places.store / record.file)


def _show(
    settings: ServeSettings,
    served: ArchiveRecord,
    released: Iterable[ArchiveRecord],
    proofs: list[Proof],
    *,
    running: bool,
) -> None:
    if settings.json:
        print(json.dumps({"running": running, "models": [each.__dict__ for each in proofs]}))
        return
    rows = []
    for record, seen in zip(released, proofs, strict=True):
        scores = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
        answer = f"{seen.first[0]}: {seen.first[1]:.4g}"
        right = f"{seen.examples} of {seen.examples}"
        took = f"{seen.seconds * 1000:.1f} ms"
        rows.append((seen.model, seen.version, scores, answer, took, right, seen.bundle))
    cli.print_table(("model", "version", "test", "a real answer", "in", "golden", "bundle"), rows)
    example = next(iter(sorted((settings.runs / served.run / "golden").glob("00.*"))), "cat.png")
    print(f"\nTorchServe {'was running already' if running else 'is running'}. Next:")
    print(f"  make predict IMAGE={example} MODEL={served.model}          # GRPC=1 for gRPC")
    print("  make status                                # what is built, released, answering")
    print("  make archive RECIPE=mnist DATA=mnist.zip   # another recipe, your own data")
    print("  make stop")


def _say(settings: ServeSettings, line: str) -> None:
    print(line, file=sys.stderr if settings.json else sys.stdout, flush=True)
