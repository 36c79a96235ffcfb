"""Scores against hand-counted examples and scikit-learn; augmentation and statistics against plain loops."""

from __future__ import annotations

import pytest
import torch
from sklearn import metrics

from marwright.learning import augmentation, evaluation, graphs
from marwright.learning.dataset import Part


def test_scores_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(torch.randn(200, 4, generator=generator) * 2, dim=1)
    labels = torch.randint(0, 4, (200,), generator=generator)
    answered = probabilities.argmax(dim=1)
    scores = evaluation.classification(probabilities, labels, loss=0.0, classes=("a", "b", "c", "d"))
    assert scores.metrics["accuracy"] == pytest.approx(metrics.accuracy_score(labels, answered))
    assert scores.confusion == tuple(map(tuple, metrics.confusion_matrix(labels, answered).tolist()))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels, answered)
    assert [one.precision for one in scores.classes] == pytest.approx(list(precision))
    assert [one.recall for one in scores.classes] == pytest.approx(list(recall))
    assert [one.f1 for one in scores.classes] == pytest.approx(list(f1))
    assert [one.support for one in scores.classes] == list(support)


def test_calibration_error_is_zero_when_confidence_is_the_share_that_is_right() -> None:
    probabilities = torch.tensor([[0.75, 0.25]] * 4)
    good = evaluation.classification(probabilities, torch.tensor([0, 0, 0, 1]), loss=0.0, classes=("a", "b"))
    bad = evaluation.classification(probabilities, torch.tensor([1, 1, 1, 1]), loss=0.0, classes=("a", "b"))
    assert good.calibration_error == pytest.approx(0.0)
    assert bad.calibration_error == pytest.approx(0.75)


def test_a_class_that_is_never_answered_scores_zero_and_divides_nothing() -> None:
    sure = torch.tensor([[1.0, 0.0, 0.0]] * 3)
    scores = evaluation.classification(sure, torch.tensor([0, 1, 1]), loss=0.0, classes=("a", "b", "c"))
    assert [(one.precision, one.recall) for one in scores.classes] == [(1 / 3, 1.0), (0.0, 0.0), (0.0, 0.0)]


def test_regression_scores_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(50, generator=generator) * 3 + 10
    values = targets[:, None] + torch.randn(50, 1, generator=generator)
    scores = evaluation.regression(values, targets).metrics
    assert scores["rmse"] == pytest.approx(metrics.root_mean_squared_error(targets, values))
    assert scores["mae"] == pytest.approx(metrics.mean_absolute_error(targets, values))
    assert scores["r2"] == pytest.approx(metrics.r2_score(targets, values))
    assert evaluation.regression(values[:1], targets[:1]).metrics["r2"] == 0.0


def test_a_shift_is_a_padded_cut() -> None:
    pictures = torch.randint(0, 256, (6, 3, 5, 7), dtype=torch.uint8)
    corners = torch.tensor([[0, 1, 2, 3, 4, 2], [4, 3, 2, 1, 0, 2]])
    shifted = augmentation.shift(pictures, corners, 2)
    for i in range(6):
        padded = torch.zeros(3, 9, 11, dtype=torch.uint8)
        padded[:, 2:7, 2:9] = pictures[i]
        row, column = int(corners[0, i]), int(corners[1, i])
        assert torch.equal(shifted[i], padded[:, row : row + 5, column : column + 7])
    assert torch.equal(shifted[2], pictures[2])


def test_flips_mirror_about_half_and_keep_each_picture_whole() -> None:
    pictures = torch.randint(0, 256, (400, 1, 4, 4), dtype=torch.uint8)
    flipped = augmentation.augment(pictures, flip=True, crop=0, generator=torch.Generator().manual_seed(0))
    mirrored = [bool(torch.equal(one, other.flip(2))) for one, other in zip(flipped, pictures, strict=True)]
    kept = [bool(torch.equal(one, other)) for one, other in zip(flipped, pictures, strict=True)]
    assert all(a or b for a, b in zip(mirrored, kept, strict=True))
    assert 150 < sum(mirrored) < 250
    assert flipped.dtype == torch.uint8


def test_the_same_generator_augments_alike() -> None:
    pictures = torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8)
    one, two = (
        augmentation.augment(pictures, flip=True, crop=2, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(one, two)


def test_statistics_are_those_of_the_part_alone() -> None:
    inputs = torch.randint(0, 256, (30, 3, 4, 4), dtype=torch.uint8)
    rows = torch.arange(0, 30, 2)
    mean, std = graphs.statistics(Part("train", inputs, rows, torch.zeros(15, dtype=torch.int64)))
    chosen = inputs[rows].double().transpose(0, 1).flatten(1) / 255
    assert mean == pytest.approx(chosen.mean(dim=1).tolist())
    assert std == pytest.approx(chosen.std(dim=1, unbiased=False).tolist())


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_constant_feature_divides_by_one(value: float) -> None:
    inputs = torch.cat([torch.full((10, 1), value), torch.arange(10.0)[:, None]], dim=1)
    _, std = graphs.statistics(Part("train", inputs, torch.arange(10), torch.zeros(10)))
    assert std[0] == 1.0
    assert std[1] == pytest.approx(2.8722813)
    black = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    assert graphs.statistics(Part("train", black, torch.arange(4), torch.zeros(4)))[1] == [1.0]
