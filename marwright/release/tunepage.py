"""What a search found, as tables and as a page with curves."""

from __future__ import annotations

import math
from typing import Any

from marwright import report
from marwright.release.contenders import Curve, Found

KEYS = ("format", "workers", "batch_size", "max_batch_delay", "threads")
OVERRULED = ("profile",)
"""What means nothing beside them."""


def section(curve: Curve) -> dict[str, str | int]:
    """The keys of a recipe's [serving] that a search decides."""
    return {key: getattr(curve.setting, key) for key in KEYS}


def tried(found: Found) -> list[tuple[str, str, str, str]]:
    """Every setting, the best first: what it is, the rate within the target, a lone client's p50, why it went."""
    rows = []
    for trial in sorted(found.trials, key=lambda trial: -trial.rate):
        alone = trial.alone.percentiles.get(50.0) if trial.alone else None
        name = f"{trial.setting}{' (today)' if trial.setting == found.today else ''}"
        rows.append((name, f"{trial.rate:.0f}/s" if trial.rate else "–", _ms(alone), trial.note))
    return rows


def columns(found: Found) -> list[float]:
    """The percentiles that are shown."""
    return sorted({50.0, 99.0, found.target.percentile})


def points(found: Found, curve: Curve) -> list[list[float | int]]:
    """Of a finalist: rate, the percentiles of `columns` in ms (medians of the rounds), and failures."""
    rows: list[list[float | int]] = []
    for rate in curve.rates:
        percentiles = [curve.percentile(rate, each) for each in columns(found)]
        if all(map(math.isfinite, percentiles)):
            rows.append([rate, *percentiles, curve.failed(rate)])
    return rows


def verdict(found: Found) -> str:
    """One sentence: what is best here, and by how much."""
    best, before = found.winner, found.of_today
    mine, theirs = best.capacity(found.target), before.capacity(found.target)
    rounds = f"{len(best.rounds)} round{'s' if len(best.rounds) != 1 else ''} by turns"
    if not found.reached:
        return f"nothing that was tried keeps {found.target}"
    if found.better:
        than = f"today's settings {theirs:.0f}/s" if theirs else "today's settings at no rate"
        return f"{best.setting} keeps {found.target} up to {mine:.0f} requests/s, {than} ({rounds})"
    if best.setting == found.today:
        return f"today's settings are the best of all that was tried: {found.target} up to {mine:.0f}/s ({rounds})"
    return (
        f"nothing is better than today's settings beyond noise: {found.target}"
        f" {f'up to {theirs:.0f}/s' if theirs else 'at no rate'}; {best.setting}: {mine:.0f}/s ({rounds})"
    )


def shortfall(found: Found) -> str:
    """Of a search that reached nothing: what came nearest, and where it fell short."""
    target, trial = found.target, found.nearest
    if found.winner.trial.alone and found.winner.trial.alone.holds(target):
        trial = found.winner.trial
    alone = trial.alone
    if alone is None:
        return f"{trial.setting} was not measured"
    if alone.failed:
        return f"the best is {trial.setting}, {alone.failed} of {alone.requests} requests failed: {alone.why}"
    best = f"the best is {trial.setting}, p{target.percentile:g} {alone.at(target):.2f} ms for one client alone"
    if not alone.holds(target):
        return best
    again = [run for curve in found.curves if curve.trial is trial for each in curve.rounds for run in each.values()]
    if failed := [run for run in again if run.failed]:
        requests = sum(run.requests for run in again)
        return (
            f"{best}, but of {requests} requests under load {sum(run.failed for run in failed)} failed: {failed[0].why}"
        )
    if trial.rate:
        return f"{best}; it held {trial.rate:.0f}/s at first, but no rate when it was measured again"
    return f"{best}, but no rate that was tried{f' ({trial.note})' if trial.note else ''}"


def document(found: Found) -> dict[str, Any]:
    """Everything, for --json."""
    return {
        "target": str(found.target),
        "reached": found.reached,
        "better": found.better,
        "today": vars(found.today),
        "best": section(found.winner),
        "rate": found.winner.capacity(found.target),
        "rate_today": found.of_today.capacity(found.target),
        "curves": [
            {"setting": vars(curve.setting), "points": points(found, curve), "rounds": len(curve.rounds)}
            for curve in found.curves
        ],
        "tried": [{"setting": vars(trial.setting), "rate": trial.rate, "note": trial.note} for trial in found.trials],
        "untried": [vars(each) for each in found.untried],
        "seconds": round(found.seconds, 1),
    }


def html(found: Found, *, model: str, machine: str) -> str:
    """The page: the verdict, the curves, the numbers."""
    page = report.Report(f"How to serve {model}", subtitle=f"{machine}; target {found.target}")
    page.paragraph(verdict(found))
    shown = [found.winner, *([] if found.winner is found.of_today else [found.of_today])]
    figure, (axes,) = report.axes()
    for curve, colour in zip(shown, (report.ACCENT, report.SECOND), strict=False):
        rows = points(found, curve)
        name = f"{curve.setting}{' (today)' if curve is found.of_today else ''}"
        for percentile, line in ((99.0, "o-"), (50.0, "o--")):
            place = 1 + columns(found).index(percentile)
            axes.plot(
                [row[0] for row in rows],
                [row[place] for row in rows],
                line,
                color=colour,
                label=f"p{percentile:g}: {name}",
            )
    axes.axhline(found.target.limit, color=report.INK, linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="requests a second, at random times", ylabel="ms from due to answered", yscale="log", xlim=(0, None)
    )
    axes.legend(fontsize=7)
    page.section("Latency under load").figure(figure, alt="latency by rate", caption="Dotted: the target's limit.")
    for curve in found.curves:
        page.section(f"{curve.setting}{' (today)' if curve is found.of_today else ''}")
        page.table(head(found), points(found, curve))
    page.section("All that was tried").table(
        ("setting", "within the target up to", "lone client, p50", ""), tried(found)
    )
    if found.untried:
        page.paragraph("Not tried for lack of time: " + "; ".join(map(str, found.untried)))
    return page.html()


def head(found: Found) -> list[str]:
    return ["requests/s", *(f"p{each:g}, ms" for each in columns(found)), "failed"]


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ms"
