"""Pictures made worse in five ways, each in five steps: streams that drift, for tests and measurements.

    corrupt(pictures, "noise", 3)      # uint8 N×C×H×W → the same

The ways, and steps of about this size, are those of Hendrycks and Dietterich (2019, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations"); the code is ours. Noise is drawn from the seed: the same pictures
give the same bytes.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

CORRUPTIONS = ("noise", "blur", "contrast", "darkness", "jpeg")
SEVERITIES = (1, 2, 3, 4, 5)

_NOISE = ((0.04, 200), (0.08, 100), (0.12, 50), (0.18, 25), (0.26, 12))
"""Standard deviation of the Gaussian part, of 1; photons of a white pixel, for the shot noise before it."""
_BLUR = (0.4, 0.6, 0.8, 1.1, 1.5)
"""Standard deviation in pixels, of pictures of up to 32 pixels; larger ones in proportion."""
_CONTRAST = (0.75, 0.55, 0.4, 0.25, 0.15)
"""What is left of a pixel's distance from the picture's mean."""
_DARKNESS = ((0.85, 1.05), (0.65, 1.3), (0.5, 1.5), (0.35, 1.75), (0.2, 2.0))
"""Factor and exponent (gamma)."""
_JPEG = (60, 35, 20, 10, 5)
"""Pillow's quality."""

Pictures = NDArray[np.uint8]


def corrupt(inputs: Pictures, name: str, severity: int, *, seed: int = 0) -> Pictures:
    """uint8 N×C×H×W, one channel or three, made worse; `severity` 1 to 5. ValueError says what is allowed."""
    if name not in CORRUPTIONS:
        raise ValueError(f"no corruption {name!r}; there are: {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity!r}, not 1 to 5")
    if inputs.dtype != np.uint8 or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        raise ValueError(f"inputs are {inputs.dtype} of shape {inputs.shape}, not uint8 N×1×H×W or N×3×H×W")
    step = severity - 1
    random = np.random.default_rng([seed, CORRUPTIONS.index(name), severity])
    made = np.empty_like(inputs)
    for row, picture in enumerate(inputs):
        made[row] = _jpeg(picture, step) if name == "jpeg" else _pixels(picture, name, step, random)
    return made


def _pixels(picture: Pictures, name: str, step: int, random: np.random.Generator) -> Pictures:
    x = picture.astype(np.float64) / 255
    match name:
        case "noise":
            spread, photons = _NOISE[step]
            x = random.poisson(x * photons) / photons + random.normal(0, spread, x.shape)
        case "blur":
            sigma = _BLUR[step] * max(1.0, min(x.shape[1:]) / 32)
            x = ndimage.gaussian_filter(x, (0, sigma, sigma), mode="nearest")
        case "contrast":
            mean = x.mean(axis=(1, 2), keepdims=True)
            x = mean + (x - mean) * _CONTRAST[step]
        case "darkness":
            factor, gamma = _DARKNESS[step]
            x = factor * x**gamma
    whole: Pictures = np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)
    return whole


def _jpeg(picture: Pictures, step: int) -> Pictures:
    """There and back by Pillow, colours at half the resolution as JPEGs have them."""
    stream = io.BytesIO()
    made = Image.fromarray(picture[0] if len(picture) == 1 else np.moveaxis(picture, 0, -1))
    made.save(stream, "JPEG", quality=_JPEG[step])
    with Image.open(stream) as again:
        pixels = np.asarray(again, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
