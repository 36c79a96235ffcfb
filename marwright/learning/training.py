"""From a recipe and its data to a finished run folder.

    run = training.train(recipe, dataset, Path("runs"))
    graph = training.load_graph(run)
    training.train(recipe, more, Path("runs"), start=run)      # its weights are the initial ones
    training.train(recipe, more, Path("runs"), start=run, method=methods.named("replay"))

All that is random comes from (seed, what for, epoch): an interrupted run that is resumed after any whole epoch ends
with the weights, bit for bit, of one that never stopped. The best epoch on the validation part is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor
from torch.nn import functional

from handlers.nets import ServingGraph
from marwright import files
from marwright.errors import RunError
from marwright.learning import (
    acceleration,
    augmentation,
    distributed,
    evaluation,
    golden,
    graphs,
    methods,
    optimisation,
    progressbar,
    provenance,
    reading,
    reference,
    reporting,
)
from marwright.learning.dataset import Dataset, order, pieces
from marwright.learning.methods import Batch, Method, Plan
from marwright.learning.recipe import Recipe
from marwright.runs import Run

CHECKPOINT = "checkpoint.pt"
Row = progressbar.Row
"""One epoch: `epoch` (from 1), `lr` at its end, `train_loss`, `validation_loss`, `validation_<metric>`, `seconds`."""

load_graph = graphs.load


def train(
    recipe: Recipe,
    dataset: Dataset,
    run_dir_root: Path,
    *,
    start: Run | None = None,
    method: Method | None = None,
    resume: bool = False,
    progress: bool = True,
    watch: Callable[[Row], None] | None = None,
) -> Run:
    """A finished run; at once if the same was trained before. `watch` is called after every whole epoch.
    In a team of processes (`distributed.joined`) all call it alike; its leader alone writes, and watches.

    `start`'s weights are the initial ones; RunError if it has another net or other classes. `method` says what is
    learned from, and for how long; without one it is everything, as the recipe says.
    `resume` goes on from the last whole epoch, where there is one. Ctrl-C leaves that epoch's checkpoint and nothing
    half-written.
    """
    start = methods.start_of(method, start)
    run, team = Run(run_dir_root / provenance.run_id(recipe, dataset, start, method)), distributed.team()
    if team.any((leaders := team.told(run.id)) != run.id):
        raise RunError(
            f"not all processes would train {leaders}, which is the leader's (process {team.rank}: {run.id})",
            hint="all machines need the same code, recipe and data",
        )
    if team.told(run.finished):
        return run
    lock: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if team.leader:
        run_dir_root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir_root / f".{run.id}.lock")
    with lock:  # a second training of the same waits, and finds it done
        if team.told(run.finished):
            return run
        return _train(run, recipe, dataset, start=start, method=method, resume=resume, progress=progress, watch=watch)


def _train(
    run: Run,
    recipe: Recipe,
    dataset: Dataset,
    *,
    start: Run | None,
    method: Method | None,
    resume: bool,
    progress: bool,
    watch: Callable[[Row], None] | None,
) -> Run:
    started, team = time.perf_counter(), distributed.team()
    trainer, checkpoint = Trainer(recipe, dataset, start, method), run.path / CHECKPOINT
    if not team.leader:
        return _follow(run, trainer)
    if not resume and run.path.exists():
        shutil.rmtree(run.path)
    for part in run.path.glob(".*.part"):  # of a training that was killed while it wrote
        part.unlink(missing_ok=True)
    about = provenance.about(recipe, dataset, run=run.id, start=start, method=method)
    if trainer.plan is not None:
        about["learned_from"] = {"new": len(trainer.plan.new), "buffer": len(trainer.plan.buffer)}
    about["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    files.write_json(run.path / "run.json", about)
    files.write_json(run.path / "recipe.json", recipe.to_dict())
    files.write_json(run.path / "split.json", dict(dataset.split))
    if team.size > 1:
        about["processes"] = team.size
    state = torch.load(checkpoint, map_location=trainer.device, weights_only=True) if checkpoint.is_file() else None
    if (state := team.told(state)) is not None:
        trainer.restore(state)
        about["resumed_after_epoch"] = len(trainer.curves)
    with progressbar.shown(recipe.name, trainer.choice.epochs, enabled=progress) as advance:
        advance(trainer.curves)
        while not trainer.done:
            row = trainer.epoch()
            _save(checkpoint, trainer.state())
            advance(trainer.curves)
            if watch is not None:
                watch(row)
    graph = trainer.best()
    _save(run.path / "weights.pt", {name: value.contiguous() for name, value in graph.state_dict().items()})
    scores = evaluation.evaluate(graph, dataset.test, classes=dataset.classes)
    spec = graphs.spec(recipe, dataset, graph, run=run.id, metrics=scores.metrics)
    files.write_text(run.path / "spec.json", spec.to_json())
    golden.write(dataset, run.path)
    reference.write(graph, dataset.validation, run.path)
    files.write_json(run.path / "curves.json", trainer.curves)
    about |= {
        "epochs": len(trainer.curves),
        "best_epoch": trainer.best_epoch,
        "stopped_early": len(trainer.curves) < trainer.choice.epochs,
        "seconds": {
            "training": round(sum(row["seconds"] for row in trainer.curves), 3),
            "total": round(time.perf_counter() - started, 3),
        },
    }
    files.write_json(run.path / "run.json", about)
    files.write_text(run.path / "report.html", reporting.page(about, recipe, trainer.curves, scores, dataset))
    files.write_json(run.path / "evaluation.json", {"part": "test", **scores.to_dict()})
    checkpoint.unlink(missing_ok=True)
    team.told(True)
    return run


def _follow(run: Run, trainer: Trainer) -> Run:
    """What those do that are not the leader: the same steps, and no files."""
    if (state := trainer.team.told(None)) is not None:
        trainer.restore(state)
    while not trainer.done:
        trainer.epoch()
    trainer.team.told(True)  # it is written
    return run


class Trainer:
    """One training under way: `epoch()` until `done`; `state()` after any epoch is enough to go on."""

    def __init__(
        self, recipe: Recipe, dataset: Dataset, start: Run | None = None, method: Method | None = None
    ) -> None:
        self.recipe = recipe
        self.dataset = dataset
        self.part, self.validation = dataset.train, dataset.validation
        self.plan: Plan | None = None
        self.answers: Tensor | None = None
        self.choice = recipe.training
        self.team = distributed.team()
        self.device = self.team.device
        acceleration.require(self.choice, self.device)
        with self._seeded("weights", 0):
            graph = graphs.build(recipe, dataset)
            if start is not None:
                graphs.warm(graph, start, recipe, dataset)
        self.graph = graph.to(self.device)
        self.layout = acceleration.layout(self.graph.net, self.device)
        if recipe.task == "classification":
            self.graph = self.graph.to(memory_format=self.layout)
        if method is not None and not method.everything:
            self._follow(method, start)
        self.optimiser = optimisation.optimiser(self.choice.optimiser, self.graph.net, l2=self.choice.regularisation.l2)
        self._net = acceleration.called(self.team.shared(self.graph.net), self.choice)
        self._sides: tuple[int, Tensor] | None = None
        self.curves: list[Row] = []
        self.best_epoch = 0
        self.best_state = _copy(self.graph)

    @property
    def done(self) -> bool:
        patience = self.choice.regularisation.patience
        waited = len(self.curves) - self.best_epoch
        return len(self.curves) >= self.choice.epochs or (patience is not None and waited >= patience)

    def epoch(self) -> Row:
        """Train through the training part once, judge on the validation part, keep the best."""
        began = time.perf_counter()
        number = len(self.curves)
        with self._seeded("dropout", number):
            loss, lr = self._pass(number)
        judged, metric, score = self._judged()
        if not (math.isfinite(loss) and math.isfinite(judged)):
            raise RunError(
                f"training came apart in epoch {number + 1}: the loss is {loss}",
                hint=f"try a lower learning rate than {self.choice.optimiser.lr:g} (`--lr`)",
            )
        self.curves.append(
            {
                "epoch": number + 1,
                "lr": lr,
                "train_loss": loss,
                "validation_loss": judged,
                f"validation_{metric}": score,
                "seconds": round(time.perf_counter() - began, 4),
            }
        )
        if best_epoch(self.curves) == number + 1:
            self.best_epoch, self.best_state = number + 1, _copy(self.graph)
        return self.curves[-1]

    def _judged(self) -> tuple[float, str, float]:
        """The loss on the validation part, the metric's name and its value: what the leader finds."""
        found = (0.0, "", 0.0)
        if self.team.leader:
            classes, frozen = self.dataset.classes, self._frozen
            scores = evaluation.evaluate(self.graph, self.validation, classes=classes, embedded=frozen)
            metric = next(iter(scores.metrics))
            found = (scores.loss, metric, scores.metrics[metric])
        return self.team.told(found)

    def best(self) -> ServingGraph:
        """The graph with the best epoch's weights, on the CPU."""
        self.graph.load_state_dict(self.best_state)
        return self.graph.to("cpu").to(memory_format=torch.contiguous_format).eval()

    def state(self) -> dict[str, Any]:
        return {
            "net": self.graph.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "best": self.best_state,
            "best_epoch": self.best_epoch,
            "curves": self.curves,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.graph.load_state_dict(state["net"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.best_state, self.best_epoch, self.curves = state["best"], state["best_epoch"], list(state["curves"])

    def _pass(self, number: int) -> tuple[float, float]:
        """One pass over the training part: the mean loss, and the last learning rate."""
        part, choice, regular = self.part, self.choice, self.choice.regularisation
        generator = torch.Generator().manual_seed(_seed(choice.seed, "order", number))
        if self.plan is not None:
            batches = self.plan.batches(part.inputs, generator=generator)
        else:
            shuffled = order(len(part), part.inputs, generator=generator)
            batches = [Batch(positions) for positions in pieces(shuffled, choice.batch_size)]
        if len(batches) > 1 and len(batches[-1]) == 1:  # a norm cannot learn from one example
            batches = batches[:-1]
        losses = [row["validation_loss"] for row in self.curves]
        total, lr = torch.zeros((), device=self.device), 0.0
        shares = [self.team.take(len(batch)) for batch in batches]
        mine = [batch.positions[share.here] for batch, share in zip(batches, shares, strict=True)]
        read = reading.batches(part, mine, ahead=self.dataset.streamed and not self._frozen)
        self.graph.train()
        for step, (batch, share, (inputs, targets)) in enumerate(zip(batches, shares, read, strict=True)):
            # The middle of a step: a warm-up does not waste its first one, a cosine not its last.
            now = number + (step + 0.5) / len(batches)
            lr = choice.optimiser.lr * optimisation.factor(
                choice.schedule, epoch=now, epochs=choice.epochs, losses=losses
            )
            optimisation.set_lr(self.optimiser, lr)
            self.team.share = share
            inputs, targets = inputs.to(self.device), targets.to(self.device)
            if (regular.flip or regular.crop) and not self._frozen:
                moves = self._moves(batch, number, generator)
                inputs = augmentation.moved(inputs, moves.of(share.here, self.device))
            loss = self._loss(inputs, targets, *batch.again)
            self.optimiser.zero_grad(set_to_none=True)
            (loss * share.weight if self.team.size > 1 else loss).backward()  # type: ignore[no-untyped-call]
            if regular.l1:
                optimisation.penalise(self.graph.net.parameters(), regular.l1)
            self.optimiser.step()
            total += loss.detach() * (len(batch) * share.weight / self.team.size)
        return float(self.team.summed(total)) / sum(map(len, batches)), lr

    def _moves(self, batch: Batch, number: int, generator: torch.Generator) -> augmentation.Moves:
        """What chance says of the whole batch, in whichever process."""
        regular, mirrored = self.choice.regularisation, None
        if regular.alternate:
            if self._sides is None or self._sides[0] != number:
                same = torch.Generator().manual_seed(_seed(self.choice.seed, "sides", 0))
                self._sides = number, augmentation.sides(len(self.part), epoch=number, generator=same)
            mirrored = self._sides[1][batch.positions]
        return augmentation.draw(
            len(batch), flip=regular.flip, crop=regular.crop, generator=generator, mirrored=mirrored
        )

    def _loss(self, inputs: Tensor, targets: Tensor, again: Tensor | None = None) -> Tensor:
        """Of one batch, whose last examples are those `again` of the buffer."""
        out = self._out(inputs)
        if again is None or self.plan is None:
            return self._error(out, targets)
        method, first = self.plan.method, len(targets) - len(again)
        error = self._error(out[:first], targets[:first]) + method.beta * self._error(out[first:], targets[first:])
        if self.answers is not None:
            error = error + method.alpha * functional.mse_loss(out[first:], self.answers[again])
        return error / (1.0 + method.beta)

    def _out(self, inputs: Tensor) -> Tensor:
        """N×K logits, or N×1 in the target's own scale; of embeddings where the net below the head is frozen."""
        if self._frozen:
            return self.graph.net.head(inputs)
        x = self.graph.normalise(inputs)
        if self.graph.task == "classification":
            x = x.contiguous(memory_format=self.layout)
        with acceleration.computing(self.choice, self.device):
            out = self._net(x)
        return out.float()

    def _error(self, out: Tensor, targets: Tensor) -> Tensor:
        if self.graph.task == "classification":
            return functional.cross_entropy(out, targets, label_smoothing=self.choice.regularisation.label_smoothing)
        wanted = (targets - self.graph.target_mean) / self.graph.target_std
        return functional.mse_loss(out[:, 0], wanted)

    @property
    def _frozen(self) -> bool:
        return self.plan is not None and self.plan.method.frozen

    def _follow(self, method: Method, start: Run | None) -> None:
        """Make the plan, and once and for all what it needs of the net as it begins."""
        if start is None:
            raise RunError(
                f"method {method.name} goes on from a run, and there is none", hint="train from scratch: method scratch"
            )
        if self.team.size > 1:
            raise RunError(
                f"method {method.name} is for one process, and this is a team of {self.team.size}",
                hint="run it without torchrun; only training from scratch or warm is shared",
            )
        plan = methods.plan(method, self.choice, self.dataset, start)
        if method.frozen:
            used = torch.cat([plan.new, plan.buffer])
            everywhere = torch.arange(len(self.validation))
            self.part = methods.embedded(self.graph, self.part, used)
            self.validation = methods.embedded(self.graph, self.validation, everywhere)
            methods.freeze(self.graph.net, self.part.take(everywhere[:1])[0].to(self.device))
            numbers = torch.arange(len(used))
            plan = replace(plan, new=numbers[: len(plan.new)], buffer=numbers[len(plan.new) :])
        elif method.alpha and len(plan.buffer):
            self.answers = methods.logits(self.graph, self.part, plan.buffer)
        self.plan, self.choice = plan, plan.training

    @contextlib.contextmanager
    def _seeded(self, purpose: str, number: int) -> Iterator[None]:
        """torch's own randomness (initial weights, dropout) from the seed; afterwards as it was before."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(_seed(self.choice.seed, purpose, number))
            yield


def best_epoch(curves: list[Row]) -> int:
    """The epoch (from 1) with the highest validation accuracy, the lower loss of equals; or with the lowest loss."""
    return int(max(curves, key=lambda row: (row.get("validation_accuracy", 0.0), -row["validation_loss"]))["epoch"])


def _seed(seed: int, purpose: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()[:7])


def _copy(graph: ServingGraph) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in graph.state_dict().items()}


def _save(path: Path, state: dict[str, Any]) -> None:
    """torch.save, atomically. By way of memory: saved to a file, its name would be in the bytes."""
    stream = io.BytesIO()
    torch.save(state, stream)
    with files.replacing(path) as temporary:
        temporary.write_bytes(stream.getbuffer())
