"""How long training takes to an accuracy, beside the loop that tutorials write; in a fixed time; and from a disk.

    python benchmarks/time_to_accuracy.py run --data cifar10.zip --accuracy 0.55 0.60 --seeds 3
    python benchmarks/time_to_accuracy.py budget --data cifar10.zip --seconds 120 300
    python benchmarks/time_to_accuracy.py streaming --data cifar10.zip --pairs 5
    python benchmarks/time_to_accuracy.py show

`run` trains the same LeNet by turns: as this project does (the recipe cifar10 with a quick schedule), and as tutorials
do (pictures as PIL images, ToTensor and Normalize for each of them in a DataLoader without and with two workers,
batches of 64, SGD with lr 0.001 and momentum 0.9). Both start from decoded pictures. What counts is training time, with
ours the judging of its validation part too; looking at the test part after each epoch counts for neither.

`budget` trains cifar10-fast for as many epochs as fit, and scores the test part with and without mirror images.
`streaming` trains the recipe cifar10 by turns in memory, mapped with a warm page cache, and mapped with a cold one.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from handlers import nets
from marwright import files
from marwright.learning import data, evaluation, recipe, training
from marwright.learning.dataset import Dataset, Part

Array = NDArray[np.float64]
RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parent.parent / "recipes"
ACCURACY, BUDGET, STREAMING = (RESULTS / f"{name}.csv" for name in ("time-to-accuracy", "fast-budget", "streaming"))
QUICK: dict[str, Any] = {
    "epochs": 6,
    "batch_size": 128,
    "lr": 0.004,
    "training.regularisation.crop": 0,
    "training.schedule.warmup": 0.5,
}
"""Put over recipes/cifar10.toml: a short schedule that is over when the accuracy is reached."""
LONGEST = 100
"""Epochs of the tutorials' loop, at most."""
MADV_DONTNEED = 4
"""Linux's."""
LOOPS = ("marwright", "tutorial, num_workers 0", "tutorial, num_workers 2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run, budget, streaming = (verbs.add_parser(name) for name in ("run", "budget", "streaming"))
    for one in (run, budget, streaming):
        one.add_argument("--data", type=Path, required=True, help="folder or zip of CIFAR-10")
        one.add_argument("--cache", type=Path, default=data.CACHE)
        one.add_argument("--threads", type=int, default=os.cpu_count())
    run.add_argument("--accuracy", type=float, nargs="+", default=[0.55, 0.60])
    run.add_argument("--seeds", type=int, default=3)
    run.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    budget.add_argument("--seconds", type=float, nargs="+", default=[120.0, 300.0])
    budget.add_argument("--seeds", type=int, default=1)
    streaming.add_argument("--pairs", type=int, default=5)
    streaming.add_argument("--examples", type=int, help="of the training part; all of it when not given")
    verbs.add_parser("show", help="print the tables")
    options = parser.parse_args()
    if options.verb != "show":
        torch.set_num_threads(options.threads)
        {"run": _run, "budget": _budget, "streaming": _streaming}[options.verb](options)
    print(section() or "nothing measured yet")


# Time to an accuracy


def _run(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for name in options.loops:
            chosen = recipe.load("cifar10", recipes_dir=RECIPES, overrides=QUICK | {"seed": seed})
            dataset = data.load(chosen, path=options.data, cache=options.cache)
            workers = int(name[-1]) if name[-1].isdigit() else 0
            steps = ours(chosen, dataset) if name == "marwright" else tutorial(dataset, seed=seed, workers=workers)
            spent, work, wanted = 0.0, 0.0, sorted(options.accuracy)
            for epoch, (seconds, processor, accuracy) in enumerate(steps, 1):
                spent, work = spent + seconds, work + processor
                while wanted and accuracy >= wanted[0]:
                    reached = {"accuracy": wanted.pop(0), "epochs": epoch, "s": spent, "cpu": "" if workers else work}
                    rows.append(_row(options, loop=name, seed=seed, **reached))
                    _write(ACCURACY, rows)
                print(f"{name}, seed {seed}, epoch {epoch}: {accuracy:.4f} after {spent:.1f} s", flush=True)
                if not wanted:
                    break
            rows += [_row(options, loop=name, seed=seed, accuracy=one, epochs=epoch, s="", cpu="") for one in wanted]
            _write(ACCURACY, rows)


def clocks() -> Array:
    """Seconds of the wall and of this process's work, its threads together."""
    return np.array([time.perf_counter(), time.process_time()])


def ours(chosen: recipe.Recipe, dataset: Dataset) -> Iterator[tuple[float, float, float]]:
    """Seconds and processor seconds of each epoch, and the test accuracy after it."""
    began = clocks()
    trainer = training.Trainer(chosen, dataset)
    while not trainer.done:
        trainer.epoch()
        seconds, work = clocks() - began
        scores = evaluation.evaluate(trainer.graph, dataset.test, classes=dataset.classes)
        yield seconds, work, scores.metrics["accuracy"]
        began = clocks()


class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A part as torchvision's CIFAR10 gives it: a PIL image made of an array, then `transform`."""

    def __init__(self, part: Part, transform: Callable[[Any], Tensor]) -> None:
        inputs, targets = part.take(torch.arange(len(part)))
        self.arrays: Any = np.ascontiguousarray(inputs.permute(0, 2, 3, 1).numpy())
        self.targets: list[int] = targets.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[i])), self.targets[i]


def tutorial(dataset: Dataset, *, seed: int, workers: int) -> Iterator[tuple[float, float, float]]:
    """The same of the usual loop, over the same examples."""
    from torchvision import transforms  # type: ignore[import-untyped]

    torch.manual_seed(seed)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    pictures, judged = Pictures(dataset.train, transform), Pictures(dataset.test, transform)
    loader = torch.utils.data.DataLoader(pictures, batch_size=64, shuffle=True, num_workers=workers)
    tests = torch.utils.data.DataLoader(judged, batch_size=512)
    net = nets.build("lenet", channels=3, height=32, width=32, classes=len(dataset.classes))
    criterion = nn.CrossEntropyLoss()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    for _ in range(LONGEST):
        began = clocks()
        net.train()
        for inputs, targets in loader:
            optimiser.zero_grad()
            criterion(net(inputs), targets).backward()
            optimiser.step()
        seconds, work = clocks() - began
        net.eval()
        with torch.inference_mode():
            right = sum(int((net(inputs).argmax(1) == targets).sum()) for inputs, targets in tests)
        yield seconds, work, right / len(judged)


# A fixed time


def _budget(options: argparse.Namespace) -> None:
    rows = []
    for seconds in options.seconds:
        for seed in range(options.seeds):
            chosen = recipe.load("cifar10-fast", recipes_dir=RECIPES, overrides={"seed": seed})
            dataset = data.load(chosen, path=options.data, cache=options.cache)
            rate = _rate(chosen, dataset)
            epochs = max(1, int(seconds * rate / len(dataset.train)))
            warmup = min(1.0, 0.2 * epochs)
            changed = {"seed": seed, "epochs": epochs, "training.schedule.warmup": warmup}
            trainer = training.Trainer(recipe.load("cifar10-fast", recipes_dir=RECIPES, overrides=changed), dataset)
            while not trainer.done:
                print(trainer.epoch(), flush=True)
            graph = trainer.best()
            scores = {}
            for mirror in (False, True):
                graph.net.mirror = mirror  # type: ignore[assignment]
                scores[mirror] = evaluation.evaluate(graph, dataset.test, classes=dataset.classes).metrics["accuracy"]
            spent = sum(row["seconds"] for row in trainer.curves)
            rows.append(
                _row(
                    options, budget=seconds, seed=seed, epochs=epochs, s=spent, plain=scores[False], mirror=scores[True]
                )
            )
            _write(BUDGET, rows)


def _rate(chosen: recipe.Recipe, dataset: Dataset, steps: int = 12) -> float:
    """Examples a second, of a few steps."""
    trainer, part = training.Trainer(chosen, dataset), dataset.train
    count = steps * chosen.training.batch_size
    trainer.part = dataclasses.replace(part, rows=part.rows[:count], targets=part.targets[:count])
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        trainer._pass(0)
        spent.append(time.perf_counter() - began)
    return len(trainer.part) / min(spent[1:])


# Memory and disk


def _streaming(options: argparse.Namespace) -> None:
    chosen = recipe.load("cifar10", recipes_dir=RECIPES, overrides={"epochs": options.pairs + 1})
    streamed = recipe.load("cifar10", recipes_dir=RECIPES, overrides={"epochs": 99, "data.memory_limit": 0})
    kinds = {
        "memory": training.Trainer(chosen, data.load(chosen, path=options.data, cache=options.cache)),
        "mapped, warm": training.Trainer(streamed, data.load(streamed, path=options.data, cache=options.cache)),
    }
    kinds["mapped, cold"] = kinds["mapped, warm"]
    rows: list[dict[str, Any]] = []
    for turn in range(options.pairs + 1):
        names = list(kinds)
        for name in names[turn % 3 :] + names[: turn % 3]:
            trainer = kinds[name]
            if options.examples:
                part = trainer.dataset.train
                few = slice(0, options.examples)
                trainer.part = dataclasses.replace(part, rows=part.rows[few], targets=part.targets[few])
            if name == "mapped, cold":
                _forget(trainer.part.inputs, options.cache)
            began = time.perf_counter()
            trainer._pass(0)
            spent = time.perf_counter() - began
            if turn:  # the first is for the processor's and torch's own caches
                rows.append(_row(options, turn=turn, kind=name, s=spent, rate=len(trainer.part) / spent))
    _write(STREAMING, rows)


def _forget(inputs: Any, cache: Path) -> None:
    """Drop the decoded pictures from memory: first from this process's map, then from the system's page cache."""
    page, start = os.sysconf("SC_PAGE_SIZE"), inputs.data_ptr()
    first = start - start % page
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(start + inputs.nbytes - first), MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")
    for path in (cache / "decoded").glob("*.npy"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Tables


def _row(options: argparse.Namespace, **values: Any) -> dict[str, Any]:
    about = {
        "machine": platform.machine(), "cores": os.cpu_count(), "threads": options.threads, "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    return about | {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with files.replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def section() -> str | None:
    """What is measured of training, as markdown."""
    parts = [part for part in (_accuracy_table(), _budget_table(), _streaming_table()) if part]
    return "\n\n".join(["## Training", *parts]) + "\n" if parts else None


def _accuracy_table() -> str:
    rows = _read(ACCURACY)
    if not rows:
        return ""
    lines = ["### Time to an accuracy (cifar10, LeNet, test part)", "", _where(rows[0]), ""]
    lines += ["| accuracy | loop | seconds, median (each) | epochs | times ours | processor seconds | times ours |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for accuracy in sorted({float(row["accuracy"]) for row in rows}):
        of = {
            name: [row for row in rows if row["loop"] == name and float(row["accuracy"]) == accuracy] for name in LOOPS
        }
        base = [float(row["s"]) for row in of[LOOPS[0]] if row["s"]]
        work = [float(row["cpu"]) for row in of[LOOPS[0]] if row["cpu"]]
        for name, found in of.items():
            times = [float(row["s"]) for row in found if row["s"]]
            if not found:
                continue
            if len(times) < len(found):
                lines.append(
                    f"| {accuracy:.0%} | {name} | not reached by {len(found) - len(times)} of {len(found)} | | | | |"
                )
                continue
            ratio = f"{statistics.median(times) / statistics.median(base):.1f}" if base else ""
            each = ", ".join(f"{one:.1f}" for one in times)
            epochs = ", ".join(row["epochs"] for row in found)
            spent = [float(row["cpu"]) for row in found if row["cpu"]]
            of_work = f"{statistics.median(spent):.0f} | " if spent else " | "
            of_work += f"{statistics.median(spent) / statistics.median(work):.1f}" if spent and work else ""
            middle = f"{statistics.median(times):.1f} ({each})"
            lines.append(f"| {accuracy:.0%} | {name} | {middle} | {epochs} | {ratio} | {of_work} |")
    return "\n".join(lines)


def _budget_table() -> str:
    rows = _read(BUDGET)
    if not rows:
        return ""
    lines = ["### cifar10-fast in a fixed time", "", _where(rows[0]), ""]
    lines += ["| seconds allowed | seed | epochs | seconds | test | with mirror images |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {float(row['budget']):.0f} | {row['seed']} | {row['epochs']} | {float(row['s']):.0f} | "
        f"{100 * float(row['plain']):.2f} % | {100 * float(row['mirror']):.2f} % |"
        for row in rows
    ]
    return "\n".join(lines)


def _streaming_table() -> str:
    rows = _read(STREAMING)
    if not rows:
        return ""
    lines = ["### Examples a second, from memory and from a disk (cifar10)", "", _where(rows[0]), ""]
    lines += ["| pictures are | examples/s, median (least to most) | of memory's |", "|---|---|---|"]
    of = {kind: sorted(float(row["rate"]) for row in rows if row["kind"] == kind) for kind in {r["kind"] for r in rows}}
    base = statistics.median(of["memory"])
    for kind, rates in sorted(of.items()):
        middle = statistics.median(rates)
        lines.append(f"| {kind} | {middle:.0f} ({rates[0]:.0f} to {rates[-1]:.0f}) | {middle / base:.0%} |")
    return "\n".join(lines)


def _where(row: dict[str, str]) -> str:
    return (
        f"{row['cores']} cores ({row['machine']}), {row['threads']} threads, torch {row['torch']}; load {row['load']}."
    )


if __name__ == "__main__":
    main()
