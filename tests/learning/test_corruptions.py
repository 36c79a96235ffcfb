"""Corruptions: worse with each step, the same for the same seed, and of the same shape."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from marwright.learning.corruptions import CORRUPTIONS, SEVERITIES, corrupt

SHAPES = [(6, 1, 8, 8), (6, 3, 8, 8), (6, 1, 16, 16), (4, 3, 32, 32), (2, 3, 224, 200)]


def pictures(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Smooth blobs over the whole range of values, as photographs are."""
    size = 1.2 * max(1, min(shape[2:]) / 32)
    drawn = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=shape), (0, 0, size, size), mode="wrap")
    low, high = drawn.min(axis=(2, 3), keepdims=True), drawn.max(axis=(2, 3), keepdims=True)
    return np.rint((drawn - low) / (high - low) * 255).astype(np.uint8)


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other.astype(float)) ** 2)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_step_is_further_from_the_picture(name: str, shape: tuple[int, ...]) -> None:
    clean = pictures(shape)
    found = [psnr(clean, corrupt(clean, name, severity)) for severity in SEVERITIES]
    assert all(later < earlier - 0.3 for earlier, later in itertools.pairwise(found)), found
    assert 16 < found[0] < 50, "the first step shows, and is mild"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_seed_gives_the_same_bytes_and_leaves_the_picture_alone(name: str) -> None:
    clean = pictures((3, 3, 16, 16))
    before = clean.copy()
    one, two = corrupt(clean, name, 4, seed=7), corrupt(clean, name, 4, seed=7)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(clean, before)
    assert one.dtype == np.uint8
    assert one.shape == clean.shape
    differs = not np.array_equal(one, corrupt(clean, name, 4, seed=8))
    assert differs == (name == "noise"), "only noise is drawn"


def test_later_pictures_do_not_change_earlier_ones() -> None:
    clean = pictures((4, 1, 8, 8))
    for name in CORRUPTIONS:
        np.testing.assert_array_equal(corrupt(clean[:2], name, 5), corrupt(clean, name, 5)[:2])


def test_channels_stay_where_they_are() -> None:
    red = np.zeros((1, 3, 32, 32), np.uint8)
    red[:, 0] = 200
    for name in CORRUPTIONS:
        means = corrupt(red, name, 2).mean(axis=(0, 2, 3))
        assert means[0] > 3 * max(means[1:]), name


@pytest.mark.parametrize(
    ("inputs", "name", "severity", "says"),
    [
        (np.zeros((1, 1, 8, 8), np.uint8), "fog", 1, "there are: noise, blur"),
        (np.zeros((1, 1, 8, 8), np.uint8), "blur", 6, "1 to 5"),
        (np.zeros((1, 1, 8, 8), np.float32), "blur", 1, "uint8"),
        (np.zeros((1, 2, 8, 8), np.uint8), "blur", 1, "N×3"),
    ],
)
def test_what_is_not_allowed_is_said(inputs: np.ndarray, name: str, severity: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        corrupt(inputs, name, severity)
