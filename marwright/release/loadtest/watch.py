"""Which versions may be pinned now: the journal's word, looked up ten times a second beside the run.

with Watch(store, "digits") as watched:
    watched()       frozenset({"1.0", "1.1"})
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from marwright.errors import MarwrightError
from marwright.release import journal

INTERVAL = 0.1
"""Seconds. A rollout leaves a version alive for longer than that after the journal has let go of it."""


class Watch:
    """Follows the journal in a thread of its own; a MarwrightError of the journal is raised where it is asked next."""

    def __init__(self, store: Path, model: str) -> None:
        with journal.open(store) as book:
            self._live = book.live(model)
        self._store = store
        self._model = model
        self._error: MarwrightError | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="journal watch", daemon=True)

    def __call__(self) -> frozenset[str]:
        if self._error is not None:
            raise self._error
        return self._live

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _follow(self) -> None:
        try:
            with journal.open(self._store) as book:
                while not self._end.wait(INTERVAL):
                    self._live = book.live(self._model)
        except MarwrightError as error:
            self._error = error
