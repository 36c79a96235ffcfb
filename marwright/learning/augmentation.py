"""Flips and padded crops of whole batches, uint8 in and out.

augment(images, flip=True, crop=4, generator=generator)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def augment(images: Tensor, *, flip: bool, crop: int, generator: torch.Generator) -> Tensor:
    """N×C×H×W: half of them mirrored, each shifted by up to ±`crop` pixels both ways, black where nothing was."""
    if crop:
        images = shift(images, torch.randint(0, 2 * crop + 1, (2, len(images)), generator=generator), crop)
    if flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def shift(images: Tensor, corners: Tensor, crop: int) -> Tensor:
    """Pad by `crop`, then cut H×W out with its upper left corner at `corners` (2×N: rows, columns, 0 to 2·crop)."""
    count, channels, height, width = images.shape
    padded = functional.pad(images, (crop, crop, crop, crop))
    rows = corners[0][:, None] + torch.arange(height)
    columns = corners[1][:, None] + torch.arange(width)
    flat = (rows[:, :, None] * (width + 2 * crop) + columns[:, None, :]).reshape(count, 1, height * width)
    cut = padded.flatten(2).gather(2, flat.expand(-1, channels, -1))
    return cut.reshape(count, channels, height, width)
