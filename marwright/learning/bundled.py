"""Data sets that come with a library: scikit-learn's (offline), torchvision's (downloaded once).

found = bundled.digits()
found.raw(0).data[:4]        # b"\\x89PNG": what a client would send
"""

from __future__ import annotations

import hashlib
import io
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from marwright.errors import DataError
from marwright.learning.examples import Array, Body, Examples

DOWNLOAD_TIMEOUT = 10.0
"""Seconds without one byte before a download is given up."""


def digits() -> Examples:
    """1797 handwritten digits of 8×8, grey (Alpaydin and Kaynak 1998), by scikit-learn."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = np.round(found.images * (255 / 16)).astype(np.uint8)
    return _pictures(grey, found.target.tolist(), tuple(str(name) for name in found.target_names), [""] * len(grey))


def diabetes() -> Examples:
    """442 patients, ten features in their own units (Efron et al. 2004), by scikit-learn."""
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    rows = found.data.astype(np.float32)
    bodies = [json.dumps([float(str(value)) for value in row]).encode() for row in rows]
    return Examples(
        names=[f"{i:04d}" for i in range(len(rows))],
        digests=[hashlib.sha256(body).hexdigest() for body in bodies],
        targets=[float(value) for value in found.target],
        parts=[""] * len(rows),
        raw=lambda i: Body(bodies[i], ".json"),
        features=tuple(found.feature_names),
        target="progression",
        rows=rows,
    )


def downloaded(name: str, cache: Path) -> Examples:
    """`mnist` or `cifar10` by torchvision's own download into `cache`; a `DataError` when there is no way to it."""
    from torchvision import datasets  # type: ignore[import-untyped]

    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        halves = [kind(str(cache), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name} could not be downloaded: {error}",
            hint=f"give it as a folder or zip (train/<class>/<file>): `marwright train --recipe {name} --data PATH`; "
            "the recipes digits, diabetes-mlp and diabetes-linear need no download",
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    arrays = np.concatenate([np.asarray(half.data, dtype=np.uint8) for half in halves])
    targets = [int(target) for half in halves for target in half.targets]
    parts = ["train"] * len(halves[0]) + ["test"] * len(halves[1])
    classes = tuple(str(i) for i in range(10)) if name == "mnist" else tuple(halves[0].classes)
    return _pictures(arrays, targets, classes, parts)


def _pictures(arrays: Array, targets: list[int], classes: tuple[str, ...], parts: list[str]) -> Examples:
    """Pictures that are arrays (N×H×W or N×H×W×3, uint8); a client would send each as a PNG."""
    return Examples(
        names=[f"{i:05d}" for i in range(len(arrays))],
        digests=[hashlib.sha256(repr(one.shape).encode() + one.tobytes()).hexdigest() for one in arrays],
        targets=targets,
        parts=parts,
        raw=lambda i: Body(_png(arrays[i]), ".png"),
        classes=classes,
    )


def _png(array: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
