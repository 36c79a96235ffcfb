"""Build the model `feedback`, which takes labels, and load it where a server runs: `marwright feedback collector`.

Nothing is done twice. Where an older version of it answers, the new one is loaded and proved beside it, becomes the
default, and the old one goes once it owes nobody an answer: whoever sends labels meanwhile notices nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from marwright.packing import collector, golden, records
from marwright.packing.golden import Golden
from marwright.packing.records import COLLECTOR, ArchiveRecord
from marwright.release import journal, loading, proof, retiring, serving, shadow, turns
from marwright.release.client import Client
from marwright.release.journal import Journal
from marwright.release.properties import ServerConfig
from marwright.release.server import Server
from marwright.settings import FeedbackCollectorSettings, Places

SETTINGS = FeedbackCollectorSettings
IDLE = 1.0
"""Seconds without a call of its pinned URL, before an old version goes."""


def main(settings: FeedbackCollectorSettings) -> int:
    server = Server(settings.serving, home=settings.home)
    attention: list[str] = []
    with turns.only_one(settings.store, COLLECTOR, what=f"loading of {COLLECTOR}"):
        record, built = archived(settings)
        _say(settings, f"built {record.file}" if built else f"unchanged: {record.file}")
        with server.lock(settings.store / ".start.lock", progress=lambda line: _say(settings, line)):
            running = server.find() is not None
            with journal.open(settings.store) as book:
                if running:
                    attention = _loaded(settings, server, record, book)
                else:
                    _released(book, record, running=False)
    serving.refresh(settings.config, settings.store)
    command = curl(settings)
    if settings.json:
        about = {"model": record.model, "version": record.version, "built": built, "running": running}
        print(json.dumps({**about, "attention": attention, "curl": command}))
        return 0
    print(f"{record.version} {'answers' if running else 'will answer at the next start: make serve'}")
    for line in attention:
        print(f"attention: {line}")
    print(f"\nA label for an answered request, by the x-request-id of its answer:\n  {command}")
    return 0


def archived(places: Places) -> tuple[ArchiveRecord, bool]:
    """The archive of this checkout's collector, in the store and in the journal, and whether it is new."""
    with journal.open(places.store) as book:
        used = {entry.version for entry in book.entries(COLLECTOR, event="archived")}
    record, built = collector.write(places.store, used=used)
    records.check_whole(record, places.store)
    with journal.open(places.store) as book:
        known = book.entries(COLLECTOR, event="archived")
        if not any((entry.version, entry.detail["sha256"]) == (record.version, record.sha256) for entry in known):
            book.add(COLLECTOR, record.version, "archived", run="", sha256=record.sha256, why="takes labels")
    return record, built


def curl(places: Places) -> str:
    """What sends one label, to be pasted into a shell."""
    config = ServerConfig.from_file(places.config)
    token = '-H "Authorization: Bearer $(marwright token)" ' if config.token_auth else ""
    label = json.dumps({"request": "ID", "label": "cat"})
    url = f"{config.inference_url}/predictions/{COLLECTOR}"
    return f"curl {token}-H 'Content-Type: application/json' -d '{label}' {url}"


def _loaded(settings: FeedbackCollectorSettings, server: Server, record: ArchiveRecord, book: Journal) -> list[str]:
    """It answers on the default URL, and no other version is left; what a person should know, a sentence each."""
    examples = golden.read(settings.store / record.file)
    seconds = settings.timeout
    server.wait_ready({}, timeout=seconds)
    with server.client() as client:
        loading.bring_in(client, record, server=server, call_seconds=seconds, ready_seconds=seconds)
        proof.prove(client, record, examples)
        if loading.default_version(client, COLLECTOR) != record.version:
            book.add(COLLECTOR, record.version, "switching", why="the collector of this checkout")
            client.set_default(COLLECTOR, record.version)
        proof.prove(client, record, examples, pinned=False)
        _released(book, record, running=True)
        said = [_retired(client, book, record, version, examples, seconds) for version in _others(client, record)]
        keeps = (client.describe(COLLECTOR, customized=True)[0].customized or {}).get("keeps")
    if not keeps:
        said.append("the server was started without MARWRIGHT_SPOOL and refuses labels: make stop, make serve")
    return [line for line in said if line]


def _others(client: Client, record: ArchiveRecord) -> list[str]:
    return sorted(loading.versions(client, COLLECTOR).keys() - {record.version})


def _retired(
    client: Client, book: Journal, record: ArchiveRecord, version: str, examples: Sequence[Golden], seconds: float
) -> str:
    """Why that version could not go; "" where it went."""
    why = f"{record.version} answers"
    sample = shadow.from_golden(examples)[0]
    left = retiring.retire(client, book, COLLECTOR, version, sample, why=why, idle=IDLE, seconds=seconds)
    return f"{COLLECTOR} {version} is still loaded: {left}" if left else ""


def _released(book: Journal, record: ArchiveRecord, *, running: bool) -> None:
    """The journal says so, where it does not yet."""
    was = book.released(COLLECTOR)
    if was is None or was.version != record.version:
        why = "answers its golden examples" if running else "for the next start"
        book.release(COLLECTOR, record.version, proven=running, why=why, running=running)


def _say(settings: FeedbackCollectorSettings, line: str) -> None:
    print(line, file=sys.stderr if settings.json else sys.stdout, flush=True)
