"""How many labels are wrong, and in which classes: confident learning (Northcutt, Jiang and Chuang 2021, "Confident
Learning: Estimating Uncertainty in Dataset Labels"), by our own code.

    found = noise.estimate(embeddings, labels, ("0", "1", "2"), trusted=(old_embeddings, old_labels))
    found.rate                        # 0.043
    found.by_class["2"].wrong         # 0.21: of the examples that are labelled "2"
    found.by_class["1"].missed        # 0.28: of the examples that seem to be a "1"

Each example gets the probabilities of a logistic regression that has not seen it (k folds). A class's threshold is the
mean probability of it among the examples that are labelled so; an example is counted as the likeliest class whose
threshold it reaches. Labels and counts that differ make the off-diagonal of the confident joint.

What a regression confuses by itself looks like noise. Examples whose labels are trusted help each fold to learn, and
say how much that is: what regressions on them alone confuse is taken off. Where that is more than half of a class,
nothing is said about it. New examples that are much harder to tell apart than the trusted ones still look noisy.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FOLDS = 5
SMALLEST = 10
"""Examples of a class below which nothing is said about it."""
TRUSTED = 2000
"""Trusted examples at most, evenly from all: more take longer and change little."""
CONFUSED = 0.5
"""Share of a class's trusted examples that the regression confuses, above which it cannot tell."""
PENALTY = 0.1
"""Inverse of the L2 penalty, of standardised features. 0.01 to 0.1 did best on digits and MNIST, drifted or not."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ClassNoise:
    """One class. Shares are None where there are too few examples, or the regression cannot tell."""

    label: str
    examples: int
    """Labelled so."""
    wrong: float | None
    """Share of those that seem to be of another class."""
    wrong_at_least: float | None
    """One-sided 95 % Clopper-Pearson bound; what trusted examples say counts as known."""
    missed: float | None
    """Of those that seem to be of this class, the share that is labelled otherwise."""
    missed_at_least: float | None

    @property
    def share(self) -> float | None:
        """The larger of the two."""
        return max((value for value in (self.wrong, self.missed) if value is not None), default=None)

    @property
    def at_least(self) -> float | None:
        """The larger of the two bounds."""
        return max((value for value in (self.wrong_at_least, self.missed_at_least) if value is not None), default=None)


@dataclass(frozen=True)
class Noise:
    """An estimate. `from_dict(to_dict())` gives it back, also through JSON."""

    examples: int
    rate: float
    """Estimated share of wrong labels among all."""
    by_class: Mapping[str, ClassNoise]
    suspects: tuple[int, ...]
    """Indices of the examples whose labels seem wrong, the surest first."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self) | {"by_class": [asdict(one) for one in self.by_class.values()]}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """TypeError or KeyError where the document is not one of `to_dict`."""
        rows = [ClassNoise(**row) for row in document["by_class"]]
        return cls(
            examples=document["examples"],
            rate=document["rate"],
            by_class={row.label: row for row in rows},
            suspects=tuple(document["suspects"]),
        )


def estimate(
    features: NDArray[Any],
    labels: Integers,
    classes: Sequence[str],
    *,
    trusted: tuple[NDArray[Any], Integers] | None = None,
    seed: int = 0,
) -> Noise | None:
    """The noise in N `labels` (indices into `classes`) of N×D `features`; None where there are too few to say.

    `trusted` are features and labels that are taken to be right. Same values, same result.
    """
    if len(labels) < 2 * SMALLEST or len(np.unique(labels)) < 2:
        return None
    others, known = _some(trusted, features.shape[1])
    everything = np.concatenate([np.asarray(features, np.float64), others])
    new = _unseen(everything, np.concatenate([labels, known]), len(classes), seed)[: len(labels)]
    joint, seen = _joint(new, labels)
    usual = _usual(others, known, len(classes), seed)
    doubted = np.flatnonzero((seen >= 0) & (seen != labels))
    sureness = new[doubted, seen[doubted]] - new[doubted, labels[doubted]]
    return Noise(
        examples=len(labels),
        rate=_beyond(_rate(joint, labels), _rate(usual, known)),
        by_class={
            label: ClassNoise(
                label,
                int((labels == i).sum()),
                *_share(joint[i], int(joint[i, i]), _confused(usual[i], usual, i)),
                *_share(joint[:, i], int(joint[i, i]), _confused(usual[:, i], usual, i)),
            )
            for i, label in enumerate(classes)
        },
        suspects=tuple(doubted[np.argsort(-sureness, kind="stable")].tolist()),
    )


def _share(counts: Integers, agreed: int, usual: float) -> tuple[float | None, float | None]:
    """The share beyond the usual one of a row or column of the joint that is not on the diagonal, and its bound."""
    total = int(counts.sum())
    if total < SMALLEST or usual > CONFUSED:
        return None, None
    off = total - agreed
    bound = float(stats.beta.ppf(0.05, off, total - off + 1)) if off else 0.0
    return _beyond(off / total, usual), _beyond(bound, usual)


def _confused(counts: Integers, usual: Integers, i: int) -> float:
    """The same share of the trusted examples; of all classes together where there are too few of this one."""
    total, agreed = int(counts.sum()), int(usual[i, i])
    if total < SMALLEST:
        total, agreed = int(usual.sum()), int(usual.trace())
    return (total - agreed) / total if total else 0.0


def _usual(features: Floats, labels: Integers, classes: int, seed: int) -> Integers:
    """The joint of the trusted examples, by regressions that saw no new label: wrong ones shall not excuse others."""
    if len(labels) < 2 * FOLDS or len(np.unique(labels)) < 2:
        return np.zeros((classes, classes), dtype=np.int64)
    return _joint(_unseen(features, labels, classes, seed), labels)[0]


def _beyond(share: float, usual: float) -> float:
    """What of `share` is noise, where clean labels have `usual`: share = usual·(1 − noise) + noise."""
    return max(0.0, (share - usual) / (1 - usual)) if usual < 1 else 0.0


def _rate(joint: Integers, labels: Integers) -> float:
    """Share of wrong labels: each label's row of the joint stands for all examples that bear it (Northcutt's
    calibration)."""
    if not len(labels):
        return 0.0
    sums = joint.sum(axis=1)
    wrong = np.divide(sums - joint.diagonal(), sums, out=np.zeros(len(joint)), where=sums > 0)
    return float((wrong * np.bincount(labels, minlength=len(joint))).sum() / len(labels))


def _joint(probabilities: Floats, labels: Integers) -> tuple[Integers, Integers]:
    """The confident joint, K×K counts by label and by class seen; and the class that each example is seen as (−1 where
    it reaches no threshold)."""
    classes = probabilities.shape[1]
    thresholds = np.full(classes, np.inf)
    for label in np.unique(labels):
        mean = probabilities[labels == label, label].mean()
        if mean > 0:  # else no regression has learned what it looks like
            thresholds[label] = mean
    reached = probabilities >= thresholds - 1e-12
    seen = np.where(reached.any(axis=1), np.where(reached, probabilities, -1.0).argmax(axis=1), -1)
    joint = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(joint, (labels[seen >= 0], seen[seen >= 0]), 1)
    return joint, seen


def _unseen(features: Floats, labels: Integers, classes: int, seed: int) -> Floats:
    """N×K probabilities, each by a regression that has not seen the example."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    spread = features.std(axis=0)
    features = (features - features.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    folds = _folds(labels, seed)
    found = np.zeros((len(labels), classes))
    # One thread: matrices this small are done before a second one has woken up. A regression that has not settled in
    # 300 steps is an estimate all the same.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for fold in range(FOLDS):
            inside = folds == fold
            only = np.unique(labels[~inside])
            if len(only) == 1:  # there is nothing to tell apart
                found[inside, only[0]] = 1.0
                continue
            model = LogisticRegression(C=PENALTY, max_iter=300).fit(features[~inside], labels[~inside])
            found[np.ix_(inside, model.classes_)] = model.predict_proba(features[inside])
    return found


def _some(trusted: tuple[NDArray[Any], Integers] | None, width: int) -> tuple[Floats, Integers]:
    if trusted is None or not len(trusted[1]):
        return np.empty((0, width)), np.empty(0, dtype=np.int64)
    features, labels = trusted
    chosen = np.unique(np.linspace(0, len(labels) - 1, min(len(labels), TRUSTED)).round().astype(np.int64))
    return np.asarray(features[chosen], np.float64), labels[chosen]


def _folds(labels: Integers, seed: int) -> Integers:
    """The fold of each example: every class is spread evenly over them."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), dtype=np.int64)
    folds[order] = np.arange(len(labels)) % FOLDS
    return folds
