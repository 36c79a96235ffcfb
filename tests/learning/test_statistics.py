"""Statistics of inputs: what they are of pictures that can be told by hand."""

from __future__ import annotations

import numpy as np
import pytest

from marwright.learning import statistics as module
from marwright.learning.corruptions import corrupt
from marwright.learning.statistics import statistics


def test_a_flat_picture_has_its_brightness_and_nothing_else() -> None:
    found = statistics(np.full((2, 3, 8, 8), 51, np.uint8))
    assert list(found) == ["brightness", "contrast", "sharpness", "saturation"]
    np.testing.assert_allclose(found["brightness"], 0.2, atol=1e-7)
    for name in ("contrast", "sharpness", "saturation"):
        np.testing.assert_allclose(found[name], 0, atol=1e-6)


def test_stripes_have_the_contrast_and_sharpness_that_can_be_counted() -> None:
    picture = np.zeros((1, 1, 4, 4), np.uint8)
    picture[..., ::2] = 255
    found = statistics(picture)
    assert found["brightness"][0] == pytest.approx(0.5)
    assert found["contrast"][0] == pytest.approx(0.5)
    assert found["sharpness"][0] == pytest.approx(0.5), "every step to the side is 1, every step down is 0"
    assert "saturation" not in found


def test_saturation_is_that_of_hsv() -> None:
    picture = np.zeros((3, 3, 8, 8), np.uint8)
    picture[0, 0] = 200
    picture[1, :] = 200
    picture[2, 0], picture[2, 1:] = 200, 100
    np.testing.assert_allclose(statistics(picture)["saturation"], [1, 0, 0.5])


def test_brightness_and_contrast_are_what_the_handlers_count() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 3, 9, 7), np.uint8)
    flat = pictures.reshape(5, -1).astype(np.float64) / 255
    found = statistics(pictures)
    np.testing.assert_allclose(found["brightness"], flat.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found["contrast"], flat.std(axis=1), rtol=1e-5)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (11, 1, 8, 8), np.uint8)
    whole = statistics(pictures)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 64 * 3)
    for name, values in statistics(pictures).items():
        np.testing.assert_array_equal(values, whole[name])


def test_no_rows_give_no_values() -> None:
    assert {name: len(values) for name, values in statistics(np.zeros((0, 1, 8, 8), np.uint8)).items()} == {
        "brightness": 0,
        "contrast": 0,
        "sharpness": 0,
    }


def test_rows_of_numbers() -> None:
    rows = np.array([[1, 2, 3], [4, 4, 4]], np.float32)
    found = statistics(rows)
    np.testing.assert_allclose(found["mean"], [2, 4])
    np.testing.assert_allclose(found["spread"], [np.sqrt(2 / 3), 0])
    np.testing.assert_array_equal(found["feature_2"], [3, 4])
    wide = statistics(np.zeros((2, 100), np.float32))
    assert len(wide) == 2 + module.FEATURES


def test_each_corruption_moves_the_statistic_that_it_should() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), np.uint8)
    before = {name: values.mean() for name, values in statistics(pictures).items()}
    for name, statistic in (("blur", "sharpness"), ("contrast", "contrast"), ("darkness", "brightness")):
        assert statistics(corrupt(pictures, name, 3))[statistic].mean() < 0.8 * before[statistic], name


@pytest.mark.parametrize("wrong", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 3), np.int64)])
def test_what_is_neither_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="not uint8"):
        statistics(wrong)
