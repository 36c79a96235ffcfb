"""Whether what was learned may go on: it forgot nothing, it is better at what is new, and the labels can be believed.

    judged = judge.runs(champion, challenger, selection, policy)
    judged.outcome       # "pass", "fail" or "inconclusive"; only "pass" goes on to an archive
    judged.reasons       # sentences

Both graphs answer the same examples, and `gate.decide` compares them twice: on the old holdout, the recipe's own test
part, where at most `max_forgetting` may be lost; and on the new one, the latest of production, where it has to be
proved better. A class that loses fails either. What needs a built archive (latency, size, memory) and calibration
are left to the rollout's gate. docs/adr/0014-the-judge.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from handlers.nets import ServingGraph
from handlers.spec import ImageInput
from marwright.errors import RunError
from marwright.feedback import selection
from marwright.feedback.selection import Selection
from marwright.learning import graphs, noise
from marwright.learning.noise import Noise
from marwright.release import gate, verdicts
from marwright.release.checks import Outcome
from marwright.release.gate import Observed, Verdict
from marwright.release.policy import Policy
from marwright.runs import Run

CHUNK = 512
Holdout = tuple[NDArray[Any], NDArray[np.int64]]
"""Inputs as the graphs take them (N×…), and class indices (N)."""


@dataclass(frozen=True)
class Labels:
    """What the estimated noise means: "fail" where a class surely has more than is allowed, with its sentence."""

    outcome: Outcome
    sentence: str


@dataclass(frozen=True)
class Judgement:
    """What the judge decided, with every number behind it. `from_dict(to_dict())` gives it back, also through JSON."""

    outcome: Outcome
    reasons: tuple[str, ...]
    """Sentences: what decided comes first."""
    old: Verdict
    new: Verdict | None
    """None where there are too few examples to judge."""
    noise: Noise | None
    """None where there are too few labels to estimate it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "outcome": self.outcome,
            "reasons": list(self.reasons),
            "old": self.old.to_dict(),
            "new": self.new.to_dict() if self.new else None,
            "noise": self.noise.to_dict() if self.noise else None,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """TypeError or KeyError where the document is not one of `to_dict`."""
        return cls(
            outcome=document["outcome"],
            reasons=tuple(document["reasons"]),
            old=Verdict.from_dict(document["old"]),
            new=Verdict.from_dict(document["new"]) if document["new"] else None,
            noise=Noise.from_dict(document["noise"]) if document["noise"] else None,
        )

    def table(self) -> tuple[Sequence[str], list[tuple[str, ...]]]:
        """Titles and rows for a terminal: a row for each check on each holdout."""
        titles, old = verdicts.table(self.old)
        new = verdicts.table(self.new)[1] if self.new else []
        return ("holdout", *titles), [*(("old", *row) for row in old), *(("new", *row) for row in new)]


def judge(
    champion: ServingGraph,
    challenger: ServingGraph,
    *,
    old: Holdout,
    new: Holdout,
    noise: Noise | None,
    policy: Policy,
    classes: Sequence[str],
    names: tuple[str, str] = ("champion", "challenger"),
) -> Judgement:
    """Both holdouts, and the labels of the new examples. ValueError where shapes do not fit one another.

    "pass" where all pass, "fail" where one fails. A new holdout of fewer than `policy.judge.min_examples`, or none,
    proves nothing: "inconclusive" at best.
    """
    limits = policy.judge
    before = _decided((champion, challenger), names, old, policy, limits.max_forgetting, classes)
    outcomes = [(before.outcome, f"old holdout: {before.reason}")]
    after: Verdict | None = None
    count = len(new[1])
    if count < limits.min_examples:
        outcomes.append(
            ("inconclusive", f"new holdout: {count} examples, and {limits.min_examples} are needed to judge")
        )
    else:
        after = _decided((champion, challenger), names, new, policy, 0.0, classes)
        outcomes.append((after.outcome, f"new holdout: {after.reason}"))
    labels = believed(noise, limits.max_label_noise)
    outcomes.append((labels.outcome, labels.sentence))
    order: tuple[Outcome, ...] = ("fail", "inconclusive", "pass")
    outcomes.sort(key=lambda one: order.index(one[0]))
    return Judgement(outcomes[0][0], tuple(sentence for _, sentence in outcomes), before, after, noise)


def runs(champion: Run, challenger: Run, chosen: Selection, policy: Policy) -> Judgement:
    """The judgement on two finished runs: the old holdout is the challenger's own test part.

    The noise is estimated on what the champion has not learned from, in its own embedding. RunError where the two do
    not take the same pictures or do not have the same classes.
    """
    spec = challenger.spec
    if (spec.input, spec.classes) != (champion.spec.input, champion.spec.classes):
        raise RunError(
            f"{challenger.id} and {champion.id} cannot be compared: they differ in input or classes",
            hint="judge by the rollout: `marwright archive` and `marwright rollout`",
        )
    if not isinstance(spec.input, ImageInput):
        raise RunError(
            f"{challenger.id} takes rows of numbers, and production's examples are pictures",
            hint="judge by the rollout: `marwright archive` and `marwright rollout`",
        )
    first, second = graphs.load(champion), graphs.load(challenger)
    with np.load(challenger.file("examples.npz", made_by="train"), allow_pickle=False) as saved:
        old = saved["inputs"], saved["labels"].astype(np.int64)
    return judge(
        first,
        second,
        old=old,
        new=selection.arrays(chosen.judge, spec.input, spec.limits, spec.classes),
        noise=doubt(first, selection.arrays(chosen.fresh, spec.input, spec.limits, spec.classes), old, spec.classes),
        policy=policy,
        classes=spec.classes,
        names=(champion.id, challenger.id),
    )


def doubt(champion: ServingGraph, new: Holdout, trusted: Holdout, classes: Sequence[str]) -> Noise | None:
    """The noise in the labels of `new`, beyond that of `trusted`, by the champion's embedding of both."""
    features, known = (_answers(champion, inputs)[1] for inputs in (new[0], trusted[0]))
    return noise.estimate(features, new[1], classes, trusted=(known, trusted[1]))


def believed(found: Noise | None, limit: float) -> Labels:
    """Fails where a class surely has more wrong labels than `limit`; undecided where it seems so, and more than half
    of `limit` is sure: of few examples, two or three doubtful ones say nothing."""
    if found is None:
        return Labels("pass", "labels: too few of them to estimate how many are wrong")
    rows = [row for row in found.by_class.values() if row.share is not None]
    if not rows:
        return Labels("pass", "labels: too few of each class, or too alike, to estimate how many are wrong")
    worst = max(rows, key=lambda row: (row.at_least or 0.0, row.share or 0.0))
    outcome: Outcome = "pass"
    if (worst.at_least or 0.0) > limit:
        outcome = "fail"
    elif (worst.share or 0.0) > limit and (worst.at_least or 0.0) > limit / 2:
        outcome = "inconclusive"
    share, at_least = worst.share or 0.0, worst.at_least or 0.0
    way = "of those labelled so seem to be of another class"
    if share != worst.wrong:
        way = "of those that seem to be of it are labelled otherwise"
    return Labels(
        outcome,
        f"labels: {found.rate:.1%} of {found.examples} seem wrong; of class {worst.label!r} {share:.1%} {way}, at least"
        f" {at_least:.1%} at 95 % confidence, and {limit:.0%} is allowed",
    )


def _decided(
    both: tuple[ServingGraph, ServingGraph],
    names: tuple[str, str],
    holdout: Holdout,
    policy: Policy,
    margin: float,
    classes: Sequence[str],
) -> Verdict:
    inputs, labels = holdout
    first, second = (
        Observed(name, _answers(graph, inputs)[0].astype(np.float64)) for name, graph in zip(names, both, strict=True)
    )
    limits = policy.gate.model_copy(
        update={"margin": margin, "confidence": policy.judge.confidence, "looks": 1, "max_ece_rise": 1.0}
    )
    return gate.decide(first, second, labels, limits, classes=classes)


def _answers(graph: ServingGraph, inputs: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Probabilities (N×K) and embedding (N×D; the flat input where the net has none)."""
    outputs, features = [], []
    graph.eval()
    with torch.inference_mode():
        for start in range(0, len(inputs), CHUNK):
            piece = torch.from_numpy(np.ascontiguousarray(inputs[start : start + CHUNK]))
            first, *rest = graph(piece)
            outputs.append(first.numpy())
            features.append(rest[0].numpy() if rest else piece.flatten(1).float().numpy())
    if not outputs:
        return np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
    return np.concatenate(outputs), np.concatenate(features)
