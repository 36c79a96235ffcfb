"""What a load test found: the numbers of a raw file, and the page that shows them.

    found = report.findings(results, entries=book.entries("digits"), spans=book.spans("digits"))
    found.lines[0].percentiles["p99"]
    path.write_text(report.page(results, found))

Latencies are in milliseconds, from when a request was due. They are those of all requests but refused and broken ones:
a refusal is quick, and would flatter. A hung one counts with the time it was given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marwright import report as pages
from marwright.release.journal import Entry, Span
from marwright.release.loadtest.checks import OUTCOMES
from marwright.release.loadtest.results import Results

PERCENTILES = {"p50": 500, "p90": 900, "p99": 990, "p99.9": 999, "max": 1000}
"""By name, in thousandths."""
SWITCHES = ("switching", "released", "rolled back")
"""Events of the journal at which another version may begin, or ends, to answer."""
SLACK = 0.001
"""Seconds: the journal's times end with the millisecond."""

_NEAR = 0.5
_BINS = 1200
_SHOWN = 20
_COLOURS = {"refused": "#d6604d", "broken": "#b2182b", "hung": "#1f2933", "wrong": "#762a83"}

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Line:
    """The requests of one kind."""

    name: str
    counts: Mapping[str, int]
    rate: float
    """Right answers a second."""
    percentiles: Mapping[str, float | None]
    """Milliseconds."""

    @property
    def requests(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class Pause:
    """The longest time without any answer."""

    seconds: float
    at: float
    """When it began, Unix seconds."""
    after: float
    """The same, in seconds from the first due time."""
    beside: tuple[str, ...]
    """What the journal and the run itself noted at that time."""
    by_chance: float | None
    """Seconds: the longest gap that Poisson arrivals at this rate would have; None for others."""


@dataclass(frozen=True)
class Versions:
    """How many answers one version gave, and how many of them the journal does not allow (None: no journal)."""

    version: str
    default: int
    pinned: int
    first: float
    last: float
    not_allowed: int | None


@dataclass(frozen=True)
class Findings:
    """All that a report says, in numbers."""

    about: Mapping[str, Any]
    end: Mapping[str, Any] | None
    """What the client said of itself when it ended; None where it was killed."""
    seconds: float
    lines: tuple[Line, ...]
    pause: Pause | None
    versions: tuple[Versions, ...]
    not_allowed: int | None
    """Answers by a version that the journal says could not answer then; None without a journal."""
    late: Mapping[str, float | None]
    """Milliseconds from due to sent: the client's own share, a wait for a new connection included."""
    switches: tuple[tuple[float, str], ...]
    failures: tuple[Mapping[str, Any], ...]
    """Outcome, status and detail, how often, and when first; the most frequent first."""


def findings(results: Results, *, entries: Sequence[Entry] = (), spans: Sequence[Span] | None = None) -> Findings:
    """The numbers. `entries` and `spans` are the journal's about this model, where there is one."""
    start = float(results.due[0]) if len(results) else 0.0
    stop = float(results.done.max()) if len(results) else 0.0
    seconds = stop - start
    pinned = results.target != "default"
    every = np.ones(len(results), dtype=np.bool_)
    parts: list[tuple[str, Mask]] = [("all", every)]
    for split in (
        [(kind, results.kind == kind) for kind in ("rest", "grpc")],
        [("default", ~pinned), ("pinned", pinned)],
    ):
        if all(mask.any() for _, mask in split):
            parts += split
    answered = results.version != ""
    foreign = None if spans is None else answered & ~allowed(results, spans)
    switches = tuple(
        (entry.time, _switch(entry)) for entry in entries if entry.event in SWITCHES and start <= entry.time <= stop
    )
    return Findings(
        about=results.about,
        end=results.end,
        seconds=seconds,
        lines=tuple(_line(name, results, mask, seconds) for name, mask in parts),
        pause=_pause(results, entries),
        versions=tuple(
            Versions(
                version=str(version),
                default=int((mask & ~pinned).sum()),
                pinned=int((mask & pinned).sum()),
                first=float(results.done[mask].min()) - start,
                last=float(results.done[mask].max()) - start,
                not_allowed=None if foreign is None else int((mask & foreign).sum()),
            )
            for version in _versions(results)
            for mask in [results.version == version]
        ),
        not_allowed=None if foreign is None else int(foreign.sum()),
        late=_percentiles((results.sent - results.due)[~np.isnan(results.sent)]),
        switches=switches,
        failures=_failures(results, start),
    )


def allowed(results: Results, spans: Sequence[Span]) -> Mask:
    """Which answers came from a version that could answer at some moment between sending and answer.

    On the default URL: a version in a span as the default one; at a pinned URL: in a span of either kind.
    """
    fine = np.zeros(len(results), dtype=np.bool_)
    pinned = results.target != "default"
    for span in spans:
        until = math.inf if span.until is None else span.until + SLACK
        meets = (results.version == span.version) & (results.sent <= until) & (results.done >= span.since - SLACK)
        fine |= meets if span.default else meets & pinned
    return fine


def page(results: Results, found: Findings) -> str:
    """Self-contained HTML."""
    about = found.about
    total = found.lines[0]
    when = datetime.fromtimestamp(float(about.get("started", 0)), UTC).strftime("%Y-%m-%d %H:%M UTC")
    made = pages.Report(f"Load test of {about.get('model', '?')}", subtitle=f"{asked(about)}; {when}")
    made.tiles(
        [
            ("requests", total.requests),
            ("failed", total.requests - total.counts["ok"]),
            ("right answers a second", round(total.rate, 1)),
            ("p50, ms", total.percentiles["p50"]),
            ("p99, ms", total.percentiles["p99"]),
            ("longest pause, ms", found.pause.seconds * 1000 if found.pause else None),
        ]
    )
    for sentence in sentences(found):
        made.paragraph(sentence)
    head, rows = table(found)
    made.section("Requests").table(head, rows)
    made.paragraph(
        "Latency in ms from when a request was due, refused and broken ones left out; hung ones as given up."
    )
    if len(results):
        made.section("Time line").figure(
            _rates(results, found), alt="answers a second by version", caption="Answers, by the version that gave them."
        )
        made.figure(_latencies(results, found), alt="latency over time", caption="Latency by due time, and failures.")
        made.section("Latency").figure(_tail(results), alt="latency percentiles", caption="Latency by percentile.")
    if found.versions:
        head, rows = version_table(found)
        made.section("Versions").table(head, rows)
    if found.failures:
        made.section("Failures").table(
            ("outcome", "status", "detail", "times", "first, s"),
            [(one["outcome"], one["status"], one["detail"], one["times"], one["first"]) for one in found.failures],
        )
    if found.switches:
        start = float(results.due[0]) if len(results) else 0.0
        made.section("Switches").table(("s", "journal"), [(at - start, label) for at, label in found.switches])
    facts = [(key, str(value)) for key, value in {**about, **(found.end or {})}.items() if key not in ("event", "at")]
    made.section("Made of").table(("", ""), facts)
    return made.html()


def table(found: Findings) -> tuple[tuple[str, ...], list[tuple[pages.Cell, ...]]]:
    """A row for all requests, and one for each kind where there are several."""
    head = ("", "requests", *OUTCOMES, "ok/s", *(f"{name} ms" for name in PERCENTILES))
    rows = [
        (
            line.name,
            line.requests,
            *(line.counts[outcome] for outcome in OUTCOMES),
            round(line.rate, 1),
            *line.percentiles.values(),
        )
        for line in found.lines
    ]
    return head, rows


def version_table(found: Findings) -> tuple[tuple[str, ...], list[tuple[pages.Cell, ...]]]:
    """A row for each version that answered; times are seconds from the first due time."""
    head = ("version", "default URL", "pinned URL", "first, s", "last, s", "not allowed")
    rows = [(one.version, one.default, one.pinned, one.first, one.last, one.not_allowed) for one in found.versions]
    return head, list(rows)


def sentences(found: Findings) -> list[str]:
    """What the table does not say."""
    said = []
    if found.pause is not None:
        chance = found.pause.by_chance
        said.append(
            f"Longest pause between two answers: {found.pause.seconds * 1000:.1f} ms, {found.pause.after:.2f} s after"
            f" the start{f' (by chance alone about {chance * 1000:.1f} ms)' if chance else ''};"
            f" {'; '.join(found.pause.beside) or 'nothing was noted at that time'}."
        )
    if found.not_allowed is not None:
        said.append(f"Answered by a version that the journal says could not answer then: {found.not_allowed}.")
    else:
        said.append("No journal was at hand to hold the versions against.")
    if found.end is None:
        said.append("The run was killed: this is what it had written.")
    else:
        said.append(
            f"The client used {found.end['cpu_share']:.0%} of one core and {found.end['most_connections']} connections"
            f" at most; its own event loop was at most {found.end['longest_stall'] * 1000:.1f} ms late, and half of the"
            f" requests left within {found.late['p50'] or 0:.2f} ms of their due time, 99 % within"
            f" {found.late['p99'] or 0:.2f} ms."
        )
        if found.end["interrupted"]:
            said.append("It was interrupted by Ctrl-C.")
    return said


def asked(about: Mapping[str, Any]) -> str:
    """What the run was told to do, in words."""
    if about.get("arrivals") == "closed":
        load = f"{about.get('connections')} closed clients"
    else:
        load = f"{about.get('rate'):g} requests a second, {about.get('arrivals')} arrivals"
    shares = f"{about.get('grpc_share', 0):.0%} gRPC, {about.get('pinned_share', 0):.0%} pinned"
    return f"{load}, {about.get('seconds'):g} s, {shares}"


# ---------------------------------------------------------------- numbers


def _line(name: str, results: Results, mask: Mask, seconds: float) -> Line:
    counts: dict[str, int] = {outcome: int((results.outcome[mask] == outcome).sum()) for outcome in OUTCOMES}
    rate = counts["ok"] / seconds if seconds > 0 else 0.0
    return Line(name, counts, rate, _percentiles(results.latency[mask & _timed(results)]))


def _timed(results: Results) -> Mask:
    return np.asarray(np.isin(results.outcome, ("ok", "wrong", "hung")))


def _percentiles(seconds: NDArray[np.float64]) -> dict[str, float | None]:
    """Milliseconds. Each is a value that was measured, the smallest with so many at or below it (nearest rank)."""
    if not len(seconds):
        return dict.fromkeys(PERCENTILES)
    ordered = np.sort(seconds) * 1000
    return {name: float(ordered[_rank(len(ordered), part)]) for name, part in PERCENTILES.items()}


def _rank(count: int, thousandths: int) -> int:
    return (count * thousandths + 999) // 1000 - 1  # in whole numbers: 0.999 * 1000 is a little more than 999


def _pause(results: Results, entries: Sequence[Entry]) -> Pause | None:
    answers = np.sort(results.done[np.isin(results.outcome, ("ok", "refused", "wrong"))])
    if len(answers) < 2:
        return None
    gaps = np.diff(answers)
    longest = int(gaps.argmax())
    at, seconds = float(answers[longest]), float(gaps[longest])
    noted = [(entry.time, f"{entry.event} {entry.version}") for entry in entries]
    noted += [(float(event["at"]), str(event["event"])) for event in results.events if event.get("event") != "end"]
    beside = tuple(
        f"{what} {when - at:+.2f} s" for when, what in sorted(noted) if at - _NEAR <= when <= at + seconds + _NEAR
    )
    poisson = results.about.get("arrivals") == "poisson"
    chance = math.log(len(answers)) / float(results.about["rate"]) if poisson else None
    return Pause(seconds, at, at - float(results.due[0]), beside, chance)


def _versions(results: Results) -> list[str]:
    """Who answered, in order of the first answer."""
    order = np.argsort(results.done, kind="stable")
    return [version for version in dict.fromkeys(results.version[order].tolist()) if version]


def _switch(entry: Entry) -> str:
    if entry.event == "released":
        return f"{'back to' if entry.detail.get('back') else 'released'} {entry.version}"
    return f"{'switching to' if entry.event == 'switching' else entry.event} {entry.version}"


def _failures(results: Results, start: float) -> tuple[Mapping[str, Any], ...]:
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for place in np.flatnonzero(results.outcome != "ok").tolist():
        outcome, status, detail = str(results.outcome[place]), int(results.status[place]), results.detail[place]
        one = found.setdefault(
            (outcome, status, detail),
            {
                "outcome": outcome,
                "status": status or None,
                "detail": detail,
                "times": 0,
                "first": float(results.due[place]) - start,
            },
        )
        one["times"] += 1
    return tuple(sorted(found.values(), key=lambda one: -one["times"])[:_SHOWN])


# ---------------------------------------------------------------- plots


def _width(found: Findings) -> float:
    """Seconds of one point of a time line: one, tenths for a short run, more for a long one."""
    return 0.1 if found.seconds < 20 else max(1.0, math.ceil(found.seconds / _BINS))


def _rates(results: Results, found: Findings) -> Any:
    figure, (one,) = pages.axes(9.0, 3.0)
    start, width = float(results.due[0]), _width(found)
    bins = np.arange(0, found.seconds + width, width)
    answered = np.isin(results.outcome, ("ok", "refused", "wrong"))
    names = _versions(results) + ([""] if (answered & (results.version == "")).any() else [])
    stack = []
    for name in names:
        done = results.done[answered & (results.version == name)] - start
        stack.append(np.histogram(done, bins)[0] / width)
    if stack:
        import matplotlib as mpl

        colours = mpl.colormaps["tab20"](np.arange(len(stack)) % 20)
        labels = [_plain(name) or "nobody named" for name in names]
        one.stackplot(bins[:-1], stack, step="post", labels=labels, colors=colours, linewidth=0)
        one.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + len(names) // 16)
    one.set(xlabel="seconds", ylabel="answers a second", xlim=(0, bins[-1]))
    one.set_ylim(bottom=0)
    _mark_switches(one, found, start)
    return figure


def _latencies(results: Results, found: Findings) -> Any:
    figure, (one,) = pages.axes(9.0, 3.0)
    start, width = float(results.due[0]), _width(found)
    at = ((results.due - start) // width).astype(np.int64)
    timed = _timed(results)
    places = np.unique(at[timed])
    parts = np.split(results.latency[timed] * 1000, np.searchsorted(at[timed], places)[1:]) if len(places) else []
    for name, colour in (("p50", pages.ACCENT), ("p99", pages.SECOND)):
        values = [float(np.sort(part)[_rank(len(part), PERCENTILES[name])]) for part in parts]
        one.plot(places * width, values, color=colour, linewidth=0.9, label=name)
    for outcome, colour in _COLOURS.items():
        chosen = results.outcome == outcome
        if chosen.any():  # one mark for each point of the time line, at the worst of them
            worst = dict.fromkeys(at[chosen].tolist(), 0.0)
            for place, value in zip(at[chosen].tolist(), (results.latency[chosen] * 1000).tolist(), strict=True):
                worst[place] = max(worst[place], value, 0.01)
            where = [place * width for place in worst]
            one.scatter(where, list(worst.values()), marker="x", s=24, color=colour, label=outcome, zorder=3)
    one.set(xlabel="seconds", ylabel="latency, ms", yscale="log", xlim=(0, found.seconds + width))
    one.yaxis.set_major_formatter("{x:g}")
    if one.get_legend_handles_labels()[0]:
        one.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _mark_switches(one, found, start)
    return figure


def _mark_switches(one: Any, found: Findings, start: float) -> None:
    for at, label in found.switches:
        one.axvline(at - start, color=pages.INK, linewidth=0.7, linestyle=":")
        if len(found.switches) <= _SHOWN:
            place = (at - start, 1.0)
            how = {"rotation": 90, "fontsize": 7, "va": "top", "ha": "right", "color": pages.INK}
            one.text(*place, _plain(label), transform=one.get_xaxis_transform(), **how)


def _tail(results: Results) -> Any:
    figure, (one,) = pages.axes(6.4, 3.4)
    timed = _timed(results)
    for kind, colour in (("rest", pages.ACCENT), ("grpc", pages.SECOND)):
        values = np.sort(results.latency[timed & (results.kind == kind)]) * 1000
        if len(values):
            rest = 1 / np.unique(np.geomspace(1, len(values), 400).astype(np.int64))
            shown = values[np.minimum(np.ceil((1 - rest) * len(values)).astype(np.int64), len(values) - 1)]
            one.plot(1 / rest, shown, color=colour, label={"rest": "REST", "grpc": "gRPC"}[kind])
    nines = [1, 2, 10, 100, 1000, 10_000, 100_000, 1_000_000]
    ticks = [nine for nine in nines if nine <= max(len(results), 2)]
    one.set(xscale="log", yscale="log", xlabel="percentile", ylabel="latency, ms")
    one.yaxis.set_major_formatter("{x:g}")
    one.set_xticks(ticks, [f"{100 * (1 - 1 / nine):.6g}" for nine in ticks])
    one.minorticks_off()
    if one.get_legend_handles_labels()[0]:
        one.legend(frameon=False)
    return figure


def _plain(label: str) -> str:
    """Fit for a plot: cut, and `$` taken literally."""
    cut = label if len(label) <= 24 else f"{label[:23]}…"
    return cut.replace("$", r"\$")
