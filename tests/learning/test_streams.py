"""Numbers of continual learning, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from marwright.learning import streams
from marwright.learning.streams import Window

R = np.array([[0.9, 0.3, 0.1], [0.6, 0.8, 0.4], [0.7, 0.5, 1.0]])


def test_average_accuracy_is_the_mean_after_the_last_task() -> None:
    assert streams.average_accuracy(R) == pytest.approx((0.7 + 0.5 + 1.0) / 3)


def test_backward_transfer_is_what_was_gained_since_a_task_was_learned() -> None:
    assert streams.backward_transfer(R) == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)


def test_forgetting_is_counted_from_the_best_and_never_less_than_minus_backward_transfer() -> None:
    risen = np.array([[0.5, 0.1, 0.1], [0.9, 0.8, 0.1], [0.6, 0.8, 0.9]])
    assert streams.backward_transfer(risen) == pytest.approx(0.05)
    assert streams.forgetting(risen) == pytest.approx((0.3 + 0.0) / 2)
    for matrix in np.random.default_rng(0).random((50, 4, 4)):
        assert streams.forgetting(matrix) >= -streams.backward_transfer(matrix) - 1e-12


def test_forward_transfer_is_what_was_known_before_learning_beyond_a_fresh_net() -> None:
    assert streams.forward_transfer(R, [0.5, 0.1, 0.2]) == pytest.approx(((0.3 - 0.1) + (0.4 - 0.2)) / 2)
    with pytest.raises(ValueError, match="2 accuracies without training for 3 tasks"):
        streams.forward_transfer(R, [0.1, 0.1])


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (3,)])
def test_a_matrix_that_is_none_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not T×T of two tasks or more"):
        streams.average_accuracy(np.zeros(shape))


def test_prequential_accuracy_counts_examples_not_windows() -> None:
    windows = [Window(100, 90), Window(300, 30)]
    assert streams.prequential(windows) == [0.9, 0.1]
    assert streams.prequential_accuracy(windows) == pytest.approx(120 / 400)


@pytest.mark.parametrize(("examples", "right"), [(0, 0), (3, 4), (3, -1)])
def test_a_window_that_cannot_be_is_refused(examples: int, right: int) -> None:
    with pytest.raises(ValueError, match="right of"):
        Window(examples, right)
