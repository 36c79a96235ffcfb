"""The history of what answered, what answers now, and why."""

from __future__ import annotations

import json

from marwright import cli
from marwright.release import journal, turns
from marwright.release.journal import Entry
from marwright.settings import ReleasesSettings

SETTINGS = ReleasesSettings
SHOWN = ("released", "rolled back", "retired", "kept", "reconciled")


def main(settings: ReleasesSettings) -> int:
    with journal.open(settings.store) as book:
        entries = [entry for entry in book.entries(settings.model) if settings.all or entry.event in SHOWN]
        releases = book.releases()
    if settings.json:
        print(json.dumps([{**entry.__dict__, "detail": dict(entry.detail)} for entry in entries]))
        return 0
    if not entries:
        print("nothing was released yet: make serve")
        return 0
    cli.print_table(
        ("when (UTC)", "model", "version", "event", "why"),
        [(entry.at[:19].replace("T", " "), entry.model, entry.version, entry.event, why(entry)) for entry in entries],
    )
    for model, release in releases.items():
        if settings.model in (None, model):
            how = "proven" if release.proven else "without proof"
            print(f"{model}: {release.version} should answer, released {how} ({release.why})")
            holder = turns.holder(settings.store, model)
            if holder:
                print(f"{model}: {holder}")
    return 0


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
            return f"run {detail['run']}"
        case _:
            return str(detail.get("reason") or detail.get("why", "")).partition("\n")[0]
