"""How good a model is, on a part that it has not learned from.

scores = evaluation.evaluate(graph, dataset.test, classes=dataset.classes)
scores.metrics            # {"accuracy": 0.98}, or {"rmse": 54.1, "mae": 43.2, "r2": 0.48}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from handlers.nets import ServingGraph
from marwright.learning.dataset import Part

BINS = 15
"""Of equal width, for the calibration error (Guo et al. 2017)."""


@dataclass(frozen=True)
class ClassScore:
    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Bin:
    """Answers with about the same confidence: its mean, how many were right, how many there were."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Evaluation:
    """`metrics` are the headline. `confusion[true][answered]` counts; `outputs` (N×K or N×1) and `targets` are raw."""

    metrics: dict[str, float]
    loss: float
    examples: int
    outputs: Tensor
    targets: Tensor
    confusion: tuple[tuple[int, ...], ...] = ()
    classes: tuple[ClassScore, ...] = ()
    calibration_error: float = 0.0
    bins: tuple[Bin, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the raw outputs: `evaluation.json`."""
        document: dict[str, Any] = {"metrics": self.metrics, "loss": self.loss, "examples": self.examples}
        if self.classes:
            document |= {
                "confusion": [list(row) for row in self.confusion],
                "classes": [asdict(one) for one in self.classes],
                "calibration": {"error": self.calibration_error, "bins": [asdict(one) for one in self.bins]},
            }
        return document


def evaluate(
    graph: ServingGraph, part: Part, *, classes: Sequence[str] = (), batch_size: int = 512, embedded: bool = False
) -> Evaluation:
    """Judge `graph` on `part`; `classes` name the labels (classification). `embedded`: its inputs are embeddings."""
    device = graph.mean.device
    outputs, targets, total = [], [], 0.0
    graph.eval()
    with torch.inference_mode():
        for inputs, wanted in part.batches(batch_size):
            inputs = inputs.to(device)
            out = graph.net.head(inputs) if embedded else graph.net(graph.normalise(inputs))
            out = out.float().cpu()
            if graph.task == "classification":
                total += float(functional.cross_entropy(out, wanted, reduction="sum"))
                out = torch.softmax(out, dim=1)
            else:
                out = out * graph.target_std.cpu() + graph.target_mean.cpu()
                total += float(((out[:, 0] - wanted) ** 2).sum())
            outputs.append(out)
            targets.append(wanted)
    answers, truth = torch.cat(outputs), torch.cat(targets)
    if graph.task == "classification":
        return classification(answers, truth, loss=total / len(truth), classes=classes)
    return regression(answers, truth)


def classification(probabilities: Tensor, labels: Tensor, *, loss: float, classes: Sequence[str]) -> Evaluation:
    """Scores of N×K probabilities against N labels. A class never answered has precision 0; one without examples,
    recall 0.
    """
    count = len(classes)
    confidence, answered = probabilities.max(dim=1)
    confusion = torch.bincount(labels * count + answered, minlength=count * count).reshape(count, count)
    right = confusion.diagonal()
    scores = []
    for i, label in enumerate(classes):
        precision = _ratio(int(right[i]), int(confusion[:, i].sum()))
        recall = _ratio(int(right[i]), int(confusion[i].sum()))
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        scores.append(ClassScore(label, precision, recall, f1, int(confusion[i].sum())))
    bins = _bins(confidence.double(), (answered == labels).double())
    error = sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / max(1, len(labels))
    return Evaluation(
        metrics={"accuracy": _ratio(int(right.sum()), len(labels))},
        loss=loss,
        examples=len(labels),
        outputs=probabilities,
        targets=labels,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        classes=tuple(scores),
        calibration_error=error,
        bins=bins,
    )


def regression(values: Tensor, targets: Tensor) -> Evaluation:
    """Scores of N×1 values against N targets, in the target's own unit. R² is 0 where the targets are all the same."""
    error = values[:, 0].double() - targets.double()
    squared = float((error**2).mean())
    spread = float(((targets.double() - targets.double().mean()) ** 2).mean())
    return Evaluation(
        metrics={
            "rmse": math.sqrt(squared),
            "mae": float(error.abs().mean()),
            "r2": 1.0 - squared / spread if spread else 0.0,
        },
        loss=squared,
        examples=len(targets),
        outputs=values,
        targets=targets,
    )


def _bins(confidence: Tensor, right: Tensor) -> tuple[Bin, ...]:
    which = (confidence * BINS).long().clamp(max=BINS - 1)
    found = []
    for i in range(BINS):
        inside = which == i
        if count := int(inside.sum()):
            found.append(Bin(float(confidence[inside].mean()), float(right[inside].mean()), count))
    return tuple(found)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
