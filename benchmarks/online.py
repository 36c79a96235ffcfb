"""What each method of learning on makes of a stream, by the training that `marwright retrain` does.

    python benchmarks/online.py run digits
    python benchmarks/online.py run mnist --data mnist.zip
    python benchmarks/online.py run cifar10 --data cifar10.zip --jobs 2
    python benchmarks/online.py show

A stream is a first data set and windows of labelled examples that come after it. Each window is answered first, by the
model that is there, and learned from afterwards. Each line of benchmarks/results/online-<set>.csv is one update;
`show` makes docs/online.md and its plots from all of them.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import online_report
import torch
from PIL import Image
from torch import Tensor

from handlers.nets import ServingGraph
from handlers.spec import ImageInput
from marwright import files
from marwright.learning import corruptions, data, methods, recipe, training
from marwright.learning.dataset import Dataset, Part
from marwright.learning.examples import Body
from marwright.learning.methods import Method
from marwright.learning.recipe import Recipe
from marwright.release import gate
from marwright.release.gate import Observed
from marwright.release.policy import JudgePolicy, LearnPolicy
from marwright.runs import Run

RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parent.parent / "recipes"
SCENARIOS = ("shift", "classes", "judged", "late", "same")
VALIDATION = 8
"""Of the examples that come, one in so many is for choosing the best epoch."""


@dataclass(frozen=True)
class Size:
    """How much of a set is used, and how: what makes the whole of it fit into minutes of two cores."""

    overrides: dict[str, Any]
    first: int
    window: int
    windows: int
    test: int


SIZES = {
    "digits": Size(
        {"data.height": 8, "data.width": 8, "epochs": 20, "batch_size": 32, "lr": 0.002},
        first=500,
        window=110,
        windows=6,
        test=359,
    ),
    "mnist": Size({"net.name": "lenet", "epochs": 10, "batch_size": 32}, first=1800, window=350, windows=6, test=2000),
    "cifar10": Size({"epochs": 10, "batch_size": 32}, first=1800, window=350, windows=6, test=2000),
}


@dataclass(frozen=True)
class Stream:
    """One scenario. `store` holds all pictures, `truth` their labels, `given` the labels that come back.

    `first` and `windows` are rows of it; the labels of a window come `delay` windows later. `tasks` are rows to test
    on; task j is learned when window `learned[j]` was (−1: by the first data set).
    """

    store: Tensor
    truth: Tensor
    given: Tensor
    first: Tensor
    windows: list[Tensor]
    tasks: list[Tensor]
    learned: list[int]
    old: Tensor
    """Rows that the judge has of the first data set's kind."""
    input: ImageInput
    classes: tuple[str, ...]
    delay: int = 0
    judged: bool = False


@dataclass
class Line:
    """One update. Step 0 is the first data set; accuracies are of what answers after the step."""

    dataset: str
    scenario: str
    seed: int
    method: str
    step: int
    labels: int = 0
    """That have come back by now."""
    examples: int = 0
    epochs: int = 0
    cpu_seconds: float = 0.0
    """Of the training: from the call until the last epoch, validation and what the method prepares included."""
    cpu_total: float = 0.0
    """Until the run is finished: the test part, golden examples and the reference too; the report is not drawn."""
    window: int = 0
    window_right: int = 0
    """Answers to the step's window before it was learned from."""
    verdict: str = ""
    accuracy: float = 0.0
    """On all tasks seen so far."""
    tasks: str = ""
    """Accuracy on each task, with blanks between."""
    untrained: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure, and keep the raw lines")
    run.add_argument("dataset", choices=sorted(SIZES))
    run.add_argument("--data", type=Path, help="folder or zip, for sets that need one")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    run.add_argument("--methods", nargs="+", choices=sorted(methods.METHODS), default=list(methods.METHODS))
    run.add_argument("--part", choices=("test", "validation"), default="test", help="what the accuracies are of")
    run.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    run.add_argument("--cache", type=Path, default=data.CACHE)
    run.add_argument("--out", type=Path, help="instead of benchmarks/results/online-<set>.csv")
    verbs.add_parser("show", help="make docs/online.md and its plots")
    options = parser.parse_args()
    if options.verb == "show":
        online_report.write()
        return
    measured(options)


def measured(options: argparse.Namespace) -> None:
    """All of it, a process for each scenario and seed; the file has what is done."""
    began = time.perf_counter()
    whole = data.load(_recipe(options.dataset), path=options.data, cache=options.cache, progress=False)
    size, lines = SIZES[options.dataset], []
    jobs = [
        (options.dataset, options.methods, scenario, seed, made(scenario, whole, size, seed, part=options.part))
        for scenario in options.scenarios
        for seed in options.seeds
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(streamed, *job) for job in jobs]):
            lines += done.result()
            _keep(lines, options.out or RESULTS / f"online-{options.dataset}.csv", str(size))
            print(f"{lines[-1].scenario}, seed {lines[-1].seed}: {time.perf_counter() - began:.0f} s", flush=True)


def _keep(lines: list[Line], path: Path, size: str) -> None:
    """What is done, in order."""
    order = list(methods.METHODS)
    lines = sorted(lines, key=lambda one: (SCENARIOS.index(one.scenario), one.seed, order.index(one.method), one.step))
    names, stream = [field.name for field in fields(Line)], io.StringIO()
    print(f"# {_processor()}, {os.cpu_count()} cores, one thread each; torch {torch.__version__}; {size}", file=stream)
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(getattr(line, name)) for name in names} for line in lines)
    files.write_text(path, stream.getvalue())


def streamed(dataset: str, names: list[str], scenario: str, seed: int, stream: Stream) -> list[Line]:
    """One stream through every method, all from the same first run."""
    torch.set_num_threads(1)
    chosen = _recipe(dataset, seed)
    lines = []
    # A page of plots for each of hundreds of runs would take longer than most of the updates.
    with tempfile.TemporaryDirectory() as folder, mock.patch("marwright.learning.reporting.page", return_value=""):
        start, spent = _trained(chosen, _dataset(stream, stream.first), Path(folder), None, None)
        for name in names:
            line = Line(dataset, scenario, seed, name, 0, examples=len(stream.first), **spent)
            lines += list(_followed(chosen, stream, start, methods.named(name), Path(folder), line))
    return lines


def _followed(chosen: Recipe, stream: Stream, start: Run, method: Method, folder: Path, line: Line) -> Iterator[Line]:
    """The lines of one method."""
    champion, graph = start, training.load_graph(start)
    known, learned = stream.first, stream.first
    untrained = training.Trainer(chosen, _dataset(stream, known)).best()
    line.untrained = _spaced(_accuracies(untrained, stream))
    _judge_tasks(line, graph, stream, -1)
    yield line
    for step, window in enumerate(stream.windows):
        line = Line(line.dataset, line.scenario, line.seed, line.method, step + 1)
        line.window, line.window_right = len(window), _right(graph, stream, window)
        if step >= stream.delay:
            known = torch.cat([known, stream.windows[step - stream.delay]])
        line.labels = len(known) - len(stream.first)
        unseen = known[len(learned) :]
        held = unseen[:0]
        if stream.judged:  # the latest are the judge's alone, and are learned from a turn later
            held = unseen[len(unseen) - round(LearnPolicy().judge_share * len(unseen)) :]
        learn = known[: len(known) - len(held)]
        if len(learn) > len(learned):
            examples = _dataset(stream, learn)
            run, spent = _trained(chosen, examples, folder, champion, method)
            line.examples = len(examples.train)
            for name, value in spent.items():
                setattr(line, name, value)
            challenger = training.load_graph(run)
            line.verdict = _verdict(graph, challenger, stream, held) if stream.judged else ""
            if line.verdict in ("", "pass"):
                champion, graph, learned = run, challenger, learn
        _judge_tasks(line, graph, stream, step - stream.delay)
        yield line


def made(scenario: str, whole: Dataset, size: Size, seed: int, *, part: str) -> Stream:
    """A scenario's pictures and labels; all that is random comes from the seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    count = size.first + size.window * size.windows
    judged_on = whole.test if part == "test" else whole.validation
    pool = torch.randperm(len(whole.train), generator=generator)[:count]
    held = torch.randperm(len(judged_on), generator=generator)[: size.test]
    (inputs, labels), (tests, truth) = whole.train.take(pool), judged_on.take(held)
    rows, of_test = torch.arange(count), torch.arange(count, count + len(held))
    store, labels = torch.cat([inputs, tests]), torch.cat([labels, truth])
    first = rows[: size.first]
    windows = list(rows[size.first :].split(size.window))
    half = len(held) // 2
    old, of_test = of_test[:half], of_test[half:]  # what the judge saw is no test
    if scenario == "classes":
        return _by_class(whole, store, labels, rows, of_test, old)
    tasks, learned, given, delay = [of_test], [-1], labels.clone(), 0
    if scenario in ("shift", "late"):
        turn = len(windows) // 2
        bad = torch.cat([torch.cat(windows[turn:]), torch.arange(len(store), len(store) + len(of_test))])
        store, labels = torch.cat([store, store[of_test]]), torch.cat([labels, labels[of_test]])
        store[bad] = torch.from_numpy(shifted(store[bad].numpy(), seed))
        given = labels.clone()
        tasks.append(bad[-len(of_test) :])
        learned = [turn - 1, len(windows) - 1]
    if scenario == "late":
        delay = 1
        wrong = rows[size.first :][torch.rand(count - size.first, generator=generator) < 0.1]
        other = torch.randint(1, len(whole.classes), (len(wrong),), generator=generator)
        given[wrong] = (labels[wrong] + other) % len(whole.classes)
    return Stream(
        store, labels, given, first, windows, tasks, learned, old, whole.input, whole.classes, delay,
        judged=scenario == "judged",
    )  # fmt: skip


def _by_class(whole: Dataset, store: Tensor, labels: Tensor, rows: Tensor, of_test: Tensor, old: Tensor) -> Stream:
    """Two classes at a time, each pair in two windows; the first pair is the first data set."""
    pairs = [rows[(labels[rows] // 2) == pair] for pair in range(5)]
    windows = [half for pair in pairs[1:] for half in pair.tensor_split(2)]
    tasks = [of_test[(labels[of_test] // 2) == pair] for pair in range(5)]
    return Stream(store, labels, labels, pairs[0], windows, tasks, [-1, 1, 3, 5, 7], old, whole.input, whole.classes)


def shifted(pictures: Any, seed: int) -> Any:
    """Dark, then noisy, as a camera's are at night."""
    dark = corruptions.corrupt(pictures, "darkness", 3, seed=seed)
    return corruptions.corrupt(dark, "noise", 2, seed=seed)


def _dataset(stream: Stream, known: Tensor) -> Dataset:
    """What `data.load` would give of those rows: every row after the first data set's is newly labelled."""
    store, of_first = stream.store, len(stream.first)
    chosen = torch.tensor([_key(int(row)) % VALIDATION == 0 for row in known])
    rows = {"train": known[~chosen].sort().values, "validation": known[chosen].sort().values, "test": stream.tasks[0]}
    digests = {int(row): f"{_key(int(row)):064x}" for row in known[of_first:]}
    label = {row: stream.classes[int(stream.given[row])] for row in digests}
    own = _digest(store[stream.first], stream.given[stream.first])

    def raw(row: int) -> Body:
        picture, out = store[row].numpy(), io.BytesIO()
        Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)).save(out, "PNG")
        return Body(out.getvalue(), ".png")

    parts = {name: Part(name, store, where, stream.given[where]) for name, where in rows.items()}
    return Dataset(
        input=stream.input,
        classes=stream.classes,
        target="",
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        digest=_digest(store[known], stream.given[known]),
        split={"own": own, "new": {digests[row]: label[row] for row in digests}, "parts": {}},
        names=[str(row) for row in range(len(store))],
        raw=raw,
        digests=digests,
    )


def _trained(
    chosen: Recipe, examples: Dataset, folder: Path, start: Run | None, method: Method | None
) -> tuple[Run, dict[str, Any]]:
    """A finished run, and the processor's seconds that it took (this process alone, one thread)."""
    began = time.process_time()
    epochs = [began]
    run = training.train(
        chosen,
        examples,
        folder,
        start=start,
        method=method,
        progress=False,
        watch=lambda row: epochs.append(time.process_time()),
    )
    return run, {
        "epochs": len(epochs) - 1,
        "cpu_seconds": epochs[-1] - began,
        "cpu_total": time.process_time() - began,
    }


def _verdict(champion: ServingGraph, challenger: ServingGraph, stream: Stream, held: Tensor) -> str:
    """As the loop's judge asks: nothing forgotten beyond the bound, and better on what came last."""
    policy, outcomes = JudgePolicy(), []
    if len(held) < policy.min_examples:
        return "inconclusive"
    for rows, margin in ((stream.old, policy.max_forgetting), (held, 0.0)):
        limits = gate.GatePolicy(margin=margin, confidence=policy.confidence, looks=1)
        observed = [
            Observed(name, _outputs(graph, stream.store[rows]))
            for name, graph in (("champion", champion), ("challenger", challenger))
        ]
        outcomes.append(gate.decide(*observed, stream.given[rows].numpy(), limits).outcome)
    return next((name for name in ("fail", "inconclusive") if name in outcomes), "pass")


def _judge_tasks(line: Line, graph: ServingGraph, stream: Stream, window: int) -> None:
    found = _accuracies(graph, stream)
    begun = [j for j in range(len(found)) if j == 0 or stream.learned[j - 1] < window]
    weights = [len(stream.tasks[j]) for j in begun]
    line.accuracy = float(np.average([found[j] for j in begun], weights=weights))
    line.tasks = _spaced(found)


def _accuracies(graph: ServingGraph, stream: Stream) -> list[float]:
    return [_right(graph, stream, rows) / len(rows) for rows in stream.tasks]


def _right(graph: ServingGraph, stream: Stream, rows: Tensor) -> int:
    answers = _outputs(graph, stream.store[rows]).argmax(axis=1)
    return int((answers == stream.truth[rows].numpy()).sum())


def _outputs(graph: ServingGraph, inputs: Tensor) -> Any:
    with torch.inference_mode():
        return torch.cat([graph(chunk)[0] for chunk in inputs.split(512)]).double().numpy()


def _recipe(name: str, seed: int = 0) -> Recipe:
    return recipe.load(name, recipes_dir=RECIPES, overrides={**SIZES[name].overrides, "seed": seed})


def _key(row: int) -> int:
    return int.from_bytes(hashlib.sha256(str(row).encode()).digest()[:8])


def _digest(inputs: Tensor, labels: Tensor) -> str:
    return hashlib.sha256(inputs.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


def _spaced(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _cell(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
