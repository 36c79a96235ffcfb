"""Labels and captured requests: take them in, look at them, remove them."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from handlers import spool
from handlers.spec import ModelSpec
from marwright import cli
from marwright.errors import DataError, SettingsError
from marwright.feedback import importing
from marwright.feedback.store import Added, Forgotten, Ingested, ModelStatus, Pictured, Store, Unknown
from marwright.packing import golden, records
from marwright.release import journal, policy
from marwright.settings import (
    FeedbackCollectorSettings,
    FeedbackForgetSettings,
    FeedbackImportSettings,
    FeedbackIngestSettings,
    FeedbackStatusSettings,
    Places,
)


def collect(settings: FeedbackCollectorSettings) -> int:
    from scripts import collector

    return collector.main(settings)


def ingest(settings: FeedbackIngestSettings) -> int:
    with _open(settings) as store:
        taken = store.ingest(settings.spool, keep=settings.keep, say=lambda line: print(line, file=sys.stderr))
    _print(settings, asdict(taken), _ingested(taken))
    return 0


def import_(settings: FeedbackImportSettings) -> int:
    """A .csv, or a folder (or zip) of labelled pictures."""
    path = settings.labels
    if not path.exists():
        raise DataError(f"there is no {path}", hint="a .csv file, or a folder of <class>/<file>")
    if path.is_dir() or path.suffix.lower() == ".zip":
        model = settings.model or _only_model(settings)
        spec = _spec(settings, model)
        with _open(settings) as store:
            added: Added = store.add_pictures(
                model, importing.pictures(path, spec.classes, source=settings.source), spec=spec
            )
    else:
        labels = importing.labels(path, source=settings.source)
        with _open(settings) as store:
            added = store.add_labels(labels)
    lines = [_added(added)]
    if isinstance(added, Pictured):
        lines = [f"{added.pictures} new pictures; {lines[0]}"]
        lines += [f"left out, as it cannot be read: {line}" for line in added.unreadable]
    _print(settings, asdict(added), lines)
    return 0


def status(settings: FeedbackStatusSettings) -> int:
    with _open(settings) as store:
        names = [name for name in store.models() if settings.model in (None, name)]
        if settings.model and not names:
            raise DataError(
                f"nothing was collected of {settings.model!r}",
                hint=f"there is: {', '.join(store.models()) or 'nothing'}; `marwright feedback ingest` takes it in",
            )
        found = [
            one
            for name in names
            for one in store.status(name, conflict=policy.load(settings.policy, name).learn.conflict)
        ]
        unknown, size = store.unknown(), store.database.bytes
    disk = {
        "database": size,
        "bodies": sum(one.body_bytes for one in found),
        "spool": spool.used(settings.spool),
    }
    if settings.json:
        document = {"models": [asdict(one) for one in found], "unknown": asdict(unknown), "disk": disk}
        print(json.dumps(document, ensure_ascii=False))
        return 0
    _show(found, unknown)
    print(", ".join(f"{name} {count / 1e6:.1f} MB" for name, count in disk.items()))
    return 0


def forget(settings: FeedbackForgetSettings) -> int:
    """A request that was never heard of is an error, as its id may be mistyped; it is refused from now on, though."""
    from scripts import taught  # torch and all of training, for a look at a lock

    with _open(settings) as store, contextlib.ExitStack() as held:
        for model in store.models():  # a turn that has loaded the picture would write it down after all
            if not held.enter_context(taught.alone(settings, model)):
                raise DataError(
                    f"a retraining of {model} is under way, and may be learning from {settings.request}",
                    hint="nothing was removed: say it again when that has ended",
                )
        gone = store.forget(settings.request, spool=settings.spool, runs=settings.runs)
    if not gone.known and not gone.before:
        raise DataError(
            f"nothing is known of request {settings.request}",
            hint="check the id (x-request-id of the answer); should it come later, it will be refused",
        )
    versions = [
        f"{record.model} {record.version}" for record in records.records(settings.store) if record.run in gone.runs
    ]
    _print(settings, asdict(gone) | {"versions": versions}, _forgotten(gone, versions))
    return 0


PARTS = {
    "collector": (FeedbackCollectorSettings, collect),
    "import": (FeedbackImportSettings, import_),
    "ingest": (FeedbackIngestSettings, ingest),
    "status": (FeedbackStatusSettings, status),
    "forget": (FeedbackForgetSettings, forget),
}


def _open(places: Places) -> Store:
    return Store.open(places.feedback, places.database)


def _print(places: Places, document: dict[str, Any], lines: list[str]) -> None:
    print(json.dumps(document, ensure_ascii=False) if places.json else "\n".join(lines))


def _only_model(places: Places) -> str:
    built = sorted({record.model for record in records.records(places.store)} - {records.COLLECTOR})
    if len(built) != 1:
        raise SettingsError(
            f"{len(built)} models are built: {', '.join(built) or 'none'}", hint="whose pictures are they: --model NAME"
        )
    return built[0]


def _spec(places: Places, model: str) -> ModelSpec:
    """Of the released version, else of the newest that was built."""
    with journal.open(places.store) as book:
        released = book.released(model)
    built = records.records(places.store, model)
    if released is not None:
        record = records.record(places.store, model, released.version)
    elif built:
        record = built[-1]
    else:
        raise DataError(f"no archive of {model} is built", hint="`marwright archive` makes one")
    return golden.spec(Path(places.store / record.file))


def _ingested(taken: Ingested) -> list[str]:
    lines = [f"{taken.segments} segments: {taken.requests} requests with {taken.instances} answers; {_added(taken)}"]
    for count, what in (
        (taken.again, "requests were there already"),
        (taken.undecodable, "answers have no example file: their bodies cannot be decoded"),
        (taken.damaged, "segments are damaged"),
    ):
        if count:
            lines.append(f"{count} {what}")
    return lines


def _added(added: Added) -> str:
    words = [f"{added.labels} new labels"]
    for count, what in (
        (added.unknown, "of them of requests that are not there (yet)"),
        (added.invalid, "of them name no class of their model"),
        (added.repeated, "repeated"),
        (added.forgotten, "refused: their requests are forgotten"),
    ):
        if count:
            words.append(f"{count} {what}")
    return ", ".join(words)


def _forgotten(gone: Forgotten, versions: list[str]) -> list[str]:
    if not gone.known:
        return [f"{gone.request} was forgotten before"]
    lines = [
        f"{gone.request} is forgotten: {gone.instances} answers, {gone.labels} labels, {gone.bodies} example files,"
        f" {gone.frames} frames of the spool"
    ]
    if gone.runs:
        which = f" (in {', '.join(versions)})" if versions else ""
        lines.append(f"learned from it: {', '.join(gone.runs)}{which}")
        lines.append(
            "weights cannot unlearn it: `marwright retrain --method scratch` makes a version that never saw it"
        )
    return lines


def _show(found: list[ModelStatus], unknown: Unknown) -> None:
    if found:
        cli.print_table(
            ("model", "requests", "answers", "files", "labelled", "labels", "repeated", "conflicting", "no class",
             "lag median", "lag p90"),
            [
                (one.model, str(one.requests), str(one.instances), str(one.bodies), str(one.labelled), str(one.labels),
                 str(one.repeated), str(one.conflicting), str(one.invalid), _age(one.lag_median), _age(one.lag_p90))
                for one in found
            ],
        )  # fmt: skip
        print()
    rows = [
        (
            one.model,
            each.version,
            str(each.labels),
            f"MAE {each.error:.4g}" if each.accuracy is None else f"{100 * each.accuracy:.2f} %",
            "" if each.low is None or each.high is None else f"{100 * each.low:.2f} to {100 * each.high:.2f} %",
        )
        for one in found
        for each in one.live
    ]
    if rows:
        cli.print_table(("model", "version", "labelled answers", "live accuracy", "95 % interval"), rows)
        print()
    for one in found:
        if one.classes:
            total = sum(one.classes.values())
            shares = ", ".join(f"{label} {count} ({100 * count / total:.0f} %)" for label, count in one.classes.items())
            print(f"{one.model}, labels by class: {shares}")
    if unknown.labels:
        more = ", …" if unknown.requests > len(unknown.some) else ""
        print(
            f"{unknown.labels} labels are about {unknown.requests} requests that are not there (yet):"
            f" {', '.join(unknown.some)}{more}"
        )
    if not found and not unknown.labels:
        print("nothing was collected yet: `marwright feedback ingest` takes in what the workers left")


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
