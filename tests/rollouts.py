"""A private server on which digits 1.0 answers, with further versions built beside it: where rollouts are tried.

with rollouts.stage(tmp_path, digits) as stage:
    rollout.rolled_out(stage.settings("1.1"))
    assert stage.answers() == "1.1"
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from marwright.packing import records
from marwright.packing.records import ArchiveRecord
from marwright.release import journal, loading
from marwright.release.client import Client
from marwright.release.journal import Entry, Release
from marwright.release.server import Expected
from marwright.settings import Places, RollbackSettings, RolloutSettings
from tests import archives, torchserve
from tests.archives import Built

QUICK = """
[shadow]
requests = 20
[gate]
margin = 0.3
looks = 1
max_latency_ratio = 20.0
[watch]
seconds = 1.0
every = 0.2
max_latency_ratio = 50.0
max_p99_ratio = 1000.0
[settle]
idle_seconds = 0.5
drain_seconds = 10.0
warm_seconds = 600.0
[server]
call_seconds = 10.0
"""
"""A policy for tests: short times, and limits that noise on a busy machine does not reach."""


@dataclass(frozen=True)
class Stage:
    """The server, the store, and the options that name them."""

    home: torchserve.Home
    runs: Path

    @property
    def store(self) -> Path:
        return self.home.store

    @property
    def places(self) -> Places:
        return Places(store=self.store, config=self.home.config_path, runs=self.runs)

    @property
    def policy(self) -> Path:
        return self.home.folder / "policies" / "digits.toml"

    def settings(self, version: str | None = None, **more: object) -> RolloutSettings:
        return RolloutSettings(**self.places.__dict__, model="digits", version=version, **more)  # type: ignore[arg-type]

    def rollback(self) -> RollbackSettings:
        return RollbackSettings(**self.places.__dict__, model="digits")

    def record(self, version: str) -> ArchiveRecord:
        return records.record(self.store, "digits", version)

    def client(self) -> Client:
        return self.home.client()

    def answers(self) -> str | None:
        """The version that a plain request is answered by."""
        with self.client() as client:
            body = next(iter((self.runs / self.record("1.0").run / "golden").glob("*.png"))).read_bytes()
            return client.predict("digits", body).version

    def held(self) -> list[str]:
        """Versions that the server has loaded."""
        with self.client() as client:
            return sorted(loading.versions(client, "digits"))

    def released(self) -> Release:
        with journal.open(self.store) as book:
            found = book.released("digits")
        assert found is not None
        return found

    def entries(self, event: str | None = None) -> tuple[Entry, ...]:
        with journal.open(self.store) as book:
            return book.entries("digits", event=event)


@contextlib.contextmanager
def stage(folder: Path, digits: Built, *, others: int = 1, policy: str = QUICK, start: bool = True) -> Iterator[Stage]:
    """digits 1.0 is released (and served, unless told otherwise); 1.1, 1.2 … hold the same net, so they are as good."""
    store = folder / "store"
    store.mkdir(parents=True)
    for path in (digits.path, digits.path.with_suffix(".json")):
        shutil.copy2(path, store / path.name)
    for number in range(others):
        archives.build(digits.run, store, threads=2 + number)
    (folder / "policies").mkdir()
    (folder / "policies" / "digits.toml").write_text(policy, encoding="utf-8")
    with journal.open(store) as book:
        book.release("digits", "1.0", proven=False, why="test")
    expected = {"digits": Expected("1.0")}
    with torchserve.home(folder, expected, archives=["digits-1.0.mar"], store=store) as home:
        if start:
            home.bring_up()
        yield Stage(home, digits.run.path.parent)
