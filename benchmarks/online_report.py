"""docs/online.md from the raw lines of benchmarks/online.py: what is below its mark, and the plots beside it."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from marwright import files, report
from marwright.learning import streams
from marwright.learning.streams import Window

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
MARK = "<!-- below: python benchmarks/online.py show -->"
SETS = ("digits", "mnist", "cifar10")
SCENARIOS = {
    "shift": "(a) The stream turns dark and noisy half-way",
    "classes": "(b) Two classes at a time",
    "late": "(c) As (a), each label a window late and one in ten wrong",
    "judged": "(d) Nothing changes, and the judge decides",
    "same": "(d) Nothing changes, and every update is taken",
}
COLOURS = {
    "scratch": "#1f2933", "warm": "#9aa5b1", "finetune": "#d6604d", "replay": "#2166ac", "derpp": "#4dac26",
    "head": "#b8860b",
}  # fmt: skip
GOALS = {"accuracy": 0.95, "time": 0.2, "forgetting": 0.25}

Line = dict[str, str]


@dataclass(frozen=True)
class Stream:
    """One method on one stream: its lines by step."""

    scenario: str
    method: str
    seed: int
    lines: list[Line]

    @property
    def matrix(self) -> Any:
        """Row i: accuracies after task i was learned, as far as the stream goes."""
        last = len(self.lines) - 1
        steps = range(0, last + 1, 2) if self.scenario == "classes" else (last // 2 + (self.scenario == "late"), last)
        return np.array([_numbers(self.lines[step]["tasks"]) for step in steps])

    @property
    def windows(self) -> list[Window]:
        return [Window(int(line["window"]), int(line["window_right"])) for line in self.lines[1:]]

    def figures(self) -> dict[str, float]:
        """What the tables show; `cpu` is of one update, in seconds."""
        updates = [line for line in self.lines[1:] if int(line["epochs"])]
        found = {
            "accuracy": float(self.lines[-1]["accuracy"]),
            "first": float(self.lines[0]["accuracy"]),
            "lowest": min(float(line["accuracy"]) for line in self.lines),
            "prequential": streams.prequential_accuracy(self.windows),
            "cpu": statistics.fmean(float(line["cpu_seconds"]) for line in updates),
            "total": statistics.fmean(float(line["cpu_total"]) for line in updates),
            "labels": float(self.lines[-1]["labels"]),
            "taken": sum(line["verdict"] in ("", "pass") for line in updates),
            "updates": len(updates),
        }
        if self.scenario in ("classes", "shift", "late"):
            found["bwt"] = streams.backward_transfer(self.matrix)
            found["fwt"] = streams.forward_transfer(self.matrix, _numbers(self.lines[0]["untrained"]))
            found["forgetting"] = streams.forgetting(self.matrix)
        return found


def write() -> None:
    """All sets that were measured."""
    parts = ["", "## Goals", "", *_goals()]
    for dataset in SETS:
        if (RESULTS / f"online-{dataset}.csv").is_file():
            parts += _section(dataset)
    page = DOCS / "online.md"
    kept = page.read_text(encoding="utf-8").partition(MARK)[0]
    files.write_text(page, kept + MARK + "\n" + "\n".join(parts) + "\n")


def _section(dataset: str) -> list[str]:
    head, found = _read(dataset)
    files_made = _plots(dataset, found)
    made = ["", f"## {dataset}", "", head, "", f"![accuracy along the stream, {dataset}](online/{files_made})"]
    for scenario, title in SCENARIOS.items():
        chosen = {method: of for (where, method), of in found.items() if where == scenario}
        if chosen:
            made += ["", f"### {title}", "", *_table(scenario, chosen)]
    return made


def _table(scenario: str, chosen: dict[str, list[Stream]]) -> list[str]:
    means = {method: _means(of) for method, of in chosen.items()}
    columns = ["method", "accuracy at the end, %", "of scratch", "prequential, %", "CPU s an update", "of scratch"]
    tasks = scenario in ("classes", "shift", "late")
    if tasks:
        columns += ["forgetting", "BWT", "FWT"]
    if scenario == "judged":
        columns += ["taken", "lowest, %", "first, %"]
    rows = []
    for method, of in chosen.items():
        mean, ends = means[method], [100 * one.figures()["accuracy"] for one in of]
        row = [
            f"`{method}`",
            f"{100 * mean['accuracy']:.1f} ({', '.join(f'{end:.1f}' for end in ends)})",
            f"{mean['accuracy'] / means['scratch']['accuracy']:.3f}",
            f"{100 * mean['prequential']:.1f}",
            f"{mean['cpu']:.2f}",
            f"{mean['cpu'] / means['scratch']['cpu']:.2f}",
        ]
        if tasks:
            row += [f"{100 * mean[name]:+.1f}" for name in ("forgetting", "bwt", "fwt")]
        if scenario == "judged":
            row += [f"{mean['taken']:.1f} of {mean['updates']:.0f}"]
            row += [f"{100 * mean[name]:.1f}" for name in ("lowest", "first")]
        rows.append(row)
    labels = round(next(iter(means.values()))["labels"])
    return [*_lines(columns, rows), "", f"Labels that came back by the end: {labels}."]


def _goals() -> list[str]:
    rows = []
    for dataset in SETS:
        if not (RESULTS / f"online-{dataset}.csv").is_file():
            continue
        _, found = _read(dataset)
        means = {key: _means(of) for key, of in found.items()}
        for scenario in ("shift", "classes", "late"):
            for method in ("replay", "derpp"):
                if (scenario, method) not in means or (scenario, "finetune") not in means:
                    continue
                mine, scratch, naive = (means[scenario, name] for name in (method, "scratch", "finetune"))
                values = {
                    "accuracy": mine["accuracy"] / scratch["accuracy"],
                    "time": mine["cpu"] / scratch["cpu"],
                    "forgetting": mine["forgetting"] / naive["forgetting"] if naive["forgetting"] > 0 else 0.0,
                }
                reached = {
                    name: value >= GOALS[name] if name == "accuracy" else value <= GOALS[name]
                    for name, value in values.items()
                }
                rows.append(
                    [dataset, scenario, f"`{method}`"]
                    + [f"{value:.3f}{'' if reached[name] else ' ✗'}" for name, value in values.items()]
                )
    head = [
        "set",
        "stream",
        "method",
        "accuracy of scratch ≥ 0.95",
        "CPU of scratch ≤ 0.20",
        "forgetting of naive ≤ 0.25",
    ]
    return [*_lines(head, rows), "", "✗ is missed. Means of the seeds, divided."]


def _plots(dataset: str, found: dict[tuple[str, str], list[Stream]]) -> str:
    """One SVG; its name."""
    figure, axes = report.axes(11.0, 3.4, columns=3)
    for one, (scenario, name) in zip(
        axes,
        (("shift", "prequential"), ("late", "prequential"), ("classes", "accuracy on classes so far")),
        strict=True,
    ):
        for method, colour in COLOURS.items():
            if of := found.get((scenario, method)):
                values = [
                    [float(line["accuracy"]) for line in each.lines]
                    if scenario == "classes"
                    else streams.prequential(each.windows)
                    for each in of
                ]
                mean = np.mean(values, axis=0)
                steps = range(len(mean)) if scenario == "classes" else range(1, len(mean) + 1)
                one.plot(steps, mean, color=colour, label=method, marker=".", linewidth=1.2)
        one.set(xlabel="window", ylabel=name, title={"shift": "(a)", "late": "(c)", "classes": "(b)"}[scenario])
    axes[0].legend(frameon=False, fontsize=7)
    path = DOCS / "online" / f"{dataset}.svg"
    with files.replacing(path) as temporary:
        temporary.write_bytes(report.svg(figure))
    return path.name


def _read(dataset: str) -> tuple[str, dict[tuple[str, str], list[Stream]]]:
    """What the first line says, and the streams by scenario and method, seeds in order."""
    text = (RESULTS / f"online-{dataset}.csv").read_text(encoding="utf-8")
    head, _, rest = text.partition("\n")
    lines: dict[tuple[str, str, int], list[Line]] = defaultdict(list)
    for line in csv.DictReader(io.StringIO(rest)):
        lines[line["scenario"], line["method"], int(line["seed"])].append(line)
    found: dict[tuple[str, str], list[Stream]] = defaultdict(list)
    for (scenario, method, seed), of in lines.items():
        found[scenario, method].append(Stream(scenario, method, seed, of))
    seeds = len({seed for _, _, seed in lines})
    return f"{head.removeprefix('# ')}. Seeds: {seeds}.", dict(found)


def _means(of: Sequence[Stream]) -> dict[str, float]:
    each = [one.figures() for one in of]
    return {name: statistics.fmean(one[name] for one in each) for name in each[0]}


def _numbers(text: str) -> list[float]:
    return [float(value) for value in text.split()]


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
