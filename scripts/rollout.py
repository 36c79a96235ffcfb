"""Bring a built version to answer on the running server, with proof before and after, and back when it fails."""

from __future__ import annotations

import json
import sys

from marwright.errors import ArchiveError
from marwright.packing import golden, records
from marwright.packing.records import ArchiveRecord
from marwright.release import journal, rollout, serving
from marwright.release.server import Server
from marwright.settings import RolloutSettings
from scripts import live

SETTINGS = RolloutSettings


def main(settings: RolloutSettings) -> int:
    record = _chosen(settings)
    records.check_whole(record, settings.store)
    server = Server(settings.serving, home=settings.home)
    with (
        server.lock(settings.store / ".start.lock"),
        live.client(settings) as client,
        journal.open(settings.store) as book,
    ):
        was = rollout.default_version(client, record.model)
        seen = rollout.roll_out(
            client,
            record,
            golden.read(settings.store / record.file),
            book=book,
            seconds=settings.timeout,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    serving.refresh(settings.config, settings.store)
    if settings.json:
        print(json.dumps({"model": record.model, "version": record.version, "was": was, "golden": seen.examples}))
    else:
        before = f" (was {was}, still loaded)" if was and was != record.version else ""
        print(f"{record.version} answers now{before}; the journal says: released, proven")
    return 0


def _chosen(settings: RolloutSettings) -> ArchiveRecord:
    if settings.version is not None:
        return records.record(settings.store, settings.model, settings.version)
    built = records.records(settings.store, settings.model)
    if not built:
        raise ArchiveError(f"no archive of {settings.model} in {settings.store}", hint="make archive")
    return built[-1]
