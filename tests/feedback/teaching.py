"""A small world that drifts: digits, a champion that learned from some of them, and labelled requests of the others."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from marwright.feedback import judge, selection
from marwright.feedback.judge import Judgement
from marwright.feedback.selection import Selection
from marwright.feedback.values import Labelled
from marwright.learning import corruptions, data, methods, training
from marwright.learning.dataset import Dataset
from marwright.learning.recipe import Recipe
from marwright.release.policy import Policy
from marwright.runs import Run

CLASSES = tuple(str(i) for i in range(10))
OWN = 1000
"""Digits that the champion's recipe has; the others come as requests."""


def recipe(*, epochs: int = 6) -> Recipe:
    """As the project's own recipe `digits`, for a folder, with fewer epochs and a larger test part."""
    return Recipe.from_dict(
        {
            "name": "tiny",
            "task": "classification",
            "data": {"source": "folder", "channels": 1, "height": 16, "width": 16, "test_share": 0.3},
            "net": {"name": "small_cnn"},
            "training": {
                "epochs": epochs,
                "batch_size": 64,
                "optimiser": {"name": "adam", "lr": 0.001},
                "regularisation": {"dropout": 0.25, "crop": 1},
            },
        }
    )


def png(picture: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def labelled(
    path: Path, label: str, *, at: float, request: str = "", source: str = "people", said: float | None = None
) -> Labelled:
    """A labelled answer whose picture is in `path`."""
    return Labelled(
        request=request or f"request-{path.stem}",
        instance=0,
        model="tiny",
        version="1.0",
        bundle="0" * 16,
        time=at,
        answer="0",
        value=None,
        confidence=0.5,
        probabilities=None,
        embedding=None,
        statistics={},
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        path=path,
        label=label,
        source=source,
        labelled_at=at + 60 if said is None else said,
    )


def flipped(truth: NDArray[np.int64], of: int, to: int, share: float, *, seed: int) -> NDArray[np.int64]:
    """`share` of class `of` labelled `to`."""
    members = np.flatnonzero(truth == of)
    chosen = np.random.default_rng(seed).choice(members, round(share * len(members)), replace=False)
    labels = truth.copy()
    labels[chosen] = to
    return labels


@dataclass(frozen=True)
class World:
    """A champion, and pictures that it has not seen."""

    root: Path
    seed: int

    @cached_property
    def _digits(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """All of them in an order that the seed gives: uint8 N×8×8, and labels."""
        found = load_digits()
        order = np.random.default_rng(self.seed).permutation(len(found.target))
        pictures = np.round(found.images * (255 / 16)).astype(np.uint8)
        return pictures[order], found.target[order].astype(np.int64)

    @property
    def truth(self) -> NDArray[np.int64]:
        """Of the requests."""
        return self._digits[1][OWN:]

    def load(self, chosen: Selection | None = None) -> Dataset:
        own = self.root / "own"
        if not own.exists():
            for i, (picture, label) in enumerate(zip(*(part[:OWN] for part in self._digits), strict=True)):
                (own / str(label)).mkdir(parents=True, exist_ok=True)
                (own / str(label) / f"{i}.png").write_bytes(png(picture))
        taught = selection.examples(chosen, recipe()) if chosen else None
        return data.load(recipe(), path=own, feedback=taught, cache=self.root / "cache", progress=False)

    @cached_property
    def champion(self) -> Run:
        return training.train(recipe(), self.load(), self.root / "runs", progress=False)

    def stream(
        self, labels: Sequence[int] | NDArray[np.int64], corruption: str = "", severity: int = 3
    ) -> list[Labelled]:
        """Requests in the order of their times, one a second, corrupted, with these labels."""
        pictures = self._digits[0][OWN:]
        if corruption:
            pictures = corruptions.corrupt(pictures[:, None], corruption, severity, seed=self.seed)[:, 0]
        folder = self.root / "bodies" / (f"{corruption}{severity}" if corruption else "clean")
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        for i, label in enumerate(labels):
            path = folder / f"{i}.png"
            if not path.exists():
                path.write_bytes(png(pictures[i]))
            made.append(labelled(path, str(label), at=1000.0 + i))
        return made

    def judged(self, stream: Sequence[Labelled], policy: Policy | None = None, *, method: str = "warm") -> Judgement:
        """Select, learn, judge: as a turn of the loop does it."""
        policy = policy or Policy()
        chosen = selection.select(stream, policy.learn, classes=CLASSES)
        dataset = self.load(chosen)
        chosen = selection.apart(chosen, recipe(), dataset)
        how = None if method == "warm" else methods.named(method)
        run = training.train(recipe(), dataset, self.root / "runs", start=self.champion, method=how, progress=False)
        return judge.runs(self.champion, run, chosen, policy)
