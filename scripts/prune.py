"""Remove what nobody needs any more, so that a loop can run for months: archives, runs, old requests."""

from __future__ import annotations

import json
import shutil

from marwright.feedback.store import Store
from marwright.packing import records
from marwright.release import journal, policy, retention
from marwright.settings import Places, PruneSettings
from scripts import taught

SETTINGS = PruneSettings


def main(settings: PruneSettings) -> int:
    with journal.open(settings.store) as book:
        models = sorted({entry.model for entry in book.entries()})
    lines = []
    for model in models:
        with taught.alone(settings, model) as alone:
            if alone:
                lines += pruned(settings, model, policy.load(settings.policy, model).keep)
            else:
                lines.append(f"{model} is left alone: a retraining of it is under way")
    with taught.opened(settings) as store:
        if store is not None:
            lines += [line for model in store.models() for line in _requests(settings, store, model)]
    print(json.dumps(lines) if settings.json else "\n".join(lines) or "nothing to remove")
    return 0


def pruned(places: Places, model: str, keep: policy.KeepPolicy) -> list[str]:
    """What was removed, in words: archives with their records, and runs that no archive came from."""
    built = records.records(places.store, model)
    with journal.open(places.store) as book:
        gone = retention.stale(built, book, model, keep=keep.versions)
    for record in gone:
        # The record first: a file without one is only a name that is taken.
        for path in (
            places.store / records.record_name(record.file),
            places.store / record.file,
            places.store / "verdicts" / f"{model}-{record.version}.html",
        ):
            path.unlink(missing_ok=True)
    left = [record for record in built if record not in gone]
    runs = retention.unneeded(places.runs, model, left)
    for run in runs:
        shutil.rmtree(run.path, ignore_errors=True)
        run.path.with_name(f".{run.id}.lock").unlink(missing_ok=True)
    lines = [f"removed {record.file}" for record in gone]
    return lines + ([f"removed {len(runs)} runs of {model}"] if runs else [])


def _requests(settings: PruneSettings, store: Store, model: str) -> list[str]:
    """What was removed of the requests to one model, in words."""
    limits, unlabelled = policy.load(settings.policy, model).keep, settings.unlabelled_days
    gone = store.prune(
        days=limits.days if settings.days is None else settings.days,
        unlabelled_days=limits.unlabelled_days if unlabelled is None else unlabelled,
        model=model,
        spool=settings.spool,
    )
    if not (gone.requests or gone.labels or gone.bodies):
        return []
    what = f"{gone.requests} requests, {gone.labels} labels, {gone.bodies} example files"
    return [f"removed {what} ({gone.body_bytes / 1e6:.1f} MB)"]
