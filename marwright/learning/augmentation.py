"""Flips and padded crops of whole batches, uint8 in and out.

augment(images, flip=True, crop=4, generator=generator)
moved(images, draw(len(images), flip=True, crop=4, generator=generator))      # the same, chance apart from work
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Moves:
    """What chance said of N pictures: `corners` (2×N: rows, columns, 0 to 2·crop) and which are `mirrored` (N)."""

    crop: int
    corners: Tensor | None
    mirrored: Tensor | None

    def of(self, some: slice, device: torch.device) -> Moves:
        """Those of some of the pictures, on `device`."""
        corners = None if self.corners is None else self.corners[:, some].to(device)
        return Moves(self.crop, corners, None if self.mirrored is None else self.mirrored[some].to(device))


def draw(count: int, *, flip: bool, crop: int, generator: torch.Generator, mirrored: Tensor | None = None) -> Moves:
    """Half of `count` pictures mirrored, each shifted by up to ±`crop` both ways. `mirrored` says it for the first."""
    corners = torch.randint(0, 2 * crop + 1, (2, count), generator=generator) if crop else None
    if flip and mirrored is None:
        mirrored = torch.rand(count, generator=generator) < 0.5
    return Moves(crop, corners, mirrored)


def sides(count: int, *, epoch: int, generator: torch.Generator) -> Tensor:
    """Which of `count` pictures are mirrored in `epoch`, where every picture is seen from each side by turns.

    `generator` must be the same in all epochs. Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds": two epochs together
    then show both sides of every picture, where chance shows one in two of them the same side twice.
    """
    first = torch.rand(count, generator=generator) < 0.5
    return first if epoch % 2 == 0 else ~first


def augment(images: Tensor, *, flip: bool, crop: int, generator: torch.Generator) -> Tensor:
    """N×C×H×W: half of them mirrored, each shifted by up to ±`crop` pixels both ways, black where nothing was."""
    return moved(images, draw(len(images), flip=flip, crop=crop, generator=generator))


def moved(images: Tensor, moves: Moves) -> Tensor:
    """Shift and mirror in one reading of the pictures."""
    if moves.corners is not None:
        return shift(images, moves.corners, moves.crop, moves.mirrored)
    if moves.mirrored is not None:
        return torch.where(moves.mirrored[:, None, None, None], images.flip(3), images)
    return images


def shift(images: Tensor, corners: Tensor, crop: int, mirrored: Tensor | None = None) -> Tensor:
    """Pad by `crop`, then cut H×W out with its upper left corner at `corners` (2×N); then mirror those `mirrored`."""
    count, channels, height, width = images.shape
    padded = functional.pad(images, (crop, crop, crop, crop))
    steps = torch.arange(width, device=images.device)
    across = steps if mirrored is None else torch.where(mirrored[:, None], width - 1 - steps, steps)
    rows = corners[0][:, None] + torch.arange(height, device=images.device)
    columns = corners[1][:, None] + across
    flat = (rows[:, :, None] * (width + 2 * crop) + columns[:, None, :]).reshape(count, 1, height * width)
    cut = padded.flatten(2).gather(2, flat.expand(-1, channels, -1))
    return cut.reshape(count, channels, height, width)
