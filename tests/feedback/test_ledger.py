"""At least once in, exactly once stored: the store against a ledger that knows nothing of how it works."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marwright.feedback import database as databases
from marwright.feedback.store import Store
from tests.feedback import spools
from tests.feedback.conftest import fresh
from tests.feedback.spools import DIGITS, Asked, said

NAMES = ("a", "b", "c", "d")
ROWS = {"a": 1, "b": 2, "c": 1, "d": 3}


@dataclass
class Ledger:
    """What was sent, in plain dicts."""

    requests: set[str] = field(default_factory=set)
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)

    def answers(self) -> set[tuple[str, int]]:
        return {(name, number) for name in self.requests for number in range(ROWS[name])}

    def labelled(self, conflict: str) -> dict[tuple[str, int], str]:
        """By brute force: all labels of an instance, sorted as they were said."""
        found = {}
        for key in self.answers():
            about = [
                label
                for label in self.labels.values()
                if (label["request"], label["instance"]) == key and label["label"] in DIGITS.classes
            ]
            about.sort(key=lambda label: (label["time"], label["uid"]))
            if not about:
                continue
            if conflict == "majority":
                votes = {label["source"]: label for label in about}
                count = Counter(label["label"] for label in votes.values())
                most = max(count.values())
                about = [label for label in about if label in votes.values() and count[label["label"]] == most]
            found[key] = about[0 if conflict == "first" else -1]["label"]
        return found

    def unknown(self) -> int:
        return sum((label["request"], label["instance"]) not in self.answers() for label in self.labels.values())


LABEL = st.builds(
    said,
    st.sampled_from(NAMES),
    st.sampled_from(["zero", "one", "nüll", "no such class"]),
    uid=st.sampled_from([f"u{n}" for n in range(12)]),
    instance=st.integers(0, 2),
    source=st.sampled_from(["x", "y", "z"]),
    time=st.integers(0, 5).map(float),
)
STEP = st.one_of(
    st.tuples(st.just("requests"), st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), max_size=3)),
    st.tuples(st.just("labels"), st.lists(st.lists(LABEL, max_size=4), max_size=3)),
    st.tuples(st.sampled_from(["ingest", "killed after its commit", "killed before its commit"]), st.none()),
)


def check(folder: Path, url: str | None, steps: Sequence[tuple[str, Any]]) -> None:
    spool, ledger = folder / "spool", Ledger()
    written: dict[str, dict[str, Any]] = {}
    with Store.open(folder, url) as store, pytest.MonkeyPatch.context() as patch:
        for kind, what in [*steps, ("ingest", None)]:
            if kind == "requests" and what:
                batches = [[Asked(name, rows=ROWS[name]) for name in dict.fromkeys(batch)] for batch in what]
                spools.requests(spool, *batches)
                ledger.requests.update(name for batch in what for name in batch)
            elif kind == "labels":
                # A uid is one label: who sends it again sends the same.
                frames = [[written.setdefault(label["uid"], label) for label in some] for some in what]
                spools.labels(spool, *frames)
                ledger.labels.update({label["uid"]: label for some in frames for label in some})
            elif kind == "ingest":
                store.ingest(spool)
            elif kind == "killed after its commit":
                store.ingest(spool, keep=True)  # what is left is the same
            elif kind == "killed before its commit":
                with patch.context() as one:
                    one.setattr(databases.Database, "insert", _end)
                    with contextlib.suppress(_Killed):
                        store.ingest(spool)
        assert {(each.request, each.instance) for each in store.answered("digits")} == ledger.answers()
        assert len(store.answered("digits")) == len(ledger.answers())
        for conflict in ("last", "first", "majority"):
            found = {(each.request, each.instance): each.label for each in store.labelled("digits", conflict=conflict)}
            assert found == ledger.labelled(conflict), conflict
        assert store.unknown().labels == ledger.unknown()
        status = {one.model: one for one in store.status()}
        if ledger.requests:
            one = status["digits"]
            assert (one.requests, one.instances) == (len(ledger.requests), len(ledger.answers()))
            assert one.labels + one.repeated + one.invalid + ledger.unknown() == len(ledger.labels)
            assert one.labelled == len(ledger.labelled("last"))
        assert not [path for path in spool.glob("*") if path.is_file()]


class _Killed(BaseException):
    pass


def _end(self: object, connection: object, table: object, rows: Sequence[object]) -> None:
    if rows:
        raise _Killed


@settings(deadline=None, max_examples=60)
@given(steps=st.lists(STEP, max_size=10))
def test_the_store_is_what_a_ledger_says(steps: list[tuple[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), None, steps)


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, max_size=10))
def test_in_postgresql_too(cluster: str, steps: list[tuple[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), fresh(cluster), steps)


def test_no_order_of_arrival_changes_what_counts(tmp_path: Path) -> None:
    about = [
        said("a", "one", uid="1", source="x", time=1.0),
        said("a", "zero", uid="2", source="x", time=2.0),
        said("a", "one", uid="3", source="x", time=3.0),
        said("a", "zero", uid="4", source="y", time=2.5),
    ]
    seen = set()
    for number, order in enumerate(itertools.permutations(about)):
        with Store.open(tmp_path / str(number)) as store:
            spools.requests(tmp_path / str(number) / "spool", [Asked("a")])
            for label in order:
                spools.labels(tmp_path / str(number) / "spool", [label])
            store.ingest(tmp_path / str(number) / "spool")
            one = store.status()[0]
            policies = ("last", "first", "majority")
            counting = tuple(store.labelled("digits", conflict=conflict)[0].label for conflict in policies)
            seen.add((counting, one.labels, one.repeated, one.conflicting))
    assert seen == {(("one", "one", "one"), 4, 0, 1)}


def ingesting(folder: Path) -> int:
    """The pid of a process that ingests."""
    pid = os.fork()
    if pid == 0:
        try:
            with Store.open(folder) as store:
                store.ingest(folder / "spool")
        finally:
            os._exit(0)
    return pid


def test_an_ingest_that_is_killed_again_and_again_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    folder, ledger = tmp_path / "feedback", Ledger()
    spool, chance = folder / "spool", random.Random(5)
    names = [f"r{n}" for n in range(400)]
    for start in range(0, 400, 10):
        some = names[start : start + 10]
        spools.requests(spool, [Asked(name) for name in some])
        again = names[max(0, start - 3) : start + 10]
        spools.labels(spool, [said(name, "one", uid=f"u{name}", time=1.0) for name in again])
    Store.open(folder).close()
    kills = 0
    while left := len(list(spool.glob("*.seg"))):
        pid, ended = ingesting(folder), 0
        goal = left - chance.randint(1, 12)  # each time it gets a little further, and is killed wherever it is then
        while not ended and len(list(spool.glob("*.seg"))) > goal:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        time.sleep(chance.uniform(0, 0.02))
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
    assert kills > 3
    ledger.requests.update(names)
    with Store.open(folder) as store:
        assert sorted(each.request for each in store.answered("digits")) == sorted(names)
        assert {each.request: each.label for each in store.labelled("digits")} == dict.fromkeys(names, "one")
        (status,) = store.status()
        assert (status.labels, status.repeated, status.bodies) == (400, 0, 400)
        store.prune(days=1e5)
        assert len(list((folder / "bodies").rglob("*"))) == 400 + len(list((folder / "bodies").iterdir()))
