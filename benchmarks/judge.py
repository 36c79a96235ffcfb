"""How often the judge stops a batch of which 30 % of one class is flipped, and lets a clean one of the same drift pass.

    python -m benchmarks.judge run benchmarks/results/judge.csv     # some minutes
    python -m benchmarks.judge show benchmarks/results/judge.csv

Digits, five seeds, two drifts, 300 and 797 labelled requests: a champion that learned from 1000 others, each batch
learned from by the method `warm`, and judged by the default policy. A line for each.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tests.feedback import teaching

DRIFTS = (("darkness", 4), ("contrast", 5))
COUNTS = (300, 797)
SEEDS = range(5)
COLUMNS = (
    "seed", "drift", "severity", "requests", "labels", "of", "to", "outcome", "old", "new", "noise", "worst_at_least",
    "reason",
)  # fmt: skip


def run(path: Path) -> None:
    torch.set_num_threads(1)
    with path.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(COLUMNS)
        for seed in SEEDS:
            with (
                tempfile.TemporaryDirectory() as folder,
                mock.patch("marwright.learning.reporting.page", return_value="<!doctype html>"),
            ):
                world = teaching.World(Path(folder), seed)
                for drift, severity in DRIFTS:
                    for count in COUNTS:
                        pair = np.random.default_rng(seed * 7 + count).choice(10, 2, replace=False)
                        of, to = (3, 8) if drift == "darkness" else (int(pair[0]), int(pair[1]))
                        clean = world.truth[:count]
                        flipped = teaching.flipped(clean, of, to, 0.3, seed=seed)
                        for name, labels in (("clean", clean), ("flipped", flipped)):
                            found = world.judged(world.stream(labels, drift, severity))
                            classes = found.noise.by_class.values() if found.noise else ()
                            rows.writerow(
                                [
                                    *(seed, drift, severity, count, name, of, to, found.outcome, found.old.outcome),
                                    found.new.outcome if found.new else "",
                                    f"{found.noise.rate:.4f}" if found.noise else "",
                                    f"{max((row.at_least or 0.0 for row in classes), default=0.0):.4f}",
                                    found.reasons[0],
                                ]
                            )
                            stream.flush()


def show(path: Path) -> None:
    """A Markdown table of how many passed, failed, and were undecided."""
    with path.open(newline="", encoding="utf-8") as stream:
        counted = Counter((int(row["requests"]), row["labels"], row["outcome"]) for row in csv.DictReader(stream))
    print("| requests | labels | passed | failed | undecided |")
    print("|---|---|---|---|---|")
    for count, labels in sorted({key[:2] for key in counted}):
        cells = (counted[count, labels, outcome] for outcome in ("pass", "fail", "inconclusive"))
        print(f"| {count} | {labels} | " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("run", "show"):
        sys.exit(__doc__)
    (run if sys.argv[1] == "run" else show)(Path(sys.argv[2]))
