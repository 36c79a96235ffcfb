"""The raw file → this benchmark's part of docs/performance.md: tables, ratios with their spread, goals, two plots.

A figure is the median over the rounds. A ratio is taken within each round, where both sides met the same machine; what
is shown is the median of those and, in brackets, the least and the largest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import rows
from benchmarks.serving import names

RAW = Path(__file__).parent.parent / "results" / "serving.csv"
CONNECTIONS = (1, 8, 32, 64, 128)
SHARES = ("0.25", "0.5", "0.75", "0.9")
NONE = "–"
Row = dict[str, str]
Value = Callable[[Row], float]


def _fewer(figures: Figures) -> str:
    """Who was not there in every round, and whose figures were so taken at other times than the rest."""
    seen: dict[str, set[str]] = {}
    for row in figures.rows:
        if row["mode"] == "closed":
            seen.setdefault(row["system"], set()).add(row["round"])
    most = max(map(len, seen.values()))
    fewer = [f"{name} ({len(rounds)})" for name, rounds in sorted(seen.items()) if len(rounds) < most]
    return f"In fewer rounds, by themselves: {', '.join(fewer)}. " if fewer else ""


def rate(row: Row) -> float:
    """Right answers a second."""
    seconds = float(row["seconds"])
    return float(row["right"]) / seconds if seconds else 0.0


def column(name: str, scale: float = 1.0) -> Value:
    return lambda row: float(row[name]) * scale if row[name] else math.nan


P50, P99, P999 = (column(name, 0.001) for name in ("p50_us", "p99_us", "p999_us"))
"""Milliseconds."""


@dataclass
class Figures:
    """The rows, by what was measured and then by round."""

    about: str
    rows: list[Row]
    table: dict[tuple[str, ...], dict[str, Row]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            share = row["share"] if row["mode"] == "open" else ""
            at = (row["system"], row["mode"], row["kind"], row["connections"] if row["mode"] == "closed" else "", share)
            self.table.setdefault(at, {})[row["round"]] = row

    @property
    def systems(self) -> list[str]:
        """Those with any figure, in the order of the page."""
        found = {row["system"] for row in self.rows if row["mode"] == "closed"}
        return [name for name in names.ORDER if name in found] + sorted(found - set(names.ORDER))

    @property
    def rounds(self) -> int:
        return len({row["round"] for row in self.rows})

    def closed(self, system: str, connections: int, kind: str = "png32") -> dict[str, Row]:
        return self.table.get((system, "closed", kind, str(connections), ""), {})

    def open(self, system: str, share: str) -> dict[str, Row]:
        return self.table.get((system, "open", "png32", "", share), {})

    def start(self, system: str) -> dict[str, Row]:
        return self.table.get((system, "start", "", "", ""), {})


@dataclass(frozen=True)
class Ratio:
    """Median, least and largest over the rounds."""

    middle: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.least:.2f} to {self.most:.2f})"


def middle(found: dict[str, Row], value: Value) -> float:
    """The median over the rounds; NaN for none."""
    values = [value(row) for row in found.values()]
    values = [one for one in values if not math.isnan(one)]
    return statistics.median(values) if values else math.nan


def ratio(over: dict[str, Row], under: dict[str, Row], value: Value = rate, below: Value | None = None) -> Ratio | None:
    """value(over) / below(under), round by round; None where no round has both."""
    both = sorted(over.keys() & under.keys())
    pairs = [(value(over[one]), (below or value)(under[one])) for one in both]
    found = [top / bottom for top, bottom in pairs if bottom > 0 and not math.isnan(top)]
    return Ratio(statistics.median(found), min(found), max(found)) if found else None


def shown(value: float, form: str) -> str:
    return NONE if math.isnan(value) else format(value, form)


def load(raw: Path) -> Figures:
    about, found = rows.read(raw)
    return Figures(about, found)


def section(raw: Path = RAW, *, plots: Path = rows.PLOTS) -> str | None:
    """Markdown, and the plots; None without a raw file or without a figure in it."""
    if not raw.is_file():
        return None
    figures = load(raw)
    if not figures.systems:
        return None
    parts = [
        "## Serving, side by side",
        f"{figures.about}. {figures.rounds} rounds, each system once in each, in another order every time; medians. "
        f"{_fewer(figures)}"
        "Every answer was checked: status 200, the right five labels in order, numbers within 0.001 of what the same "
        "weights give for that picture. `python -m benchmarks.serving run --data cifar10.zip` makes the raw file.",
        "### Goals",
        goals(figures),
        "### Requests a second, 32×32 PNG, small net",
        by_connections(figures, lambda found: shown(middle(found, rate), ".0f")),
        "![throughput](performance/serving-throughput.svg)",
        "### Milliseconds: p50 / p99",
        by_connections(figures, latencies),
        "![p99](performance/serving-p99.svg)",
        "### Ours to each of them",
        "`marwright-throughput`'s requests a second divided by theirs: median (least to largest round).",
        ratios(figures),
        "### Open loop",
        "Poisson arrivals at a share of what each one's best closed loop gave; latency from the moment that a request "
        "was due: p50 / p99 / p99.9 ms.",
        open_loop(figures),
        *bodies(figures),
        "### What it costs",
        costs(figures),
        "### How each was tuned",
        "\n".join(f"- `{name}`: {names.TUNED[name]}." for name in figures.systems if name in names.TUNED),
        *failures(figures),
    ]
    draw(figures, plots)
    return "\n\n".join(parts) + "\n"


def by_connections(figures: Figures, cell: Callable[[dict[str, Row]], str]) -> str:
    """A line for each system that was asked in full."""
    full = [name for name in figures.systems if name not in names.SHORT]
    lines = [[f"`{name}`", *(cell(figures.closed(name, count)) for count in CONNECTIONS)] for name in full]
    return rows.markdown(["connections", *map(str, CONNECTIONS)], lines)


def latencies(found: dict[str, Row]) -> str:
    return f"{shown(middle(found, P50), '.2f')} / {shown(middle(found, P99), '.2f')}"


def ratios(figures: Figures) -> str:
    ours = "marwright-throughput"
    lines = []
    for name in figures.systems:
        if name == ours or name in names.SHORT:
            continue
        found = (ratio(figures.closed(ours, count), figures.closed(name, count)) for count in CONNECTIONS)
        lines.append([f"`{name}`", *(NONE if one is None else str(one) for one in found)])
    return rows.markdown(["connections", *map(str, CONNECTIONS)], lines)


def open_loop(figures: Figures) -> str:
    lines = []
    for name in figures.systems:
        if not any(figures.open(name, share) for share in SHARES):
            continue
        cells = []
        for share in SHARES:
            found = figures.open(name, share)
            text = " / ".join(shown(middle(found, value), ".2f") for value in (P50, P99, P999))
            failed = sum(unanswered(row) for row in found.values())
            cells.append(text + (f", {failed} failed" if failed else ""))
        capacity = max((middle(figures.closed(name, count), rate) for count in CONNECTIONS), default=math.nan)
        lines.append([f"`{name}`", shown(capacity, ".0f"), *cells])
    return rows.markdown(["", "capacity/s", *(f"{float(share):.0%}" for share in SHARES)], lines)


def bodies(figures: Figures) -> list[str]:
    """Other bodies and the other net, at 64 connections; nothing where none was asked."""
    ours, theirs = "marwright-throughput", "stock-tuned"
    lines = []
    for kind, title in names.KINDS.items():
        pair = figures.closed(ours, 64, kind), figures.closed(theirs, 64, kind)
        if pair[0] or pair[1]:
            lines.append(_compared(title, *pair))
    other = figures.closed(f"{ours}-resnet", 64), figures.closed(f"{theirs}-resnet", 64)
    if other[0] or other[1]:
        lines.append(_compared("PNG 32×32, ResNet-8", *other))
    if not lines:
        return []
    titles = ["64 connections", f"`{ours}`/s", f"`{theirs}`/s", "ratio", "p99 ms, ours / theirs"]
    return ["### Other bodies, another net", rows.markdown(titles, lines)]


def _compared(title: str, ours: dict[str, Row], theirs: dict[str, Row]) -> list[str]:
    found = ratio(ours, theirs)
    late = f"{shown(middle(ours, P99), '.1f')} / {shown(middle(theirs, P99), '.1f')}"
    rates = [shown(middle(one, rate), ".0f") for one in (ours, theirs)]
    return [title, *rates, NONE if found is None else str(found), late]


def costs(figures: Figures) -> str:
    titles = [
        "",
        "CPU µs a request at 64",
        "at 1",
        "RSS MB",
        "PSS MB",
        "start to first answer s",
        "load generator's CPU",
    ]
    lines = []
    for name in figures.systems:
        many, one = figures.closed(name, 64), figures.closed(name, 1)
        cells = [shown(middle(found, column("cpu_us")), ".0f") for found in (many, one)]
        cells += [shown(middle(many, column(key)), ".0f") for key in ("rss_mb", "pss_mb")]
        cells += [shown(middle(figures.start(name), column("first_seconds")), ".1f")]
        lines.append([f"`{name}`", *cells, shown(middle(many, column("load_cpu")), ".2f")])
    return rows.markdown(titles, lines)


def unanswered(row: Row) -> int:
    """Requests without a right answer."""
    return sum(int(row[name] or 0) for name in ("bad_status", "wrong", "broken", "hung"))


def failures(figures: Figures) -> list[str]:
    """What could not run, and where requests failed, over all rounds."""
    lines = []
    for row in figures.rows:
        if row["mode"] == "failed":
            lines.append(f"- `{row['system']}`, round {row['round']}: {row['complaint']}")
    for (system, mode, kind, connections, share), found in figures.table.items():
        if mode not in ("open", "closed") or not sum(map(unanswered, found.values())):
            continue
        counts = {word: sum(int(row[name] or 0) for row in found.values()) for name, word in names.FAILURES.items()}
        said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        asked = sum(int(row["answered"]) + int(row["hung"]) for row in found.values())
        where = f"{connections} connections" if mode == "closed" else f"open loop at {float(share):.0%}"
        first = next(row["complaint"] for row in found.values() if unanswered(row))
        lines.append(f"- `{system}`, {names.KINDS[kind]}, {where}: of {asked} {said}; first: {first[:60]}")
    return ["### What did not run, and what failed", "\n".join(lines)] if lines else []


# ---------------------------------------------------------------- goals


@dataclass(frozen=True)
class Goal:
    words: str
    wanted: str
    found: str
    reached: bool | None
    """None: not measured."""


def goals(figures: Figures) -> str:
    """Each goal and what the raw file says of it."""
    word = {True: "reached", False: "**not reached**", None: "not measured"}
    lines = [[one.words, one.wanted, one.found, word[one.reached]] for one in _goals(figures)]
    return rows.markdown(["goal", "wanted", "found", ""], lines)


def _goals(figures: Figures) -> Iterable[Goal]:
    ours, tuned = "marwright-throughput", figures.closed("stock-tuned", 64)
    at_64 = figures.closed(ours, 64)
    stock = _fastest(figures, ("stock", "stock-batched"), 64)
    yield _at_least("64 connections, to stock at its defaults (the faster of two)", 8, ratio(at_64, stock))
    yield _at_least("64 connections, to stock tuned", 3.3, ratio(at_64, tuned))
    yield _at_least("64 connections, to a stock server that does nothing", 1, ratio(at_64, figures.closed("echo", 64)))
    yield _at_most("64 connections, p99 to stock tuned's p50", 1, ratio(at_64, tuned, P99, P50))
    lone, slow = middle(figures.closed("marwright-latency", 1), P50), middle(figures.closed("stock-batched", 1), P50)
    beside = f"{shown(lone, '.3f')} ms; stock {shown(slow, '.2f')} ms"
    reached = None if math.isnan(lone) else lone <= 0.35
    yield Goal("1 connection, latency profile, p50", "≤ 0.35 ms", beside, reached)
    best = _fastest(figures, names.PROFILES, 8)
    yield _at_least("8 connections, best profile to stock tuned", 4, ratio(best, figures.closed("stock-tuned", 8)))
    yield _peers(figures)
    plain = ratio(figures.closed("marwright-plain", 64), tuned)
    yield _at_least("64 connections, Pillow and stock wire, to stock tuned", 1.7, plain)
    yield _one_setting(figures)
    for kind in ("jpeg1080", "png1080"):
        pair = figures.closed(ours, 64, kind), figures.closed("stock-tuned", 64, kind)
        yield _at_least(f"{names.KINDS[kind]}, to stock tuned", 1.5, ratio(*pair))


def _at_least(words: str, wanted: float, found: Ratio | None) -> Goal:
    return Goal(words, f"≥ {wanted:g}×", str(found or NONE), None if found is None else found.middle >= wanted)


def _at_most(words: str, wanted: float, found: Ratio | None) -> Goal:
    return Goal(words, f"≤ {wanted:g}", str(found or NONE), None if found is None else found.middle <= wanted)


def _fastest(figures: Figures, systems: Sequence[str], connections: int) -> dict[str, Row]:
    """Of these, the one that answers most."""
    found = [one for one in (figures.closed(name, connections) for name in systems) if one]
    return max(found, key=lambda one: middle(one, rate), default={})


def _peers(figures: Figures) -> Goal:
    """More than each, and a lower p99, with the best of our profiles."""
    ahead, compared = [], 0
    for name in figures.systems:
        for count in CONNECTIONS if name in names.PEERS else ():
            ours, theirs = _fastest(figures, names.PROFILES, count), figures.closed(name, count)
            more, later = ratio(theirs, ours), ratio(theirs, ours, P99)
            if more is None or later is None:
                continue
            compared += 1
            if more.middle >= 1:
                ahead.append(f"{name} at {count} answers {more.middle:.2f}×")
            if later.middle <= 1:
                ahead.append(f"{name} at {count} has {later.middle:.2f}× our p99")
    words = "more than every peer at every number of connections, with lower p99"
    return Goal(words, "all", "; ".join(ahead) or f"{compared} comparisons", not ahead if compared else None)


def _one_setting(figures: Figures) -> Goal:
    """The setting whose worst share of the best, over 1, 8, 64 and 128 connections, is largest."""
    counts = (1, 8, 64, 128)
    rates = {name: [middle(figures.closed(name, count), rate) for count in counts] for name in names.PROFILES}
    rates = {name: found for name, found in rates.items() if not any(map(math.isnan, found))}
    words = "one setting within 25 % of the best at 1, 8, 64, 128 (of the profiles here)"
    if len(rates) < 2:
        return Goal(words, "≥ 0.75", NONE, None)
    best = [max(column) for column in zip(*rates.values(), strict=True)]
    worst = {name: min(one / top for one, top in zip(found, best, strict=True)) for name, found in rates.items()}
    name = max(worst, key=lambda one: worst[one])
    return Goal(words, "≥ 0.75", f"{worst[name]:.2f} (`{name}`)", worst[name] >= 0.75)


# ---------------------------------------------------------------- plots


def draw(figures: Figures, folder: Path) -> None:
    """Requests a second and p99 by connections, one line for each system that was asked in full."""
    for name, value, words in (("throughput", rate, "requests a second"), ("p99", P99, "p99, ms")):
        lines = {}
        for system in figures.systems:
            found = [(count, middle(figures.closed(system, count), value)) for count in CONNECTIONS]
            points = [(float(count), one) for count, one in found if one > 0]
            if system not in names.SHORT and points:
                lines[system] = ([x for x, _ in points], [y for _, y in points])
        rows.plot(folder / f"serving-{name}.svg", lines, x="connections", y=words)
