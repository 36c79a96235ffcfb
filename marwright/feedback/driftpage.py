"""What a look found, as one page with plots: samples beside each other, the latest requests in time, wrong answers.

path.write_text(driftpage.page("digits", look, reference, answered, looks, outcomes, rises))
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from marwright.feedback import drift
from marwright.feedback.changes import Rises
from marwright.feedback.drift import Look
from marwright.feedback.values import Answered
from marwright.learning.reference import Reference
from marwright.report import ACCENT, FAINT, INK, SECOND, Report, axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 24
ROLLING = 50
"""Rows of a moving mean."""
TIMELINES = ("confidence", "value", "brightness", "contrast")


def page(
    model: str,
    look: Look,
    reference: Reference,
    answered: Sequence[Answered],
    looks: Sequence[Look] = (),
    outcomes: Sequence[bool] = (),
    rises: Rises | None = None,
) -> str:
    """Self-contained HTML. `outcomes` are the version's labelled answers, right or wrong, in the order of the answers;
    `looks` the latest ones, newest first."""
    report = Report(f"{model} {look.version}: drift".replace("  ", " "), subtitle=_subtitle(look))
    alarms = sum(test.drifted for test in look.tests)
    report.tiles([("tests", len(look.tests)), ("drifted", alarms), ("false alarm rate", look.false_alarm)])
    report.section("Tests").table(
        ("what", "test", "reference", "now", "statistic", "p", "p of all", ""),
        [
            (
                test.name, test.kind, test.before, test.now, test.statistic, test.p, test.adjusted,
                "drifted" if test.drifted else "",
            )
            for test in look.tests
        ],
    )  # fmt: skip
    for line in look.skipped:
        report.paragraph(f"Not compared: {line}.")
    pairs, _ = drift.columns(reference, answered)
    rows = pairs.pop("embedding", None)
    if pairs or rows:
        report.section("Reference and window")
    for name, (old, new) in pairs.items():
        report.figure(_histogram(name, old, new), alt=f"{name} of the reference and of the window")
    if rows is not None:
        for number, (one, other) in enumerate(drift.components(*rows), start=1):
            report.figure(_histogram(f"component {number}", one, other), alt=f"component {number} of the embedding")
        tested = drift.mmd(*rows, random=np.random.default_rng(0))
        report.figure(
            _null(tested),
            alt="maximum mean discrepancy, observed and without drift",
            caption="Grey: what it would be if reference and window were mixed. Red: what it is.",
        )
    lines = [name for name in TIMELINES if name in pairs]
    if lines:
        report.section("The window in time")
    for name in lines:
        report.figure(
            _timeline(name, answered, pairs[name][0]),
            alt=f"{name} of the latest requests in time",
            caption=f"Mean of {ROLLING} requests; grey: the middle 90 % of the reference.",
        )
    if outcomes:
        report.section("Labelled answers")
        found = rises or Rises()
        report.figure(
            _errors(outcomes, found),
            alt="share of right answers, with what the detectors found",
            caption=f"Mean of {ROLLING} labelled answers. Lines: ADWIN (red), Page-Hinkley (dashed).",
        )
    if looks:
        report.section("Latest looks").table(
            ("until", "requests", "smallest p of all", ""),
            [
                (
                    _when(each.until), each.requests, min((test.adjusted for test in each.tests), default=None),
                    "drifted" if each.drifted else "",
                )
                for each in looks
            ],
        )  # fmt: skip
    return report.html()


# -------------------------------------------------------------------- private


def _subtitle(look: Look) -> str:
    verdict = "has drifted" if look.drifted else "no drift found" if look.tests else "nothing to compare"
    return (
        f"{verdict}: {look.requests} instances from {_when(look.since)} to {_when(look.until)}, against"
        f" {look.reference} examples of the reference"
    )


def _histogram(name: str, old: NDArray[np.float64], new: NDArray[np.float64]) -> Figure:
    """Shares of both in the same bins."""
    figure, (axis,) = axes(height=2.4)
    both = np.concatenate([old, new])
    edges = np.histogram_bin_edges(both, bins=BINS)
    for values, colour, label in ((old, ACCENT, "reference"), (new, SECOND, "window")):
        counts, _ = np.histogram(values, bins=edges)
        axis.stairs(counts / len(values), edges, color=colour, label=label, fill=True, alpha=0.35)
        axis.stairs(counts / len(values), edges, color=colour)
    axis.set_xlabel(name)
    axis.set_ylabel("share")
    axis.legend(frameon=False)
    return figure


def _null(tested: drift.Permuted) -> Figure:
    figure, (axis,) = axes(height=2.4)
    counts, edges = np.histogram(tested.null, bins=BINS)
    axis.stairs(counts / len(tested.null), edges, color=FAINT, fill=True)
    axis.axvline(tested.statistic, color=SECOND)
    axis.set_xlabel("squared maximum mean discrepancy of the embedding")
    axis.set_ylabel("share of permutations")
    return figure


def _timeline(name: str, answered: Sequence[Answered], old: NDArray[np.float64]) -> Figure:
    rows = [(each.time, value) for each in answered if (value := drift.value_of(each, name)) is not None]
    seconds = np.array([at for at, _ in rows])
    values = np.array([value for _, value in rows])
    figure, (axis,) = axes(height=2.4)
    low, high = np.quantile(old, [0.05, 0.95])
    axis.axhspan(float(low), float(high), color=FAINT, alpha=0.5, linewidth=0)
    axis.axhline(float(old.mean()), color=INK, linewidth=0.8)
    minutes = (seconds - seconds[0]) / 60
    axis.plot(minutes, values, ".", color=FAINT, markersize=2)
    axis.plot(minutes, _rolling(values), color=ACCENT)
    axis.set_xlabel(f"minutes after {_when(float(seconds[0]))}")
    axis.set_ylabel(name)
    return figure


def _errors(outcomes: Sequence[bool], rises: Rises) -> Figure:
    figure, (axis,) = axes(height=2.4)
    axis.plot(np.arange(1, len(outcomes) + 1), _rolling(np.array(outcomes, dtype=np.float64)), color=ACCENT)
    for at in rises.adwin:
        axis.axvline(at, color=SECOND)
    for at in rises.page_hinkley:
        axis.axvline(at, color=INK, linestyle="--")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("labelled answers, the oldest first")
    axis.set_ylabel("right")
    return figure


def _rolling(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of the last values, of fewer at the beginning."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - ROLLING)
    means: NDArray[np.float64] = (total[ends] - total[starts]) / (ends - starts)
    return means


def _when(at: float | None) -> str:
    return "–" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
