"""What can be said of an input without knowing what it shows: one number for each row.

    statistics(pictures)     # {"brightness": N, "contrast": N, "sharpness": N, "saturation": N}

They are kept of the validation part when a run is trained, and of captured requests; `feedback.drift` compares the two.
Brightness and contrast are what the handlers count, too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEATURES = 32
"""Columns of a row that get a statistic of their own; further ones are in `mean` and `spread` alone."""
CHUNK_BYTES = 32 * 2**20

Statistics = dict[str, NDArray[np.float64]]


def statistics(inputs: NDArray[Any]) -> Statistics:
    """One value for each row, by name.

    uint8 N×C×H×W: `brightness` (mean of the pixels, 0 to 1), `contrast` (their standard deviation, 0 to 0.5),
    `sharpness` (mean of the absolute differences of neighbours, 0 to 1) and, of three channels, `saturation` (mean of
    HSV's, 0 to 1). float32 N×F: `mean` and `spread` (standard deviation) of a row, and `feature_0`, … as they are.
    ValueError for anything else.
    """
    if inputs.dtype == np.uint8 and inputs.ndim == 4:
        size = max(1, CHUNK_BYTES // max(1, 4 * inputs[:1].size))
        parts = [_of_pictures(inputs[start : start + size]) for start in range(0, max(1, len(inputs)), size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if np.issubdtype(inputs.dtype, np.floating) and inputs.ndim == 2:
        return _of_rows(inputs.astype(np.float64))
    raise ValueError(f"inputs are {inputs.dtype} of shape {inputs.shape}, not uint8 N×C×H×W or float N×F")


def _of_pictures(pictures: NDArray[np.uint8]) -> Statistics:
    scaled: NDArray[np.float32] = np.divide(pictures, np.float32(255), dtype=np.float32)
    flat = scaled.reshape(len(scaled), math.prod(scaled.shape[1:]))
    found = {
        "brightness": flat.mean(axis=1, dtype=np.float64),
        "contrast": flat.std(axis=1, dtype=np.float64),
        "sharpness": (_steps(scaled, 2) + _steps(scaled, 3)) / 2,
    }
    if pictures.shape[1] == 3:
        high, low = scaled.max(axis=1), scaled.min(axis=1)
        share = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
        found["saturation"] = share.mean(axis=(1, 2), dtype=np.float64)
    return found


def _steps(scaled: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
    if scaled.shape[axis] < 2:
        return np.zeros(len(scaled))
    mean: NDArray[np.float64] = np.abs(np.diff(scaled, axis=axis)).mean(axis=(1, 2, 3), dtype=np.float64)
    return mean


def _of_rows(rows: NDArray[np.float64]) -> Statistics:
    found = {"mean": rows.mean(axis=1), "spread": rows.std(axis=1)}
    found |= {f"feature_{column}": rows[:, column].copy() for column in range(min(FEATURES, rows.shape[1]))}
    return found
