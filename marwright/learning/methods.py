"""How a training goes on from a run: what it looks at again, for how long, and what holds the old answers in place.

    method = methods.named("replay")
    run = training.train(recipe, dataset, Path("runs"), start=champion, method=method)

| method | learns from | begins with |
|---|---|---|
| `scratch` | everything | fresh weights |
| `warm` | everything | the start's weights |
| `finetune` | what the start has not learned from | the start's weights |
| `replay` | that, and as many examples from a buffer of what it has learned from, in each batch | the start's weights |
| `derpp` | the same; on the buffer it also keeps to the start's own logits (DER++) | the start's weights |
| `head` | the same, but all of the net below its head stays as it is | the start's weights |

Replay: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning". DER++: Buzzega et al. 2020, "Dark
Experience for General Continual Learning"; here the same draw from the buffer is used for both of its terms.

The buffer is a list of positions in the training part, made anew for each training: nothing is copied, so an example
that is forgotten is gone from it too. `Trainer` does the training; a `Plan` tells it what is in a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from handlers.nets import Net, ServingGraph
from marwright.errors import RunError, SettingsError
from marwright.learning.dataset import Dataset, Inputs, Part, order, pieces
from marwright.learning.tables import Cosine, Training
from marwright.runs import Run

CHUNK = 512
EPOCHS = 5
"""Of a plan, at most. An epoch ends with the validation part, so many short ones would cost more than they train."""
WARMUP = 0.1
"""Of a plan's epochs: an optimiser without a memory begins gently."""

Choice = TypeVar("Choice", bound="Run | None")


@dataclass(frozen=True)
class Method:
    """One way to learn from more. Numbers are defaults that docs/online.md measured."""

    name: str
    starts: bool = True
    """Begins with the weights of a run."""
    everything: bool = False
    """Learns from the whole training part, as the recipe says; nothing below has a meaning then."""
    budget: float = 0.0
    """Examples that may be looked at, as a share of what a training from scratch would look at. At least one pass; and
    no new example is seen more often than from scratch."""
    lr: float = 1.0
    """Times the recipe's learning rate; then half a cosine down to 0."""
    buffer: int = 0
    """Examples, at most, of those that the start has learned from."""
    alpha: float = 0.0
    """Weight of the squared distance to the start's logits, on the buffer's examples."""
    beta: float = 1.0
    """Weight of the buffer's labels; 1 is that of the new ones."""
    frozen: bool = False
    """Only the net's head learns, from embeddings that are computed once. Pictures are not augmented then."""


METHODS = {
    method.name: method
    for method in (
        Method("scratch", starts=False, everything=True),
        Method("warm", everything=True),
        Method("finetune", budget=0.08, lr=2.0),
        Method("replay", budget=0.16, lr=2.0, buffer=2000),
        Method("derpp", budget=0.16, lr=2.0, buffer=2000, alpha=0.05),
        Method("head", budget=0.5, lr=3.0, buffer=2000, frozen=True),
    )
}


@dataclass(frozen=True)
class Batch:
    """`positions` in the training part; the last of them are examples `again[0]` of the buffer, where it is used."""

    positions: Tensor
    again: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Plan:
    """A method on one data set: `new` and `buffer` are positions in its training part (int64), `training` how."""

    method: Method
    training: Training
    new: Tensor
    buffer: Tensor
    length: int
    """New examples in an epoch, those seen again counted again."""

    def batches(self, inputs: Inputs, *, generator: torch.Generator) -> list[Batch]:
        """One epoch: the new examples, none once more before all others, each batch with as many of the buffer."""
        new = _drawn(self.new, self.length, inputs, generator)
        if not len(self.buffer):
            return [Batch(positions) for positions in pieces(new, self.training.batch_size)]
        every = torch.arange(len(self.buffer))
        old = _drawn(every, self.length, inputs, generator)
        half = max(1, self.training.batch_size // 2)
        return [
            Batch(torch.cat([first, self.buffer[again]]), (again,))
            for first, again in zip(pieces(new, half), pieces(old, half), strict=True)
        ]


def named(name: str) -> Method:
    """`SettingsError` names the methods there are."""
    if name not in METHODS:
        raise SettingsError(f"no method {name!r} to learn by", hint=f"one of {', '.join(METHODS)}")
    return METHODS[name]


def start_of(method: Method | None, start: Choice) -> Choice | None:
    """What a training by `method` begins with: `scratch` leaves a start aside."""
    return start if method is None or method.starts else None


def plan(method: Method, training: Training, dataset: Dataset, start: Run) -> Plan:
    """What `method` looks at. RunError where there is nothing that `start` has not learned from."""
    new = fresh(dataset, start)
    if not len(new):
        raise RunError(
            f"method {method.name}: there is nothing that run {start.id} has not learned from",
            hint="add labelled examples, or learn from everything again: method warm or scratch",
        )
    seen = torch.ones(len(dataset.train), dtype=torch.bool)
    seen[new] = False
    buffer = reservoir(dataset, seen.nonzero()[:, 0], size=method.buffer, seed=training.seed)
    once = len(new) * (2 if len(buffer) else 1)
    passes = int(method.budget * training.epochs * len(dataset.train) / once)
    passes = min(max(1, passes), training.epochs)
    epochs = min(passes, EPOCHS)
    changed = {
        "epochs": epochs,
        "schedule": Cosine(name="cosine", warmup=WARMUP * epochs),
        "optimiser": training.optimiser.model_copy(update={"lr": method.lr * training.optimiser.lr}),
    }
    return Plan(method, training.model_copy(update=changed), new, buffer, len(new) * passes // epochs)


def fresh(dataset: Dataset, run: Run) -> Tensor:
    """Positions in the training part that `run` has not learned from, ascending (int64).

    An example whose label is another now is new. So is everything where the recipe's own data are others.
    """
    before = run.json("split.json", made_by="train")
    if dataset.split["own"] != before.get("own", run.about["data_digest"]):
        return torch.arange(len(dataset.train))
    learned, now, digests = before.get("new", {}), dataset.split["new"], dataset.digests
    found = [
        position
        for position, row in enumerate(dataset.train.rows.tolist())
        if row in digests and learned.get(digests[row]) != now[digests[row]]
    ]
    return torch.tensor(found, dtype=torch.int64)


def reservoir(dataset: Dataset, candidates: Tensor, *, size: int, seed: int) -> Tensor:
    """Up to `size` of those positions in the training part, ascending: each class the same number while it has as many.

    Within a class, those with the smallest sha256 of seed and name: a uniform sample, as a reservoir keeps of a stream
    that is as long (Vitter 1985), and the same whatever order the examples came in. One that comes or goes makes at
    most two of the others change.
    """
    part = dataset.train
    ranked: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for position in candidates.tolist():
        row = int(part.rows[position])
        key = hashlib.sha256(f"{seed}:{dataset.digests.get(row, dataset.names[row])}".encode()).hexdigest()
        ranked[int(part.targets[position]) if dataset.classes else 0].append((key, position))
    places = [
        (place, key, position) for members in ranked.values() for place, (key, position) in enumerate(sorted(members))
    ]
    return torch.tensor(sorted(position for _, _, position in sorted(places)[:size]), dtype=torch.int64)


def logits(graph: ServingGraph, part: Part, positions: Tensor) -> Tensor:
    """N×K of a classifier, N×1 of a regressor in its own scale, without dropout; on the graph's device."""
    found = [graph.net(graph.normalise(inputs)) for inputs in _taken(graph, part, positions)]
    return torch.cat(found)


def embedded(graph: ServingGraph, part: Part, positions: Tensor) -> Part:
    """Those examples as what the net's head takes (float32 N×D), in that order."""
    found = [graph.net.embed(graph.normalise(inputs)).float().cpu() for inputs in _taken(graph, part, positions)]
    return Part(part.name, torch.cat(found), torch.arange(len(positions)), part.targets[positions])


def freeze(net: Net, embedding: Tensor) -> None:
    """Leave only what `net.head` uses to be trained; `embedding` (N×D) is any."""
    there = [one for one in net.parameters() if one.requires_grad]
    used = torch.autograd.grad(net.head(embedding).sum(), there, allow_unused=True)
    for parameter, gradient in zip(there, used, strict=True):
        parameter.requires_grad_(gradient is not None)


def _taken(graph: ServingGraph, part: Part, positions: Tensor) -> Iterator[Tensor]:
    graph.eval()
    with torch.no_grad():
        for chunk in pieces(positions, CHUNK):
            yield part.take(chunk)[0].to(graph.mean.device)


def _drawn(positions: Tensor, count: int, inputs: Inputs, generator: torch.Generator) -> Tensor:
    """`count` of them: all in a new order, over and over."""
    turns = math.ceil(count / len(positions))
    shuffled = [positions[order(len(positions), inputs, generator=generator)] for _ in range(turns)]
    return torch.cat(shuffled)[:count]
