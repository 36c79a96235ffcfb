"""One rollout of a model at a time, whichever process or terminal it is in.

    with turns.only_one(store, "digits", what="rollout of digits 1.1"):
        ...

The system itself drops the lock of a process that ends, however it ends; a note beside the lock says who holds it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import filelock

from marwright import files
from marwright.errors import RolloutError

LOOK_SECONDS = 1.0
"""`holder` takes the lock for a moment to see whether it is free: a rollout waits that long before it gives up."""


@contextlib.contextmanager
def only_one(store: Path, model: str, *, what: str) -> Iterator[None]:
    """Hold the model; RolloutError, saying who does, where another one holds it for longer than a look takes."""
    lock, note = _paths(store, model)
    store.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(lock)
    try:
        held.acquire(timeout=LOOK_SECONDS)
    except filelock.Timeout:
        raise RolloutError(
            f"{model} is being changed by another command: {holder(store, model) or 'it does not say which'}",
            hint="wait for it, or stop that process; `marwright releases` shows how far it is",
        ) from None
    try:
        with contextlib.suppress(OSError):  # the lock counts, the note is for people; the disk may be full
            files.write_json(
                note, {"pid": os.getpid(), "what": what, "since": datetime.now().isoformat("T", "seconds")}
            )
        yield
    finally:
        note.unlink(missing_ok=True)
        held.release()


def holder(store: Path, model: str) -> str:
    """Who holds the model now, in words; "" when nobody does."""
    lock, note = _paths(store, model)
    if not lock.exists():
        return ""
    probe = filelock.FileLock(lock)
    try:
        probe.acquire(timeout=0)
    except filelock.Timeout:
        try:
            said = json.loads(note.read_text(encoding="utf-8"))
            return f"{said['what']}, process {said['pid']}, since {said['since']}"
        except (OSError, ValueError, KeyError):
            return "a process that has left no note"
    except OSError:  # a store that cannot be written: nobody changes anything there
        return ""
    probe.release()
    return ""


def _paths(store: Path, model: str) -> tuple[Path, Path]:
    return store / f".rollout-{model}.lock", store / f".rollout-{model}.holder"
