"""`serving.properties`: what TorchServe reads = `config.properties` + the store + one released archive for each model.

It is a function of the configuration and the journal, so every command may make it again, and does where it is stale.
"""

from __future__ import annotations

from pathlib import Path

from marwright.release import journal, properties


def refresh(config: Path, store: Path) -> bool:
    """Make the generated file what it must be, atomically; True where it was not. No journal, nothing to serve."""
    if not (store / journal.FILE).is_file():
        return (store / properties.SERVING).is_file() and properties.write_serving(config, store, [])
    with journal.open(store) as book:
        released = book.releases()
    archives = [f"{release.model}-{release.version}.mar" for release in released.values()]
    return properties.write_serving(config, store, archives)
