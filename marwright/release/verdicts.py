"""A verdict for people: a table for the terminal, and a page with plots that needs nothing else.

    print_table(*verdicts.table(verdict))
    path.write_text(verdicts.page(verdict, title="digits 1.1"), encoding="utf-8")

Both say only what is in the verdict, so that a stored one can be shown again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from marwright import report
from marwright.release.gate import Bin, Check, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 40
"""Classes at most in the plot; the table has all."""

_OUTCOMES = {"pass": "passed", "fail": "failed", "inconclusive": "undecided"}


def table(verdict: Verdict) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Titles and rows, all text: a row for each check."""
    titles = ("check", "outcome", verdict.champion, verdict.challenger, "compared", "bounds", "limit")
    return titles, [_cells(check) for check in verdict.checks]


def page(verdict: Verdict, *, title: str) -> str:
    """Self-contained HTML."""
    first, second = verdict.champion, verdict.challenger
    made = report.Report(title, subtitle=f"{second} against {first}: {_OUTCOMES[verdict.outcome]}")
    metric = verdict.check(verdict.metric)
    name = "accuracy" if verdict.task == "classification" else "mean absolute error"
    made.tiles(
        [
            ("verdict", _OUTCOMES[verdict.outcome]),
            (f"{name}, {first}", metric.champion),
            (f"{name}, {second}", metric.challenger),
            ("examples", verdict.examples),
            ("look", f"{verdict.look} of {verdict.looks}"),
        ]
    )
    made.paragraph(f"{verdict.reason}.")
    made.section("Checks").table(*table(verdict))
    for check in verdict.checks:
        made.paragraph(f"{check.name}: {check.sentence}.")
    if metric.low is not None and metric.high is not None:
        made.section("What was gained or lost").figure(
            _difference(metric, relative=verdict.task == "regression"),
            alt="difference with its bounds, and the margin",
            caption=f"Each bound at {100 * verdict.confidence:.3g} % confidence; to pass, all of it lies to the right"
            " of the margin.",
        )
    if verdict.classes:
        _classes(made, verdict)
        made.section("Calibration").figure(
            _reliability(verdict),
            alt="reliability diagram of both",
            caption="How often answers of some confidence were right; a larger dot stands for more answers.",
        )
    if verdict.latencies:
        made.section("Latency").figure(
            _latencies(verdict), alt="share of requests answered within a time", caption="At the pinned URLs, in turns."
        )
        made.table(
            ("share of requests", f"{first}, ms", f"{second}, ms"),
            [(row.share, 1000 * row.champion, 1000 * row.challenger) for row in verdict.latencies],
        )
    return made.html()


def _cells(check: Check) -> tuple[str, ...]:
    before, after = (_value(check.name, value) for value in (check.champion, check.challenger))
    bounds = ""
    if check.low is not None and check.high is not None:
        bounds = f"{_compared(check.name, check.low)} … {_compared(check.name, check.high)}"
    compared = "" if check.estimate is None else _compared(check.name, check.estimate)
    limit = "" if check.limit is None else _compared(check.name, check.limit)
    return check.name, check.outcome, before, after, compared, bounds, limit


def _value(name: str, value: float | None) -> str:
    """A version's own number, in the unit of its check."""
    if value is None:
        return "–"
    match name:
        case "accuracy" | "classes" | "calibration":
            return f"{value:.4f}"
        case "latency":
            return f"{1000 * value:.3g} ms"
        case "size" | "memory":
            return f"{value / 1e6:.4g} MB"
        case _:
            return f"{value:.4g}"


def _compared(name: str, value: float) -> str:
    """What is compared with the limit: a ratio, a difference, or a plain number."""
    match name:
        case "latency" | "size" | "memory":
            return f"× {value:.3g}"
        case "accuracy" | "error" | "classes" | "calibration":
            return f"{value:+.4f}"
        case "mcnemar":
            return f"p = {value:.3g}"
        case _:
            return f"{value:.4g}"


def _difference(metric: Check, *, relative: bool) -> Figure:
    low, high, estimate, limit = (value or 0.0 for value in (metric.low, metric.high, metric.estimate, metric.limit))
    figure, (one,) = report.axes(7.0, 1.6)
    one.axvline(0, color=report.INK, linewidth=0.8)
    one.axvline(limit, color=report.SECOND, linestyle="--", label=f"margin {limit:g}")
    one.plot([low, high], [0, 0], color=report.ACCENT, linewidth=2)
    one.plot([low, high], [0, 0], "|", color=report.ACCENT, markersize=12)
    one.plot([estimate], [0], "o", color=report.ACCENT)
    one.set(yticks=[], ylim=(-1, 1), xlabel="gain, as a share of the champion's error" if relative else "gain")
    one.legend(frameon=False, loc="upper left")
    return figure


def _classes(made: report.Report, verdict: Verdict) -> None:
    made.section("Classes").figure(
        _recalls(verdict), alt="recall of each class, both versions", caption=_which(len(verdict.classes))
    )
    made.table(
        ("class", "examples", f"recall, {verdict.champion}", f"recall, {verdict.challenger}", "lost", "won", "p", ""),
        [
            (
                row.label,
                row.examples,
                row.champion,
                row.challenger,
                row.lost,
                row.won,
                row.p,
                "worse" if row.worse else "",
            )
            for row in verdict.classes
        ],
    )
    made.paragraph("p of a drop: exact one-sided McNemar, adjusted over the classes by Holm.")


def _which(classes: int) -> str:
    return "" if classes <= SHOWN else f"The {SHOWN} that lost most."


def _recalls(verdict: Verdict) -> Figure:
    rows = list(verdict.classes)
    if len(rows) > SHOWN:
        rows = sorted(rows, key=lambda row: row.challenger - row.champion)[:SHOWN]
    figure, (one,) = report.axes(max(4.0, min(10.0, 1.5 + 0.5 * len(rows))), 3.2)
    places = range(len(rows))
    sides = ((-0.2, "champion", report.FAINT), (0.2, "challenger", report.ACCENT))
    for shift, side, colour in sides:
        heights = [getattr(row, side) for row in rows]
        one.bar(
            [place + shift for place in places], heights, width=0.38, color=colour, label=_short(getattr(verdict, side))
        )
    labels = [_short(row.label) for row in rows]
    one.set_xticks(list(places), labels, rotation=45 if len(rows) > 10 else 0)
    one.set(ylabel="recall", ylim=(0, 1.02))
    one.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def _reliability(verdict: Verdict) -> Figure:
    figure, (one,) = report.axes(4.6, 4.2)
    one.plot([0, 1], [0, 1], color=report.FAINT)
    both: tuple[tuple[str, tuple[Bin, ...], str], ...] = (
        (verdict.champion, verdict.champion_bins, report.SECOND),
        (verdict.challenger, verdict.challenger_bins, report.ACCENT),
    )
    for version, bins, colour in both:
        points = [one_bin.confidence for one_bin in bins], [one_bin.accuracy for one_bin in bins]
        one.plot(*points, color=colour, linewidth=0.8, label=_short(version))
        one.scatter(*points, s=[10 + 190 * one_bin.count / verdict.examples for one_bin in bins], color=colour)
    one.set(xlabel="confidence", ylabel="share that was right", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    one.legend(frameon=False, loc="lower right")
    return figure


def _latencies(verdict: Verdict) -> Figure:
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (one,) = report.axes(7.0, 3.0)
    shares = [row.share for row in verdict.latencies]
    for side, colour in (("champion", report.SECOND), ("challenger", report.ACCENT)):
        times = [1000 * getattr(row, side) for row in verdict.latencies]
        one.plot(times, shares, color=colour, marker=".", label=_short(getattr(verdict, side)))
    one.set(xlabel="ms", ylabel="share of requests", ylim=(0, 1.02), xscale="log")
    one.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    one.xaxis.set_major_formatter("{x:g}")
    one.xaxis.set_minor_formatter(NullFormatter())
    one.legend(frameon=False, loc="lower right")
    return figure


def _short(label: str) -> str:
    """Fit for an axis: cut, and `$` taken literally."""
    cut = label if len(label) <= 16 else f"{label[:15]}…"
    return cut.replace("$", r"\$")
