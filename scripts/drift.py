"""Whether requests are still what the version that answers was made for: a table, and a page with plots."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime

from marwright import cli, files
from marwright.errors import ArchiveError, DataError, SettingsError
from marwright.feedback import changes, drift, driftpage, trigger
from marwright.feedback.changes import Rises
from marwright.feedback.database import VARIABLE
from marwright.feedback.drift import Look
from marwright.feedback.store import Answered, Store
from marwright.packing import records, reference
from marwright.packing.records import ArchiveRecord
from marwright.release import journal, policy
from marwright.release.policy import TriggerPolicy
from marwright.settings import DriftSettings, Places

SETTINGS = DriftSettings
NOTE = "drift"


def main(settings: DriftSettings) -> int:
    with _opened(settings) as store:
        record = _champion(settings, _model(settings, store))
        limits = policy.load(settings.policy, record.model)
        known = reference.read(settings.store / record.file)
        if known is None:
            raise ArchiveError(
                f"{record.file} has no reference: it was built before there were any",
                hint="train and build the next version, `marwright archive`, and `marwright rollout` it",
            )
        answered = store.answered(record.model, version=record.version, last=limits.trigger.drift_window)
        look = drift.look(known, answered, limits.trigger)
        looks = _noted(store, record, look, answered, limits.trigger)
        labelled = store.labelled(record.model, conflict=limits.learn.conflict)
    outcomes = [each.answer == each.label for each in labelled if each.version == record.version and each.answer]
    rises = changes.rises(outcomes)
    if settings.html is not None:
        files.write_text(settings.html, driftpage.page(record.model, look, known, answered, looks, outcomes, rises))
    if settings.json:
        document = {
            "model": record.model,
            "drifted": look.drifted,
            **look.to_dict(),
            "looks_in_a_row": trigger.in_a_row(looks),
            "labelled": len(outcomes),
            "right": sum(outcomes),
            "adwin": list(rises.adwin),
            "page_hinkley": list(rises.page_hinkley),
        }
        print(json.dumps(document, ensure_ascii=False))
        return 0
    _show(look)
    for line in sentences(record, look, looks, limits.trigger, outcomes, rises):
        print(line)
    if settings.html is not None:
        print(settings.html)
    return 0


def looked(places: Places, store: Store, record: ArchiveRecord, limits: TriggerPolicy) -> list[Look]:
    """Look at the latest requests to that version, unless too few of them are new; its latest looks, the newest first.

    None of a version whose archive has no reference. The next look is due when half of a window is new: two looks at
    almost the same requests say no more than one.
    """
    known = reference.read(places.store / record.file)
    if known is None:
        return []
    answered = store.answered(record.model, version=record.version, last=limits.drift_window)
    looks = _past(store, record, limits)
    if not _due(answered, looks):
        return looks
    return _noted(store, record, drift.look(known, answered, limits), answered, limits)


def sentences(
    record: ArchiveRecord, look: Look, looks: list[Look], limits: TriggerPolicy, outcomes: list[bool], rises: Rises
) -> list[str]:
    """What a person is told below the table."""
    found = [f"not compared: {line}" for line in look.skipped]
    name = f"{record.model} {record.version}"
    since = f", since {_when(look.since)}" if look.since is not None else ""
    seen = f"the last {look.requests} instances{since}, against {look.reference} examples of its reference"
    if not look.tests:
        found.append(f"{name}: nothing to compare; `marwright feedback ingest` takes in what the workers left")
    elif look.drifted:
        worst = ", ".join(test.name for test in look.tests if test.drifted)
        count = trigger.in_a_row(looks)
        found.append(f"{name} has drifted: {worst} ({seen}; {count} in a row, {limits.drift_looks} are a reason)")
    else:
        found.append(f"{name}: no drift at a false alarm rate of {look.false_alarm:g} ({seen})")
    if outcomes:
        found.append(f"{sum(outcomes)} of {len(outcomes)} labelled answers are right")
    for detector, places in (("ADWIN", rises.adwin), ("Page-Hinkley", rises.page_hinkley)):
        if places:
            found.append(f"{detector}: wrong answers became more frequent by answer {', '.join(map(str, places))}")
    return found


# -------------------------------------------------------------------- private


def _show(look: Look) -> None:
    if not look.tests:
        return
    cli.print_table(
        ("what", "test", "reference", "now", "statistic", "p", "p of all", ""),
        [
            (
                test.name, test.kind, _number(test.before), _number(test.now), f"{test.statistic:.3g}",
                f"{test.p:.2g}", f"{test.adjusted:.2g}", "drifted" if test.drifted else "",
            )
            for test in look.tests
        ],
    )  # fmt: skip


def _noted(
    store: Store, record: ArchiveRecord, look: Look, answered: list[Answered], limits: TriggerPolicy
) -> list[Look]:
    """Keep the look if it was due; the latest ones, with this one first where it was kept."""
    looks = _past(store, record, limits)
    if look.tests and _due(answered, looks):
        store.note(NOTE, record.model, {**look.to_dict(), "alarm": look.drifted, "bundle": record.bundle})
        looks = [look, *looks][: limits.drift_looks]
    return looks


def _past(store: Store, record: ArchiveRecord, limits: TriggerPolicy) -> list[Look]:
    """The looks at that version among the latest ones, the newest first."""
    notes = store.notes(NOTE, record.model, last=limits.drift_looks)
    return [Look.from_dict(note) for note in notes if note.get("bundle") == record.bundle]


def _due(answered: list[Answered], looks: list[Look]) -> bool:
    """Whether at least half of these requests came after the latest look."""
    if len(answered) < drift.LEAST:
        return False
    until = looks[0].until if looks else None
    return until is None or sum(each.time > until for each in answered) * 2 >= len(answered)


def _opened(places: Places) -> Store:
    if places.database is None and VARIABLE not in os.environ and not places.feedback.is_dir():
        raise DataError(
            f"nothing was collected: there is no {places.feedback}", hint="docs/feedback.md says how to begin"
        )
    return Store.open(places.feedback, places.database)


def _model(settings: DriftSettings, store: Store) -> str:
    names = store.models()
    if settings.model is not None:
        if settings.model not in names:
            raise DataError(
                f"no requests to {settings.model!r} are in the store",
                hint=f"there are: {', '.join(names) or 'none'}; `marwright feedback ingest` takes in new ones",
            )
        return settings.model
    if not names:
        raise DataError("no requests are in the store", hint="`marwright feedback ingest` takes in what workers left")
    if len(names) > 1:
        raise SettingsError(
            f"requests to {len(names)} models are in the store: {', '.join(names)}", hint="--model NAME"
        )
    return names[0]


def _champion(settings: DriftSettings, model: str) -> ArchiveRecord:
    with journal.open(settings.store) as book:
        released = book.released(model)
    if released is None:
        raise DataError(f"no version of {model} is released", hint="`marwright serve`")
    return records.record(settings.store, model, released.version)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
