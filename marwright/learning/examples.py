"""Examples as they were found, before they are split or decoded: what a source gives.

A source (`folders`, `bundled`) lists examples; `raw(i)` is the body that a client would send for example `i`: the bytes
of the original file, a PNG of a bundled picture at its native size, a JSON row of numbers. Pictures become inputs by
`pixels`, which is what the worker calls too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from handlers import images
from handlers.spec import ImageInput, Limits

Array = npt.NDArray[Any]
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Body:
    """A request body, and the suffix of a file that holds it (".png", ".json")."""

    data: bytes
    suffix: str


@dataclass(frozen=True)
class Examples:
    """`names`, `digests` (sha256 of the content), `targets` and `parts` have one entry for each example.

    `targets` are indices into `classes`, or values; `parts` is "" where the data leaves the split to us.
    `rows` are the inputs themselves where there is nothing to decode (float32 N×F).
    """

    names: Sequence[str]
    digests: Sequence[str]
    targets: Sequence[int] | Sequence[float]
    parts: Sequence[str]
    raw: Callable[[int], Body]
    classes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    target: str = ""
    rows: Array | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """sha256 of the content: the same files in a folder or in a zip, found in whatever order, have the same."""
        lines = sorted(
            json.dumps([part, self.classes[int(target)] if self.classes else target, name, digest], ensure_ascii=True)
            for part, target, name, digest in zip(self.parts, self.targets, self.names, self.digests, strict=True)
        )
        head = json.dumps([list(self.classes), list(self.features), self.target])
        return hashlib.sha256("\n".join([head, *lines]).encode()).hexdigest()


def pixels(data: bytes, image: ImageInput, limits: Limits) -> Array:
    """One picture, uint8 C×H×W, exactly as a worker would see it. `BadRequest` if it cannot be read."""
    return images.decode(data, image, limits)
