"""Rows of the store, made up or computed, for tests of what is decided from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from handlers import spool
from handlers.nets import ServingGraph
from handlers.spec import ModelSpec
from marwright.feedback.store import Answered, Label, Labelled
from marwright.learning.reference import Reference
from marwright.learning.statistics import statistics
from tests.feedback import spools


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
        Labelled(**row.__dict__, label="3" if good else "5", source="test", labelled_at=1.0, received=2_000.0 + place)
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


def spooled(
    folder: Path,
    graph: ServingGraph,
    pictures: NDArray[np.uint8],
    *,
    spec: ModelSpec,
    bundle: str,
    version: str = "1.0",
    start: float = 1_000.0,
) -> list[str]:
    """Pictures as requests to a version, a second apart, as its workers leave them; their ids."""
    with torch.inference_mode():
        probabilities, embedding = graph.eval()(torch.from_numpy(pictures))
    head = {"v": 1, "model": "digits", "version": version, "bundle": bundle, "spec": json.loads(spec.to_json())}
    writer = spool.Writer(folder, "requests", head)
    ids = []
    for number, picture in enumerate(pictures):
        body, ids = spools.png(picture[0]), [*ids, f"{start:.0f}-{number}"]
        entry = {
            "id": ids[-1],
            "rows": 1,
            "body": [0, len(body)],
            "sha256": hashlib.sha256(body).hexdigest(),
            "type": "image/png",
            "http": True,
        }
        given = probabilities[number].numpy().astype(np.float32), embedding[number].numpy().astype(np.float16)
        outputs = {
            "probabilities": [len(body), 1, len(given[0]), "float32"],
            "embedding": [len(body) + given[0].nbytes, 1, len(given[1]), "float16"],
        }
        header = {"time": start + number, "requests": [entry], "outputs": outputs}
        writer.append(header, body + given[0].tobytes() + given[1].tobytes())
    writer.close()
    return ids


def labels(ids: Sequence[str], said: Sequence[str], *, at: float = 5_000.0) -> list[Label]:
    """A label for each request."""
    return [
        Label(request=one, instance=0, label=label, source="test", time=at + number, uid=f"{one}/{label}")
        for number, (one, label) in enumerate(zip(ids, said, strict=True))
    ]
