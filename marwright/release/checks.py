"""What the gate compares, one function for each comparison: numbers in, a `Check` with its sentence out.

    checks.latency(champion_seconds, challenger_seconds, limit=1.5, confidence=0.95).outcome

The order is always champion, challenger. `gate.decide` puts the checks together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from marwright.release import paired

Outcome = Literal["pass", "fail", "inconclusive"]
Floats = NDArray[np.float64]

BINS = 15
"""Of equal width, for the calibration error (Guo et al. 2017); as in a run's report."""
HUGE = 1e100


@dataclass(frozen=True)
class Check:
    """One comparison. Numbers that a check does not have, or that could not be measured, are None."""

    name: str
    outcome: Literal["pass", "fail", "inconclusive", "reported"]
    champion: float | None
    challenger: float | None
    estimate: float | None
    """What is compared with `limit`: challenger minus champion, or challenger to champion; of a regressor's error, the
    share of the champion's that is saved."""
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


class Judged:
    """A classifier's N×K probabilities against N class indices. An answer that is no number is wrong, with confidence
    0.
    """

    def __init__(self, outputs: Floats, truth: NDArray[Any]) -> None:
        usable = _finite(outputs)
        outputs = np.where(usable[:, np.newaxis], outputs, 0.0)
        self.truth = truth
        self.right: NDArray[np.bool_] = usable & (outputs.argmax(axis=1) == truth)
        self.confidence: Floats = outputs.max(axis=1)
        self.calibration = paired.Calibration(self.confidence, self.right, BINS)

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    def bins(self) -> tuple[Bin, ...]:
        """The bins of the reliability diagram that hold anything."""
        found = []
        for i in range(BINS):
            inside = self.calibration.bins == i
            if count := int(inside.sum()):
                found.append(Bin(float(self.confidence[inside].mean()), float(self.right[inside].mean()), count))
        return tuple(found)


def answers(champion: Floats, challenger: Floats) -> Check:
    """Fails where the challenger has answers that are not finite; the champion's are only counted."""
    before, after = (int((~_finite(outputs)).sum()) for outputs in (champion, challenger))
    return Check(
        name="answers",
        outcome="fail" if after else "pass",
        champion=float(before),
        challenger=float(after),
        estimate=float(after),
        limit=0.0,
        low=None,
        high=None,
        sentence=f"answers that are not finite numbers: {before} → {after} of {len(champion)}, and 0 are allowed",
    )


def accuracy(champion: Judged, challenger: Judged, *, margin: float, confidence: float) -> Check:
    """Passes where a loss of `margin` is ruled out, fails where any smaller loss is; of a margin of 0, where something
    was won or lost.
    """
    lost, won = _discordant(champion, challenger)
    examples = len(champion.right)
    low, high = paired.proportions(lost, won, examples, confidence)
    undecided = ""
    if margin:
        needed = paired.examples_needed((lost + won) / examples, margin, confidence)
        undecided = f"; were they equally good, about {needed} examples would show it"
    before, after = champion.accuracy, challenger.accuracy
    return _margin(
        name="accuracy",
        said=f"accuracy {before:.4f} → {after:.4f} on {examples} examples",
        unit="",
        undecided=undecided,
        values=(before, after, after - before),
        bounds=(low, high),
        margin=margin,
        confidence=confidence,
    )


def error(champion: Floats, challenger: Floats, truth: Floats, *, margin: float, confidence: float) -> Check:
    """As `accuracy`, of N values: the mean absolute error, its loss as a share of the champion's.

    Examples that either did not answer with a number say nothing here; `answers` speaks of them.
    """
    usable = _finite(champion) & _finite(challenger)
    if not usable.any():
        return Check("error", "inconclusive", None, None, None, -margin, None, None, "mean absolute error: no answers")
    errors = np.abs(champion - truth)[usable], np.abs(challenger - truth)[usable]
    before, after = float(errors[0].mean()), float(errors[1].mean())
    if before == 0:  # nothing to be a share of: only a challenger as perfect has lost nothing
        gain = 0.0 if after == 0 else -1.0
        bounds: tuple[float | None, float | None] = (gain, gain)
    else:
        # The champion's mean counts as known: what is uncertain in it is multiplied by a gain of a few percent.
        gain = (before - after) / before
        bounds = paired.means((errors[0] - errors[1]) / before, confidence)
    return _margin(
        name="error",
        said=f"mean absolute error {before:.4g} → {after:.4g} on {len(errors[0])} examples",
        unit="as a share of the champion's, ",
        undecided="",
        values=(before, after, gain),
        bounds=bounds,
        margin=margin,
        confidence=confidence,
    )


def mcnemar(champion: Judged, challenger: Judged) -> Check:
    """Reported: whether the two differ at all. The margin decides."""
    lost, won = _discordant(champion, challenger)
    p = paired.mcnemar(lost, won)
    sentence = f"right by the champion alone: {lost}, by the challenger alone: {won}; McNemar's exact p is {p:.3g}"
    return Check("mcnemar", "reported", float(lost), float(won), p, None, None, None, sentence)


def class_rows(
    champion: Judged, challenger: Judged, labels: Sequence[str], *, max_drop: float, confidence: float
) -> tuple[ClassRow, ...]:
    """Recall of each class that has examples. Worse is one that lost more than `max_drop`, significantly."""
    lost, won = champion.right & ~challenger.right, challenger.right & ~champion.right
    masks = (np.ones_like(lost), champion.right, challenger.right, lost, won)
    counts = np.stack([np.bincount(champion.truth[mask], minlength=len(labels)) for mask in masks], axis=1)
    there = [i for i in range(len(labels)) if counts[i, 0]]
    adjusted = paired.drops(counts[there, 3], counts[there, 4])
    rows = []
    for i, p in zip(there, adjusted.tolist(), strict=True):
        examples, right_before, right_after, only_before, only_after = counts[i].tolist()
        before, after = right_before / examples, right_after / examples
        worse = p <= 1 - confidence and before - after > max_drop
        rows.append(ClassRow(labels[i], examples, before, after, only_before, only_after, p, worse))
    return tuple(rows)


def classes(rows: Sequence[ClassRow], *, max_drop: float, confidence: float) -> Check:
    """Fails where a class is worse; speaks of the one for which most says so."""
    worst = min(rows, key=lambda row: (not row.worse, row.p, row.challenger - row.champion))
    others = sum(row.worse for row in rows) - 1
    sentence = (
        f"recall of {worst.label!r} {worst.champion:.4f} → {worst.challenger:.4f} on {worst.examples} examples"
        f" (p = {worst.p:.2g} by Holm over {len(rows)} classes, significant up to {1 - confidence:.2g}), and"
        f" a drop of {max_drop:g} is allowed"
    )
    if others < 0:
        sentence = f"no class is worse; nearest to it: {sentence}"
    elif others:
        sentence += f"; {others} more worse"
    return Check(
        name="classes",
        outcome="fail" if worst.worse else "pass",
        champion=worst.champion,
        challenger=worst.challenger,
        estimate=worst.challenger - worst.champion,
        limit=-max_drop,
        low=None,
        high=None,
        sentence=sentence,
    )


def calibration(champion: Judged, challenger: Judged, *, max_rise: float, confidence: float) -> Check:
    """Fails only where the rise is clearly too large: the calibration error of few examples is mostly noise."""
    before, after = champion.calibration.error, challenger.calibration.error
    low, high = paired.calibration_rise(champion.calibration, challenger.calibration, confidence)
    rise = after - before
    sentence = f"expected calibration error {before:.4f} → {after:.4f}, and {max_rise:+g} is allowed"
    outcome: Outcome = "inconclusive"
    if rise <= max_rise:
        outcome = "pass"
    elif low > max_rise:
        outcome = "fail"
        sentence += f": the rise is at least {low:.4f} at {_percent(confidence)} confidence"
    else:
        sentence += f": the rise may be chance, it is at least {low:.4f} at {_percent(confidence)} confidence"
    return Check("calibration", outcome, before, after, rise, max_rise, low, high, sentence)


def latency(champion: Floats, challenger: Floats, *, limit: float, confidence: float) -> Check:
    """The median of the N ratios of latencies, both in seconds and measured in turns."""
    ratios = challenger / champion
    before, after, ratio = (float(np.median(values)) for values in (champion, challenger, ratios))
    low, high = paired.medians(ratios, confidence)
    outcome: Outcome = "inconclusive"
    if low is None or high is None:
        bounds = "too few to say more"
    else:
        bounds = f"{low:.3g} to {high:.3g} at {_percent(confidence)} confidence"
        if high <= limit:
            outcome = "pass"
        elif low > limit:
            outcome = "fail"
    sentence = (
        f"median latency {1000 * before:.3g} ms → {1000 * after:.3g} ms: {ratio:.3g} times ({bounds}), and"
        f" {limit:g} is allowed"
    )
    return Check("latency", outcome, before, after, ratio, limit, low, high, sentence)


def ratio(name: str, what: str, champion: int, challenger: int, *, limit: float) -> Check:
    """Of two numbers of bytes, where 0 is unknown."""
    before, after = (float(value) if value else None for value in (champion, challenger))
    if before is None or after is None:
        return Check(name, "reported", before, after, None, limit, None, None, f"{what}: not measured")
    times = after / before
    sentence = f"{what} {before / 1e6:.4g} MB → {after / 1e6:.4g} MB: {times:.3g} times, and {limit:g} is allowed"
    return Check(name, "pass" if times <= limit else "fail", before, after, times, limit, None, None, sentence)


def _margin(
    *,
    name: str,
    said: str,
    unit: str,
    undecided: str,
    values: tuple[float, float, float],
    bounds: tuple[float | None, float | None],
    margin: float,
    confidence: float,
) -> Check:
    (before, after, gain), (low, high) = values, bounds
    at = f"at {_percent(confidence)} confidence"
    allowed = f"{margin:g} may be lost" if margin else "it has to be better"
    outcome: Outcome = "inconclusive"
    if low is None or high is None:
        sentence = f"{said}: too few to say anything {at}; {allowed}"
    elif low > -margin:
        outcome = "pass"
        least = f"better by at least {low:.4f}" if low > 0 else f"worse by at most {-low:.4f}"
        sentence = f"{said}: {unit}{least} {at}, and {allowed}"
    elif high < -margin:
        outcome = "fail"
        sentence = f"{said}: {unit}worse by at least {-high:.4f} {at}, and {allowed}"
    else:
        most = f"{high:.4f} better" if high > 0 else f"{-high:.4f} worse"
        sentence = f"{said}: {unit}anything from {-low:.4f} worse to {most} {at}, and {allowed}{undecided}"
    return Check(name, outcome, before, after, gain, 0.0 - margin, low, high, sentence)


def _discordant(champion: Judged, challenger: Judged) -> tuple[int, int]:
    """How many examples the champion alone had right, and the challenger alone."""
    return int((champion.right & ~challenger.right).sum()), int((challenger.right & ~champion.right).sum())


def _finite(outputs: Floats) -> NDArray[np.bool_]:
    """Which of N answers, each of one or K numbers, are numbers throughout. Beyond HUGE a square would be infinite."""
    return np.asarray((np.abs(outputs.reshape(len(outputs), -1)) < HUGE).all(axis=1))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
