"""`serving.properties`: what TorchServe reads = `config.properties` + the store + one released archive for each model.

It is a function of the configuration and the journal, so every command may make it again, and does where it is stale.
"""

from __future__ import annotations

from pathlib import Path

from marwright.errors import RolloutError
from marwright.release import journal, properties


def refresh(config: Path, store: Path) -> bool:
    """Make the generated file what it must be, atomically; True where it was not. No journal, nothing to serve.

    RolloutError where it cannot be written.
    """
    if not (store / journal.FILE).is_file():
        return (store / properties.SERVING).is_file() and _written(config, store, [])
    with journal.open(store) as book:
        released = book.releases()
    archives = [f"{release.model}-{release.version}.mar" for release in released.values()]
    return _written(config, store, archives)


def _written(config: Path, store: Path, archives: list[str]) -> bool:
    try:
        return properties.write_serving(config, store, archives)
    except OSError as error:
        raise RolloutError(
            f"{store / properties.SERVING}, which TorchServe reads at its next start, cannot be written: {error}",
            hint="the store must be a writable folder with room in it; every command writes that file anew",
        ) from error
