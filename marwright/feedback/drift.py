"""Whether the latest requests still look like what a version was made for.

    look = drift.look(reference, store.answered("digits", version="1.1", last=500), policy.trigger)
    look.drifted, [test.name for test in look.tests if test.drifted]

The reference is the validation part, packed in the archive. Compared are each input statistic, the confidence (of a
regressor the value) and the leading principal components of the embedding (Kolmogorov-Smirnov), and the embedding as a
whole (maximum mean discrepancy, Gretton et al. 2012). Holm's correction over all of them keeps the promised false alarm
rate for one look.

That promise is for a reference and a window drawn from the same source. Each p-value is one by permutation, (1 + as
extreme) / (1 + permutations), or scipy's where no value occurs twice: Kolmogorov-Smirnov's own distribution knows no
ties, and confidences have many. Principal components and the kernel's width come from both samples together: fitted to
the reference alone, they would fit it better than anything new, and find drift where there is none.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from marwright.feedback.values import Answered
from marwright.learning.reference import Reference
from marwright.release.policy import TriggerPolicy

LEAST = 20
"""Rows of a window, or of the reference, with fewer of which nothing is tested."""
COMPONENTS = 3
SUBSAMPLE = 500
"""Rows of each side that MMD takes."""
PERMUTATIONS = 999
"""At least; more where a strict policy or many tests ask for smaller p-values."""
MOST = 19_999
DIGITS = 4
"""Decimals of a confidence or a value that count: what two backends compute differs below that."""
_CHUNK = 2**21

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """One comparison. `p` is its own p-value, `adjusted` after Holm's correction over the look."""

    name: str
    kind: Literal["KS", "MMD"]
    statistic: float
    p: float
    adjusted: float
    drifted: bool
    before: float | None = None
    """Mean in the reference."""
    now: float | None = None
    """Mean in the window."""


@dataclass(frozen=True)
class Look:
    """What one window of requests to one version said."""

    version: str
    requests: int
    """Rows of the window."""
    reference: int
    since: float | None
    until: float | None
    """Times of the oldest and the newest answer in it, Unix seconds."""
    false_alarm: float
    tests: tuple[Compared, ...] = ()
    skipped: tuple[str, ...] = ()
    """What could not be compared, a sentence each."""

    @property
    def drifted(self) -> bool:
        return any(test.drifted for test in self.tests)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the store keeps them; `from_dict` gives the look back."""
        return {**asdict(self), "tests": [asdict(test) for test in self.tests], "skipped": list(self.skipped)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Look:
        """What `to_dict` gave; further keys (the store's `time`) are left out."""
        names = cls.__dataclass_fields__
        given = {name: value for name, value in document.items() if name in names}
        given["tests"] = tuple(Compared(**test) for test in given.get("tests", ()))
        given["skipped"] = tuple(given.get("skipped", ()))
        return cls(**given)


@dataclass(frozen=True, eq=False)
class Permuted:
    """A statistic, its p-value, and what it is where nothing has changed (a value for each permutation)."""

    statistic: float
    p: float
    null: Values


def look(reference: Reference, answered: Sequence[Answered], policy: TriggerPolicy, *, seed: int = 0) -> Look:
    """Compare `answered`, rows of one version, with its reference. Same values and seed, same look."""
    pairs, skipped = columns(reference, answered)
    tests = len(pairs) - ("embedding" in pairs) + (1 + COMPONENTS) * ("embedding" in pairs)
    permutations = min(MOST, max(PERMUTATIONS, math.ceil(2 * tests / policy.drift_false_alarm)))
    random = np.random.default_rng(seed)
    found: list[Compared] = []
    for name, (old, new) in pairs.items():
        if name == "embedding":
            tested = mmd(old, new, random=random, permutations=permutations)
            found.append(Compared(name, "MMD", tested.statistic, tested.p, 1.0, False))
            for number, (one, other) in enumerate(components(old, new), start=1):
                found.append(_ks(f"component {number}", one, other, random, permutations))
        else:
            found.append(_ks(name, old, new, random, permutations))
    adjusted = holm([test.p for test in found])
    alarm = policy.drift_false_alarm
    return Look(
        version=answered[-1].version if answered else "",
        requests=len(answered),
        reference=len(reference),
        since=answered[0].time if answered else None,
        until=answered[-1].time if answered else None,
        false_alarm=alarm,
        tests=tuple(
            Compared(test.name, test.kind, test.statistic, test.p, p, p <= alarm, test.before, test.now)
            for test, p in zip(found, adjusted, strict=True)
        ),
        skipped=tuple(skipped),
    )


def columns(
    reference: Reference, answered: Sequence[Answered]
) -> tuple[dict[str, tuple[NDArray[Any], NDArray[Any]]], list[str]]:
    """What can be compared, by name: the reference's values and the window's; and what cannot, a sentence each.

    The values are N and M numbers; `embedding` is N×D and M×D.
    """
    found: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    skipped = []
    window: dict[str, Values] = {}
    for name in reference.values:
        window[name] = np.array(
            [value for each in answered if (value := value_of(each, name)) is not None], dtype=np.float64
        )
    for name, old in reference.values.items():
        new = window[name]
        if min(len(old), len(new)) < LEAST:
            skipped.append(f"{name}: {len(new)} requests and {len(old)} examples of the reference, {LEAST} are needed")
        elif not (np.isfinite(old).all() and np.isfinite(new).all()):
            skipped.append(f"{name}: not all values are finite")
        else:
            digits = DIGITS if name in ("confidence", "value") else 9
            found[name] = (np.round(old, digits), np.round(new, digits))
    if reference.embedding is not None:
        width = reference.embedding.shape[1]
        rows = [each.embedding for each in answered if each.embedding is not None and each.embedding.shape == (width,)]
        if min(len(rows), len(reference)) < LEAST:
            skipped.append(
                f"embedding: {len(rows)} requests and {len(reference)} examples of the reference, {LEAST} are needed"
            )
        else:
            old, new = reference.embedding.astype(np.float64), np.stack(rows).astype(np.float64)
            if np.isfinite(old).all() and np.isfinite(new).all():
                found["embedding"] = (old, new)
            else:
                skipped.append("embedding: not all values are finite")
    return found, skipped


def ks(old: Values, new: Values, *, random: np.random.Generator, permutations: int = PERMUTATIONS) -> Permuted:
    """Kolmogorov-Smirnov of two samples. Where no value occurs twice scipy's p-value, and no `null`; else by
    permutation."""
    from scipy import stats

    both = np.concatenate([old, new])
    ordered = np.sort(both)
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    if len(ends) == len(both):
        with warnings.catch_warnings():  # where its exact sum overflows it says so, and takes the asymptotic one
            warnings.simplefilter("ignore", RuntimeWarning)
            done = stats.ks_2samp(old, new)
        return Permuted(float(done.statistic), float(done.pvalue), np.empty(0))
    observed = float(stats.ks_2samp(old, new, method="asymp").statistic)
    labels = np.zeros(len(both), dtype=np.int32)
    labels[: len(old)] = 1
    null = np.empty(permutations)
    size = max(1, _CHUNK // len(both))
    for start in range(0, permutations, size):
        count = min(size, permutations - start)
        mixed = random.permuted(np.broadcast_to(labels, (count, len(both))), axis=1)
        first = np.cumsum(mixed, axis=1)[:, ends]
        null[start : start + count] = np.abs(first / len(old) - (ends + 1 - first) / len(new)).max(axis=1)
    return Permuted(observed, _share(null, observed), null)


def mmd(
    old: NDArray[Any], new: NDArray[Any], *, random: np.random.Generator, permutations: int = PERMUTATIONS
) -> Permuted:
    """Squared maximum mean discrepancy of N×D and M×D, unbiased, by permutation.

    The kernel is Gaussian, as wide as the median distance of all rows. Of more than 500 rows, as many are drawn.
    """
    from scipy import spatial

    old, new = (rows[_drawn(len(rows), random)] for rows in (old, new))
    both = np.concatenate([old, new]).astype(np.float64)
    squared = spatial.distance.squareform(spatial.distance.pdist(both, "sqeuclidean"))
    apart = squared[np.triu_indices(len(both), 1)]
    width = float(np.median(apart)) or float(apart.mean()) or 1.0
    kernel = np.exp(-squared / (2 * width)).astype(np.float32)
    np.fill_diagonal(kernel, 0.0)
    rows, whole = kernel.sum(axis=1, dtype=np.float64), kernel.sum(dtype=np.float64)
    labels = np.zeros(len(both), dtype=np.float32)
    labels[: len(old)] = 1.0
    found = np.empty(permutations + 1)
    size = max(1, _CHUNK // len(both))
    for start in range(0, permutations + 1, size):
        count = min(size, permutations + 1 - start)
        mixed = random.permuted(np.broadcast_to(labels, (count, len(both))), axis=1)
        if start == 0:
            mixed[0] = labels
        within = np.einsum("ij,ij->i", mixed @ kernel, mixed, dtype=np.float64)
        touched = mixed @ rows
        between = touched - within
        n, m = len(old), len(new)
        found[start : start + count] = (
            within / (n * (n - 1)) + (whole - 2 * touched + within) / (m * (m - 1)) - 2 * between / (n * m)
        )
    return Permuted(float(found[0]), _share(found[1:], found[0]), found[1:])


def components(old: NDArray[Any], new: NDArray[Any]) -> list[tuple[Values, Values]]:
    """Both samples along the leading principal components of the two together; those without spread are left out."""
    both = np.concatenate([old, new]).astype(np.float64)
    centred = both - both.mean(axis=0)
    wide = centred.shape[1] > len(centred)
    sizes, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    scale = math.sqrt(max(0.0, float(sizes[-1])) / len(both))
    found: list[tuple[Values, Values]] = []
    for size, vector in list(zip(sizes, vectors.T, strict=True))[: -COMPONENTS - 1 : -1]:
        if size <= 1e-12 * sizes[-1] or not scale:
            break
        along = np.round((vector * math.sqrt(size) if wide else centred @ vector) / scale, 7)
        found.append((along[: len(old)], along[len(old) :]))
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values: those at most α are rejected, with at most α of any false rejection (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda index: p[index])
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted


def value_of(each: Answered, name: str) -> float | None:
    """A row's own value of what a reference calls by that name; None where it has none."""
    if name == "confidence":
        return each.confidence
    return each.value if name == "value" else each.statistics.get(name)


# -------------------------------------------------------------------- private


def _ks(name: str, old: Values, new: Values, random: np.random.Generator, permutations: int) -> Compared:
    done = ks(old, new, random=random, permutations=permutations)
    return Compared(name, "KS", done.statistic, done.p, 1.0, False, float(old.mean()), float(new.mean()))


def _share(null: Values, observed: float) -> float:
    """As extreme, those that differ by no more than rounding included."""
    return float((1 + np.count_nonzero(null >= observed - 1e-9)) / (1 + len(null)))


def _drawn(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    if count <= SUBSAMPLE:
        return np.arange(count)
    return np.sort(random.choice(count, SUBSAMPLE, replace=False))
