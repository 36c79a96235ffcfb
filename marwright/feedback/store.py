"""The feedback store: what production saw, and what it should have answered.

with Store.open(Path("feedback")) as store:
    store.ingest(Path("feedback/spool"))
    store.labelled("digits")                 # [Labelled(request=…, answer="3", label="8", path=…), …]
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock
import sqlalchemy as sa

from handlers.spec import ModelSpec
from marwright.errors import DataError
from marwright.feedback import asking, forgetting, importing, ingesting, labelling, pruning, tables
from marwright.feedback.bodies import Bodies
from marwright.feedback.database import Database
from marwright.feedback.ingesting import Place
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
    Pictured,
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
    "Pictured",
    "Pruned",
    "Store",
    "Unknown",
]

Say = Callable[[str], None]

LOCK = ".feedback.lock"
LOCK_SECONDS = 600.0


class Store:
    """An open feedback store; several processes may hold one at a time. DataError where its database fails."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.folder = folder
        self.database = database
        self._place = Place(database, Bodies(folder), filelock.FileLock(folder / LOCK, timeout=LOCK_SECONDS))

    @classmethod
    def open(cls, folder: Path, url: str | None = None) -> Self:
        """The store of a folder; made where there is none. `url`, else MARWRIGHT_DATABASE, names another database.

        SettingsError for a URL that nothing here can open, DataError for a database that cannot be used.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder} cannot be used: {error.strerror}", hint="--feedback names another") from None
        return cls(Database.open(folder, url), folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.database.close()

    def ingest(self, spool: Path, *, keep: bool = False, say: Say = lambda line: None) -> Ingested:
        """Take every whole segment of a spool, each in one transaction; `keep` leaves the files there.

        `say` gets a line about whatever could not be taken.
        """
        with self._told():
            return ingesting.ingest(self._place, spool, keep=keep, say=say)

    def add_labels(self, labels: Iterable[Label]) -> Added:
        """All of them, or none."""
        now = time.time()
        with self.database.writing() as connection:
            return labelling.add(self.database, connection, list(labels), received=now)

    def add_pictures(self, model: str, pictures: Iterable[Picture], *, spec: ModelSpec) -> Pictured:
        """Labelled pictures that were no request; `spec` says what the model takes, and its classes."""
        with self._told():
            return importing.add_pictures(self._place, model, pictures, spec=spec)

    def models(self) -> list[str]:
        """Those with a request, or with a labelled picture."""
        with self.database.reading() as connection:
            return asking.models(connection)

    def labelled(self, model: str, *, conflict: str = "last") -> list[Labelled]:
        """One for each instance with a label that counts, oldest answer first. `conflict`: last, first, majority."""
        with self.database.reading() as connection:
            return asking.labelled(connection, self._place.bodies, model, conflict=conflict)

    def answered(self, model: str, *, version: str | None = None, last: int | None = None) -> list[Answered]:
        """What production asked, oldest first; of that, the `last` so many."""
        with self.database.reading() as connection:
            return asking.answered(connection, self._place.bodies, model, version=version, last=last)

    def status(self, model: str | None = None, *, conflict: str = "last") -> list[ModelStatus]:
        """How it stands with each model, or with one."""
        with self.database.reading() as connection:
            return [
                asking.status(connection, name, conflict=conflict)
                for name in asking.models(connection)
                if model in (None, name)
            ]

    def unknown(self) -> Unknown:
        """Labels whose request nobody has seen (yet)."""
        with self.database.reading() as connection:
            return asking.unknown(connection)

    def forget(
        self, request: str, *, spool: Path | None = None, runs: Path | None = None, patience: float | None = None
    ) -> Forgotten:
        """Remove every trace of it: here, in the spool, and in what training keeps; refuse what still comes of it.

        A segment that has it and is still written to is waited for, `patience` seconds; then DataError.
        """
        wait = forgetting.GROWING_SECONDS if patience is None else patience
        where = spool or self.folder / "spool"
        with self._told():
            return forgetting.forget(self._place, request, spool=where, runs=runs, patience=wait)

    def prune(
        self,
        *,
        days: float,
        unlabelled_days: float | None = None,
        model: str | None = None,
        spool: Path | None = None,
        now: float | None = None,
    ) -> Pruned:
        """Remove what is older, requests of `model` alone where it is given, and give its space back. SettingsError for
        an age that is none."""
        with self._told():
            where = spool or self.folder / "spool"
            return pruning.prune(self._place, where, days=days, unlabelled_days=unlabelled_days, model=model, now=now)

    def note(self, kind: str, model: str, document: Mapping[str, Any]) -> None:
        """Keep a document of the loop's: a look at drift, the outcome of a turn."""
        row = {"kind": kind, "model": model, "time": time.time(), "document": json.dumps(document)}
        with self.database.writing() as connection:
            connection.execute(sa.insert(tables.notes).values(**row))

    def notes(self, kind: str, model: str, last: int = 1) -> list[dict[str, Any]]:
        """Newest first, each with its "time"."""
        note = tables.notes.c
        statement = sa.select(note.document, note.time).where(note.kind == kind, note.model == model)
        with self.database.reading() as connection:
            rows = connection.execute(statement.order_by(note.id.desc()).limit(last)).all()
        return [{**json.loads(document), "time": at} for document, at in rows]

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Trouble with the files, said in our words."""
        try:
            yield
        except filelock.Timeout:
            raise DataError(
                f"{self.folder} is being written by another command for {LOCK_SECONDS:.0f} s", hint="try again later"
            ) from None
        except OSError as error:
            raise DataError(
                f"{error.filename or self.folder}: {error.strerror or error}", hint="is the disk full, or read-only?"
            ) from None
