"""The feedback store: what production saw, and what it should have answered.

with Store.open(Path("feedback")) as store:
    store.ingest(Path("feedback/spool"))
    store.labelled("digits")                 # [Labelled(request=…, answer="3", label="8", path=…), …]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from handlers.spec import ModelSpec
from marwright.feedback.values import (
    Added,
    Answered,
    Forgotten,
    Ingested,
    Label,
    Labelled,
    Live,
    ModelStatus,
    Picture,
    Pruned,
    Unknown,
)

__all__ = [
    "Added",
    "Answered",
    "Forgotten",
    "Ingested",
    "Label",
    "Labelled",
    "Live",
    "ModelStatus",
    "Picture",
    "Pruned",
    "Store",
    "Unknown",
]

Say = Callable[[str], None]


class Store:
    """An open feedback store. Several processes may hold one at a time."""

    @classmethod
    def open(cls, folder: Path, url: str | None = None) -> Self:
        """The store of a folder; made where there is none. DataError where it cannot be used."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError

    def ingest(self, spool: Path, *, keep: bool = False, say: Say = lambda line: None) -> Ingested:
        """Take every whole segment of a spool, each in one transaction."""
        raise NotImplementedError

    def add_labels(self, labels: Iterable[Label]) -> Added:
        raise NotImplementedError

    def add_pictures(self, model: str, pictures: Iterable[Picture], *, spec: ModelSpec) -> Added:
        """Labelled pictures without a request; their request id is `file:<sha256>`."""
        raise NotImplementedError

    def models(self) -> list[str]:
        raise NotImplementedError

    def labelled(self, model: str, *, conflict: str = "last") -> list[Labelled]:
        """One for each labelled instance, oldest answer first. `conflict` is last, first or majority."""
        raise NotImplementedError

    def answered(self, model: str, *, version: str | None = None, last: int | None = None) -> list[Answered]:
        """Oldest first."""
        raise NotImplementedError

    def status(self, model: str | None = None, *, conflict: str = "last") -> list[ModelStatus]:
        raise NotImplementedError

    def unknown(self) -> Unknown:
        raise NotImplementedError

    def forget(self, request: str, spool: Path | None = None) -> Forgotten:
        raise NotImplementedError

    def prune(self, *, days: float, unlabelled_days: float | None = None) -> Pruned:
        raise NotImplementedError

    def note(self, kind: str, model: str, document: Mapping[str, Any]) -> None:
        """Keep a document of the loop's (a look at drift, a turn's outcome)."""
        raise NotImplementedError

    def notes(self, kind: str, model: str, last: int = 1) -> list[dict[str, Any]]:
        """Newest first, each with its "time"."""
        raise NotImplementedError
