"""Pictures decoded once: one `.npy` file of uint8 N×C×H×W, named by all that went into it.

The name has the digest of the data, the input's shape, resize and decoder, and the digest of the code that decodes. The
file gets its name when it is whole; beside it a `.json` says which examples could not be read (they are blank).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from rich.progress import track

from handlers import images
from handlers.errors import BadRequest
from handlers.spec import ImageInput, Limits
from marwright import files
from marwright.errors import DataError
from marwright.learning.examples import Array, Examples, pixels

CHUNK = 256


@dataclass(frozen=True)
class Store:
    """The decoded file; `unreadable` maps an example's index to the reason."""

    path: Path
    unreadable: dict[int, str]

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    def held(self) -> Array:
        """In memory."""
        array: Array = np.load(self.path, allow_pickle=False)
        return array

    def mapped(self) -> Array:
        """On disk, read as it is touched (private copy-on-write: the file cannot change)."""
        array: Array = np.load(self.path, mmap_mode="c", allow_pickle=False)
        return array


def store(found: Examples, image: ImageInput, limits: Limits, *, cache: Path, progress: bool) -> Store:
    """The decoded pictures of `found`, in its order; made now if they are not there yet."""
    path = cache / "decoded" / f"{_key(found, image, limits)}.npy"
    about = path.with_suffix(".json")
    if not path.is_file() or not about.is_file():
        unreadable: dict[int, str] = {}
        with files.replacing(path) as temporary:
            target = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(len(found), *image.shape))
            for i, outcome in track(
                enumerate(_decode(found, image, limits)),
                "decoding",
                total=len(found),
                disable=not progress,
                transient=True,
            ):
                if isinstance(outcome, str):
                    unreadable[i] = outcome
                else:
                    target[i] = outcome
            target.flush()
            del target
            files.write_json(about, {"unreadable": {str(i): reason for i, reason in unreadable.items()}})
    document = json.loads(about.read_text(encoding="utf-8"))
    return Store(path, {int(i): reason for i, reason in document["unreadable"].items()})


def refused(found: Examples, unreadable: dict[int, str]) -> DataError:
    """Names every unreadable file."""
    lines = "\n".join(f"  - {found.names[i]}: {reason}" for i, reason in sorted(unreadable.items()))
    return DataError(
        f"{len(unreadable)} of {len(found)} files cannot be read as pictures:\n{lines}",
        hint='remove them, or leave them out with on_unreadable = "skip" under [data]',
    )


def _decode(found: Examples, image: ImageInput, limits: Limits) -> Iterator[Array | str]:
    def one(i: int) -> Array | str:
        try:
            return pixels(found.raw(i).data, image, limits)
        except BadRequest as error:
            return error.reason

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(found), CHUNK * workers):
            stop = min(len(found), start + CHUNK * workers)
            yield from pool.map(one, range(start, stop))


def _key(found: Examples, image: ImageInput, limits: Limits) -> str:
    order = hashlib.sha256("\n".join(found.digests).encode()).hexdigest()
    home = Path(images.__file__).parent
    code = [files.sha256(home / name) for name in ("images.py", "turbo.py")]
    versions = [metadata.version(name) for name in images.PACKAGES[image.decoder]]
    text = f"{found.digest}|{order}|{image}|{limits}|{code}|{versions}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]
