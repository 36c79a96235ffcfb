"""Segments on disk: how a worker hands something on without waiting for whoever takes it.

    writer = Writer(Path("feedback/spool"), "requests", {"model": "digits", "version": "1.0"})
    writer.append({"ids": ["…"]}, body)
    writer.close()

    for path in finished(Path("feedback/spool")):
        for frame in frames(path): ...

A segment is a file of frames, the first of which is its head. It grows under a hidden name and gets its real one,
`<kind>-<time>-<pid>-<number>.seg`, when it is full, old enough, or closed: whoever sees that name sees all of it. Its
writer holds a lock on it, which the system lets go of when the process ends, however it ends: `finished` then takes
over what a killed writer left, up to the last whole frame.

A frame is `MWF1`, the lengths of its header and of its payload, the CRC-32 of both, the header (JSON), the payload.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

MAGIC = b"MWF1"
SUFFIX = ".seg"
_PREFIX = struct.Struct("<4sIII")
_LARGEST = 2**30
"""Bytes of one frame: a larger length is damage."""
_TRIES = 5
_numbers = itertools.count()


@dataclass(frozen=True)
class Frame:
    """One entry of a segment."""

    header: dict[str, Any]
    payload: bytes


class Writer:
    """Writes segments of one kind. Not for several threads at a time. OSError where the disk refuses."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        head: Mapping[str, Any],
        *,
        segment_bytes: int = 4 * 2**20,
        segment_seconds: float = 5.0,
    ) -> None:
        """`head` is the first frame of every segment. Nothing is made before the first frame."""
        self.folder = folder
        self.kind = kind
        self._head = dict(head)
        self._bytes = segment_bytes
        self._seconds = segment_seconds
        self._file: BufferedWriter | None = None
        self._begun = 0.0
        self._written = self._empty = 0

    @property
    def open(self) -> bool:
        """Whether a segment is growing."""
        return self._file is not None

    def append(self, header: Mapping[str, Any], payload: bytes = b"", *, sync: bool = False) -> None:
        """One frame, in the system's hands when this returns; with `sync` on the disk.

        Where it fails, what was written of it is cut off again: a segment never has half a frame in its middle.
        """
        if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
            self._file.close()  # somebody has removed it, perhaps with the whole folder
            self._file = None
        file = self._file or self._begin()
        data = encode(header, payload)
        try:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        except OSError:
            self._cut(file)
            raise
        self._written += len(data)
        self.turn()

    def turn(self) -> None:
        """Finish the segment if it is full or old; call it now and then where nothing is appended."""
        if self._file is None:
            return
        if self._written >= self._bytes or time.monotonic() - self._begun >= self._seconds:
            self.close()

    def close(self) -> None:
        """Give the growing segment its real name."""
        file, self._file = self._file, None
        if file is None:
            return
        growing = Path(file.name)
        try:
            _rename(growing)
        finally:
            file.close()

    def _begin(self) -> BufferedWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            file = self._made()
            if file is not None:
                return file
        raise BlockingIOError(errno.EAGAIN, "others take the segment before it is begun", str(self.folder))

    def _made(self) -> BufferedWriter | None:
        """A segment with its head; None where `finished` came before its lock and took it for a dead writer's."""
        name = f".{self.kind}-{time.time_ns()}-{os.getpid()}-{next(_numbers)}{SUFFIX}.open"
        file = (self.folder / name).open("xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:
                file.close()
                return None
            head = encode(self._head)
            file.write(head)
            file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
            if isinstance(error, BlockingIOError):
                return None
            raise
        self._file, self._begun = file, time.monotonic()
        self._written = self._empty = len(head)
        return file

    def _cut(self, file: BufferedWriter) -> None:
        """Back to the last whole frame; where even that fails, the segment is left to `finished`, which cuts it."""
        self._file = None
        with contextlib.suppress(OSError, ValueError):
            file.close()  # may try to flush again
        with contextlib.suppress(OSError):
            if self._written == self._empty:  # nothing but its head: a full disk would be filled with such
                Path(file.name).unlink()
                return
            os.truncate(file.name, self._written)
            _rename(Path(file.name))


def encode(header: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """The bytes of one frame."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    crc = zlib.crc32(payload, zlib.crc32(text))
    return b"".join((_PREFIX.pack(MAGIC, len(text), len(payload), crc), text, payload))


def finished(folder: Path, kind: str = "") -> list[Path]:
    """Whole segments, oldest first; those that a dead writer left are taken over. An absent folder has none."""
    if not folder.is_dir():
        return []
    for growing in folder.glob(f".*{SUFFIX}.open"):
        _adopt(growing)
    found = [path for path in folder.glob(f"{kind}*{SUFFIX}") if not path.name.startswith(".")]
    return sorted(found, key=lambda path: (_time(path), path.name))


def frames(path: Path) -> Iterator[Frame]:
    """The frames of a segment, its head first. What follows the last whole one is left out (`whole` says whether
    anything does)."""
    with path.open("rb") as file:
        while (frame := _read(file)) is not None:
            yield frame


def whole(path: Path) -> bool:
    """Whether the segment ends with a whole frame."""
    with path.open("rb") as file:
        good = 0
        while _read(file) is not None:
            good = file.tell()
    return good == path.stat().st_size


def used(folder: Path) -> int:
    """Bytes of all segments, growing ones included."""
    total = 0
    for path in folder.glob(f"*{SUFFIX}*") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _read(file: Any) -> Frame | None:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        return None
    magic, header, payload, crc = _PREFIX.unpack(prefix)
    if magic != MAGIC or header + payload > _LARGEST:
        return None
    text, data = file.read(header), file.read(payload)
    if len(text) + len(data) < header + payload or zlib.crc32(data, zlib.crc32(text)) != crc:
        return None
    try:
        found = json.loads(text.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return None
    return Frame(found, data) if isinstance(found, dict) else None


def _adopt(growing: Path) -> None:
    """Finish another process's segment, if that process is gone."""
    with contextlib.suppress(OSError), growing.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where its writer lives
        if os.fstat(file.fileno()).st_nlink == 0 or not growing.exists():
            return  # it was finished meanwhile
        good = 0
        while _read(file) is not None:
            good = file.tell()
        if not good:
            growing.unlink()
            return
        file.truncate(good)
        _rename(growing)


def _rename(growing: Path) -> None:
    growing.rename(growing.with_name(growing.name.removeprefix(".").removesuffix(".open")))


def _time(path: Path) -> int:
    """Nanoseconds, from its name."""
    for part in path.name.split("-"):
        if part.isdigit():
            return int(part)
    return 0
