"""What the store is asked: answers with their labels, and how it stands with each model."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa

from marwright.feedback import labelling, tables
from marwright.feedback.bodies import Bodies
from marwright.feedback.labelling import Key, Said
from marwright.feedback.values import Answered, Labelled, Live, ModelStatus, Unknown

CONFIDENCE = 0.95

_instance, _request, _answerer = tables.instances.c, tables.requests.c, tables.answerers.c
_ALL = tables.instances.join(tables.requests, _request.id == _instance.request).join(
    tables.answerers, _answerer.id == _request.answerer
)


def models(connection: sa.Connection) -> list[str]:
    """Names, sorted."""
    there = sa.exists().where(_request.answerer == _answerer.id)
    return sorted(connection.scalars(sa.select(_answerer.model).where(there).distinct()))


def answered(
    connection: sa.Connection, bodies: Bodies, model: str, *, version: str | None, last: int | None
) -> list[Answered]:
    """Oldest first; of labelled pictures, which nothing answered, none."""
    wanted = _answerer.version == version if version is not None else _answerer.version != ""
    order = (_request.time, _instance.request, _instance.number)
    newest = sa.select(_instance.request, _instance.number).select_from(_ALL).where(_answerer.model == model, wanted)
    newest = newest.order_by(*(column.desc() for column in order)).limit(last)
    if last is None:
        rows = connection.execute(_columns().where(_answerer.model == model, wanted).order_by(*order)).all()
    else:
        chosen = newest.subquery()
        here = sa.and_(chosen.c.request == _instance.request, chosen.c.number == _instance.number)
        rows = connection.execute(_columns(_ALL.join(chosen, here)).order_by(*order)).all()
    there = bodies.there((row.digest, row.suffix) for row in rows)
    return [Answered(**_fields(row, bodies, there)) for row in rows]


def labelled(connection: sa.Connection, bodies: Bodies, model: str, *, conflict: str) -> list[Labelled]:
    """One for each instance with a label that counts, oldest answer first."""
    counting = _counting(labelling.said(connection, model), conflict)
    some = sa.exists().where(tables.labels.c.request == _instance.request)
    order = (_request.time, _instance.request, _instance.number)
    statement = _columns().where(_answerer.model == model, some).order_by(*order)
    rows = [row for row in connection.execute(statement) if (row.request, row.number) in counting]
    there = bodies.there((row.digest, row.suffix) for row in rows)
    made = []
    for row in rows:
        label = counting[row.request, row.number]
        made.append(
            Labelled(
                **_fields(row, bodies, there),
                label=label.label,
                source=label.source,
                labelled_at=label.time,
                received=label.received,
            )
        )
    return made


def status(connection: sa.Connection, model: str, *, conflict: str) -> ModelStatus:
    """How it stands with one model."""
    grouped = labelling.said(connection, model)
    counting = _counting(grouped, conflict)
    valid = [[label for label in some if label.valid] for some in grouped.values()]
    answers = _answers(connection, model)
    lags = [label.time - answers[key].time for key, label in counting.items() if answers[key].version]
    requests, first, last = connection.execute(
        sa.select(sa.func.count(), sa.func.min(_request.time), sa.func.max(_request.time))
        .join_from(tables.requests, tables.answerers, _answerer.id == _request.answerer)
        .where(_answerer.model == model)
    ).one()
    instances = connection.scalar(sa.select(sa.func.count()).select_from(_ALL).where(_answerer.model == model))
    files = sa.select(_instance.digest, _instance.size).select_from(_ALL)
    different = files.where(_answerer.model == model, _instance.digest != "").distinct().subquery()
    count, size = connection.execute(
        sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(different.c.size), 0))
    ).one()
    classes = {answer.task for answer in answers.values()} != {"regression"}
    return ModelStatus(
        model=model,
        requests=requests,
        instances=int(instances or 0),
        bodies=count,
        body_bytes=int(size),
        labelled=len(counting),
        labels=sum(len(some) - labelling.repeats(some) for some in valid),
        repeated=sum(labelling.repeats(some) for some in valid),
        invalid=sum(len(some) for some in grouped.values()) - sum(map(len, valid)),
        conflicting=sum(len({label.label for label in some}) > 1 for some in valid),
        lag_median=float(np.median(lags)) if lags else None,
        lag_p90=float(np.quantile(lags, 0.9)) if lags else None,
        classes=dict(sorted(Counter(label.label for label in counting.values()).items())) if classes else {},
        live=_live(counting.values(), answers),
        first=first,
        last=last,
    )


def unknown(connection: sa.Connection, *, some: int = 5) -> Unknown:
    """Labels about instances that are not there (yet)."""
    label = tables.labels.c
    there = sa.exists().where(_instance.request == label.request, _instance.number == label.instance)
    count, requests, oldest = connection.execute(
        sa.select(sa.func.count(), sa.func.count(label.request.distinct()), sa.func.min(label.received)).where(~there)
    ).one()
    ids = connection.scalars(sa.select(label.request).where(~there).distinct().order_by(label.request).limit(some))
    return Unknown(count, requests, oldest, tuple(ids))


def live(version: str, hits: Sequence[bool]) -> Live:
    """A classifier's accuracy on the instances that were labelled, with its Wilson interval."""
    from scipy.stats import binomtest  # a second of imports, and not every command counts hits

    found = binomtest(sum(hits), len(hits)).proportion_ci(CONFIDENCE, method="wilson")
    low, high = max(0.0, float(found.low)), min(1.0, float(found.high))
    return Live(version, len(hits), sum(hits), sum(hits) / len(hits), low, high, None)


def _live(counting: Iterable[Said], answers: dict[Key, Any]) -> tuple[Live, ...]:
    """One for each version with labels, in the order of their first answers."""
    hits: dict[str, list[bool]] = defaultdict(list)
    errors: dict[str, list[float]] = defaultdict(list)
    for label in sorted(counting, key=lambda label: answers[label.key].time):
        answer = answers[label.key]
        if not answer.version:
            continue
        if answer.task == "regression":
            if answer.value is not None and label.number is not None:
                errors[answer.version].append(abs(answer.value - label.number))
        else:
            hits[answer.version].append(answer.answer == label.label)
    found = [live(version, some) for version, some in hits.items()]
    found += [
        Live(version, len(some), None, None, None, None, math.fsum(some) / len(some))
        for version, some in errors.items()
    ]
    return tuple(found)


def _answers(connection: sa.Connection, model: str) -> dict[Key, Any]:
    """What was answered to the instances that labels are about: time, version, task, answer, value."""
    wanted = (
        _instance.request, _instance.number, _instance.answer, _instance.value,
        _request.time, _answerer.version, _answerer.task,
    )  # fmt: skip
    some = sa.exists().where(tables.labels.c.request == _instance.request)
    rows = connection.execute(sa.select(*wanted).select_from(_ALL).where(_answerer.model == model, some))
    return {(row[0], row[1]): row for row in rows}


def _counting(grouped: dict[Key, list[Said]], conflict: str) -> dict[Key, Said]:
    decided = ((key, labelling.decided(some, conflict)) for key, some in grouped.items())
    return {key: label for key, label in decided if label is not None}


def _columns(source: sa.FromClause = _ALL) -> sa.Select[Any]:
    answerer = (_answerer.model, _answerer.version, _answerer.bundle)
    return sa.select(tables.instances, _request.time, *answerer).select_from(source)


def _fields(row: Any, bodies: Bodies, there: set[str]) -> dict[str, Any]:
    probabilities, embedding = row.probabilities, row.embedding
    return {
        "request": row.request,
        "instance": row.number,
        "model": row.model,
        "version": row.version,
        "bundle": row.bundle,
        "time": row.time,
        "answer": row.answer,
        "value": row.value,
        "confidence": row.confidence,
        "probabilities": None if probabilities is None else np.frombuffer(probabilities, "<f4"),
        "embedding": None if embedding is None else np.frombuffer(embedding, "<f2").astype(np.float32),
        "statistics": json.loads(row.statistics),
        "digest": row.digest,
        "path": bodies.path(row.digest, row.suffix) if row.digest in there else None,
    }
