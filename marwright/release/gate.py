"""The promotion rule: may the challenger answer instead of the champion? Pure: values in, a verdict out.

    verdict = gate.decide(champion, challenger, truth, policy.gate, classes=("cat", "dog"))
    verdict.outcome      # "pass", "fail", or "inconclusive": look again with more examples
    verdict.reason       # "accuracy fell from 0.9721 to 0.9415 …"

Both versions answered the same labelled examples, so everything is paired. "pass" is a proof that no more than
`policy.margin` was lost; what is not proved is not passed. Each look spends its share of the error (Bonferroni), so
that the error of all looks together is what the policy says. docs/adr/0005-the-gate.md has the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from marwright.release.policy import GatePolicy

Outcome = Literal["pass", "fail", "inconclusive"]

BINS = 15
"""Of equal width, for the calibration error (Guo et al. 2017)."""


@dataclass(frozen=True, eq=False)
class Observed:
    """One version's answers to the holdout, in the same order as the other version's."""

    version: str
    outputs: NDArray[np.float64]
    """N×K probabilities by class, or N values of a regressor."""
    seconds: NDArray[np.float64]
    """N latencies at the pinned URL, measured in turns with the other version's."""
    size: int
    """Bytes of the archive."""
    memory: int
    """Bytes of the largest worker; 0 is unknown."""


@dataclass(frozen=True)
class Check:
    """One comparison. Numbers that a check does not have, or that could not be measured, are None."""

    name: str
    outcome: Literal["pass", "fail", "inconclusive", "reported"]
    champion: float | None
    challenger: float | None
    estimate: float | None
    """What is compared with `limit`: a difference (challenger minus champion) or a ratio (challenger to champion)."""
    limit: float | None
    low: float | None
    high: float | None
    """One-sided bounds of `estimate`, each at the confidence of this look."""
    sentence: str


@dataclass(frozen=True)
class ClassRow:
    """Recall of one class, for both. `lost` and `won` count examples that one of them alone had right."""

    label: str
    examples: int
    champion: float
    challenger: float
    lost: int
    won: int
    p: float
    """Of a drop: exact one-sided McNemar, adjusted over the classes (Holm)."""
    worse: bool


@dataclass(frozen=True)
class Bin:
    """Answers with about the same confidence: its mean, the share that was right, how many there were."""

    confidence: float
    accuracy: float
    count: int


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
    def reason(self) -> str:
        """One sentence: of the first check that decided, with metric, both values and limit."""
        deciding = [check for check in self.checks if check.outcome == self.outcome]
        if self.outcome == "pass" or not deciding:
            return self.checks[0].sentence
        more = f" (and {len(deciding) - 1} more)" if len(deciding) > 1 else ""
        return deciding[0].sentence + more

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
