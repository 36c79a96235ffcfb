"""Labels into the database, and which of several counts.

Every label has a `uid`: the same one twice is one label, however often it arrives. What an instance's label is follows
from the labels that are there and never from the order in which they came, so that it does not matter which segment was
ingested first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from marwright.errors import SettingsError
from marwright.feedback import tables
from marwright.feedback.database import Database, Row, chunks, found
from marwright.feedback.tombs import buried
from marwright.feedback.values import Added, Label

POLICIES = ("last", "first", "majority")

Key = tuple[str, int]
"""Request and instance."""


@dataclass(frozen=True)
class Said:
    """One label about an instance that is there."""

    key: Key
    label: str
    number: float | None
    source: str
    time: float
    received: float
    uid: str
    valid: bool

    @property
    def when(self) -> tuple[float, float, str]:
        """Labels of one instance in their order."""
        return self.time, self.received, self.uid


def text(label: object) -> str:
    """A label as it is stored; a whole number is written as one (7, not 7.0). ValueError: neither text nor a number."""
    if isinstance(label, str) and label:
        return clean(label)
    if isinstance(label, int | float) and not isinstance(label, bool) and math.isfinite(label):
        return str(int(label)) if float(label).is_integer() else repr(float(label))
    raise ValueError(f"{label!r} is no label")


def clean(value: str) -> str:
    """What either database can hold."""
    return value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def add(database: Database, connection: sa.Connection, labels: Sequence[Label], *, received: float) -> Added:
    """Store those that are new, in the caller's transaction."""
    there = found(connection, tables.labels.c.uid, (label.uid for label in labels))
    dead = buried(connection, {label.request for label in labels})
    count: Counter[str] = Counter()
    fresh: dict[str, Label] = {}
    for label in labels:
        if label.request in dead:
            count["forgotten"] += 1
        elif label.uid in there or label.uid in fresh:
            count["repeated"] += 1
        else:
            fresh[label.uid] = label
    latest = _latest(connection, {label.request for label in fresh.values()})
    known = _known(connection, {label.request for label in fresh.values()})
    rows: list[Row] = []
    for label in fresh.values():
        chain = (label.request, label.instance, label.source)
        number = _number(label.label)
        before = latest.get(chain)
        if before is not None and before[1] == label.label:
            count["repeated"] += 1
        else:
            count["labels"] += 1
            answerer = known.get((label.request, label.instance))
            if answerer is None:
                count["unknown"] += 1
            elif not (label.label in answerer.classes or (answerer.regression and number is not None)):
                count["invalid"] += 1
        if before is None or before[0] <= label.time:
            latest[chain] = (label.time, label.label)
        rows.append(
            {
                "uid": label.uid,
                "request": label.request,
                "instance": label.instance,
                "label": label.label,
                "number": number,
                "source": label.source,
                "time": label.time,
                "received": received,
            }
        )
    database.insert(connection, tables.labels, rows)
    return Added(**count)


def said(connection: sa.Connection, model: str) -> dict[Key, list[Said]]:
    """Every label about the model's instances, in order, by instance; labels that are invalid, too."""
    label, instance = tables.labels.c, tables.instances.c
    request, answerer, known = tables.requests.c, tables.answerers.c, tables.classes.c
    about = (
        tables.labels.join(
            tables.instances, sa.and_(instance.request == label.request, instance.number == label.instance)
        )
        .join(tables.requests, request.id == label.request)
        .join(tables.answerers, answerer.id == request.answerer)
        .outerjoin(tables.classes, sa.and_(known.answerer == answerer.id, known.label == label.label))
    )
    valid = sa.or_(known.label.is_not(None), sa.and_(answerer.task == "regression", label.number.is_not(None)))
    order = (label.request, label.instance, label.time, label.received, label.uid)
    wanted = (label.request, label.instance, label.label, label.number, label.source, *order[2:], valid)
    statement = sa.select(*wanted).select_from(about).where(answerer.model == model).order_by(*order)
    grouped: dict[Key, list[Said]] = {}
    for row in connection.execute(statement):
        key = (row[0], row[1])
        grouped.setdefault(key, []).append(Said(key, row[2], row[3], row[4], row[5], row[6], row[7], bool(row[8])))
    return grouped


def decided(labels: Sequence[Said], conflict: str) -> Said | None:
    """The label that counts, of one instance's in their order; None where none is valid.

    `majority` gives each source one vote, its latest; of equally many, the label that was said latest wins.
    SettingsError for another policy.
    """
    if conflict not in POLICIES:
        raise SettingsError(f"no policy {conflict!r} for labels that differ", hint=f"one of: {', '.join(POLICIES)}")
    valid = [label for label in labels if label.valid]
    if not valid:
        return None
    if conflict == "first":
        return valid[0]
    if conflict == "last":
        return valid[-1]
    votes = {label.source: label for label in valid}.values()
    count = Counter(label.label for label in votes)
    return max(votes, key=lambda label: (count[label.label], label.when))


def repeats(labels: Sequence[Said]) -> int:
    """How many of one instance's labels say only what their source said last."""
    count, last = 0, dict[str, str]()
    for label in labels:
        count += last.get(label.source) == label.label
        last[label.source] = label.label
    return count


@dataclass(frozen=True)
class _Answerer:
    classes: frozenset[str]
    regression: bool


def _known(connection: sa.Connection, requests: Iterable[str]) -> dict[Key, _Answerer]:
    """Who answered each instance of those requests."""
    instance, request = tables.instances.c, tables.requests.c
    answerers: dict[str, _Answerer] = {}
    found: dict[Key, _Answerer] = {}
    statement = sa.select(instance.request, instance.number, request.answerer).join_from(
        tables.instances, tables.requests, request.id == instance.request
    )
    for some in chunks(requests):
        for name, number, answerer in connection.execute(statement.where(instance.request.in_(some))).all():
            if answerer not in answerers:
                answerers[answerer] = _answerer(connection, answerer)
            found[name, number] = answerers[answerer]
    return found


def _answerer(connection: sa.Connection, id: str) -> _Answerer:
    labels = connection.scalars(sa.select(tables.classes.c.label).where(tables.classes.c.answerer == id))
    task = connection.scalar(sa.select(tables.answerers.c.task).where(tables.answerers.c.id == id))
    return _Answerer(frozenset(labels), task == "regression")


def _latest(connection: sa.Connection, requests: Iterable[str]) -> dict[tuple[str, int, str], tuple[float, str]]:
    """The time and the label that each source said last of each instance."""
    label = tables.labels.c
    order = (label.time, label.received, label.uid)
    statement = sa.select(label.request, label.instance, label.source, label.time, label.label).order_by(*order)
    latest: dict[tuple[str, int, str], tuple[float, str]] = {}
    for some in chunks(requests):
        rows: Iterable[Any] = connection.execute(statement.where(label.request.in_(some)))
        latest |= {(request, number, source): (time, said) for request, number, source, time, said in rows}
    return latest


def _number(label: str) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
