"""A map of attributions over the picture that it explains, as a PNG.

    overlay.png(image, attributions)        # uint8 C×H×W and float32 C×H×W or 1×H×W → bytes

Red spoke for the class, blue against it; where nothing did, the picture shows in grey. The strongest attribution of the
picture has the full colour, so colours compare within one picture and not between two.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SMALLEST = 224
"""Pixels of the longer side at least: pictures of 16×16 are hard to look at."""
_FOR, _AGAINST = np.array([214.0, 30.0, 40.0]), np.array([30.0, 80.0, 214.0])


def png(image: NDArray[np.uint8], attributions: NDArray[Any]) -> bytes:
    """Enlarged by a whole number, each pixel a square, until the longer side has `SMALLEST` pixels."""
    summed = attributions.sum(axis=0, dtype=np.float64)
    peak = float(np.abs(summed).max())
    strength = (np.abs(summed) / peak if peak > 0 else np.zeros_like(summed))[..., None]
    grey = np.repeat(image.mean(axis=0)[..., None], 3, axis=2) * 0.6 + 102.0
    colour = np.where(summed[..., None] >= 0, _FOR, _AGAINST)
    mixed = np.rint(grey * (1 - strength) + colour * strength).clip(0, 255).astype(np.uint8)
    times = math.ceil(SMALLEST / max(summed.shape))
    large = mixed.repeat(times, axis=0).repeat(times, axis=1)
    stream = io.BytesIO()
    Image.fromarray(large).save(stream, "PNG")
    return stream.getvalue()
