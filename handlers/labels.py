"""Labels that somebody sends back, however they were sent → what the spool keeps of them.

    sent = labels.read({"body": {"request": "4f0c…", "label": "cat"}}, now=time.time())
    sent.labels        # [{"uid": …, "request": "4f0c…", "instance": 0, "label": "cat", "source": "api", "time": None}]

| sent                                                                             | over                       |
|----------------------------------------------------------------------------------|----------------------------|
| JSON `{"request", "label", "instance"?, "source"?, "time"?, "uid"?}`             | a body, or one gRPC field  |
| JSON `{"labels": [such objects]}`, at most `MOST`                                | the same                   |
| the same names as fields of their own, `labels` holding the JSON list            | form, multipart, gRPC      |

`check` beside them asks for the look at their form alone. Only the form is judged here: whether a request is known, or
a label is a class of the model that answered it, is for whoever takes them out of the spool.
"""

from __future__ import annotations

import json
import math
import unicodedata
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from handlers import payloads
from handlers.errors import BadRequest
from handlers.payloads import Headers

MOST = 10_000
"""Labels in one request."""
LONGEST = 200
"""Characters of a request's id, of a label and of a source."""

_UID = 64
_SAID = 20
"""Bad labels whose faults one refusal spells out; of so many times five more it says where they are."""
_LARGEST_INSTANCE = 2**31 - 1
_EARLIEST = datetime(2000, 1, 1, tzinfo=UTC).timestamp()
_AHEAD = 86400.0
"""Seconds that a sender's clock may be ahead of ours."""
_DOCUMENT = ("body", "data")
_BESIDE = frozenset({"top_k", "meta", "capture"})
"""Controls of other handlers, which whoever asks all models alike sends along."""


@dataclass(frozen=True)
class Sent:
    """What one request holds, all of it well formed."""

    labels: Sequence[Mapping[str, Any]]
    check: bool = False
    """Not to be kept."""


@dataclass
class Request:
    """One request of a batch, and what has become of it."""

    headers: Headers = field(default_factory=Headers)
    meta: bool = False
    sent: Sent | None = None
    error: BadRequest | None = None

    @property
    def call(self) -> str:
        """What metrics count it as."""
        return "describe" if self.headers.describe else "predict"


def read(fields: Any, *, now: float, form_encoded: bool = False) -> Sent:
    """The labels in one request's fields; `now` in Unix seconds. `BadRequest` names everything that is wrong.

    `form_encoded`: that is the body's content type. What `curl -d` makes of JSON without another one has no fields.
    """
    document = _document(fields, form_encoded)
    check = payloads.flag(document, "check")
    given = {name: value for name, value in document.items() if name != "check"}
    if "labels" not in given:
        label, faults = _label(given, now)
        if faults:
            raise BadRequest(400, "; ".join(faults))
        return Sent([label], check)
    if len(given) > 1:
        raise BadRequest(400, f"beside labels there is {_names(given.keys() - {'labels'})}; each label says its own")
    return Sent(_list(given["labels"], now), check)


def _document(fields: Any, form_encoded: bool) -> dict[str, Any]:
    """The JSON object that was sent, or the fields that stand for it."""
    if not isinstance(fields, Mapping):
        raise BadRequest(400, "the request holds no label")
    inputs = {name: value for name, value in fields.items() if name not in _BESIDE}
    held = [name for name in _DOCUMENT if name in inputs]
    if held:
        if len(inputs) > 1:
            raise BadRequest(400, f"beside {held[0]} there is {_names(inputs.keys() - {held[0]})}")
        document = _decoded(inputs[held[0]])
        if not isinstance(document, dict):
            raise BadRequest(400, 'a label is a JSON object: {"request": "…", "label": "…"}, or {"labels": [ … ]}')
        return document
    if (form_encoded and not inputs) or any(name.lstrip().startswith(("{", "[")) for name in inputs):
        raise BadRequest(415, "form encoding damages JSON: add -H 'Content-Type: application/json'")
    document = {name: _text(name, value) for name, value in inputs.items()}
    if "labels" in document:
        document["labels"] = _decoded(document["labels"])
    return document


def _list(given: Any, now: float) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise BadRequest(400, "labels must be a list of one or more")
    if len(given) > MOST:
        raise BadRequest(413, f"the request holds {len(given)} labels; at most {MOST}")
    found, bad = [], {}
    seen: dict[str, int] = {}
    for index, one in enumerate(given):
        label, faults = _label(one, now)
        if not faults:
            first = seen.setdefault(label["uid"], index)
            faults = [] if first == index else [f"uid is that of label {first}"]
        if faults:
            bad[index] = ", ".join(faults)
        found.append(label)
    if not bad:
        return found
    said = [f"label {index}: {reason}" for index, reason in list(bad.items())[:_SAID]]
    if more := list(bad)[_SAID:]:
        where = ", ".join(map(str, more[: 5 * _SAID])) + (", …" if len(more) > 5 * _SAID else "")
        said.append(f"{len(more)} more, at {where}")
    raise BadRequest(400, f"{len(bad)} of {len(given)} labels are bad, none is kept: " + "; ".join(said))


def _label(given: Any, now: float) -> tuple[dict[str, Any], list[str]]:
    """What is kept of one label, and what is wrong with it."""
    if not isinstance(given, Mapping):
        return {}, ["a label is an object with request and label"]
    faults = []
    unknown = given.keys() - _READERS.keys() - {"request", "label"}
    if unknown:
        faults.append(f"unknown: {_names(unknown)}")
    missing = [name for name in ("request", "label") if given.get(name) is None]
    if missing:
        faults.append(f"{' and '.join(missing)} must be said")
    found: dict[str, Any] = {}
    for name, (read, default) in _READERS.items():
        value = given.get(name)
        try:
            found[name] = default() if value is None else read(value, now)
        except ValueError as error:
            faults.append(f"{name} {error}")
    return found, faults


def _request(value: Any, now: float) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST or not (value.isascii() and value.isprintable()):
        raise ValueError(f"must be the id of an answered request, printable ASCII of at most {LONGEST} characters")
    return value


def _class_or_number(value: Any, now: float) -> str | int | float:
    if isinstance(value, str):
        if not value.strip() or not _plain(value):
            raise ValueError(f"must be text of 1 to {LONGEST} characters without control characters")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise ValueError("must be text or a finite number")
    return value


def _instance(value: Any, now: float) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not 0 <= value <= _LARGEST_INSTANCE:
        raise ValueError("must be a whole number, 0 or more")
    return value


def _source(value: Any, now: float) -> str:
    if not isinstance(value, str) or not value.strip() or not _plain(value):
        raise ValueError(f"must be text of 1 to {LONGEST} characters without control characters")
    return value


def _time(value: Any, now: float) -> float:
    """Unix seconds of a number, or of ISO 8601 (UTC where it names no zone)."""
    said = "must be Unix seconds or ISO 8601"
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                when = datetime.fromisoformat(value)
                value = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
            except (ValueError, OverflowError):
                raise ValueError(said) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise ValueError(said)
    if not _EARLIEST <= value <= now + _AHEAD:
        raise ValueError(f"{said}, of a day from 2000 to today")
    return float(value)


def _uid(value: Any, now: float) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _UID or not (value.isascii() and value.isprintable()):
        raise ValueError(f"must be printable ASCII of 1 to {_UID} characters")
    return value


_READERS: dict[str, tuple[Callable[[Any, float], Any], Callable[[], Any]]] = {
    "uid": (_uid, lambda: uuid.uuid4().hex),
    "request": (_request, str),
    "instance": (_instance, int),
    "label": (_class_or_number, str),
    "source": (_source, lambda: "api"),
    "time": (_time, lambda: None),
}


def _plain(value: str) -> bool:
    """Short enough, and nothing in it that a database or a terminal chokes on (Cc), or that UTF-8 has not (Cs)."""
    return len(value) <= LONGEST and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _decoded(given: Any) -> Any:
    """TorchServe has decoded JSON that was sent as such, and left the rest as bytes or text."""
    if not isinstance(given, bytes | bytearray | str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        raise BadRequest(400, "the body is not JSON") from None


def _text(name: str, value: Any) -> Any:
    if not isinstance(value, bytes | bytearray):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        raise BadRequest(400, f"{_names([name])} is not UTF-8") from None


def _names(names: Any) -> str:
    """A few of them, each cut short."""
    found = [ascii(name if len(name) <= 40 else f"{name[:40]}…") for name in sorted(map(str, names))]
    return ", ".join(found[:10]) + (" and more" if len(found) > 10 else "")
