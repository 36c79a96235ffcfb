"""`serving.properties`: what TorchServe reads = `config.properties` + the store + one released archive for each model.

It is a function of the configuration and the journal, so every command may make it again, and does where it is stale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from marwright.errors import RolloutError
from marwright.release import journal, properties

LOCK = ".serving.lock"
"""File name, in the model store."""


def refresh(config: Path, store: Path) -> bool:
    """Make the generated file what it must be, atomically; True where it was not. No journal, nothing to serve.

    RolloutError where it cannot be written.
    """
    if not store.is_dir():
        return False
    with _alone(store):  # reading included: what was read earlier must not be written later
        if not (store / journal.FILE).is_file():
            return (store / properties.SERVING).is_file() and _written(config, store, [])
        with journal.open(store) as book:
            released = book.releases()
        archives = [f"{release.model}-{release.version}.mar" for release in released.values()]
        return _written(config, store, archives)


@contextlib.contextmanager
def _alone(store: Path) -> Iterator[None]:
    """One refresh at a time. Where no lock can be had nothing can be written either, and a mere look may go on."""
    lock = filelock.FileLock(store / LOCK)
    try:
        lock.acquire(timeout=journal.BUSY_SECONDS, poll_interval=0.02)
    except filelock.Timeout:
        raise RolloutError(
            f"another command has been writing {store / properties.SERVING} for {journal.BUSY_SECONDS:g} s",
            hint=f"end the process that holds {lock.lock_file}",
        ) from None
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _written(config: Path, store: Path, archives: list[str]) -> bool:
    try:
        return properties.write_serving(config, store, archives)
    except OSError as error:
        raise RolloutError(
            f"{store / properties.SERVING}, which TorchServe reads at its next start, cannot be written: {error}",
            hint="the store must be a writable folder with room in it; every command writes that file anew",
        ) from error
