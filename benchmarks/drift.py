"""How soon drift is found, and how often where there is none: corrupted streams of real pictures.

    python benchmarks/drift.py run digits
    python benchmarks/drift.py run mnist --data mnist.zip --seeds 0
    python benchmarks/drift.py run cifar10 --data cifar10.zip --seeds 0
    python benchmarks/drift.py show          # the tables of docs/drift.md, from benchmarks/results/drift-*.csv

A small net is trained on some of the pictures. What it has not learned from is the reference and the stream; at some
request the stream turns into one of five corruptions, in one of five severities. Looks are taken as `marwright drift`
takes them, with the defaults of the policy but for the window. Each row of the raw results is one stream (or one count
of false alarms): what was measured, and the value, empty where nothing was found.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from marwright import files  # noqa: E402
from marwright.feedback import changes, drift, sequential  # noqa: E402
from marwright.learning import data, recipe, training  # noqa: E402
from marwright.learning.corruptions import CORRUPTIONS, SEVERITIES, corrupt  # noqa: E402
from marwright.learning.dataset import Dataset, Part  # noqa: E402
from marwright.learning.reference import Reference  # noqa: E402
from marwright.release.policy import TriggerPolicy  # noqa: E402
from tests.feedback.answers import part, seen, window  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "drift.md"
BEGIN, END = "<!-- tables: python benchmarks/drift.py show -->", "<!-- end of tables -->"
WINDOWS = 200
ERRORS = 20
"""Streams of labelled answers for each corruption and severity: GOOD of the clean pictures, BAD of the others."""
GOOD, BAD = 500, 2000
LOST = 0.05
"""The bound of the sequential test: the clean accuracy less so much."""
Row = tuple[str, int, str, str, int, int, float | None]
HEAD = ("data", "seed", "what", "corruption", "severity", "repeat", "value")


@dataclass(frozen=True)
class Size:
    """How much of a data set is used for what. Counts of pictures."""

    epochs: int
    train: int
    reference: int
    window: int
    step: int
    """Requests between two looks."""
    most: int
    """Corrupted requests after which a stream is given up."""
    repeats: int


SIZES = {
    "digits": Size(epochs=4, train=700, reference=200, window=100, step=25, most=500, repeats=5),
    "mnist": Size(epochs=2, train=10_000, reference=1000, window=500, step=100, most=2000, repeats=3),
    "cifar10": Size(epochs=8, train=20_000, reference=1000, window=500, step=100, most=2000, repeats=3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure, and keep the results")
    run.add_argument("recipe", choices=list(SIZES))
    run.add_argument("--data", type=Path, help="folder or zip, for recipes that need one")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--cache", type=Path, default=data.CACHE)
    verbs.add_parser("show", help="make the tables of docs/drift.md")
    options = parser.parse_args()
    if options.verb == "show":
        show()
        return
    began, rows = time.perf_counter(), []
    for seed in options.seeds:
        for row in measured(options.recipe, seed, options):
            rows.append(row)
            print(*row, flush=True)
    with files.replacing(RESULTS / f"drift-{options.recipe}.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEAD, *rows])
    files.write_json(
        RESULTS / f"drift-{options.recipe}.json",
        {
            "size": SIZES[options.recipe].__dict__,
            "seeds": options.seeds,
            "permutations": drift.PERMUTATIONS,
            "false_alarm": TriggerPolicy().drift_false_alarm,
            "seconds": round(time.perf_counter() - began, 1),
            "cores": os.cpu_count(),
            "load_at_end": os.getloadavg()[0],
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        },
    )


# -------------------------------------------------------------------- run


def measured(name: str, seed: int, options: argparse.Namespace) -> Iterator[Row]:
    size = SIZES[name]
    chosen = recipe.load(name, recipes_dir=ROOT / "recipes", overrides={"seed": seed, "epochs": size.epochs})
    dataset, held = divided(data.load(chosen, path=options.data, cache=options.cache, progress=False), size, seed)
    with tempfile.TemporaryDirectory() as folder:
        graph = training.load_graph(training.train(chosen, dataset, Path(folder), progress=False))
    pictures, labels = (tensor.numpy() for tensor in held)
    random = np.random.default_rng(seed)
    clean = seen(graph, pictures)
    right = answers(graph, pictures) == labels
    yield name, seed, "accuracy", "none", 0, 0, float(right.mean())
    yield from false_alarms(name, seed, clean, size, random)
    yield from steady_errors(name, seed, float(right.mean()), random)
    reference = part(clean, np.arange(size.reference))
    rest = np.arange(size.reference, len(pictures))
    for corruption in CORRUPTIONS:
        for severity in SEVERITIES:
            worse = corrupt(pictures, corruption, severity, seed=seed)
            still = answers(graph, worse) == labels
            key = (corruption, severity)
            yield name, seed, "accuracy", *key, 0, float(still.mean())
            after = seen(graph, worse)
            for repeat in range(size.repeats):
                places = random.permutation(rest)[: size.window + size.most]
                once, twice = delays(reference, clean, after, places, size, seed=repeat)
                yield name, seed, "look", *key, repeat, once
                yield name, seed, "two looks", *key, repeat, twice
            yield from error_delays(name, seed, key, right, still, random)


def divided(dataset: Dataset, size: Size, seed: int) -> tuple[Dataset, tuple[torch.Tensor, torch.Tensor]]:
    """`size.train` pictures to learn from and a tenth of that to choose the epoch by; and all others, mixed."""
    taken = [each.take(torch.arange(len(each))) for each in dataset.parts]
    inputs, targets = torch.cat([one for one, _ in taken]), torch.cat([two for _, two in taken])
    mixed = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    choice = size.train // 10
    cuts = {"train": mixed[: size.train], "validation": mixed[size.train : size.train + choice]}
    parts = {name: Part(name, inputs, rows.sort().values, targets[rows.sort().values]) for name, rows in cuts.items()}
    parts["test"] = replace(parts["validation"], name="test")
    others = mixed[size.train + choice :][: size.reference + 2 * (size.window + size.most)]
    made = replace(dataset, **parts, digest=f"{dataset.digest}-{seed}-{size.train}")
    return made, (inputs[others], targets[others])


def answers(graph: torch.nn.Module, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
    with torch.inference_mode():
        found: NDArray[np.int64] = graph(torch.from_numpy(pictures))[0].argmax(dim=1).numpy()
    return found


def false_alarms(name: str, seed: int, clean: Reference, size: Size, random: np.random.Generator) -> Iterator[Row]:
    """Of 200 windows without drift: each with a reference of its own, and all with one."""
    policy, alarms = TriggerPolicy(), {"fresh reference": 0, "one reference": 0}
    for number in range(WINDOWS):
        places = random.permutation(len(clean))
        requests = window(clean, places[size.reference :][: size.window])
        alarms["fresh reference"] += drift.look(
            part(clean, places[: size.reference]), requests, policy, seed=number
        ).drifted
        places = size.reference + random.permutation(len(clean) - size.reference)
        requests = window(clean, places[: size.window])
        alarms["one reference"] += drift.look(
            part(clean, np.arange(size.reference)), requests, policy, seed=number
        ).drifted
    for what, count in alarms.items():
        yield name, seed, what, "none", 0, 0, float(count)


def steady_errors(name: str, seed: int, accuracy: float, random: np.random.Generator) -> Iterator[Row]:
    """Of 200 streams at the clean accuracy: alarms of the detectors of rises, and of the test at that very bound."""
    counts = {"adwin alarms": 0, "page-hinkley alarms": 0, "sequential alarms": 0}
    for _ in range(WINDOWS):
        outcomes = random.random(GOOD + BAD) < accuracy
        found = changes.rises(outcomes.tolist())
        counts["adwin alarms"] += bool(found.adwin)
        counts["page-hinkley alarms"] += bool(found.page_hinkley)
        alpha = TriggerPolicy().accuracy_false_alarm
        counts["sequential alarms"] += sequential.below(outcomes, accuracy, alpha).at is not None
    for what, count in counts.items():
        yield name, seed, what, "none", 0, 0, float(count)


def delays(
    reference: Reference, clean: Reference, after: Reference, places: NDArray[np.int64], size: Size, *, seed: int
) -> tuple[float | None, float | None]:
    """Corrupted requests until a look alarms, and until two in a row do."""
    before, later = window(clean, places[: size.window]), window(after, places[size.window :])
    once: float | None = None
    streak = 0
    for count in range(size.step, size.most + 1, size.step):
        latest = (before + later[:count])[-size.window :]
        streak = streak + 1 if drift.look(reference, latest, TriggerPolicy(), seed=seed * 1000 + count).drifted else 0
        once = float(count) if streak and once is None else once
        if streak == 2:
            return once, float(count)
    return once, None


def error_delays(
    name: str,
    seed: int,
    key: tuple[str, int],
    right: NDArray[np.bool_],
    still: NDArray[np.bool_],
    random: np.random.Generator,
) -> Iterator[Row]:
    """Labelled answers after the change until each detector finds it; alarms before it are left out."""
    policy, bound = TriggerPolicy(), float(right.mean()) - LOST
    for repeat in range(ERRORS):
        outcomes = np.concatenate([random.choice(right, GOOD), random.choice(still, BAD)])
        found = changes.rises(outcomes.tolist())
        at = sequential.below(outcomes, bound, policy.accuracy_false_alarm).at
        for what, places in (
            ("adwin", found.adwin),
            ("page-hinkley", found.page_hinkley),
            ("sequential", () if at is None else (at,)),
        ):
            later = [place - GOOD for place in places if place > GOOD]
            yield name, seed, what, *key, repeat, float(later[0]) if later else None


# -------------------------------------------------------------------- show


def show() -> None:
    """Write the tables into docs/drift.md, and print them."""
    text = "\n".join(line for name in SIZES for line in tables(name))
    document = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = document.partition(BEGIN)
    files.write_text(DOCUMENT, f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    print(text)


def tables(name: str) -> Iterator[str]:
    """What is there of one data set."""
    path = RESULTS / f"drift-{name}.csv"
    if not path.is_file():
        return
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    about, size = files.read_json(path.with_suffix(".json")), SIZES[name]
    seeds = len(about["seeds"])

    def values(what: str, corruption: str = "none", severity: int = 0) -> list[float | None]:
        return [
            float(row["value"]) if row["value"] else None
            for row in rows
            if (row["what"], row["corruption"], int(row["severity"])) == (what, corruption, severity)
        ]

    def share(what: str) -> str:
        return ", ".join(f"{value / WINDOWS:.1%}" for value in values(what) if value is not None)

    plural = "s" if seeds > 1 else ""
    yield f"\n### {name}\n"
    yield (
        f"{seeds} seed{plural}; {size.train} pictures learned from in {size.epochs} epochs, reference {size.reference},"
        f" window {size.window}, a look each {size.step} requests, {size.repeats} streams for each seed; clean accuracy"
        f" {', '.join(f'{value:.1%}' for value in values('accuracy') if value is not None)}.\n"
    )
    yield "| without drift, each seed | alarms |"
    yield "|---|---|"
    for what, said in (
        ("fresh reference", f"looks that alarm, of {WINDOWS}, each with a reference of its own (promised: 5 %)"),
        ("one reference", f"the same, all {WINDOWS} with one reference"),
        ("adwin alarms", f"ADWIN: streams of {GOOD + BAD} answers with an alarm"),
        ("page-hinkley alarms", "Page-Hinkley: the same"),
        ("sequential alarms", "sequential test at the very accuracy: the same (promised: 1 %)"),
    ):
        yield f"| {said} | {share(what)} |"
    yield ""
    yield "| corruption | severity | accuracy | look | two looks | ADWIN | Page-Hinkley | sequential |"
    yield "|---|---|---|---|---|---|---|---|"
    for corruption in CORRUPTIONS:
        for severity in SEVERITIES:
            accuracy = [value for value in values("accuracy", corruption, severity) if value is not None]
            cells = [
                median(values(what, corruption, severity))
                for what in ("look", "two looks", "adwin", "page-hinkley", "sequential")
            ]
            yield f"| {corruption} | {severity} | {statistics.mean(accuracy):.1%} | {' | '.join(cells)} |"


def median(found: list[float | None]) -> str:
    """Median, those that were never found counted as later than all others; how many were found where not all were."""
    there = sorted(value for value in found if value is not None)
    middle = statistics.median_low([*there, *[float("inf")] * (len(found) - len(there))])
    shown = f"{middle:.0f}" if middle < float("inf") else "–"
    return shown if len(there) == len(found) else f"{shown} ({len(there)} of {len(found)})"


if __name__ == "__main__":
    main()
