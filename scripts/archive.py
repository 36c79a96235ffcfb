"""Package a run as <name>-<version>.mar, and say which version will answer."""

from __future__ import annotations

import json
from dataclasses import asdict

from marwright.learning.recipe import Recipe
from marwright.packing import archive, records
from marwright.packing.exporting import Artifact
from marwright.packing.records import ArchiveRecord
from marwright.release import journal, rollout, serving
from marwright.release.journal import Standing
from marwright.release.server import Server
from marwright.runs import Run
from marwright.settings import ArchiveSettings, Places
from scripts import export

SETTINGS = ArchiveSettings


def main(settings: ArchiveSettings) -> int:
    record, built, standing = archived(settings)
    if settings.json:
        print(json.dumps(asdict(record) | {"built": built, "released": standing.releases}))
        return 0
    if not built:
        print(f"unchanged: {record.file}")
    else:
        twin = f", {record.twin_size / 1000:.0f} kB of it for explanations" if record.twin_size else ""
        print(f"built {settings.store / record.file} ({record.size / 1000:.0f} kB{twin}, sha256 {record.sha256[:12]})")
    if standing.sentence:
        print(standing.sentence)
    return 0


def archived(settings: ArchiveSettings) -> tuple[ArchiveRecord, bool, Standing]:
    """The archive of the recipe's run, whether it is new, and what that means for the version that answers."""
    if settings.version is not None:
        records.check_version(settings.version)  # before anything is trained for it
    chosen, run, artifact = export.exported(settings)
    if settings.profile is not None:
        chosen = chosen.model_copy(update={"serving": chosen.serving.under(settings.profile)})
    return stored(settings, chosen, run, artifact, version=settings.version)


def stored(
    settings: Places,
    chosen: Recipe,
    run: Run,
    artifact: Artifact,
    *,
    version: str | None = None,
    behind_gate: bool = False,
) -> tuple[ArchiveRecord, bool, Standing]:
    """The archive of that run, in the store and in the journal. `behind_gate`: where a version is released already,
    this one waits for its rollout, be the server running or not."""
    with journal.open(settings.store) as book:
        used = {entry.version for entry in book.entries(chosen.name, event="archived")}
    record, built = archive.write(run, artifact, chosen, settings.store, version=version, used=used)
    server = Server(settings.serving, home=settings.home)
    with server.lock(settings.store / ".start.lock"), journal.open(settings.store) as book:
        known = book.entries(record.model, event="archived")
        new = not any((entry.version, entry.detail["sha256"]) == (record.version, record.sha256) for entry in known)
        if new:
            book.add(record.model, record.version, "archived", run=record.run, sha256=record.sha256)
        released = book.released(record.model)
        standing = journal.after_archive(
            record.version,
            new=new,
            released=released,
            running=behind_gate or server.find() is not None,
            proven=book.has_proven_rollout(record.model) or rollout.unfinished(book, record.model) is not None,
        )
        if standing.releases:
            why = "first archive" if released is None else "archived while the server was stopped"
            book.release(record.model, record.version, proven=False, why=why)
    serving.refresh(settings.config, settings.store)
    return record, built, standing
