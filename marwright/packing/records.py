"""What is known of each built archive: its record, a JSON file beside it in the store.

records.records(store, "digits")        every built version, 1.10 after 1.9
records.check_whole(record, store)      the file is still the one that was built
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from marwright import files
from marwright.errors import ArchiveError

COLLECTOR = "feedback"
"""The model that takes labels. It learns nothing, so nothing is trained, rolled out or asked by default under that
name."""

_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)")


@dataclass(frozen=True)
class ArchiveRecord:
    """One built archive; kept as `<model>-<version>.json` beside it."""

    model: str
    version: str
    file: str
    sha256: str
    size: int
    """Bytes."""
    bundle: str
    """First 16 hex digits of the sha256 of MAR-INF/digests.json: what every answer says of itself."""
    content: str
    """sha256 over every member but the manifest: the same in two versions that differ in nothing but the number."""
    run: str
    format: str
    workers: int
    metrics: Mapping[str, float]
    twin_size: int = 0
    """Bytes of `size` that are there for explanations alone."""


def records(store: Path, model: str | None = None) -> list[ArchiveRecord]:
    """Every archive built into a store, by model and then by number (1.10 after 1.9)."""
    found = []
    for path in store.glob("*.json") if store.is_dir() else ():
        try:
            record = ArchiveRecord(**files.read_json(path))
            if (
                record_name(record.file) != path.name
                or f"{record.model}-{check_version(record.version)}.mar" != record.file
            ):
                raise ValueError(record.file)
            found.append(record)
        except (TypeError, ValueError, ArchiveError):
            raise ArchiveError(
                f"{path} is not the record of an archive",
                hint="move it out of the store; records are made by `archive`",
            ) from None
    wanted = [record for record in found if model in (None, record.model)]
    return sorted(wanted, key=lambda record: (record.model, Version(record.version)))


def record(store: Path, model: str, version: str) -> ArchiveRecord:
    """The record of one version; ArchiveError lists those there are."""
    built = records(store, model)
    for candidate in built:
        if candidate.version == version:
            return candidate
    there = ", ".join(candidate.version for candidate in built) or "none"
    raise ArchiveError(f"no archive of {model} {version} in {store}", hint=f"there are: {there}")


def check_whole(record: ArchiveRecord, store: Path) -> None:
    """The file is there and is the one that was built. ArchiveError says which it is not."""
    path = store / record.file
    if not path.is_file():
        raise ArchiveError(f"{path} is missing", hint="put it back, or release another version: make release VERSION=…")
    digest = files.sha256(path)
    if digest != record.sha256:
        raise ArchiveError(
            f"{path} is not the file that was built: sha256 {digest[:12]}…, its record says {record.sha256[:12]}…",
            hint="put the built file back, or release another version: make release VERSION=…",
        )


def taken(store: Path, model: str) -> set[str]:
    """Versions that have a record or a file in the store, even a file whose record was lost."""
    prefix = f"{model}-"
    names = [path.name.removeprefix(prefix).removesuffix(".mar") for path in store.glob(f"{prefix}*.mar")]
    return {record.version for record in records(store, model)} | {name for name in names if _VERSION.fullmatch(name)}


def next_version(taken: Collection[str]) -> str:
    """1.0, then one more than the highest minor number of the highest major one."""
    if not taken:
        return "1.0"
    highest = max(Version(version) for version in taken)
    return f"{highest.major}.{highest.minor + 1}"


def check_version(version: str) -> str:
    """Two numbers and a dot, so that 1.10 comes after 1.9 and nothing equals 1.0 but 1.0; TorchServe reserves `all`."""
    if not _VERSION.fullmatch(version):
        raise ArchiveError(f"{version!r} is not a version", hint="two numbers and a dot: --version 2.0")
    return version


def record_name(file: str) -> str:
    return f"{file.removesuffix('.mar')}.json"
