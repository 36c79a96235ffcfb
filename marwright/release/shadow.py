"""The same requests to two versions, in turns: what each answers, how fast, and what it costs its worker.

    champion, challenger = shadow.side_by_side(client, "digits", ("1.0", "1.1"), requests, max_missed=0)
    shadow.agreement(champion, challenger)              # 0.98

Each goes to the pinned URL; callers of the default URL notice nothing. Which of the two is asked first alternates, so
that whatever else the machine is doing weighs on both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from marwright.errors import DataError, MarwrightError
from marwright.packing.golden import Golden
from marwright.release import loading
from marwright.release.client import Client
from marwright.release.loadtest import bodies

ALIKE = 0.1
"""A regressor's two values agree when they are within this share of the champion's."""


@dataclass(frozen=True)
class Sample:
    """One request body."""

    body: bytes
    content_type: str = "application/octet-stream"


@dataclass(frozen=True)
class Holdout:
    """Labelled examples that neither version has learned from. `targets` are indices into `classes`, or values."""

    samples: Sequence[Sample]
    targets: np.ndarray[Any, Any]
    classes: tuple[str, ...] = ()


@dataclass
class Side:
    """One version's answers: as many as there were requests, None where it gave none."""

    version: str
    answers: list[Mapping[str, float] | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    grown: int = 0
    """Bytes that its largest worker grew by in the second half of the requests."""
    memory: int = 0
    """Bytes of its largest worker at the end; 0 where the system does not say."""

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds) if self.seconds else 0.0


def side_by_side(
    client: Client,
    model: str,
    versions: tuple[str, str],
    samples: Sequence[Sample],
    *,
    max_missed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Side, Side]:
    """Every sample to both versions, all labels asked for. A version's refusals are in its `errors`, never raised.

    Ends early when the second one owes more than `max_missed` answers that the first one gave: nothing can make up for
    them, and each may be a timeout that has to be waited for.
    """
    sides = champion, challenger = (Side(versions[0]), Side(versions[1]))
    owed = 0
    pids = tuple(loading.ready_pids(loading.loaded(client, model, version)) for version in versions)
    half = (0, 0)
    for number, sample in enumerate(samples):
        if number == len(samples) // 2:
            half = (largest(pids[0]), largest(pids[1]))
        for side in sides if number % 2 else reversed(sides):
            _ask(client, model, side, sample)
        owed += champion.answers[-1] is not None and challenger.answers[-1] is None
        if owed > max_missed:
            break
        if progress is not None:
            progress(number + 1)
    for side, before, of in zip(sides, half, pids, strict=True):
        side.memory = largest(of)
        side.grown = max(0, side.memory - before) if before and side.memory else 0
    return sides


def missed(champion: Side, challenger: Side) -> int:
    """How many of the requests that the champion answered the challenger did not."""
    pairs = zip(champion.answers, challenger.answers, strict=True)
    return sum(one is not None and other is None for one, other in pairs)


def agreement(champion: Side, challenger: Side) -> float:
    """Share of the requests that both answered with the same best label, or about the same value."""
    pairs = [(one, other) for one, other in zip(champion.answers, challenger.answers, strict=True) if one and other]
    return sum(_alike(one, other) for one, other in pairs) / len(pairs) if pairs else 0.0


def outputs(side: Side, classes: Sequence[str]) -> np.ndarray[Any, Any]:
    """N×K probabilities in the order of `classes`, or N values of a regressor; NaN where it did not answer."""
    rows = [
        [np.nan] * max(1, len(classes))
        if answer is None
        else [answer.get(name, 0.0) for name in classes]
        if classes
        else [next(iter(answer.values()))]
        for answer in side.answers
    ]
    values = np.array(rows, dtype=np.float64).reshape(len(rows), max(1, len(classes)))
    return values if classes else values[:, 0]


def largest(pids: Iterable[int]) -> int:
    """Bytes of the largest of these processes; 0 where none of them can be seen from here."""
    found = [0]
    for pid in pids:
        try:
            found.append(int(psutil.Process(pid).memory_info().rss))
        except psutil.Error:
            continue
    return max(found)


def from_golden(examples: Sequence[Golden]) -> list[Sample]:
    """Golden examples as requests."""
    kinds = {"json": "application/json"}
    return [Sample(each.body, kinds.get(each.kind, "application/octet-stream")) for each in examples]


def from_folder(folder: Path) -> list[Sample]:
    """Every file of a folder but hidden ones is one request body; DataError where there is none."""
    return [Sample(each.data, each.content_type) for each in bodies.folder(folder)]


def _ask(client: Client, model: str, side: Side, sample: Sample) -> None:
    began = time.perf_counter()
    try:
        answer = client.predict(
            model,
            sample.body,
            version=side.version,
            headers={"X-Top-K": "1000000"},
            content_type=sample.content_type,
            capture=False,
        )
        value = json.loads(answer.body)
        if not isinstance(value, dict) or not value:
            raise DataError(f"an answer without a label: {answer.body[:80]!r}", hint="")
        side.answers.append(value)
    except (MarwrightError, ValueError) as error:
        side.answers.append(None)
        side.errors.append(str(error).partition("\n")[0])
    side.seconds.append(time.perf_counter() - began)


def _alike(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    if len(one) == 1 == len(other):
        (value,), (second,) = one.values(), other.values()
        return abs(value - second) <= ALIKE * max(abs(value), 1e-9)
    return max(one, key=lambda name: one[name]) == max(other, key=lambda name: other[name])
