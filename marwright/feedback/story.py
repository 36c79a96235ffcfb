"""One page that tells what happened to a model while it was answering: a time line of answers and events.

path.write_text(story.page(hits, events, title="digits", pictures=[(png, "image/png", "before")]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from marwright.report import ACCENT, FAINT, INK, SECOND, Report, axes

WINDOW = 50
"""Answers that a point of the accuracy line looks back on."""


@dataclass(frozen=True)
class Hit:
    """One request as its caller saw it. `at` is in seconds from the beginning."""

    at: float
    seconds: float
    version: str = ""
    right: bool = False
    error: str = ""
    phase: str = ""


@dataclass(frozen=True)
class Event:
    """Something to mark on the time line. Those with a `mark` get a line of their own in the plot."""

    at: float
    text: str
    mark: str = ""


def accuracy(hits: Sequence[Hit], phase: str = "") -> float | None:
    """Share of right ones among the answers of that phase (or all); None where there are none."""
    answered = [hit.right for hit in hits if not hit.error and phase in ("", hit.phase)]
    return sum(answered) / len(answered) if answered else None


def page(
    hits: Sequence[Hit],
    events: Sequence[Event],
    *,
    title: str,
    subtitle: str = "",
    phases: Sequence[tuple[str, str]] = (),
    pictures: Sequence[tuple[bytes, str, str]] = (),
) -> str:
    """Self-contained HTML. `phases` are names of phases of hits, and what to call them."""
    report = Report(title, subtitle=subtitle)
    failed = [hit for hit in hits if hit.error]
    report.tiles(
        [
            ("requests", len(hits)),
            ("failed", len(failed)),
            *((f"accuracy: {name}", _percent(accuracy(hits, phase))) for phase, name in phases),
            ("seconds, all in all", round(max((hit.at for hit in hits), default=0.0))),
        ]
    )
    report.section("Time line")
    report.figure(
        _timeline(hits, events),
        alt="accuracy of answers over time, with the version that gave them",
        caption=f"Share of right answers among the last {WINDOW}, as the callers knew them; the version that answered"
        " below; what happened is numbered.",
    )
    marks = {event: number for number, event in enumerate((one for one in events if one.mark), 1)}
    report.table(
        ("", "second", "what happened"),
        [(str(marks.get(event, "")), f"{event.at:.1f}", event.text) for event in events],
    )
    if pictures:
        report.section("What was asked").gallery(pictures)
    report.section("Versions")
    report.table(("version", "answers", "right", "median ms", "99th percentile ms"), _versions(hits))
    if failed:
        report.section("Failed").table(("second", "error"), [(f"{hit.at:.1f}", hit.error) for hit in failed[:50]])
    return report.html()


def _timeline(hits: Sequence[Hit], events: Sequence[Event]):  # type: ignore[no-untyped-def]
    """A matplotlib Figure."""
    figure, (plot,) = axes(11.0, 4.6)
    answered = [hit for hit in hits if not hit.error]
    times, shares = [], []
    for i in range(WINDOW - 1, len(answered)):
        times.append(answered[i].at)
        shares.append(100 * sum(hit.right for hit in answered[i - WINDOW + 1 : i + 1]) / WINDOW)
    plot.plot(times, shares, color=ACCENT, linewidth=1.6)
    for hit in hits:
        if hit.error:
            plot.axvline(hit.at, color=SECOND, linewidth=0.8)
    names = sorted({hit.version for hit in answered})
    for number, name in enumerate(names):
        at = [hit.at for hit in answered if hit.version == name]
        height = -6 - 6 * number
        plot.scatter(at, [height] * len(at), s=3, color=ACCENT if number % 2 else INK, clip_on=False)
        plot.annotate(f"answered by {name}", (at[0], height + 1.5), fontsize=8, color=INK)
    for number, event in enumerate((one for one in events if one.mark), 1):
        plot.axvline(event.at, color=FAINT, linewidth=1.0, zorder=0)
        height = 104 + 5 * (number % 3)
        plot.annotate(f"{number} {event.mark}", (event.at, height), fontsize=8, color=SECOND, ha="center")
    plot.set(ylim=(-8 - 6 * len(names), 122), xlabel="seconds", ylabel="right answers, %")
    plot.set_yticks(range(0, 101, 20))
    return figure


def _versions(hits: Sequence[Hit]) -> list[tuple[str, int, str, float, float]]:
    rows = []
    for name in sorted({hit.version for hit in hits if not hit.error}):
        mine = [hit for hit in hits if hit.version == name]
        times = sorted(1000 * hit.seconds for hit in mine)
        last = times[min(len(times) - 1, int(0.99 * len(times)))]
        rows.append((name, len(mine), _percent(accuracy(mine)), round(times[len(times) // 2], 2), round(last, 2)))
    return rows


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
