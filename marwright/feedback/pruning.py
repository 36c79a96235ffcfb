"""What is too old goes: requests with their answers, labels and example files, and what is left of damaged segments."""

from __future__ import annotations

import time
from pathlib import Path

import sqlalchemy as sa

from marwright.errors import SettingsError
from marwright.feedback import tables
from marwright.feedback.database import chunks, found
from marwright.feedback.ingesting import DAMAGED, Place
from marwright.feedback.values import Pruned

DAY = 86_400.0
PIECE = 5000
"""Requests of one transaction: nobody else waits longer for a turn."""


def prune(
    place: Place,
    spool: Path,
    *,
    days: float,
    unlabelled_days: float | None,
    model: str | None = None,
    now: float | None = None,
) -> Pruned:
    """Requests of `model` alone where it is given; SettingsError where an age is not a positive number of days."""
    for name, value in (("--days", days), ("--unlabelled-days", unlabelled_days)):
        if value is not None and not value > 0:
            raise SettingsError(f"{name} is {value:g}", hint="a positive number of days")
    now = time.time() if now is None else now
    old = now - days * DAY
    request, label, answerer = tables.requests.c, tables.labels.c, tables.answerers.c
    is_labelled = sa.exists().where(label.request == request.id)
    # A labelled picture is as old as what was said of it: its file may be from long before it was given to us.
    answered = sa.exists().where(answerer.id == request.answerer, answerer.version != "")
    lately = sa.exists().where(label.request == request.id, label.received >= old)
    mine = sa.exists().where(answerer.id == request.answerer, answerer.model == model) if model else sa.true()
    requests, labels = _requests(place, sa.and_(request.time < old, sa.or_(answered, ~lately), mine))
    if unlabelled_days is not None and unlabelled_days < days:
        more, none = _requests(place, sa.and_(request.time < now - unlabelled_days * DAY, ~is_labelled, mine))
        requests, labels = requests + more, labels + none
    with place.database.writing() as connection:
        there = sa.exists().where(request.id == label.request)
        gone = connection.execute(sa.delete(tables.labels).where(label.received < old, ~there)).rowcount
        asked = sa.exists().where(request.answerer == answerer.id)
        connection.execute(sa.delete(tables.answerers).where(~asked))
        connection.execute(sa.delete(tables.notes).where(tables.notes.c.time < old))
        taken = tables.segments.c
        there_yet = {path.name for path in spool.glob("*.seg")}  # were they unknown, they would be taken once more
        for some in chunks(set(connection.scalars(sa.select(taken.name).where(taken.time < old))) - there_yet):
            connection.execute(sa.delete(tables.segments).where(taken.name.in_(some)))
    bodies, size = orphans(place)
    damaged = 0
    for path in (spool / DAMAGED).glob("*"):
        if path.stat().st_mtime < old:
            path.unlink(missing_ok=True)
            damaged += 1
    place.database.shrink()
    return Pruned(requests, labels + gone, bodies, size, damaged)


def _requests(place: Place, wanted: sa.ColumnElement[bool]) -> tuple[int, int]:
    """How many requests went, and how many labels with them."""
    requests = labels = 0
    while True:
        with place.database.writing() as connection:
            ids = connection.scalars(sa.select(tables.requests.c.id).where(wanted).limit(PIECE)).all()
            for some in chunks(ids):
                labels += connection.execute(sa.delete(tables.labels).where(tables.labels.c.request.in_(some))).rowcount
                connection.execute(sa.delete(tables.requests).where(tables.requests.c.id.in_(some)))
        requests += len(ids)
        if len(ids) < PIECE:
            return requests, labels


def orphans(place: Place) -> tuple[int, int]:
    """Remove example files that no row names: how many, and their bytes. Others may write in between."""
    count = size = 0
    for folder in place.bodies.folders():
        with place.lock, place.database.reading() as connection:
            here = place.bodies.tidied(folder)
            files, total = place.bodies.remove(here - found(connection, tables.instances.c.digest, here))
            count, size = count + files, size + total
    return count, size
