"""Where labels are kept until somebody takes them into the store: segments of the kind `labels`.

    inbox = Inbox(Path("feedback/spool"), {"v": 1, "collector": "1.0"}, megabytes=1024)
    inbox.begin()
    inbox.keep(labels)          # on the disk, all of them, when this returns; BadRequest 503: none, try again
    inbox.close()

A segment gets its real name a few seconds after its first label, whether more come or not. A killed worker's segment is
taken over by whoever reads the spool.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handlers import ending, spool
from handlers.errors import BadRequest

KIND = "labels"
SECONDS = 2.0
"""After which a segment gets its name."""

_LOOK = 1.0
"""Seconds between two looks at how full the spool is."""

_log = logging.getLogger(__name__)


class Inbox:
    """One worker's segments. `folder` None: nothing is ever kept. Any thread may call."""

    def __init__(
        self, folder: Path | None, head: Mapping[str, Any], *, megabytes: float, seconds: float = SECONDS
    ) -> None:
        self.folder = folder
        self._writer = None if folder is None else spool.Writer(folder, KIND, head, segment_seconds=seconds)
        self._limit = megabytes * 2**20
        self._period = seconds / 4
        self._used = 0
        self._look_again = 0.0
        self._lock = threading.Lock()
        self._over = threading.Event()

    def begin(self) -> None:
        """Segments turn from now on, and the last one is finished when the process ends."""
        if self._writer is None:
            return
        threading.Thread(target=self._run, name="marwright-labels", daemon=True).start()
        ending.before(self.close)

    def keep(self, labels: Sequence[Mapping[str, Any]]) -> None:
        """All of them in one frame, so that there is no half; `BadRequest` 503 says why not."""
        if self._writer is None or self.folder is None:
            raise BadRequest(503, "labels are not kept here: MARWRIGHT_SPOOL names no folder for them")
        with self._lock:
            if self._over.is_set():
                raise BadRequest(503, "this worker is ending; send it again")
            if self._full():
                raise BadRequest(503, "the spool is full; `marwright feedback ingest` empties it; send it again then")
            begins = not self._writer.open
            try:
                self._writer.append({"received": time.time(), "labels": list(labels)}, sync=True)
                if begins:
                    _sync(self.folder)  # the file's name, too
            except OSError as error:
                _log.error("%d labels could not be kept: %s", len(labels), error)
                why = error.strerror or type(error).__name__
                raise BadRequest(503, f"labels cannot be kept now: {why}; send it again later") from None

    def close(self) -> None:
        """Finish the segment; whatever comes now is refused."""
        self._over.set()
        # A signal may come while this very thread keeps something: then the segment is left to be taken over.
        if self._writer is None or not self._lock.acquire(timeout=1.0):
            return
        try:
            with contextlib.suppress(OSError):
                self._writer.close()
        finally:
            self._lock.release()

    def _run(self) -> None:
        assert self._writer is not None
        while not self._over.wait(self._period):
            with self._lock:
                try:
                    self._writer.turn()
                except OSError as error:
                    _log.error("a segment of labels could not get its name, `feedback ingest` gives it one: %s", error)

    def _full(self) -> bool:
        assert self.folder is not None
        now = time.monotonic()
        if now >= self._look_again:
            self._used, self._look_again = spool.used(self.folder), now + _LOOK
        return self._used >= self._limit


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
