"""Raw results as CSV, a comment in front that says where and with what they were measured; and plots of them.

rows.write(path, measured)                       # replaces the file; `rows.add` adds to it
about, measured = rows.read(path)                # values are text
rows.plot(path.svg, {"sqlite": ([1e3, 1e4], [0.1, 0.9])}, x="rows", y="seconds")
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from marwright import files

Row = Mapping[str, Any]
PLOTS = Path(__file__).parent.parent / "docs" / "performance"


def about() -> str:
    """Machine, cores and versions, on one line."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torchserve", "torch", "onnxruntime"))
    return f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def write(path: Path, rows: Sequence[Row]) -> None:
    """All of a file; the columns are the first row's."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], restval="")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, f"# {about()}\n{text.getvalue()}")


def add(path: Path, row: Row) -> None:
    """One more row, at once: a run that is killed loses nothing of what it has measured."""
    if not path.exists():
        write(path, [row])
        return
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, _columns(path)).writerow(row)


def read(path: Path) -> tuple[str, list[dict[str, str]]]:
    """(what `about` said, the rows)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[0].removeprefix("# "), list(csv.DictReader(lines[1:]))


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """b of y = a·xᵇ, by least squares on the logarithms: 1 is growth in step, 0 none. NaN for fewer than two points."""
    pairs = [(math.log(one), math.log(other)) for one, other in zip(x, y, strict=True) if one > 0 and other > 0]
    if len({one for one, _ in pairs}) < 2:
        return math.nan
    return float(np.polyfit(*zip(*pairs, strict=True), 1)[0])


def plot(path: Path, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str) -> None:
    """Lines on logarithmic axes as an SVG; the same lines, the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"svg.hashsalt": "marwright", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, (at, values) in lines.items():
            axes.loglog(at, values, marker="o", markersize=3.5, linewidth=1.2, label=name)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _columns(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        file.readline()
        return next(csv.reader([file.readline()]))
