"""What nobody needs goes, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from marwright import files
from marwright.packing import records
from marwright.packing.records import ArchiveRecord
from marwright.release import journal, retention
from marwright.settings import Places
from scripts import prune


def built(store: Path, version: str, run: str = "") -> ArchiveRecord:
    record = ArchiveRecord(
        model="m",
        version=version,
        file=f"m-{version}.mar",
        sha256="0",
        size=1,
        bundle=version,
        content=version,
        run=run or f"m-{version}",
        format="onnx",
        workers=1,
        metrics={},
    )
    files.write_json(store / records.record_name(record.file), asdict(record))
    (store / record.file).write_bytes(b"x")
    return record


def names(found: list[ArchiveRecord]) -> list[str]:
    return [each.version for each in found]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Eight versions: each answered, one after another; 1.6 and 1.7 were only built."""
    where = tmp_path / "store"
    with journal.open(where) as book:
        for number in range(8):
            built(where, f"1.{number}")
            book.add("m", f"1.{number}", "archived", run="", sha256="0")
            if number < 6:
                book.release("m", f"1.{number}", proven=True, why="", running=False)
    return where


def test_the_last_that_answered_and_the_last_that_was_built_stay(store: Path) -> None:
    with journal.open(store) as book:
        assert names(retention.stale(records.records(store), book, "m", keep=2)) == ["1.0", "1.1", "1.2", "1.3"]
        book.add("m", "1.6", "rolled back", reason="worse")
        assert names(retention.stale(records.records(store), book, "m", keep=100)) == ["1.6"]


def test_where_a_rollback_leads_stays(store: Path) -> None:
    with journal.open(store) as book:
        assert book.previous("m") == "1.4"
        stale = names(retention.stale(records.records(store), book, "m", keep=1))
        assert stale == ["1.0", "1.1", "1.2", "1.3"]
        book.release("m", "1.4", proven=True, why="back", back=True)
        assert book.previous("m") == "1.3"
        assert "1.3" not in names(retention.stale(records.records(store), book, "m", keep=1))


def test_what_is_live_or_under_way_stays(store: Path) -> None:
    with journal.open(store) as book:
        book.add("m", "1.1", "kept")
        book.add("m", "1.6", "rollout", id=1, kind="rollout", phase="verified", step="begun", champion="1.5", given={})
        assert names(retention.stale(records.records(store), book, "m", keep=2)) == ["1.0", "1.2", "1.3"]


def run(folder: Path, name: str, *, start: object = None, new: int = 0, age: int = 0) -> None:
    files.write_json(folder / name / "run.json", {"recipe": "m", "start": start, "new_examples": new})
    import os

    os.utime(folder / name / "run.json", (10**9 - age, 10**9 - age))


def test_runs_of_retraining_that_no_archive_came_from_go_and_others_do_not(tmp_path: Path, store: Path) -> None:
    runs = tmp_path / "runs"
    run(runs, "m-byhand", age=100)
    run(runs, "m-used", start={"run": "x"}, age=90)
    run(runs, "m-refused", start={"run": "x"}, age=80)
    run(runs, "m-scratch", new=5, age=70)
    for number in range(3):
        run(runs, f"m-new{number}", new=5, age=number)
    (runs / "m-other").mkdir()
    assert {each.id for each in retention.unneeded(runs, "m", [built(store, "2.0", run="m-used")])} == {
        "m-refused",
        "m-scratch",
    }
    assert retention.unneeded(tmp_path / "gone", "m", []) == []


def test_runs_of_a_model_whose_name_begins_the_same_are_none_of_its(tmp_path: Path) -> None:
    for number in range(5):
        files.write_json(tmp_path / f"m-28-{number}" / "run.json", {"recipe": "m-28", "start": {"run": "x"}})
    run(tmp_path, "m-refused", start={"run": "x"}, age=10)
    for number in range(3):
        run(tmp_path, f"m-new{number}", new=5, age=number)
    assert [each.id for each in retention.unneeded(tmp_path, "m", [])] == ["m-refused"]


def test_prune_removes_them_with_their_records_and_says_so(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[keep]\nversions = 2\n", encoding="utf-8")
    places = Places(store=store, runs=tmp_path / "runs", feedback=tmp_path / "feedback")
    given = {name: getattr(places, name) for name in ("store", "runs", "feedback")}
    (store / "verdicts").mkdir()
    (store / "verdicts" / "m-1.0.html").write_text("x")
    assert prune.main(prune.SETTINGS(**given, policy=policy, json=True)) == 0
    assert json.loads(capsys.readouterr().out) == [f"removed m-1.{number}.mar" for number in (0, 1, 2, 3)]
    assert names(records.records(store)) == ["1.4", "1.5", "1.6", "1.7"]
    assert sorted(path.name for path in store.glob("*.mar")) == ["m-1.4.mar", "m-1.5.mar", "m-1.6.mar", "m-1.7.mar"]
    assert not (store / "verdicts" / "m-1.0.html").exists()
    assert prune.main(prune.SETTINGS(**given, policy=policy)) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    with journal.open(store) as book:
        assert len(book.entries("m", event="archived")) == 8, "numbers that were given stay taken"
