"""From the spool into the database: each segment in one transaction, after which its file goes.

Whoever is killed in between finds the segment's name in the database at the next turn and only removes the file; a
request or label that comes in two segments is stored once, by its id. What is damaged is kept in `spool/damaged/`.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from handlers import capture, spool
from handlers.errors import BadRequest
from handlers.spec import ModelSpec
from handlers.spool import Frame
from marwright.feedback import bodies, labelling, tables
from marwright.feedback.bodies import Bodies
from marwright.feedback.database import Database, Row, found
from marwright.feedback.tombs import buried
from marwright.feedback.values import Ingested, Label
from marwright.learning.statistics import statistics

DAMAGED = "damaged"
VERSION = 1
"""Of what segments hold."""
_PIXELS = 32 * 2**20
"""Bytes of decoded instances that are looked at together."""
_ODD = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)
"""What an entry raises that its writer cannot have meant."""

NO_ANSWER: Row = {"answer": "", "value": None, "confidence": None, "probabilities": None, "embedding": None}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where a store keeps what is no row. `lock` is held by whoever writes or removes files there."""

    database: Database
    bodies: Bodies
    lock: filelock.BaseFileLock


@dataclass(frozen=True)
class Entry:
    """One captured request: its part of a frame's header, its body, and its rows of each output."""

    head: Mapping[str, Any]
    time: float
    body: bytes | None
    outputs: Mapping[str, NDArray[Any]]

    @property
    def id(self) -> str:
        return labelling.clean(str(self.head["id"]))


def ingest(place: Place, folder: Path, *, keep: bool, say: Say) -> Ingested:
    """Every whole segment; `keep` leaves the files there."""
    count: Counter[str] = Counter()
    for path in spool.finished(folder):
        taker = {"requests": _requests, "labels": _labels}.get(path.name.partition("-")[0])
        if taker is None:
            continue
        with place.lock:
            if not path.exists():  # another ingest was here
                continue
            try:
                frames, whole = read(path)
            except OSError as error:
                say(f"{path} cannot be read: {error.strerror}")
                continue
            if frames and frames[0].header.get("v", 0) != VERSION and whole:
                say(f"{path} was written by another version of the handlers: it is left there")
                continue
            with place.database.writing() as connection:
                if _first(connection, path.name):
                    count["segments"] += 1
                    try:
                        whole = taker(place, connection, frames, count) and whole
                    except _Unusable as error:
                        say(f"{path.name}: {error}")
                        whole = False
                    count["damaged"] += not whole
            if keep:
                continue
            if whole:
                path.unlink(missing_ok=True)
            else:
                say(f"{path.name} is damaged: what was whole in it was taken, the file is in {folder / DAMAGED}")
                (folder / DAMAGED).mkdir(exist_ok=True)
                path.replace(folder / DAMAGED / path.name)
    return Ingested(**count)


def entries(frame: Frame) -> Iterator[Entry]:
    """A frame's requests. One of `_ODD` where it is not what a worker writes."""
    arrays = {
        name: np.frombuffer(frame.payload, np.dtype(kind).newbyteorder("<"), rows * columns, start).reshape(
            rows, columns
        )
        for name, (start, rows, columns, kind) in frame.header["outputs"].items()
    }
    at = 0
    for head in frame.header["requests"]:
        rows = int(head["rows"])
        if rows < 0 or any(at + rows > len(array) for array in arrays.values()):
            raise ValueError("more rows than outputs")
        body = None
        if head["body"] is not None:
            start, length = head["body"]
            if start < 0 or length < 0 or start + length > len(frame.payload):
                raise ValueError("a body beyond the payload")
            body = frame.payload[start : start + length]
        part = {name: array[at : at + rows] for name, array in arrays.items()}
        when = min(float(frame.header["time"]), time.time())  # a clock that was ahead: it would never be old
        yield Entry(head, when, body, part)
        at += rows


class _Unusable(Exception):
    """Nothing of a segment can be taken."""


def read(path: Path) -> tuple[list[Frame], bool]:
    """A segment's frames, as far as they can be read, and whether that is all of it."""
    found: list[Frame] = []
    try:
        for frame in spool.frames(path):
            if not isinstance(frame.header, dict):
                return found, False
            found.append(frame)
        return found, bool(found) and spool.whole(path)
    except ValueError:  # a header that is no JSON: what follows is not looked at
        return found, False


def _first(connection: sa.Connection, name: str) -> bool:
    """Whether this segment was not taken before; from now on it was."""
    segments = tables.segments
    if connection.execute(sa.select(segments.c.name).where(segments.c.name == name)).first() is not None:
        return False
    connection.execute(sa.insert(segments).values(name=name, time=time.time()))
    return True


def _labels(place: Place, connection: sa.Connection, frames: Sequence[Frame], count: Counter[str]) -> bool:
    whole, now = True, time.time()
    for frame in frames[1:]:
        labels = []
        try:
            received = float(frame.header["received"])
            for one in frame.header["labels"]:
                try:
                    labels.append(_label(one, received))
                except _ODD:
                    whole = False
        except _ODD:
            whole = False
            continue
        added = labelling.add(place.database, connection, labels, received=received if math.isfinite(received) else now)
        for name in ("labels", "repeated", "unknown", "invalid", "forgotten"):
            count[name] += getattr(added, name)
    return whole


def _label(one: Mapping[str, Any], received: float) -> Label:
    at = received if one.get("time") is None else float(one["time"])
    if not math.isfinite(at) or not 0 <= int(one["instance"]) < 2**31:
        raise ValueError("no time, or no instance")
    return Label(
        request=labelling.clean(str(one["request"])),
        instance=int(one["instance"]),
        label=labelling.text(one["label"]),
        source=labelling.clean(str(one["source"])),
        time=at,
        uid=labelling.clean(str(one["uid"])),
    )


def _requests(place: Place, connection: sa.Connection, frames: Sequence[Frame], count: Counter[str]) -> bool:
    if not frames:
        raise _Unusable("it has no beginning")
    head = frames[0].header
    try:
        spec = ModelSpec.from_json(json.dumps(head["spec"]))
        answerer = register(
            place.database, connection, spec, str(head["model"]), str(head["version"]), str(head["bundle"])
        )
    except _ODD as error:
        raise _Unusable(f"its head does not say who answered: {error}") from None
    given: dict[str, Entry] = {}
    whole = True
    for frame in frames[1:]:
        try:
            for entry in entries(frame):
                count["again"] += entry.id in given
                given.setdefault(entry.id, entry)
        except _ODD:
            whole = False
    there = found(connection, tables.requests.c.id, given)
    dead = buried(connection, given)
    count["again"] += len(there)
    count["forgotten"] += len(dead - there)
    fresh = [entry for name, entry in given.items() if name not in there and name not in dead]
    requests, instances = [], []
    waiting = list(_pieces(fresh, spec))
    for together in waiting:  # it grows
        try:
            rows = list(_instances(together, spec, place.bodies, count))
            heads = [_request(entry, answerer) for entry in together]
        except _ODD:
            whole = False
            waiting += [[entry] for entry in together if len(together) > 1]  # the others are none the worse for it
            continue
        instances += rows
        requests += heads
    place.database.insert(connection, tables.requests, requests)
    place.database.insert(connection, tables.instances, instances)
    count["requests"] += len(requests)
    count["instances"] += len(instances)
    return whole


def register(
    database: Database, connection: sa.Connection, spec: ModelSpec, model: str, version: str, bundle: str
) -> str:
    """The id of whoever answers so, in the tables from now on."""
    document = spec.to_json()
    id = hashlib.sha256("\0".join((model, version, bundle, document)).encode()).hexdigest()
    row = {"id": id, "model": model, "version": version, "bundle": bundle, "task": spec.task, "spec": document}
    database.insert(connection, tables.answerers, [row])
    database.insert(connection, tables.classes, [{"answerer": id, "label": label} for label in spec.classes])
    return id


def _pieces(given: Sequence[Entry], spec: ModelSpec) -> Iterator[list[Entry]]:
    """As many requests at a time as may be decoded together."""
    size = math.prod(spec.input.shape) * (1 if spec.task == "classification" else 4)
    piece: list[Entry] = []
    held = 0
    for entry in given:
        if piece and held + int(entry.head["rows"]) * size > _PIXELS:
            yield piece
            piece, held = [], 0
        piece.append(entry)
        held += int(entry.head["rows"]) * size
    if piece:
        yield piece


def _request(entry: Entry, answerer: str) -> Row:
    return {
        "id": entry.id,
        "answerer": answerer,
        "time": entry.time,
        "sha256": str(entry.head.get("sha256") or hashlib.sha256(entry.body or b"").hexdigest()),
        "type": labelling.clean(str(entry.head["type"])),
    }


def _instances(given: Sequence[Entry], spec: ModelSpec, kept: Bodies, count: Counter[str]) -> Iterator[Row]:
    """A row for each answer, its example file being there."""
    decoded = [_decoded(entry, spec) for entry in given]
    arrays = [array for some in decoded for array in some or ()]
    numbers = statistics(np.stack(arrays)) if arrays else {}
    at = 0
    for entry, some in zip(given, decoded, strict=True):
        if some is None and entry.body is not None:
            count["undecodable"] += int(entry.head["rows"])
        for number in range(int(entry.head["rows"])):
            about: dict[str, float] = {}
            file = None
            if some is not None:
                file = bodies.made(entry.body or b"", some[number], alone=len(some) == 1)
                kept.write(file)
                about = {name: float(values[at]) for name, values in numbers.items()}
                at += 1
            yield row(entry.id, number, _answer(entry, number, spec), about, file)


def row(request: str, number: int, answer: Row, about: Mapping[str, float], file: bodies.File | None) -> Row:
    """An instance's; `about` are its statistics."""
    return {
        "request": request,
        "number": number,
        **answer,
        "statistics": json.dumps(about),
        "digest": file.digest if file else "",
        "suffix": file.suffix if file else "",
        "size": len(file.data) if file else 0,
    }


def _decoded(entry: Entry, spec: ModelSpec) -> list[NDArray[Any]] | None:
    if entry.body is None:
        return None
    try:
        return capture.instances(entry.head, entry.body, spec)
    except (BadRequest, *_ODD):
        return None


def _answer(entry: Entry, number: int, spec: ModelSpec) -> Row:
    outputs = {name: array[number] for name, array in entry.outputs.items()}
    embedding = outputs.get("embedding")
    row = NO_ANSWER | {"embedding": None if embedding is None else embedding.astype("<f2").tobytes()}
    if spec.task == "regression":
        value = float(outputs["value"][0])
        return row | {"value": value if math.isfinite(value) else None}
    probabilities = outputs["probabilities"].astype("<f4")
    best = int(probabilities.argmax())
    confidence = float(probabilities[best])
    return row | {
        "answer": spec.classes[best],
        "confidence": confidence if math.isfinite(confidence) else None,
        "probabilities": probabilities.tobytes(),
    }
