"""What requests look like when nothing has changed: the validation part, as the finished graph sees it.

    reference.write(graph, dataset.validation, run.path)      # runs/<run>/reference.npz
    Reference.from_bytes(data).values["confidence"]

It travels in the archive, and `feedback.drift` compares captured requests with it. At most 1000 examples, evenly from
all over the part: not the training part, which a net knows too well, nor the test part, which is the gate's. A version
that production has taught gets another one before it is archived: the latest requests, which it has not learned from.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from marwright import files
from marwright.learning.statistics import statistics

if TYPE_CHECKING:  # whoever only reads one needs no torch
    from handlers.nets import ServingGraph
    from marwright.learning.dataset import Part

FILE = "reference.npz"
ROWS = 1000
BATCH = 128
EMBEDDING = "embedding"
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class Reference:
    """Arrays of N rows, an example each."""

    embedding: NDArray[np.float16] | None
    """N×D, of a net that has one."""
    values: Mapping[str, NDArray[np.float64]]
    """`confidence` (probability of the best class) or `value` (a regressor's answer), and each of the statistics."""

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def to_bytes(self) -> bytes:
        """An .npz; the same values give the same bytes."""
        stream = io.BytesIO()
        arrays: dict[str, NDArray[np.float16] | NDArray[np.float64]] = dict(sorted(self.values.items()))
        if self.embedding is not None:
            arrays[EMBEDDING] = self.embedding
        np.savez(stream, **arrays)  # type: ignore[arg-type]
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Reference:
        """What `to_bytes` wrote; ValueError for anything else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        except (OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"not a reference: {error}") from None
        embedding = found.pop(EMBEDDING, None)
        values = {name: array.astype(np.float64) for name, array in found.items()}
        if (
            not values
            or len({len(array) for array in (*found.values(), *([] if embedding is None else [embedding]))}) != 1
        ):
            raise ValueError("not a reference: its arrays are not of one length")
        return cls(embedding, values)


def of(graph: ServingGraph, part: Part) -> Reference:
    """The reference of a finished graph (on the CPU)."""
    import torch

    from marwright.learning.dataset import pieces

    count = min(len(part), ROWS)
    positions = torch.linspace(0, len(part) - 1, count, dtype=torch.float64).round().long()
    answers, embeddings, seen = [], [], []
    graph.eval()
    with torch.inference_mode():
        for some in pieces(positions, BATCH):
            inputs, _ = part.take(some)
            outputs = dict(zip(graph.outputs, graph(inputs), strict=True))
            answer = outputs["probabilities"].amax(dim=1) if graph.task == "classification" else outputs["value"][:, 0]
            answers.append(answer.double().numpy())
            if EMBEDDING in outputs:
                embeddings.append(outputs[EMBEDDING].clamp(-LARGEST, LARGEST).numpy().astype(np.float16))
            seen.append(statistics(inputs.numpy()))
    name = "confidence" if graph.task == "classification" else "value"
    values = {each: np.concatenate([one[each] for one in seen]) for each in seen[0]}
    return Reference(np.concatenate(embeddings) if embeddings else None, values | {name: np.concatenate(answers)})


def write(graph: ServingGraph, part: Part, folder: Path) -> None:
    """Into a run folder. Same graph and data, same bytes."""
    made = of(graph, part).to_bytes()
    with files.replacing(folder / FILE) as temporary:
        temporary.write_bytes(made)
