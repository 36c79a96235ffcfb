"""The history of what answered, what answers now, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence

from marwright import cli
from marwright.errors import ServerError, ServerUnreachable
from marwright.release import journal, loading, rollout, turns
from marwright.release.journal import Entry
from marwright.settings import Places, ReleasesSettings
from scripts import live

SETTINGS = ReleasesSettings
SHOWN = ("released", "rolled back", "retired", "kept", "reconciled")


def main(settings: ReleasesSettings) -> int:
    with journal.open(settings.store) as book:
        entries = book.entries(settings.model)
    shown = [entry for entry in entries if settings.all or entry.event in SHOWN]
    if settings.json:
        print(json.dumps([{**entry.__dict__, "detail": dict(entry.detail)} for entry in shown]))
        return 0
    if shown:
        cli.print_table(
            ("when (UTC)", "model", "version", "event", "why"),
            [(entry.at[:19].replace("T", " "), entry.model, entry.version, entry.event, why(entry)) for entry in shown],
        )
    lines = now(settings, sorted({entry.model for entry in entries if entry.event != "archived"}))
    print("\n".join(lines) or "nothing was released yet: make serve")
    return 0


def now(places: Places, models: Sequence[str]) -> list[str]:
    """What should answer for each of these models, what does, and which rollout of it is on its way, a line each."""
    answers = _answering(places, models)
    lines = []
    with journal.open(places.store) as book:
        for model in models:
            release, left = book.released(model), rollout.unfinished(book, model)
            holder = turns.holder(places.store, model)
            if release is not None:
                how = "proven" if release.proven else "without proof"
                lines.append(f"{model}: {release.version} should answer, released {how} ({release.why})")
            lines.append(f"{model}: {answers[model]}")
            if left is not None:
                way = f"on its way back: {left.failing.splitlines()[0]}" if left.failing else f"in phase {left.next}"
                goes_on = "" if holder else f"; no process holds it: marwright rollout --resume --model {model}"
                lines.append(f"{model}: the {left.kind} of {left.version} is {way}{goes_on}")
            if holder:
                lines.append(f"{model}: held by {holder}")
    return lines


def _answering(places: Places, models: Sequence[str]) -> dict[str, str]:
    """What the server itself says that it answers by default, in words, for each model."""
    try:
        with live.client(places, timeout=3.0, starting=0) as client:
            return {model: _answers(loading.default_version(client, model)) for model in models}
    except ServerUnreachable as error:
        return dict.fromkeys(models, f"the server cannot be asked what answers: {error.message}")
    except ServerError as error:
        return dict.fromkeys(models, f"the server does not say what answers: {error.message}")


def _answers(version: str | None) -> str:
    return f"{version} answers" if version else "no version answers"


def why(entry: Entry) -> str:
    """One line of an entry's reasons."""
    detail = entry.detail
    match entry.event:
        case "released":
            was = f", was {detail['was']}" if detail.get("was") and detail["was"] != entry.version else ""
            return f"{'proven' if detail['proven'] else 'without proof'}{was}: {detail['why']}"
        case "rollout":
            return f"{detail.get('kind', 'rollout')} {detail.get('id', '')}, {detail['phase']} {detail.get('step', '')}"
        case "archived":
            return f"run {detail['run']}" if detail["run"] else str(detail.get("why", ""))
        case _:
            return str(detail.get("reason") or detail.get("why", "")).partition("\n")[0]
