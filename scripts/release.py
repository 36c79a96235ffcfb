"""Make a version the released one, without proof; where the server is running, it answers from now on."""

from __future__ import annotations

import json

from marwright.packing import records
from marwright.release import journal, loading, rollout, serving, turns
from marwright.release.server import Server
from marwright.settings import ReleaseSettings
from scripts import live

SETTINGS = ReleaseSettings


def main(settings: ReleaseSettings) -> int:
    record = records.record(settings.store, settings.model, settings.version)
    records.check_whole(record, settings.store)
    server = Server(settings.serving, home=settings.home)
    with (
        turns.only_one(settings.store, record.model, what=f"release of {record.model} {record.version}"),
        server.lock(settings.store / ".start.lock"),
        journal.open(settings.store) as book,
    ):
        was = book.released(record.model)
        running = server.find() is not None
        left = rollout.unfinished(book, record.model)
        if left is not None:  # whoever releases by hand has decided; `reconcile` takes out what it had loaded
            about = {"id": left.id, "champion": record.version, "innocent": True}
            book.add(left.model, left.version, "rolled back", reason=f"{record.version} was released by hand", **about)
        if running:
            with live.client(settings) as client:
                seconds = {"call_seconds": settings.timeout, "ready_seconds": settings.timeout}
                loading.bring_in(client, record, server=server, **seconds)
                book.add(record.model, record.version, "switching", why="released by hand, without proof")
                client.set_default(record.model, record.version)
        if was is None or was.version != record.version:
            why = "released by hand, without proof"
            book.release(record.model, record.version, proven=False, why=why, running=running)
    serving.refresh(settings.config, settings.store)
    before = f" (was {was.version})" if was and was.version != record.version else ""
    when = "answers now" if running else "will answer at the next start"
    if settings.json:
        print(json.dumps({"model": record.model, "version": record.version, "running": running}))
    else:
        print(f"{record.version} {when}{before}; the journal says: released without proof")
    return 0
