"""Several servers and commands at one store, at once: each sees one view, and none undoes another's work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from marwright.errors import DataError
from marwright.feedback import bodies, ingesting, labelling, tables
from marwright.feedback.store import Label, Store
from tests.feedback import spools
from tests.feedback.spools import Asked, said

Opened = Callable[[], Store]
SECONDS = 0.5
"""For which a thread that has to wait is given the chance not to."""


@contextmanager
def meanwhile(deed: Callable[[], object]) -> Iterator[threading.Thread]:
    """`deed` is under way in another thread; over, and without an error, after the block."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            deed()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield thread
    thread.join(60)
    assert not thread.is_alive()
    assert errors == []


@pytest.fixture
def elsewhere(tmp_path: Path, database: str | None) -> Iterator[Store]:
    """Another server's store: a folder of its own, the same database. SQLite has but one folder."""
    with Store.open(tmp_path / ("feedback" if database is None else "elsewhere"), database) as store:
        yield store


def test_a_status_sees_what_is_forgotten_meanwhile_as_it_was(
    store: Store, opened: Opened, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spools.requests(spool, [Asked("r1"), Asked("r2")])
    spools.labels(spool, [said("r1", "one", uid="u1"), said("r2", "one", uid="u2")])
    store.ingest(spool)
    other, asked = opened(), labelling.said

    def slow(connection: sa.Connection, model: str) -> Any:
        found = asked(connection, model)
        with other.database.writing() as writing:
            writing.execute(sa.delete(tables.requests).where(tables.requests.c.id == "r1"))
        return found

    monkeypatch.setattr(labelling, "said", slow)
    (status,) = store.status("digits")
    assert (status.requests, status.labelled) == (2, 2)
    monkeypatch.undo()
    (status,) = store.status("digits")
    assert (status.requests, status.labelled) == (1, 1)


@pytest.mark.parametrize("what", ["labels", "requests"])
def test_what_is_forgotten_while_another_server_stores_it_stays_forgotten(
    store: Store, elsewhere: Store, spool: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    for module in (labelling, ingesting):
        monkeypatch.setattr(module, "buried", _slow(module.buried, reached, go_on))
    if what == "requests":
        spools.requests(spool, [Asked("r1")])

    def stored() -> object:
        if what == "requests":
            return store.ingest(spool)
        return store.add_labels([Label("r1", 0, "one", "ann", 1.0, "u1")])

    with meanwhile(stored):
        assert reached.wait(60)
        with meanwhile(lambda: elsewhere.forget("r1")) as forgetting:
            forgetting.join(SECONDS)
            go_on.set()
    assert store.answered("digits") == []
    assert store.unknown().labels == 0


def test_labels_that_two_servers_store_in_other_orders_are_each_stored_once(store: Store, elsewhere: Store) -> None:
    labels = [Label(f"r{n}", 0, "one", "ann", 1.0, f"u{n}") for n in range(3000)]
    with meanwhile(lambda: store.add_labels(labels)), meanwhile(lambda: elsewhere.add_labels(labels[::-1])):
        pass
    assert store.unknown().labels == 3000


def test_a_store_is_opened_and_looked_at_while_another_writes(store: Store, opened: Opened) -> None:
    with store.database.writing() as connection:
        connection.execute(sa.insert(tables.segments).values(name="x", time=0.0))
        assert opened().status() == []


def test_a_full_disk_is_said_of_the_file_and_the_segment_is_taken_later(
    store: Store, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spools.requests(spool, [Asked("r1"), Asked("r2")])

    def refused(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "replace", refused)
        with pytest.raises(DataError, match=r"bodies/.*\.png: No space left on device") as raised:
            store.ingest(spool)
    assert raised.value.hint == "is the disk full, or read-only?"
    assert (store.answered("digits"), list(store.folder.rglob("*.part"))) == ([], [])
    assert store.ingest(spool).requests == 2


def test_a_short_file_is_mended_by_the_same_picture(tmp_path: Path) -> None:
    kept = bodies.Bodies(tmp_path)
    file = bodies.File(b"a picture", ".png")
    kept.write(file)
    path = kept.path(file.digest, ".png")
    path.write_bytes(b"")
    kept.write(file)
    assert path.read_bytes() == b"a picture"


def test_who_answered_is_forgotten_with_the_last_of_its_requests(store: Store, spool: Path) -> None:
    spools.requests(spool, [Asked("old", time=1000)], version="1.0")
    spools.requests(spool, [Asked("new", time=2000 * 86_400)], version="2.0")
    store.ingest(spool)
    store.prune(days=10, now=2001 * 86_400)
    with store.database.reading() as connection:
        assert connection.scalars(sa.select(tables.answerers.c.version)).all() == ["2.0"]
        known = connection.scalar(sa.select(sa.func.count()).select_from(tables.classes))
    assert known == len(spools.DIGITS.classes)


def _slow(buried: Any, reached: threading.Event, go_on: threading.Event) -> Any:
    def asked(connection: sa.Connection, requests: Collection[str]) -> Any:
        found = buried(connection, requests)
        reached.set()
        assert go_on.wait(60)
        return found

    return asked


def test_one_odd_request_takes_no_other_with_it(store: Store, spool: Path) -> None:
    writer = spools.requests(spool, [Asked("r1"), Asked("r2")], finish=False)
    header, payload = spools.frame([Asked("r3"), Asked("odd"), Asked("r4")])
    del header["requests"][1]["type"]
    writer.append(header, payload)
    writer.close()
    taken = store.ingest(spool)
    assert (taken.requests, taken.instances, taken.damaged) == (4, 4, 1)
    assert [each.request for each in store.answered("digits")] == ["r1", "r2", "r3", "r4"]


def test_what_is_kept_in_the_spool_is_not_taken_again_when_it_is_old(store: Store, spool: Path) -> None:
    spools.requests(spool, [Asked("old", time=1000)])
    assert store.ingest(spool, keep=True).requests == 1
    later = time.time() + 2 * 86_400
    assert store.prune(days=1, now=later).requests == 1
    assert (store.ingest(spool, keep=True).requests, store.answered("digits")) == (0, [])
    for path in spool.glob("*.seg"):
        path.unlink()
    store.prune(days=1, now=later)
    with store.database.reading() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.segments)) == 0
