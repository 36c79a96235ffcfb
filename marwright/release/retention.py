"""Which archives and runs nobody needs any more.

    for record in retention.stale(records, book, "digits", keep=10): ...

What answers, may answer, answered among the last `keep`, was never tried, or was built last, stays: a rollback finds
its archive, and what was refused is not built again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from marwright.packing.records import ArchiveRecord
from marwright.release import rollout
from marwright.release.journal import Journal
from marwright.runs import Run


def stale(records: Sequence[ArchiveRecord], book: Journal, model: str, *, keep: int) -> list[ArchiveRecord]:
    """Archives of `model` that can go; `records` are all of them, by number."""
    answered: list[str] = []
    for entry in reversed(book.entries(model, event="released")):
        if entry.version not in answered:
            answered.append(entry.version)
    needed = {*answered[:keep], *book.live(model), *(each.version for each in records[-1:])}
    needed |= {version for version in (book.previous(model),) if version}
    refused = {entry.version for entry in book.entries(model, event="rolled back")}
    needed |= {each.version for each in records if each.version not in {*answered, *refused}}  # nobody has tried it yet
    under_way = rollout.unfinished(book, model)
    if under_way is not None:
        needed |= {under_way.version, under_way.champion or ""}
    return [each for each in records if each.version not in needed]


def unneeded(runs: Path, model: str, records: Iterable[ArchiveRecord], *, last: int = 3) -> list[Run]:
    """Runs of `model` that a retraining left and no archive came from, but for the newest ones, finished or not.

    What somebody trained by hand is not among them: those have neither a start nor newly labelled examples.
    """
    used = {record.run for record in records}
    # Another model's name may begin with this one's and a hyphen: only the last part of a run's id is its own.
    folders = [path.parent for path in runs.glob(f"{model}-*/run.json")]
    made = [Run(folder) for folder in folders if folder.name.rpartition("-")[0] == model]
    newest = sorted(made, key=lambda run: (run.path / "run.json").stat().st_mtime)[-last:]
    return [run for run in made if run.id not in used and run not in newest and _retrained(run, model)]


def _retrained(run: Run, model: str) -> bool:
    about = run.about
    return bool(about["recipe"] == model and (about.get("start") or about.get("new_examples")))
