"""Which version should be answering: the journal, a SQLite file in the store.

Entries are only ever added. The last "released" entry of a model is the truth about it; TorchServe's own memory, its
snapshots and a restart change nothing.

    with journal.open(store) as book:
        book.released("digits")      → Release(version="1.0", proven=False, …) or None
        book.release("digits", "1.1", proven=False, why="archived while the server was stopped")
        book.live("digits")          → frozenset({"1.0", "1.1"}): versions whose pinned URL may be called now

| event        | detail                                   | says                                                  |
|--------------|------------------------------------------|-------------------------------------------------------|
| archived     | run, sha256                              | built                                                 |
| rollout      | id, kind, champion, phase, step          | a phase of a rollout or rollback; step: begin, done,  |
|              |                                          | of the gate also look or verdict; and what it found   |
| switching    | why                                      | from now on it may answer by default                  |
| released     | was, proven, why, running, back          | it should be answering by default                     |
| rolling back | id, reason, champion, innocent           | a rollout fails                                       |
| rolled back  | the same, left                           | that is over; left: what could not be cleared away    |
| reconciled   | why                                      | the server was made what this says                    |
| retiring     | why                                      | on its way out of the server: `retired` or `kept`     |
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from marwright.errors import RolloutError

FILE = "journal.db"
BUSY_SECONDS = 20.0
NETWORK = frozenset(
    ["nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "ceph", "lustre", "glusterfs", "gpfs", "beegfs"]
    + [f"fuse.{name}" for name in ("sshfs", "ceph", "glusterfs", "s3fs", "gcsfuse", "rclone")]
)
"""File systems on which SQLite's locks cannot be trusted.

9p and virtiofs are not among them: they hand a virtual machine or a sandbox a folder of its own host, and the guest's
kernel keeps the locks of the guest's processes itself. All of ours run in one guest.
"""


@dataclass(frozen=True)
class Entry:
    """One line of the journal. `at` is UTC, ISO 8601."""

    number: int
    at: str
    model: str
    version: str
    event: str
    detail: Mapping[str, Any]

    @property
    def time(self) -> float:
        """Unix seconds."""
        return datetime.fromisoformat(self.at).timestamp()


@dataclass(frozen=True)
class Span:
    """A time in which a version may answer: on the default URL, or at its pinned one. Unix seconds; None is still."""

    version: str
    default: bool
    since: float
    until: float | None = None


@dataclass(frozen=True)
class Release:
    """The version of a model that should be answering, and whether a rollout has proved it."""

    model: str
    version: str
    proven: bool
    why: str
    at: str


@dataclass(frozen=True)
class Standing:
    """What a new archive means for the version that answers: whether it becomes the released one, and the words."""

    releases: bool
    sentence: str


def after_archive(version: str, *, new: bool, released: Release | None, running: bool, proven: bool) -> Standing:
    """A build changes what answers only where nothing is running and nothing was ever proved.

    `new`: the journal has not heard of this archive before;
    `proven`: the journal holds a proven rollout of this model; `released` is what it says should be answering.
    """
    if released is None:
        return Standing(True, f"{version} will answer at the next start (released, unproven)")
    if released.version == version or not new:
        return Standing(False, "")
    if running or proven:
        return Standing(
            False,
            f"{released.version} still answers: `make rollout`, or `make release VERSION={version}` without proof",
        )
    return Standing(True, f"{version} will answer at the next start (was {released.version})")


class Journal:
    """An open journal; see `open`. Several processes may hold one at a time."""

    def __init__(self, database: sqlite3.Connection, path: Path) -> None:
        self._database = database
        self._path = path
        self.store = path.parent

    def add(self, model: str, version: str, event: str, **detail: Any) -> None:
        """One more entry, on disk when this returns."""
        with _told(self._path), self._database:
            self._database.execute(
                "insert into entries (at, model, version, event, detail) values (?, ?, ?, ?, ?)",
                (datetime.now(UTC).isoformat(timespec="milliseconds"), model, version, event, json.dumps(detail)),
            )

    def release(
        self, model: str, version: str, *, proven: bool, why: str, running: bool = False, back: bool = False
    ) -> None:
        """From now on `version` should be answering for `model`.

        `running`: the server holds it, beside what it held before; `back`: a return to what answered earlier.
        """
        was = self.released(model)
        self.add(
            model,
            version,
            "released",
            proven=proven,
            why=why,
            was=was.version if was else None,
            running=running,
            back=back,
        )

    def released(self, model: str) -> Release | None:
        entries = self.entries(model, event="released")
        if not entries:
            return None
        last = entries[-1]
        return Release(model, last.version, bool(last.detail["proven"]), str(last.detail["why"]), last.at)

    def releases(self) -> dict[str, Release]:
        """What should be answering, by model."""
        found = {model: self.released(model) for (model,) in self._query("select distinct model from entries")}
        return {model: release for model, release in sorted(found.items()) if release is not None}

    def was_proven(self, model: str, version: str) -> bool:
        """Whether that version ever came to answer by a rollout."""
        return any(
            entry.detail["proven"] for entry in self.entries(model, event="released") if entry.version == version
        )

    def previous(self, model: str) -> str | None:
        """What answered before the released version, and was not found wanting: where a rollback leads."""
        line: list[str] = []
        for entry in self.entries(model, event="released"):
            if entry.detail.get("back") and entry.version in line:
                del line[line.index(entry.version) + 1 :]
            elif line[-1:] != [entry.version]:
                line.append(entry.version)
        return line[-2] if len(line) > 1 else None

    def live(self, model: str) -> frozenset[str]:
        """Versions that the server should hold, ready to answer at their pinned URLs."""
        live: set[str] = set()
        for entry in self.entries(model):
            match entry.event:
                case "released":
                    live = {*live, entry.version} if entry.detail.get("running") else {entry.version}
                case "rollout" if (entry.detail["phase"], entry.detail.get("step")) == ("ready", "done"):
                    live.add(entry.version)
                case "kept":
                    live.add(entry.version)
                case "rolling back" | "rolled back" | "retiring" | "retired":
                    live.discard(entry.version)
        return frozenset(live)

    def spans(self, model: str) -> tuple[Span, ...]:
        """When each version may have answered, and where: an answer outside of these should not exist."""
        closed: list[Span] = []
        now: dict[tuple[str, bool], float] = {}

        def begin(version: str, default: bool, at: float) -> None:
            now.setdefault((version, default), at)

        def end(version: str, default: bool, at: float) -> None:
            if (version, default) in now:
                closed.append(Span(version, default, now.pop((version, default)), at))

        for entry in self.entries(model):
            match entry.event:
                case "rollout":
                    begin(entry.version, False, entry.time)
                case "switching":
                    begin(entry.version, True, entry.time)
                case "released":
                    for version, default in list(now):
                        if version != entry.version and (default or not entry.detail.get("running")):
                            end(version, default, entry.time)
                    begin(entry.version, True, entry.time)
                    begin(entry.version, False, entry.time)
                case "rolled back" | "retired":
                    end(entry.version, True, entry.time)
                    end(entry.version, False, entry.time)
        return (*closed, *(Span(version, default, since) for (version, default), since in now.items()))

    def has_proven_rollout(self, model: str) -> bool:
        """Once a rollout was proven, a mere build never changes what answers."""
        return any(entry.detail["proven"] for entry in self.entries(model, event="released"))

    def entries(self, model: str | None = None, *, event: str | None = None) -> tuple[Entry, ...]:
        """Oldest first."""
        rows = self._query(
            "select number, at, model, version, event, detail from entries"
            " where (?1 is null or model = ?1) and (?2 is null or event = ?2) order by number",
            (model, event),
        )
        return tuple(
            Entry(number, at, model, version, event, json.loads(detail))
            for number, at, model, version, event, detail in rows
        )

    def _query(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with _told(self._path):
            return self._database.execute(statement, values).fetchall()


@contextlib.contextmanager
def open(store: Path, *, busy: float = BUSY_SECONDS) -> Iterator[Journal]:
    """The journal of a store; made where there is none. `RolloutError` where it cannot be read or written.

    Another process that holds it for itself is waited for, `busy` seconds.
    """
    path = store / FILE
    with _told(path):
        store.mkdir(parents=True, exist_ok=True)
        kind = filesystem(store)
        if kind in NETWORK:
            raise RolloutError(
                f"the journal {path} would be on a network file system ({kind}), where SQLite's locks do not hold",
                hint="keep model_store/ on a local disk: --store PATH",
            )
        database = sqlite3.connect(path, timeout=busy)
    with contextlib.closing(database):
        with _told(path), database:
            database.execute("pragma synchronous = full")
            database.execute(
                "create table if not exists entries (number integer primary key, at text not null,"
                " model text not null, version text not null, event text not null, detail text not null)"
            )
        yield Journal(database, path)


def filesystem(path: Path) -> str:
    """The kind of file system that holds `path`: ext4, nfs4, …; "" where the system does not say."""
    where = path.resolve()
    kind, longest = "", 0
    for mount in psutil.disk_partitions(all=True):  # in the order of mounting: a later one covers what was there
        if where.is_relative_to(mount.mountpoint) and len(mount.mountpoint) >= longest:
            kind, longest = mount.fstype, len(mount.mountpoint)
    return kind


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Trouble with the file, said in our words."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise RolloutError(
            f"the journal {path} cannot be used: {error}", hint="the store must be a writable folder on a local disk"
        ) from error
