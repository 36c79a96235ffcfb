"""Real examples that travel with a model, for those who check it later: the recipe's own alone.

What was labelled later may be a request of production, which `marwright feedback forget` has to find everywhere that it
is; archives are spread, and nobody takes a picture out of them.

`examples.npz` holds inputs as the artifact takes them and their labels: the whole test part; of a large one as many as
10 000 and 64 MiB, from all over it. It is the holdout that a gate judges by.
`golden/` holds request bodies as a client would send them: at least 16, every class where there are up to 16, of the
test part as far as it goes; listed in `golden.json`:

    [{"file": "00.png", "kind": "image", "label": "7"}, …]      or {"file": "00.json", "kind": "json", "value": 151.0}
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marwright import files
from marwright.learning.dataset import Dataset, Part

EXAMPLES = 10_000
BYTES = 64 * 2**20
GOLDEN = 16


def write(dataset: Dataset, folder: Path) -> None:
    """Both, into a run folder. Same data, same bytes."""
    test = _own(dataset, dataset.test)
    size = max(1, test.inputs[0].numel() * test.inputs.element_size())
    count = min(len(test), EXAMPLES, max(2, BYTES // size))
    inputs, targets = test.take(torch.linspace(0, len(test) - 1, count, dtype=torch.float64).round().long())
    stream = io.BytesIO()
    np.savez(stream, inputs=inputs.numpy(), labels=targets.numpy())
    with files.replacing(folder / "examples.npz") as temporary:
        temporary.write_bytes(stream.getvalue())

    listed: list[dict[str, Any]] = []
    for number, (part, position) in enumerate(chosen(dataset)):
        body = dataset.raw(int(part.rows[position]))
        name = f"{number:02d}{body.suffix}"
        with files.replacing(folder / "golden" / name) as temporary:
            temporary.write_bytes(body.data)
        target = part.targets[position]
        if dataset.classes:
            listed.append({"file": name, "kind": "image", "label": dataset.classes[int(target)]})
        else:
            listed.append({"file": name, "kind": "json", "value": float(target)})
    files.write_json(folder / "golden" / "golden.json", listed)


def chosen(dataset: Dataset) -> list[tuple[Part, int]]:
    """Positions in a part: class by class in turn, until there are 16 and, of up to 16 classes, each.

    A test part that is too small is helped out by the validation part, and that by the training part: a golden example
    says what the artifact answers, not how good that is.
    """
    found: list[tuple[Part, int]] = []
    for part in (_own(dataset, part) for part in (dataset.test, dataset.validation, dataset.train)):
        found += [(part, position) for position in _in_turn(part, len(dataset.classes))]
        if len(found) >= GOLDEN:
            break
    return found[:GOLDEN]


def _own(dataset: Dataset, part: Part) -> Part:
    """The examples of `part` that are the recipe's own."""
    if not dataset.digests:
        return part
    own = torch.tensor([row not in dataset.digests for row in part.rows.tolist()], dtype=torch.bool)
    return replace(part, rows=part.rows[own], targets=part.targets[own])


def _in_turn(part: Part, classes: int) -> list[int]:
    """The first positions of a part, one of each class after another."""
    if not classes:
        return list(range(min(GOLDEN, len(part))))
    queues: list[list[int]] = [[] for _ in range(classes)]
    for position, label in enumerate(part.targets.tolist()):
        queues[label].append(position)
    return [queue[turn] for turn in range(GOLDEN) for queue in queues if turn < len(queue)]
