"""Rows of the store, made up or computed, for tests of what is decided from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from handlers.nets import ServingGraph
from marwright.feedback.store import Answered, Labelled
from marwright.learning.reference import Reference
from marwright.learning.statistics import statistics


def rows(
    confidence: Sequence[float] | NDArray[Any],
    *,
    embedding: NDArray[Any] | None = None,
    values: Mapping[str, NDArray[Any]] | None = None,
    version: str = "1.0",
    start: float = 1_000.0,
) -> list[Answered]:
    """One row each, a second apart."""
    return [
        Answered(
            request=f"r{number}",
            instance=0,
            model="digits",
            version=version,
            bundle="b",
            time=start + number,
            answer="3",
            value=None,
            confidence=float(sure),
            probabilities=None,
            embedding=None if embedding is None else embedding[number].astype(np.float32),
            statistics={name: float(array[number]) for name, array in (values or {}).items()},
            digest="",
            path=None,
        )
        for number, sure in enumerate(confidence)
    ]


def labelled(right: Sequence[bool], *, version: str = "1.0", order: Sequence[int] | None = None) -> list[Labelled]:
    """Answers that were right or wrong; `order` says when the label of each came, by default as the answers did."""
    answered = rows([0.9] * len(right), version=version)
    return [
        Labelled(**row.__dict__, label="3" if good else "5", source="test", labelled_at=2_000.0 + place)
        for row, good, place in zip(answered, right, order or range(len(right)), strict=True)
    ]


def seen(graph: ServingGraph, pictures: NDArray[np.uint8]) -> Reference:
    """Pictures as a graph sees them: a reference, or what `window` makes requests of."""
    with torch.inference_mode():
        probabilities, embedding = graph.eval()(torch.from_numpy(pictures))
    confidence = probabilities.amax(dim=1).double().numpy()
    return Reference(embedding.numpy().astype(np.float16), {**statistics(pictures), "confidence": confidence})


def part(whole: Reference, places: NDArray[np.int64]) -> Reference:
    """Some of its rows."""
    embedding = None if whole.embedding is None else whole.embedding[places]
    return Reference(embedding, {name: array[places] for name, array in whole.values.items()})


def window(whole: Reference, places: NDArray[np.int64]) -> list[Answered]:
    """Some of its rows, as requests."""
    some = part(whole, places)
    values = {name: array for name, array in some.values.items() if name != "confidence"}
    return rows(some.values["confidence"], embedding=some.embedding, values=values)
