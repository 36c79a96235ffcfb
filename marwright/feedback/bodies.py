"""Example files, named by their content: `bodies/ab/<sha256>.png`. Whoever sent the same picture shares the file.

A file has its name when it is whole. It is not forced to the disk by itself (4 ms each, measured): after a power cut
one may be short, which its name tells: whoever learns leaves it out, and the same picture, sent again, mends it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = "bodies"
_NAME = re.compile(r"[0-9a-f]{64}\.[a-z]+")
_KINDS = (
    (re.compile(rb"\x89PNG"), ".png"),
    (re.compile(rb"\xff\xd8\xff"), ".jpg"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), ".webp"),
    (re.compile(rb"GIF8"), ".gif"),
    (re.compile(rb"BM"), ".bmp"),
)


@dataclass(frozen=True)
class File:
    """An example file to be."""

    data: bytes
    suffix: str

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def made(body: bytes, instance: NDArray[Any], *, alone: bool) -> File:
    """The example file of one instance: the body itself where it is one picture, else the instance as the net saw it.

    `instance` is uint8 C×H×W (kept as PNG, to the bit) or float32 F (a JSON list).
    """
    if instance.ndim == 1:
        return File(json.dumps([float(value) for value in instance]).encode(), ".json")
    suffix = next((suffix for kind, suffix in _KINDS if kind.match(body)), "") if alone else ""
    if suffix:
        return File(body, suffix)
    stream = io.BytesIO()
    pixels = instance[0] if len(instance) == 1 else instance.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", compress_level=1)
    return File(stream.getvalue(), ".png")


class Bodies:
    """The files of a feedback folder. Whoever writes or removes some holds the folder's lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def path(self, digest: str, suffix: str) -> Path:
        return self.folder / digest[:2] / f"{digest}{suffix}"

    def write(self, file: File) -> None:
        """Harmless where it is there; a short one, as a power cut leaves it, is made whole."""
        path = self.path(file.digest, file.suffix)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == len(file.data):
                return
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            stream = part.open("wb")
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = part.open("wb")
        try:
            with stream:
                stream.write(file.data)
            part.replace(path)
        except OSError as error:  # what writing raises names no file
            part.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from None
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def there(self, names: Iterable[tuple[str, str]]) -> set[str]:
        """Those of (digest, suffix) whose file is here, by digest: a database may be shared, its files may not."""
        wanted = {f"{digest}{suffix}": digest for digest, suffix in names if digest}
        if len(wanted) <= 1000:
            return {digest for name, digest in wanted.items() if (self.folder / digest[:2] / name).exists()}
        present: set[str] = set()
        for prefix in {name[:2] for name in wanted}:
            with contextlib.suppress(FileNotFoundError):
                present.update(os.listdir(self.folder / prefix))  # noqa: PTH208 (a name, and no Path, for each of many)
        return {wanted[name] for name in present & wanted.keys()}

    def remove(self, digests: Iterable[str]) -> tuple[int, int]:
        """How many files went, and their bytes."""
        count = size = 0
        gone = set(digests)
        for prefix in sorted({digest[:2] for digest in gone}):
            for path in (self.folder / prefix).glob("*"):  # each folder is read once
                if path.stem in gone and _NAME.fullmatch(path.name):
                    size += path.stat().st_size
                    path.unlink()
                    count += 1
        return count, size

    def folders(self) -> list[Path]:
        """Of the files, by the first two digits of their names."""
        return sorted(self.folder.glob("[0-9a-f][0-9a-f]"))

    def tidied(self, folder: Path) -> set[str]:
        """Digests of the files in one of the folders, from which half-written ones of a killed writer are removed."""
        found = set()
        for path in folder.glob("*"):
            if _NAME.fullmatch(path.name):
                found.add(path.stem)
            elif path.name.endswith(".part"):
                path.unlink(missing_ok=True)
        return found
