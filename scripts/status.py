"""What is built, what is released, and what answers; any difference between the last two is said."""

from __future__ import annotations

import json
from dataclasses import dataclass

from marwright import cli
from marwright.errors import ServerError
from marwright.packing import records
from marwright.release import journal, loading, reconcile, turns
from marwright.release.answers import ModelStatus
from marwright.release.server import Server
from marwright.settings import Places, StatusSettings
from scripts import live

SETTINGS = StatusSettings


@dataclass(frozen=True)
class Row:
    """One built version."""

    model: str
    version: str
    size: int
    scores: str
    released: str
    serving: str
    trouble: str = ""


def main(settings: StatusSettings) -> int:
    server = Server(settings.serving, home=settings.home)
    running = server.find()
    serving: dict[tuple[str, str], ModelStatus] = {}
    trouble = ""
    if running is not None:
        try:
            with live.client(settings, timeout=5.0, starting=0) as client:
                serving = {
                    (model, version): status
                    for model in client.models()
                    for version, status in loading.versions(client, model).items()
                }
        except ServerError as error:
            trouble = str(error)
    rows = table(settings, serving, server if running else None)
    attention = [row.trouble for row in rows if row.trouble] + ([trouble] if trouble else [])
    if running is not None and not trouble:
        attention += against_journal(settings, serving)
    if settings.json:
        versions = [row.__dict__ for row in rows]
        print(json.dumps({"running": running is not None, "versions": versions, "attention": attention}))
        return 0
    show(rows)
    print(f"TorchServe: {f'running, pid {running.pid}' if running else 'not running (make serve starts it)'}")
    for line in attention:
        print(f"attention: {line}")
    return 0


def against_journal(places: Places, serving: dict[tuple[str, str], ModelStatus], *, changing: bool = True) -> list[str]:
    """Where the server differs from the journal, a sentence each; of a model that is being changed only that it is.

    Without `changing`, not even that.
    """
    held_now, found = [], []
    with journal.open(places.store) as book:
        for model in book.releases():
            held = {version: status for (name, version), status in serving.items() if name == model}
            holder = turns.holder(places.store, model)
            if holder:
                held_now.append(f"{model} is being changed: {holder}")
                continue
            found += [each.sentence for each in reconcile.differences(book, model, held)]
    return [*(held_now if changing else ()), *found, *(["`marwright reconcile` mends that"] if found else [])]


def table(places: Places, serving: dict[tuple[str, str], ModelStatus], server: Server | None) -> list[Row]:
    """A row for each archive in the store; `trouble` where one that is released cannot answer."""
    with journal.open(places.store) as book:
        released = book.releases()
    rows = []
    for record in records.records(places.store):
        release = released.get(record.model)
        chosen = release is not None and release.version == record.version
        status = serving.get((record.model, record.version))
        trouble = ""
        if chosen and not (places.store / record.file).is_file():
            trouble = (
                f"{record.file} is released and missing from {places.store}: put it back, or make release VERSION=…"
            )
        elif server and chosen and status is not None and status.ready_workers < record.workers:
            words = server.last_words(record.model, record.version) or "logs/model_log.log has their own words"
            trouble = (
                f"{record.model} {record.version} has {status.ready_workers} of {record.workers} workers ready: {words}"
            )
        word = ("proven" if release.proven else "unproven") if release and chosen else ""
        answers = f"{'answers' if status.default else 'loaded'}, {status.ready_workers} ready" if status else ""
        scores = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
        rows.append(Row(record.model, record.version, record.size, scores, word, answers, trouble))
    built = {(record.model, record.version) for record in records.records(places.store)}
    for model, release in released.items():
        if (model, release.version) not in built:
            trouble = (
                f"{model} {release.version} is released and its record is missing from {places.store}: put it back"
            )
            rows.append(Row(model, release.version, 0, "", "proven" if release.proven else "unproven", "", trouble))
    return rows


def show(rows: list[Row]) -> None:
    if not rows:
        print("nothing built yet: make archive")
        return
    titles = ("model", "version", "kB", "test", "released", "server")
    cli.print_table(
        titles,
        [(row.model, row.version, f"{row.size / 1000:.0f}", row.scores, row.released, row.serving) for row in rows],
    )
