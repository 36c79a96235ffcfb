"""The store: what was answered and what was said about it, whenever and however often it came."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handlers.spool import SUFFIX
from marwright.errors import DataError, SettingsError
from marwright.feedback import database as databases
from marwright.feedback.store import Label, Store
from marwright.learning.statistics import statistics
from tests.feedback import spools
from tests.feedback.spools import DIABETES, Asked, said


def test_an_answer_comes_back_as_it_was_captured(store: Store, spool: Path) -> None:
    one, several = Asked("one", time=1000), Asked("several", time=1001, rows=3)
    spools.requests(spool, [one, several])
    taken = store.ingest(spool)
    assert (taken.segments, taken.requests, taken.instances, taken.damaged, taken.undecodable) == (1, 2, 4, 0, 0)
    assert list(spool.iterdir()) == []
    answers = store.answered("digits")
    assert [(each.request, each.instance) for each in answers] == [
        ("one", 0),
        ("several", 0),
        ("several", 1),
        ("several", 2),
    ]
    assert store.models() == ["digits"]
    for each, asked in zip(answers, [one, several, several, several], strict=True):
        assert (each.model, each.version, each.bundle, each.time) == ("digits", "1.0", "b" * 16, 1000)
        assert each.answer == asked.answer(each.instance)
        assert each.probabilities is not None
        assert each.embedding is not None
        assert np.array_equal(each.probabilities, asked.output(each.instance))
        assert each.confidence == pytest.approx(float(asked.output(each.instance).max()))
        assert each.embedding.tolist() == [each.instance if asked is several else 0] * spools.DIMENSIONS
        picture = asked.instance(each.instance)
        expected = statistics(picture[np.newaxis, np.newaxis])
        assert each.statistics == pytest.approx({name: float(value[0]) for name, value in expected.items()})
        assert each.path is not None
        data = each.path.read_bytes()
        assert hashlib.sha256(data).hexdigest() == each.digest == each.path.stem
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), picture), "to the bit"
    assert answers[0].path is not None
    assert answers[0].path.read_bytes() == one.sent[1], "a single picture is kept as it was received"


def test_rows_of_numbers_are_kept_as_json(store: Store, spool: Path) -> None:
    asked = Asked("row", rows=2, spec=DIABETES)
    spools.requests(spool, [asked], model="diabetes")
    spools.labels(spool, [said("row", 151, uid="a"), said("row", "not a number", uid="b", instance=1)])
    taken = store.ingest(spool)
    assert taken.invalid == 1
    first, second = store.answered("diabetes")
    assert first.path is not None
    assert np.array_equal(np.asarray(json.loads(first.path.read_bytes()), np.float32), asked.instance(0))
    assert (first.answer, first.confidence, first.probabilities) == ("", None, None)
    assert second.value == pytest.approx(float(asked.output(1)[0]))
    (labelled,) = store.labelled("diabetes")
    assert labelled.label == "151"
    (status,) = store.status()
    (live,) = status.live
    assert (live.labels, live.accuracy) == (1, None)
    assert live.error == pytest.approx(abs(float(asked.output(0)[0]) - 151))


def test_without_a_body_the_answer_is_kept(store: Store, spool: Path) -> None:
    spools.requests(spool, [Asked("hashed", body=False)])
    store.ingest(spool)
    (answer,) = store.answered("digits")
    assert (answer.path, answer.digest, answer.statistics) == (None, "", {})
    assert answer.answer == Asked("hashed").answer()


def test_a_body_that_cannot_be_decoded_loses_its_file_alone(store: Store, spool: Path) -> None:
    header, payload = spools.frame([Asked("odd"), Asked("good")])
    start, length = header["requests"][0]["body"]
    payload = payload[:start] + b"x" * length + payload[start + length :]
    writer = spools.requests(spool, [Asked("first")], finish=False)
    writer.append(header, payload)
    writer.close()
    taken = store.ingest(spool)
    assert (taken.instances, taken.undecodable, taken.damaged) == (3, 1, 0)
    assert {each.request: each.path is None for each in store.answered("digits")} == {
        "odd": True, "good": False, "first": False,
    }  # fmt: skip


def test_labels_may_come_first_late_and_twice(store: Store, spool: Path) -> None:
    spools.labels(spool, [said("late", "one", uid="a"), said("never", "one", uid="b")])
    taken = store.ingest(spool)
    assert (taken.labels, taken.unknown) == (2, 2)
    assert store.labelled("digits") == []
    assert store.unknown().some == ("late", "never")
    spools.requests(spool, [Asked("late")])
    spools.labels(spool, [said("late", "one", uid="a"), said("late", "one", uid="again")])
    taken = store.ingest(spool)
    assert (taken.labels, taken.repeated) == (0, 2), "the uid was there; and the source says nothing new"
    (labelled,) = store.labelled("digits")
    assert (labelled.request, labelled.label, labelled.source, labelled.labelled_at) == ("late", "one", "api", 2000)
    assert (store.unknown().labels, store.unknown().requests) == (1, 1)
    (status,) = store.status()
    assert (status.labels, status.repeated, status.labelled, status.conflicting) == (1, 1, 1, 0)


def test_a_label_about_an_instance_that_is_not_there_is_unknown(store: Store, spool: Path) -> None:
    spools.requests(spool, [Asked("one")])
    spools.labels(spool, [said("one", "one", uid="a", instance=1)])
    assert store.ingest(spool).unknown == 1
    assert store.labelled("digits") == []


def test_what_names_no_class_is_kept_reported_and_not_used(store: Store, spool: Path) -> None:
    spools.requests(spool, [Asked("one")])
    spools.labels(spool, [said("one", "cat", uid="a"), said("one", 7, uid="b", source="numbers")])
    assert store.ingest(spool).invalid == 2
    assert store.labelled("digits") == []
    (status,) = store.status()
    assert (status.invalid, status.labels, status.labelled) == (2, 0, 0)


def test_a_whole_number_is_a_class_of_that_name(store: Store, spool: Path) -> None:
    from dataclasses import replace

    spec = replace(spools.DIGITS, classes=tuple("0123456789"))
    spools.requests(spool, [Asked("one", spec=spec)])
    spools.labels(spool, [said("one", 7.0, uid="a")])
    store.ingest(spool)
    assert [each.label for each in store.labelled("digits")] == ["7"]


CONFLICT = [
    ("one", "a", 10.0), ("two", "b", 11.0), ("two", "a", 12.0), ("three", "c", 13.0), ("two", "b", 14.0),
    ("cat", "d", 15.0), ("one", "e", 13.5),
]  # fmt: skip


@pytest.mark.parametrize(
    ("conflict", "label", "at"), [("first", "one", 10), ("last", "two", 14), ("majority", "two", 14)]
)
@pytest.mark.parametrize("backwards", [False, True])
def test_labels_that_differ(store: Store, spool: Path, conflict: str, label: str, at: float, backwards: bool) -> None:
    spools.requests(spool, [Asked("one")])
    for number, (what, source, time) in enumerate(reversed(CONFLICT) if backwards else CONFLICT):
        spools.labels(spool, [said("one", what, uid=f"{number}", source=source, time=time)])
    store.ingest(spool)
    (labelled,) = store.labelled("digits", conflict=conflict)
    assert (labelled.label, labelled.labelled_at) == (label, at), "whatever came first"
    (status,) = store.status(conflict=conflict)
    assert (status.conflicting, status.repeated, status.labels, status.invalid) == (1, 1, 5, 1)


def test_of_equally_many_votes_the_latest_wins(store: Store, spool: Path) -> None:
    spools.requests(spool, [Asked("one")])
    spools.labels(spool, [said("one", "two", uid="a", source="b", time=2), said("one", "one", uid="b", time=1)])
    store.ingest(spool)
    assert [each.label for each in store.labelled("digits", conflict="majority")] == ["two"]
    with pytest.raises(SettingsError, match="no policy 'loudest'"):
        store.labelled("digits", conflict="loudest")


def test_status_says_lag_classes_and_live_accuracy(store: Store, spool: Path) -> None:
    old = [Asked(f"old-{n}", time=100) for n in range(8)]
    new = [Asked(f"new-{n}", time=200) for n in range(4)]
    spools.requests(spool, old, version="1.0")
    spools.requests(spool, new, version="1.1")
    right = [said(each.id, each.answer(), uid=each.id, time=each.time + 10) for each in old[:6]]
    wrong = [
        said(each.id, "zero" if each.answer() != "zero" else "one", uid=each.id, time=each.time + 20) for each in new
    ]
    spools.labels(spool, right, wrong)
    store.ingest(spool)
    (status,) = store.status("digits")
    assert (status.requests, status.instances, status.bodies, status.labelled) == (12, 12, 12, 10)
    assert status.body_bytes == sum(path.stat().st_size for path in (store.folder / "bodies").rglob("*.png"))
    assert (status.lag_median, status.lag_p90, status.first, status.last) == (10, 20, 100, 200)
    assert sum(status.classes.values()) == 10
    first, second = status.live
    assert (first.version, first.labels, first.right, first.accuracy) == ("1.0", 6, 6, 1.0)
    assert (second.version, second.labels, second.right, second.accuracy) == ("1.1", 4, 0, 0.0)
    # Wilson (1927) by hand: z = 1.959964, n = 6, p = 1.
    z = 1.959963984540054
    assert first.low == pytest.approx((1 + z * z / 12 - z * (z * z / 144) ** 0.5) / (1 + z * z / 6))
    assert first.high == 1.0
    assert store.status("cats") == []


def test_answers_of_one_version_and_the_latest_of_them(store: Store, spool: Path) -> None:
    for n in range(5):
        spools.requests(spool, [Asked(f"a{n}", time=n)], version="1.0")
        spools.requests(spool, [Asked(f"b{n}", time=n)], version="1.1")
    store.ingest(spool)
    assert [each.request for each in store.answered("digits", version="1.1", last=2)] == ["b3", "b4"]
    assert len(store.answered("digits")) == 10
    assert store.answered("digits", version="2.0") == []
    assert store.answered("cats", last=3) == []


def test_the_same_picture_is_one_file(store: Store, spool: Path) -> None:
    header, payload = spools.frame([Asked("one")])
    for name in ("one", "two"):
        header["requests"][0]["id"] = name
        writer = spools.requests(spool, [Asked("other")], finish=False)
        writer.append(header, payload)
        writer.close()
    assert store.ingest(spool).again == 1, "`other` came twice"
    assert len(list((store.folder / "bodies").rglob("*.png"))) == 2
    (status,) = store.status()
    assert (status.requests, status.bodies) == (3, 2)


def test_a_segment_is_taken_once_however_often_it_is_there(store: Store, spool: Path, tmp_path: Path) -> None:
    spools.requests(spool, [Asked("one")])
    spools.labels(spool, [said("one", "one", uid="a")])
    assert store.ingest(spool, keep=True).segments == 2
    kept = sorted(spool.iterdir())
    assert len(kept) == 2
    again = store.ingest(spool)
    assert (again.segments, again.requests, again.labels) == (0, 0, 0)
    assert list(spool.iterdir()) == [], "whoever was killed between the two left them there"
    spools.requests(spool, [Asked("one"), Asked("two")])
    taken = store.ingest(spool)
    assert (taken.requests, taken.again) == (1, 1)
    assert [each.request for each in store.answered("digits")] == ["one", "two"]


def test_a_failure_in_the_middle_leaves_all_of_it_for_the_next_time(
    store: Store, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spools.requests(spool, [Asked("one"), Asked("two")])
    before = databases.Database.insert

    def fail(self: databases.Database, connection: object, table: object, rows: object) -> None:
        if getattr(table, "name", "") == "instances":
            raise OSError(28, "No space left on device")
        before(self, connection, table, rows)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(databases.Database, "insert", fail)
        with pytest.raises(DataError, match="No space left on device"):
            store.ingest(spool)
    assert store.answered("digits") == []
    assert store.models() == []
    assert store.ingest(spool).requests == 2


def test_what_is_whole_in_a_damaged_segment_is_taken_and_the_file_is_kept(store: Store, spool: Path) -> None:
    spools.requests(spool, [Asked("one")], [Asked("two")])
    (path,) = spool.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    lines: list[str] = []
    taken = store.ingest(spool, say=lines.append)
    assert (taken.segments, taken.requests, taken.damaged) == (1, 1, 1)
    assert (spool / "damaged" / path.name).is_file()
    assert not path.exists()
    assert lines
    assert path.name in lines[0]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"MWF1" + bytes(12)])
def test_a_segment_that_cannot_be_read_stands_in_nobodys_way(store: Store, spool: Path, content: bytes) -> None:
    spools.requests(spool, [Asked("one")])
    (spool / f"requests-1-2-3{SUFFIX}").write_bytes(content)
    (spool / f"labels-1-2-3{SUFFIX}").write_bytes(content)
    taken = store.ingest(spool)
    assert (taken.requests, taken.damaged) == (1, 2)
    assert len(list((spool / "damaged").iterdir())) == 2
    assert store.ingest(spool).segments == 0


def test_a_segment_of_newer_handlers_is_left_there(store: Store, spool: Path) -> None:
    import handlers.spool

    writer = handlers.spool.Writer(spool, "requests", {"v": 2})
    writer.append({})
    writer.close()
    lines: list[str] = []
    assert store.ingest(spool, say=lines.append).segments == 0
    assert len(list(spool.iterdir())) == 1
    assert "another version" in lines[0]


def test_an_entry_that_makes_no_sense_costs_itself(store: Store, spool: Path) -> None:
    writer = spools.labels(spool, [said("one", "one", uid="a")], finish=False)
    writer.append({"received": 1.0, "labels": [{"uid": "b"}, said("two", True, uid="c"), said("two", "two", uid="d")]})
    writer.append({"nothing": 1})
    writer.close()
    taken = store.ingest(spool)
    assert (taken.labels, taken.damaged) == (2, 1)


def test_two_ingests_at_once_take_everything_once(opened: Callable[[], Store], spool: Path) -> None:
    for n in range(20):
        spools.requests(spool, [Asked(f"{n}"), Asked(f"{n + 1}")])
        spools.labels(spool, [said(f"{n}", "one", uid=f"{n}"), said(f"{n + 1}", "one", uid=f"{n + 1}")])
    stores = [opened(), opened()]
    failures: list[BaseException] = []

    def work(store: Store) -> None:
        try:
            store.ingest(spool)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(spool.iterdir()) == []
    assert sorted(each.request for each in stores[0].answered("digits")) == sorted(f"{n}" for n in range(21))
    assert stores[0].status()[0].labels == 21


def test_labels_can_be_added_by_themselves(store: Store, spool: Path) -> None:
    spools.requests(spool, [Asked("one")])
    store.ingest(spool)
    labels = [
        Label("one", 0, "two", "me", 5.0, "u"),
        Label("one", 0, "two", "me", 5.0, "u"),
        Label("x", 0, "two", "me", 5.0, "v"),
    ]
    added = store.add_labels(labels)
    assert (added.labels, added.repeated, added.unknown) == (2, 1, 1)
    assert [each.label for each in store.labelled("digits")] == ["two"]


def test_notes_come_back_newest_first(store: Store) -> None:
    for n in range(3):
        store.note("drift", "digits", {"n": n})
    store.note("turn", "digits", {"n": 9})
    assert [note["n"] for note in store.notes("drift", "digits", 2)] == [2, 1]
    assert store.notes("drift", "cats") == []
    assert store.notes("turn", "digits")[0]["time"] > 0


def test_a_file_that_is_not_here_is_no_path(store: Store, spool: Path) -> None:
    spools.requests(spool, [Asked("one")])
    store.ingest(spool)
    shutil.rmtree(store.folder / "bodies")
    (answer,) = store.answered("digits")
    assert answer.path is None
    assert len(answer.digest) == 64


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    with sqlite3.connect(tmp_path / databases.FILE) as connection:
        connection.execute("update meta set value = '99'")
    connection.close()
    with pytest.raises(DataError, match="newer version"):
        Store.open(tmp_path)


def test_a_database_that_cannot_be_used_says_which(tmp_path: Path) -> None:
    (tmp_path / databases.FILE).write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(DataError, match=r"feedback\.sqlite cannot be used: file is not a database"):
        Store.open(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="file cannot be used"):
        Store.open(tmp_path / "file")


@pytest.mark.parametrize(
    "given", ["nonsense: secret", "mysql://me:secret@host/db", "postgresql://me:secret@127.0.0.1:1/db"]
)
def test_no_error_tells_the_password(tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(databases.VARIABLE, given)
    with pytest.raises((DataError, SettingsError)) as caught:
        Store.open(tmp_path)
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_missing_driver_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pg8000", None)
    with pytest.raises(SettingsError, match="not installed") as caught:
        Store.open(tmp_path, "postgresql://me:secret@127.0.0.1:1/db")
    assert ".[postgres]" in caught.value.hint


def test_a_wrong_password_is_not_told_either(tmp_path: Path, cluster: str) -> None:
    with pytest.raises(DataError, match="password authentication failed") as caught:
        Store.open(tmp_path, cluster.replace("printed", "wrong"))
    assert "wrong" not in str(caught.value).replace("wright", "")
