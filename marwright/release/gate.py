"""The promotion rule: may the challenger answer instead of the champion? Pure: values in, a verdict out.

    verdict = gate.decide(champion, challenger, truth, policy.gate, classes=("cat", "dog"))
    verdict.outcome      # "pass", "fail", or "inconclusive": look again with more examples
    verdict.reason       # "accuracy 0.9721 → 0.9415 on 10000 examples: worse by at least 0.0231 …"

Both versions answered the same labelled examples, so everything is paired. "pass" is a proof that no more than
`policy.margin` was lost, or with a margin of 0 that something was won; what is not proved is not passed. Each look
spends its share of the error (Bonferroni), so that the error of all looks together is what the policy says.
docs/adr/0005-the-gate.md has the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from marwright.release import checks
from marwright.release.checks import Bin as Bin
from marwright.release.checks import Check as Check
from marwright.release.checks import ClassRow as ClassRow
from marwright.release.checks import Floats, Outcome
from marwright.release.policy import GatePolicy

SHARES = (*(round(0.05 * i, 2) for i in range(20)), 0.99, 1.0)
"""Of the requests, for the distribution of latencies."""


@dataclass(frozen=True, eq=False)
class Observed:
    """One version's answers to the holdout, in the same order as the other version's."""

    version: str
    outputs: Floats
    """N×K probabilities by class, or N values of a regressor."""
    seconds: Floats | None = None
    """N latencies at the pinned URL, measured in turns with the other version's; None before there is an archive."""
    size: int = 0
    """Bytes of the archive; 0 is unknown."""
    memory: int = 0
    """Bytes of the largest worker; 0 is unknown."""


@dataclass(frozen=True)
class Latency:
    """Seconds within which `share` of the requests were answered."""

    share: float
    champion: float
    challenger: float


@dataclass(frozen=True)
class Verdict:
    """What the gate decided, with every number behind it. `from_dict(to_dict())` gives it back, also through JSON."""

    outcome: Outcome
    champion: str
    challenger: str
    task: Literal["classification", "regression"]
    examples: int
    look: int
    looks: int
    confidence: float
    """One-sided, of this look."""
    checks: tuple[Check, ...]
    classes: tuple[ClassRow, ...]
    champion_bins: tuple[Bin, ...]
    challenger_bins: tuple[Bin, ...]
    latencies: tuple[Latency, ...]

    @property
    def metric(self) -> str:
        """Name of the check that the margin is for."""
        return "accuracy" if self.task == "classification" else "error"

    @property
    def reason(self) -> str:
        """One sentence: metric, both values and limit of the first check that decided."""
        if self.outcome == "pass":
            return self.check(self.metric).sentence
        first, *others = (check for check in self.checks if check.outcome == self.outcome)
        more = f" (also {', '.join(check.name for check in others)})" if others else ""
        return first.sentence + more

    def check(self, name: str) -> Check:
        """KeyError where there is none of that name."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            name: [asdict(one) for one in value] if isinstance(value, tuple) else value
            for name, value in ((field.name, getattr(self, field.name)) for field in fields(self))
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """TypeError or KeyError where the document is not one of `to_dict`."""
        made = dict(document)
        for name, kind in _ROWS.items():
            made[name] = tuple(kind(**row) for row in made[name])
        return cls(**made)


_ROWS: dict[str, Any] = {
    "checks": Check,
    "classes": ClassRow,
    "champion_bins": Bin,
    "challenger_bins": Bin,
    "latencies": Latency,
}


def examples_at(look: int, policy: GatePolicy, available: int) -> int:
    """How many of `available` examples look number `look` (from 1) uses; the last one uses all.

    The caller puts them into random order once, before the first look: a prefix has to be a fair sample.
    """
    if not 1 <= look <= policy.looks:
        raise ValueError(f"look {look} of {policy.looks}")
    return math.ceil(available * look / policy.looks)


def decide(
    champion: Observed,
    challenger: Observed,
    truth: NDArray[Any],
    policy: GatePolicy,
    *,
    classes: Sequence[str] = (),
    look: int = 1,
) -> Verdict:
    """The verdict of look number `look` (from 1) on N examples; `truth` is N class indices, or N values of a regressor.

    Latencies are compared where both were measured. "pass" where every check passes, "fail" where one fails. ValueError
    where shapes do not fit one another.
    """
    _validate(champion, challenger, truth, classes)
    if not 1 <= look <= policy.looks:
        raise ValueError(f"look {look} of {policy.looks}")
    confidence = 1 - (1 - policy.confidence) / policy.looks
    made = [checks.answers(champion.outputs, challenger.outputs)]
    rows: tuple[ClassRow, ...] = ()
    bins: tuple[tuple[Bin, ...], tuple[Bin, ...]] = ((), ())
    classifies = champion.outputs.ndim == 2
    if classifies:
        first, second = checks.Judged(champion.outputs, truth), checks.Judged(challenger.outputs, truth)
        bins = first.bins(), second.bins()
        by_class = {
            "max_drop": policy.max_class_drop,
            "confidence": 1 - (1 - policy.class_confidence) / policy.looks,
        }
        labels = classes or [str(i) for i in range(champion.outputs.shape[1])]
        rows = checks.class_rows(first, second, labels, **by_class)
        made += [
            checks.accuracy(first, second, margin=policy.margin, confidence=confidence),
            checks.mcnemar(first, second),
            checks.classes(rows, **by_class),
            checks.calibration(first, second, max_rise=policy.max_ece_rise, confidence=confidence),
        ]
    else:
        outputs = champion.outputs, challenger.outputs
        made.append(checks.error(*outputs, truth, margin=policy.margin, confidence=confidence))
    latencies: tuple[Latency, ...] = ()
    if champion.seconds is not None and challenger.seconds is not None:
        times = champion.seconds, challenger.seconds
        made.append(checks.latency(*times, limit=policy.max_latency_ratio, confidence=confidence))
        quantiles = [np.quantile(seconds, SHARES).tolist() for seconds in times]
        latencies = tuple(Latency(*row) for row in zip(SHARES, *quantiles, strict=True))
    made += [
        checks.ratio("size", "archive", champion.size, challenger.size, limit=policy.max_size_ratio),
        checks.ratio("memory", "largest worker", champion.memory, challenger.memory, limit=policy.max_memory_ratio),
    ]
    return Verdict(
        outcome=_overall(made),
        champion=champion.version,
        challenger=challenger.version,
        task="classification" if classifies else "regression",
        examples=len(truth),
        look=look,
        looks=policy.looks,
        confidence=confidence,
        checks=tuple(made),
        classes=rows,
        champion_bins=bins[0],
        challenger_bins=bins[1],
        latencies=latencies,
    )


def _overall(made: Sequence[Check]) -> Outcome:
    outcomes = {check.outcome for check in made}
    if "fail" in outcomes:
        return "fail"
    return "inconclusive" if "inconclusive" in outcomes else "pass"


def _validate(champion: Observed, challenger: Observed, truth: NDArray[Any], classes: Sequence[str]) -> None:
    shape, count = champion.outputs.shape, len(truth)
    if count == 0 or np.shape(truth) != (count,):
        raise ValueError(f"truth has shape {np.shape(truth)}, not N")
    if challenger.outputs.shape != shape or len(shape) not in (1, 2) or shape[0] != count:
        raise ValueError(f"outputs have shapes {shape} and {challenger.outputs.shape} for {count} examples")
    if len(shape) == 2:
        if shape[1] < 2 or (classes and len(classes) != shape[1]):
            raise ValueError(f"outputs have {shape[1]} columns for {len(classes) or 'at least two'} classes")
        if truth.dtype.kind not in "iu" or truth.min() < 0 or truth.max() >= shape[1]:
            raise ValueError(f"truth is not made of class indices from 0 to {shape[1] - 1}")
    elif not np.isfinite(truth).all():
        raise ValueError("truth holds values that are not finite")
    for one in (champion, challenger):
        seconds = one.seconds
        if seconds is not None and (seconds.shape != (count,) or not (np.isfinite(seconds) & (seconds > 0)).all()):
            raise ValueError(f"latencies of {one.version} are not {count} positive numbers of seconds")
        if one.size < 0 or one.memory < 0:
            raise ValueError(f"size and memory of {one.version} are {one.size} and {one.memory}")
