"""How well something learns from a stream: numbers of prequential evaluation and of continual learning.

    streams.prequential([Window(100, 92), Window(100, 61)])        # [0.92, 0.61]
    streams.average_accuracy(R), streams.backward_transfer(R), streams.forward_transfer(R, untrained)

`R` is the accuracy matrix of Lopez-Paz & Ranzato 2017 ("Gradient Episodic Memory for Continual Learning", section 2.2):
T×T, `R[i, j]` the accuracy on task j after tasks 0 … i were learned, in that order. Prequential evaluation is that of
Gama, Sebastião & Rodrigues 2013 ("On evaluating stream learning algorithms"): each example is answered first and
learned from afterwards, so all of a stream is a test, and none of it twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """Examples of a stream that were answered before they were learned from, and how many answers were right."""

    examples: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.examples or not self.examples:
            raise ValueError(f"{self.right} right of {self.examples} examples")


def prequential(windows: Sequence[Window]) -> list[float]:
    """Accuracy of each window, by the model that was there when it came."""
    return [window.right / window.examples for window in windows]


def prequential_accuracy(windows: Sequence[Window]) -> float:
    """Of the whole stream: right answers of all, so that a larger window counts for more."""
    return sum(window.right for window in windows) / sum(window.examples for window in windows)


def average_accuracy(matrix: Matrix) -> float:
    """ACC: the mean over all tasks when the last was learned."""
    return float(_square(matrix)[-1].mean())


def backward_transfer(matrix: Matrix) -> float:
    """BWT: what the tasks before the last have gained since each was learned, on average. Negative is forgetting."""
    learned = np.diagonal(_square(matrix))[:-1]
    return float((matrix[-1, :-1] - learned).mean())


def forgetting(matrix: Matrix) -> float:
    """What those tasks have lost since they were at their best, on average; never less than −BWT.

    Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning"; there the last row is not among the best.
    """
    best = np.array([_square(matrix)[j:-1, j].max() for j in range(len(matrix) - 1)])
    return float((best - matrix[-1, :-1]).mean())


def forward_transfer(matrix: Matrix, untrained: Sequence[float]) -> float:
    """FWT: what was known of each task after the first just before it was learned, beyond `untrained`, on average.

    `untrained[j]` is the accuracy of a net with fresh weights on task j.
    """
    if len(untrained) != len(_square(matrix)):
        raise ValueError(f"{len(untrained)} accuracies without training for {len(matrix)} tasks")
    before = np.diagonal(matrix, offset=1)
    return float((before - np.asarray(untrained[1:], dtype=np.float64)).mean())


def _square(matrix: Matrix) -> Matrix:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(f"the accuracy matrix is {'×'.join(map(str, matrix.shape))}, not T×T of two tasks or more")
    return matrix
