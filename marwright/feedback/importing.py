"""Labels that people made: a CSV file, or a folder of labelled pictures.

    store.add_labels(importing.labels(Path("labels.csv"), source=None))
    store.add_pictures("digits", importing.pictures(Path("sorted"), spec.classes, source=None), spec=spec)

The CSV has a header line with `request` and `label`, and `instance`, `source` and `time` (Unix seconds or ISO 8601)
where there are any. The same file may be imported again, and after more lines were added to it: a line is known by what
it says and by how often the file has said it before.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from handlers import images
from handlers.errors import BadRequest
from handlers.spec import ImageInput, ModelSpec
from marwright.errors import DataError
from marwright.feedback import bodies, ingesting, labelling, tables
from marwright.feedback.bodies import File
from marwright.feedback.database import Row, found
from marwright.feedback.ingesting import Place
from marwright.feedback.tombs import buried
from marwright.feedback.values import Label, Picture, Pictured
from marwright.learning import folders
from marwright.learning.statistics import statistics

COLUMNS = ("request", "label", "instance", "source", "time")
NEEDED = COLUMNS[:2]
LONGEST = 200
"""Characters of a request's id, of a label, of a source: what the collector takes."""
NAMED = 100
"""Bad lines that an error lists; it counts the others."""
PIECE = 200
"""Pictures of one transaction."""
_ID = re.compile(rf"[\x20-\x7e]{{1,{LONGEST}}}")
_STEP = 1e-3
"""Seconds between two lines without a time: a later one says it later."""


def labels(path: Path, *, source: str | None) -> list[Label]:
    """The labels of a CSV file. DataError lists every line that is none, by its number: then nothing is imported.

    `source` is who says so where the file does not; the file's name when not given. Lines without a time were said
    when the file was last changed.
    """
    try:
        text, written = path.read_text(encoding="utf-8-sig"), path.stat().st_mtime
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="a CSV file in UTF-8: request,label") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: list[Label] = []
    bad: list[str] = []
    said: Counter[tuple[str, ...]] = Counter()
    columns: list[str] = []
    first = written - _STEP * text.count("\n")
    try:
        columns = _header(path, next(reader, []))
        for fields in reader:
            if not any(fields):
                continue
            try:
                if len(fields) != len(columns):
                    raise ValueError(f"{len(fields)} fields, and the header has {len(columns)}")
                given = dict(zip(columns, (field.strip() for field in fields), strict=True))
                what = _label(given, source or path.name, first + _STEP * reader.line_num)
            except ValueError as error:
                bad.append(f"line {reader.line_num}: {error}")
                continue
            words = (what.request, str(what.instance), what.label, what.source, given.get("time", ""))
            said[words] += 1
            uid = hashlib.sha256("\0".join(("csv", *words, str(said[words]))).encode()).hexdigest()[:32]
            found.append(Label(what.request, what.instance, what.label, what.source, what.time, uid))
    except csv.Error as error:
        bad.append(f"line {reader.line_num}: {error}")
    if bad:
        more = [f"  - and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
        raise DataError(
            "\n".join([f"{path}: bad lines, nothing was imported", *(f"  - {one}" for one in bad[:NAMED]), *more]),
            hint=f"each line: {','.join(columns)}; correct them and import the file again",
        )
    return found


def pictures(where: Path, classes: Sequence[str], *, source: str | None) -> Iterator[Picture]:
    """The pictures of `<class>/<file>` in a folder or zip. DataError for a class that is not known, or nothing there.

    They were labelled when their files were last changed.
    """
    listed = folders.labelled(where, classes)
    for i, (name, target) in enumerate(zip(listed.names, listed.targets, strict=True)):
        file = where / name
        written = (file if file.exists() else where).stat().st_mtime
        yield Picture(name, listed.raw(i).data, classes[int(target)], source or where.resolve().name, written)


def add_pictures(place: Place, model: str, given: Iterable[Picture], *, spec: ModelSpec) -> Pictured:
    """Store them, each under the id `file:<sha256>`. Who says of the same picture the same twice has said it once."""
    if not isinstance(spec.input, ImageInput):
        raise DataError(f"{model} takes rows of numbers, not pictures", hint="import labels by request: a .csv file")
    count: Counter[str] = Counter()
    unreadable: list[str] = []
    waiting: list[Picture] = []
    for picture in given:
        waiting.append(picture)
        if len(waiting) == PIECE:
            unreadable += _store(place, model, waiting, spec, spec.input, count)
            waiting = []
    unreadable += _store(place, model, waiting, spec, spec.input, count)
    return Pictured(unreadable=tuple(unreadable), **count)


@dataclass(frozen=True)
class _Read:
    """A picture as it was read."""

    picture: Picture
    file: File
    pixels: images.Pixels

    @property
    def id(self) -> str:
        return f"file:{self.file.digest}"


def _store(
    place: Place, model: str, given: Sequence[Picture], spec: ModelSpec, image: ImageInput, count: Counter[str]
) -> list[str]:
    """One transaction; the files that cannot be read."""
    read: list[_Read] = []
    bad = []
    for picture in given:
        try:
            pixels = images.decode(picture.data, image, spec.limits)
        except BadRequest as error:
            bad.append(f"{picture.name}: {error.reason}")
            continue
        read.append(_Read(picture, bodies.made(picture.data, pixels, alone=True), pixels))
    if not read:
        return bad
    different = {one.id: one for one in read}
    with place.lock, place.database.writing() as connection:
        dead = buried(connection, different)
        there = found(connection, tables.requests.c.id, different)
        fresh = {id: one for id, one in different.items() if id not in dead and id not in there}
        if fresh:
            answerer = ingesting.register(place.database, connection, spec, model, "", "")
            _insert(place, connection, answerer, list(fresh.values()))
        count["pictures"] += len(fresh)
        said = [_said(one) for one in read]
        added = labelling.add(place.database, connection, said, received=time.time())
    for name in ("labels", "repeated", "unknown", "invalid", "forgotten"):
        count[name] += getattr(added, name)
    return bad


def _insert(place: Place, connection: sa.Connection, answerer: str, fresh: Sequence[_Read]) -> None:
    numbers = statistics(np.stack([one.pixels for one in fresh]))
    requests: list[Row] = []
    instances: list[Row] = []
    for at, one in enumerate(fresh):
        digest = one.file.digest
        place.bodies.write(one.file)
        about = {name: float(values[at]) for name, values in numbers.items()}
        requests.append({"id": one.id, "answerer": answerer, "time": one.picture.time, "sha256": digest, "type": ""})
        instances.append(ingesting.row(one.id, 0, ingesting.NO_ANSWER, about, one.file))
    place.database.insert(connection, tables.requests, requests)
    place.database.insert(connection, tables.instances, instances)


def _said(one: _Read) -> Label:
    picture = one.picture
    words = ("file", one.id, picture.label, picture.source)
    uid = hashlib.sha256("\0".join(words).encode("utf-8", "replace")).hexdigest()[:32]
    source = labelling.clean(picture.source)[:LONGEST]
    return Label(one.id, 0, labelling.text(picture.label), source, picture.time, uid)


def _header(path: Path, names: Sequence[str]) -> list[str]:
    columns = [name.strip().lower() for name in names]
    wrong = [name for name in columns if name not in COLUMNS]
    missing = [name for name in NEEDED if name not in columns]
    if wrong or missing or len(set(columns)) != len(columns):
        raise DataError(
            f"{path}: the first line is {','.join(names)!r}",
            hint="it names the columns: request,label and, where there are any, instance,source,time",
        )
    return columns


def _label(given: dict[str, str], source: str, time: float) -> Label:
    """ValueError says what is wrong with a line."""
    if not _ID.fullmatch(given["request"]):
        raise ValueError(f"request is {given['request']!r}: 1 to {LONGEST} printable ASCII characters")
    for name in ("label", "source"):
        value = given.get(name) or ("" if name == "label" else source)
        if not 1 <= len(value) <= LONGEST or not value.isprintable():
            raise ValueError(f"{name} is {value!r}: 1 to {LONGEST} printable characters")
    number = given.get("instance") or "0"
    if not re.fullmatch(r"\d{1,9}", number):
        raise ValueError(f"instance is {number!r}: 0 or more")
    at = _time(given["time"]) if given.get("time") else time
    return Label(given["request"], int(number), given["label"], given.get("source") or source, at, "")


def _time(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"time is {text!r}: Unix seconds, or ISO 8601") from None
        value = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(value) or abs(value) > 1e11:
        raise ValueError(f"time is {text!r}: seconds since 1970")
    return value
