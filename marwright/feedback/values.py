"""What the store takes and gives: answers, labels, counts. Plain values; `marwright.feedback.store` has them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Answered:
    """One instance of one captured request, and what was answered. Times are Unix seconds."""

    request: str
    instance: int
    model: str
    version: str
    """"" for a labelled picture that was no request."""
    bundle: str
    time: float
    answer: str
    """The best label; "" of a regressor."""
    value: float | None
    """A regressor's."""
    confidence: float | None
    """The best label's probability; None of a regressor."""
    probabilities: NDArray[np.float32] | None
    """K."""
    embedding: NDArray[np.float32] | None
    """D."""
    statistics: Mapping[str, float]
    """`learning.statistics`, by name; none where the body was not kept."""
    digest: str
    """sha256 of the example file; "" where none is kept."""
    path: Path | None
    """The example file: a picture as it was received, a PNG of the decoded instance, or a row of numbers (.json)."""


@dataclass(frozen=True, eq=False)
class Labelled(Answered):
    """The same, and the label that counts."""

    label: str
    source: str
    labelled_at: float
    """When it was said, as the sender says."""
    received: float = 0.0
    """When it came."""


@dataclass(frozen=True)
class Label:
    """What somebody says about one instance of a request. The same `uid` twice is one label."""

    request: str
    instance: int
    label: str
    source: str
    time: float
    """When it was said."""
    uid: str


@dataclass(frozen=True)
class Picture:
    """A labelled picture that was no request."""

    name: str
    data: bytes
    """The file as it is."""
    label: str
    source: str
    time: float


@dataclass(frozen=True)
class Added:
    """What became of labels: `labels` are new, `repeated` were there or say what their source said last."""

    labels: int = 0
    repeated: int = 0
    unknown: int = 0
    """Of the new ones, those whose request is not there (yet)."""
    invalid: int = 0
    """Of the new ones, those that name no class of the model that answered, or no number."""
    forgotten: int = 0
    """Refused: about requests that are to be forgotten."""


@dataclass(frozen=True)
class Pictured(Added):
    """What became of labelled pictures."""

    pictures: int = 0
    """That were not there before."""
    unreadable: tuple[str, ...] = ()
    """Files that are no pictures, and why; left out."""


@dataclass(frozen=True)
class Ingested(Added):
    """What became of a spool. `labels` and so on count as in `Added`."""

    segments: int = 0
    requests: int = 0
    instances: int = 0
    again: int = 0
    """Requests that were there already."""
    undecodable: int = 0
    """Instances that were stored without an example file, as their body cannot be decoded."""
    damaged: int = 0
    """Segments, moved to spool/damaged/ after what was whole in them was taken."""


@dataclass(frozen=True)
class Live:
    """How good one version's answers were, by the labels that came."""

    version: str
    labels: int
    right: int | None
    """None of a regressor."""
    accuracy: float | None
    low: float | None
    high: float | None
    """95 % Wilson interval of the accuracy."""
    error: float | None
    """Mean absolute error of a regressor."""


@dataclass(frozen=True)
class ModelStatus:
    """One model in the store."""

    model: str
    requests: int
    instances: int
    bodies: int
    """Different example files."""
    body_bytes: int
    labelled: int
    """Instances with a label that counts."""
    labels: int
    """That name a class (or a number), repeated ones left out."""
    repeated: int
    invalid: int
    """That name no class of the model."""
    conflicting: int
    """Instances about which the labels differ."""
    lag_median: float | None
    lag_p90: float | None
    """Seconds from the answer to the label that counts."""
    classes: Mapping[str, int] = field(default_factory=dict)
    """Instances by the label that counts; {} of a regressor."""
    live: tuple[Live, ...] = ()
    first: float | None = None
    last: float | None = None
    """Times of the oldest and the newest answer."""


@dataclass(frozen=True)
class Unknown:
    """Labels whose request nobody has seen (yet)."""

    labels: int
    requests: int
    oldest: float | None
    """When the oldest of them came."""
    some: tuple[str, ...] = ()
    """A few of the ids."""


@dataclass(frozen=True)
class Forgotten:
    """What was removed for good."""

    request: str
    known: bool
    """Whether there was any trace of it."""
    before: bool
    """Whether it had been forgotten before."""
    instances: int = 0
    labels: int = 0
    bodies: int = 0
    frames: int = 0
    """Of the spool."""
    runs: tuple[str, ...] = ()
    """Ids of those that have learned from it."""


@dataclass(frozen=True)
class Pruned:
    """What was removed for its age."""

    requests: int = 0
    labels: int = 0
    bodies: int = 0
    body_bytes: int = 0
    damaged: int = 0
