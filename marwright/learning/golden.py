"""Real examples of the test part that travel with a model, for those who check it later.

`examples.npz` holds inputs as the artifact takes them (up to 1000) and labels; `golden/` holds request bodies as a
client would send them (at least 16, every class where there are up to 16), listed in `golden.json`:

    [{"file": "00.png", "kind": "image", "label": "7"}, …]      or {"file": "00.json", "kind": "json", "value": 151.0}
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marwright import files
from marwright.learning.dataset import Dataset

EXAMPLES = 1000
GOLDEN = 16


def write(dataset: Dataset, folder: Path) -> None:
    """Both, into a run folder. Same data, same bytes."""
    test = dataset.test
    inputs, targets = test.take(torch.arange(min(EXAMPLES, len(test))))
    stream = io.BytesIO()
    np.savez(stream, inputs=inputs.numpy(), labels=targets.numpy())
    with files.replacing(folder / "examples.npz") as temporary:
        temporary.write_bytes(stream.getvalue())

    listed: list[dict[str, Any]] = []
    for number, position in enumerate(chosen(dataset)):
        body = dataset.raw(int(test.rows[position]))
        name = f"{number:02d}{body.suffix}"
        with files.replacing(folder / "golden" / name) as temporary:
            temporary.write_bytes(body.data)
        target = test.targets[position]
        if dataset.classes:
            listed.append({"file": name, "kind": "image", "label": dataset.classes[int(target)]})
        else:
            listed.append({"file": name, "kind": "json", "value": float(target)})
    files.write_json(folder / "golden" / "golden.json", listed)


def chosen(dataset: Dataset) -> list[int]:
    """Positions in the test part: class by class in turn, until there are 16 and, of up to 16 classes, each."""
    if not dataset.classes:
        return list(range(min(GOLDEN, len(dataset.test))))
    queues: list[list[int]] = [[] for _ in dataset.classes]
    for position, label in enumerate(dataset.test.targets.tolist()):
        queues[label].append(position)
    turns = [queue[turn] for turn in range(GOLDEN) for queue in queues if turn < len(queue)]
    return turns[:GOLDEN]
