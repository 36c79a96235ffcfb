"""When to learn again: facts and a policy in, a decision with its reasons out. No clock, no database, no file.

    trigger.should_retrain(Facts(labels=240, …), policy.trigger).reasons
    # ("240 newly labelled examples, 200 are reason enough",)

Somebody who puts examples into the folder, or changes the recipe's own data, has decided already. What production says
(labels, the schedule, accuracy, drift) counts from `floor` labelled examples on: below that there would be nothing to
learn from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from marwright.feedback import changes, sequential
from marwright.feedback.changes import Rises
from marwright.feedback.drift import Look
from marwright.feedback.sequential import Finding
from marwright.feedback.values import Labelled
from marwright.release.policy import TriggerPolicy

DAY = 86_400.0


@dataclass(frozen=True)
class Facts:
    """What is known when it is asked."""

    labels: int
    """New labelled examples of the store that the champion has not learned from."""
    folder: int
    """New examples of the folder: any is reason enough, somebody put them there."""
    own: bool
    """Whether the recipe's own data are others than the champion's."""
    released_at: float | None
    now: float
    """Unix seconds."""
    outcomes: Sequence[bool] = ()
    """The champion's labelled answers, right or wrong: see `outcomes`."""
    looks: Sequence[Look] = ()
    """Latest looks at the champion's requests, the newest first."""
    tried_at: float | None = None
    """When it was last learned from the champion in vain; `labels` have come since."""
    vain: int = 0
    """How often that was."""


@dataclass(frozen=True)
class Signals:
    """What was found, whether it led to something or not."""

    labels: int
    days: float | None
    """Since the champion was released."""
    accuracy: float | None
    """Share of right ones among the outcomes."""
    below: Finding
    """Of the bound, where the policy has one."""
    rises: Rises
    """Of wrong answers."""
    looks: int
    """One after another that found drift, the newest among them."""
    drifted: tuple[str, ...] = ()
    """What the newest look found to have drifted."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a note."""
        return {
            "labels": self.labels,
            "days": self.days,
            "accuracy": self.accuracy,
            "accuracy_wealth": self.below.wealth,
            "accuracy_below_at": self.below.at,
            "adwin": list(self.rises.adwin),
            "page_hinkley": list(self.rises.page_hinkley),
            "looks": self.looks,
            "drifted": list(self.drifted),
        }


@dataclass(frozen=True)
class Decision:
    """Whether to learn again, and why; or, in `waiting`, what would be a reason if there were enough labels."""

    retrain: bool
    reasons: tuple[str, ...]
    signals: Signals
    waiting: tuple[str, ...] = field(default=())


def should_retrain(facts: Facts, policy: TriggerPolicy) -> Decision:
    """Pure: the same facts and policy give the same decision."""
    signals = _signals(facts, policy)
    reasons = []
    if facts.own:
        reasons.append("the recipe's own data are others than those of the version that answers")
    if facts.folder:
        reasons.append(f"{_examples(facts.folder)} in the folder of new examples")
    if facts.labels >= policy.min_labels:
        reasons.append(f"{_examples(facts.labels)} with a label from production, {policy.min_labels} are reason enough")
    said = _said(signals, policy, facts)
    needed = floor(facts, policy)
    if facts.labels >= needed:
        reasons += said
        return Decision(bool(reasons), tuple(reasons), signals)
    few = f"{_examples(facts.labels)} with a label, {needed} are needed"
    if facts.vain:
        few += f" after learning {facts.vain} times in vain" if facts.vain > 1 else " after learning in vain"
    return Decision(bool(reasons), tuple(reasons), signals, tuple(f"{sentence}; but {few}" for sentence in said))


def floor(facts: Facts, policy: TriggerPolicy) -> int:
    """New labelled examples from which on production and the calendar are heard: twice as many after each time that
    was in vain, until there are enough for a reason of their own. What they say may be so for ever."""
    return max(policy.floor, min(policy.min_labels, policy.floor << min(facts.vain, 30)))


def outcomes(labelled: Iterable[Labelled], version: str) -> list[bool]:
    """Right or wrong, of one version's labelled answers of a classifier, in the order in which the labels came: what
    was said before stays as it was, and more is added at the end."""
    rows = [each for each in labelled if each.version == version and each.answer]
    rows.sort(key=lambda each: (each.received, each.time, each.request, each.instance))
    return [each.answer == each.label for each in rows]


# -------------------------------------------------------------------- private


def _signals(facts: Facts, policy: TriggerPolicy) -> Signals:
    count = len(facts.outcomes)
    return Signals(
        labels=facts.labels,
        days=None if facts.released_at is None else (facts.now - facts.released_at) / DAY,
        accuracy=sum(facts.outcomes) / count if count else None,
        below=sequential.below(facts.outcomes, policy.min_accuracy, policy.accuracy_false_alarm),
        rises=changes.rises(facts.outcomes),
        looks=in_a_row(facts.looks),
        drifted=tuple(test.name for test in facts.looks[0].tests if test.drifted) if facts.looks else (),
    )


def in_a_row(looks: Sequence[Look]) -> int:
    """How many looks, from the newest back, found drift. Two at the same requests are one."""
    count, last = 0, None
    for look in looks:
        if not look.drifted:
            break
        if count and look.until == last:
            continue
        count, last = count + 1, look.until
    return count


def _said(signals: Signals, policy: TriggerPolicy, facts: Facts) -> list[str]:
    """What production and the calendar say for learning again, a sentence each."""
    found, count = [], len(facts.outcomes)
    rested = facts.tried_at is None or facts.now - facts.tried_at >= policy.days * DAY
    if policy.days and signals.days is not None and signals.days >= policy.days and rested:
        found.append(f"the version was released {signals.days:.1f} days ago, the schedule says {policy.days:g}")
    if signals.below.at is not None:
        found.append(
            f"live accuracy is below {policy.min_accuracy:g}: {signals.accuracy:.3f} of {count} labelled answers,"
            f" refuted after {signals.below.at} (at a false alarm rate of {policy.accuracy_false_alarm:g})"
        )
    if signals.rises.first is not None:
        both = (("ADWIN", signals.rises.adwin), ("Page-Hinkley", signals.rises.page_hinkley))
        names = " and ".join(name for name, at in both if at)
        found.append(
            f"wrong answers became more frequent: {names}, after {signals.rises.first} of {count} labelled ones"
        )
    if signals.looks >= policy.drift_looks:
        found.append(
            f"{signals.looks} looks in a row found drift, {policy.drift_looks} are reason enough:"
            f" {', '.join(signals.drifted)}"
        )
    return found


def _examples(count: int) -> str:
    return "1 new example" if count == 1 else f"{count} new examples"
