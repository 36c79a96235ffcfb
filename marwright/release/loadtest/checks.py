"""What an answer must be: who may have given it, and what it must say.

A version's golden examples say what it answers to them; to any other body the first answer of a version is the one that
all its later ones are held against. A model without records in the store (not built here) need not name its versions.

    checks = Checks(bodies, store, "digits")
    checks.learn()                                      reads what is new in the store; from any thread
    checks.rest(call, 200, headers, body)               Verdict(status=200, version="1.0", outcome="ok", detail="")
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from marwright.packing import golden as golden_examples
from marwright.packing import records
from marwright.packing.golden import TOLERANCE, Golden
from marwright.release.loadtest.bodies import Body
from marwright.release.loadtest.calls import Call

Outcome = Literal["ok", "refused", "broken", "hung", "wrong"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "refused", "broken", "hung", "wrong")

_REMEMBERED = 10_000
_DETAIL = 200


class Verdict(NamedTuple):
    """What became of one request. `version` is who answered, empty where nobody said."""

    status: int
    version: str
    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True)
class Known:
    """A built version: what its answers say of it, and what it answers to its golden examples, by body."""

    bundle: str
    golden: Mapping[int, Golden]


class Checks:
    """Judges answers. Kept by one event loop; only `learn` may run in another thread."""

    def __init__(self, bodies: Sequence[Body], store: Path, model: str) -> None:
        self._places = {body.data: place for place, body in enumerate(bodies)}
        self._store = store
        self._model = model
        self._known: dict[str, Known] = {}
        self._seen: set[str] = set()
        self._first: dict[tuple[str, int, str], Any] = {}
        self._judged: dict[tuple[str, int, bytes], str] = {}
        self.learn()

    def learn(self) -> None:
        """Versions that were built since, so that a run may see new ones come."""
        there = {path.name for path in self._store.glob("*.json")}
        if there == self._seen:
            return
        for record in records.records(self._store, self._model):
            if record.version not in self._known and (self._store / record.file).is_file():
                examples = golden_examples.read(self._store / record.file)
                places = {self._places[one.body]: one for one in examples if one.body in self._places}
                self._known[record.version] = Known(record.bundle, places)
        self._seen = there

    def rest(self, call: Call, status: int, headers: Mapping[bytes, bytes], body: bytes) -> Verdict:
        version = headers.get(b"x-model-version", b"").decode("latin-1")
        if status >= 400:
            return Verdict(status, version, "refused", _line(body.decode("utf-8", "replace")))
        bundle = headers.get(b"x-bundle-digest", b"").decode("latin-1")
        why = self._stranger(call, version, bundle)
        if not why:
            key = (version, call.body, body)  # the same bytes again are right, or wrong, again
            found = self._judged.get(key)
            if found is None:
                try:
                    found = self._content(call, version, json.loads(body))
                except ValueError:
                    found = f"not JSON: {body[:80]!r}"
                if len(self._judged) >= _REMEMBERED:
                    self._judged.clear()
                self._judged[key] = found
            why = found
        return Verdict(status, version, "wrong" if why else "ok", _line(why))

    def grpc(self, call: Call, body: bytes) -> Verdict:
        """`body` is the envelope that a handler gives who sets `meta`; a bare answer is one without a version."""
        try:
            value = json.loads(body)
        except ValueError:
            return Verdict(200, "", "wrong", _line(f"not JSON: {body[:80]!r}"))
        status, version, bundle, refusal = 200, "", "", ""
        if isinstance(value, dict) and {"prediction", "status", "version"} <= value.keys():
            status, version, bundle = int(value["status"]), str(value["version"]), str(value.get("bundle", ""))
            refusal = str(value.get("reason", value["prediction"]))
            value = value["prediction"]
        elif isinstance(value, dict) and value.keys() == {"code", "reason"}:
            status, refusal = int(value["code"]), str(value["reason"])
        if status >= 400:
            return Verdict(status, version, "refused", _line(refusal))
        why = self._stranger(call, version, bundle) or self._content(call, version, value)
        return Verdict(status, version, "wrong" if why else "ok", _line(why))

    def _stranger(self, call: Call, version: str, bundle: str) -> str:
        """Why this version should not have answered this request, or is not the one that was built."""
        if call.version is not None and version != call.version:
            return f"{version or 'nobody'} answered a request for {call.version}"
        if not self._known:
            return ""
        known = self._known.get(version)
        if known is None:
            self.learn()  # built a moment ago: rare enough to read it here
            known = self._known.get(version)
        if known is None:
            return f"{version or 'a version without a name'} is not one that was built"
        if known.bundle != bundle:
            return f"bundle {bundle or 'without a name'}, the record of {version} says {known.bundle}"
        return ""

    def _content(self, call: Call, version: str, value: Any) -> str:
        known = self._known.get(version)
        golden = known.golden.get(call.body) if known else None
        if golden is not None:
            if not _scores(value):
                return f"{golden.name}: not {{label: number}}"
            return "; ".join(golden_examples.differences([golden], [value]))
        scores = _scores(value)
        # An answer of another form repeats the request's own form, as an echo does: each way has its first one.
        first = self._first.setdefault((version, call.body, "" if scores else call.kind), value)
        if scores and _scores(first):
            return _unlike(first, value)
        return "" if first == value else "not what it answered before"


def _scores(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(type(score) in (float, int) for score in value.values())


def _unlike(first: Mapping[str, float], later: Mapping[str, float]) -> str:
    """How two answers to one body differ, of which one may hold fewer labels: in the best label, or in a value."""
    best, before = next(iter(later)), next(iter(first))
    if best != before:
        both = [scores for scores in (first, later) if best in scores and before in scores]
        if not any(abs(scores[best] - scores[before]) <= TOLERANCE for scores in both):
            return f"{best!r} first, {before!r} before"
    for name in first.keys() & later.keys():
        if not abs(first[name] - later[name]) <= TOLERANCE * max(1.0, abs(first[name])):
            return f"{name} is {later[name]:.6g}, was {first[name]:.6g}"
    return ""


def _line(text: str) -> str:
    return " ".join(text.split())[:_DETAIL]
