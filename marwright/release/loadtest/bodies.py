"""What is sent: the golden examples of a model's archives, or a folder of files.

bodies.golden(store, "digits")      every different body among the golden examples of all built versions
bodies.folder(Path("pictures"))     every file in it
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from marwright.errors import DataError
from marwright.packing import golden as golden_examples
from marwright.packing import records


@dataclass(frozen=True)
class Body:
    """One request body, as a client would send it."""

    name: str
    data: bytes

    @property
    def content_type(self) -> str:
        return "application/json" if self.name.endswith(".json") else "application/octet-stream"


def golden(store: Path, model: str) -> tuple[Body, ...]:
    """The golden examples of every version whose archive is there, each body once; DataError where there are none."""
    found: dict[bytes, Body] = {}
    for record in records.records(store, model):
        if (store / record.file).is_file():
            for example in golden_examples.read(store / record.file):
                found.setdefault(example.body, Body(f"{record.version}/{example.name}", example.body))
    if not found:
        raise DataError(f"no archive of {model} in {store} to take requests from", hint="name a folder: --images PATH")
    return tuple(found.values())


def folder(path: Path) -> tuple[Body, ...]:
    """Every file below a folder but hidden ones, by name; DataError where there are none."""
    found = [
        Body(str(file.relative_to(path)), file.read_bytes())
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise DataError(f"there are no files in {path}", hint="one file for each request: pictures, .npy or .json")
    return tuple(found)
