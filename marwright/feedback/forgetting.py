"""Every trace of a request, removed: rows, labels, example files, frames of the spool, what training kept of it.

    forgotten = forgetting.forget(place, "0d6c…", spool=Path("feedback/spool"), runs=Path("runs"))
    forgotten.runs                          # those that have learned from it

First its id's hash becomes a tombstone, so that whatever is still on its way is refused; the rows, which say what there
is to remove, go last: whoever is killed in between begins again. What another request shares stays. Weights cannot be
unlearned: a training from scratch makes others.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from handlers import spool as segments
from handlers.spool import Frame
from marwright import files
from marwright.errors import DataError
from marwright.feedback import ingesting, pruning, tables, tombs
from marwright.feedback.database import found
from marwright.feedback.ingesting import DAMAGED, Place
from marwright.feedback.values import Forgotten

GROWING_SECONDS = 20.0
"""How long a segment that is still written to is waited for: its writer finishes it within some five seconds."""


def forget(place: Place, request: str, *, spool: Path, runs: Path | None, patience: float) -> Forgotten:
    """Call it again to no harm. DataError where a segment that has the request is still written to after `patience`."""
    with place.database.writing() as connection:
        before = tombs.forgotten(connection, request)
        tombs.bury(connection, request, known=False)
    frames = _from_spool(place, spool, request, patience)
    with place.lock, place.database.writing() as connection:
        instance, label = tables.instances, tables.labels
        digests = set(
            connection.scalars(
                sa.select(instance.c.digest).where(instance.c.request == request, instance.c.digest != "")
            )
        )
        count = connection.scalar(sa.select(sa.func.count()).where(instance.c.request == request))
        instances = int(count or 0)
        there = connection.execute(sa.delete(tables.requests).where(tables.requests.c.id == request)).rowcount
        labels = connection.execute(sa.delete(label).where(label.c.request == request)).rowcount
        alone = digests - found(connection, instance.c.digest, digests)
        known = bool(there or labels or frames)
        tombs.bury(connection, request, known=known)
        # Before the commit, after which nobody knows which files these are.
        removed, _ = place.bodies.remove(alone)
        learned = _untrained(runs, alone) if runs is not None else []
    pruning.orphans(place)  # an ingest that was killed before its commit has left files that no row names
    if known or before:
        place.database.shrink(whole=True)
    return Forgotten(request, known, before, instances, labels, removed, frames, tuple(learned))


def _untrained(runs: Path, gone: set[str]) -> list[str]:
    """Remove what training keeps of those examples; the ids of the runs that have learned from them.

    Caches of new examples go as a whole: the next turn makes them again.
    """
    learned = []
    for path in sorted(runs.glob("*/split.json")):
        try:
            document = files.read_json(path)
        except (OSError, ValueError):  # of a run that was killed: it cannot be told from one that has it
            continue
        cleaned = _cleaned(document, gone)
        if cleaned != document:
            learned.append(path.parent.name)
            files.write_json(path, cleaned)
    for folder in (runs / "cache" / "new", runs / "feedback"):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
    return learned


def _cleaned(document: dict[str, Any], gone: set[str]) -> dict[str, Any]:
    """A run's split without those examples."""
    new = {digest: label for digest, label in document.get("new", {}).items() if digest not in gone}
    parts = {
        part: [name for name in names if not any(digest in name for digest in gone)]
        for part, names in document.get("parts", {}).items()
    }
    return {**document, **({"new": new} if "new" in document else {}), **({"parts": parts} if parts else {})}


def _from_spool(place: Place, folder: Path, request: str, patience: float) -> int:
    """Frames that had something of the request. Segments that grow are waited for."""
    until = time.monotonic() + patience
    needle = json.dumps(request, ensure_ascii=False)[1:-1].encode("utf-8", "surrogatepass")
    count = 0
    while True:
        growing = [path for path in folder.glob(f".*{segments.SUFFIX}.open") if _holds(path, b'"%b"' % needle)]
        with place.lock:
            for path in segments.finished(folder):
                if _holds(path, needle):
                    count += _rewritten(path, request)
            for path in (folder / DAMAGED).glob("*"):  # what was whole in it is in the database
                if _holds(path, needle):
                    path.unlink()
                    count += 1
            for path in folder.glob(".*.part"):
                path.unlink(missing_ok=True)
        if not growing:  # when this look began: one that was finished since is found by the next
            return count
        if time.monotonic() > until:
            raise DataError(
                f"{request} is in a segment that a server still writes to: {growing[0].name}",
                hint="run the same command again in a moment; until then nothing of it can be ingested",
            )
        time.sleep(0.2)


def _holds(path: Path, needle: bytes) -> bool:
    try:
        return needle in path.read_bytes()
    except FileNotFoundError:  # finished or taken meanwhile
        return False


def _rewritten(path: Path, request: str) -> int:
    """The segment without the request, under the same name; how many frames had it."""
    frames, whole = ingesting.read(path)
    cleaned = [_without(frame, request) for frame in frames]
    kept = b"".join(segments.encode(frame.header, frame.payload) for frame in cleaned if frame is not None)
    with files.replacing(path) as temporary:
        temporary.write_bytes(kept)  # without a damaged end, which may hold it where nothing can be read
    return sum(now is not frame for now, frame in zip(cleaned, frames, strict=True)) + (not whole)


def _without(frame: Frame, request: str) -> Frame | None:
    """The same frame where it has nothing of the request; None where it has nothing else."""
    said = frame.header.get("labels")
    if isinstance(said, list):
        others = [one for one in said if not (isinstance(one, Mapping) and one.get("request") == request)]
        if len(others) == len(said):
            return frame
        return Frame({**frame.header, "labels": others}, frame.payload) if others else None
    asked = frame.header.get("requests")
    if not isinstance(asked, list) or not any(isinstance(one, Mapping) and one.get("id") == request for one in asked):
        return frame
    kept = [entry for entry in ingesting.entries(frame) if entry.head["id"] != request]
    return _frame(frame, kept) if kept else None


def _frame(frame: Frame, kept: list[ingesting.Entry]) -> Frame:
    """A frame of some of another's requests."""
    pieces: list[bytes] = []

    def put(data: bytes) -> int:
        start = sum(map(len, pieces))
        pieces.append(data)
        return start

    heads = [
        {**entry.head, "body": None if entry.body is None else [put(entry.body), len(entry.body)]} for entry in kept
    ]
    outputs = {}
    for name, (_, _, columns, kind) in frame.header["outputs"].items():
        data = b"".join(entry.outputs[name].tobytes() for entry in kept)
        rows = sum(len(entry.outputs[name]) for entry in kept)
        outputs[name] = [put(data), rows, columns, kind]
    return Frame({**frame.header, "requests": heads, "outputs": outputs}, b"".join(pieces))
