"""The journal: what answers, through any number of processes, for ever; and what a new archive means for it."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from marwright.errors import RolloutError
from marwright.release import journal, serving
from marwright.release.journal import Release
from tests import torchserve


def release(version: str, *, proven: bool = False) -> Release:
    return Release("digits", version, proven, "test", "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize(
    ("new", "released", "running", "proven", "becomes", "words"),
    [
        (True, None, False, False, True, "1.1 will answer at the next start (released, unproven)"),
        (True, None, True, False, True, "1.1 will answer at the next start (released, unproven)"),
        (True, release("1.0"), False, False, True, "1.1 will answer at the next start (was 1.0)"),
        (
            *(True, release("1.0"), True, False, False),
            "1.0 still answers: `make rollout`, or `make release VERSION=1.1` without proof",
        ),
        (
            *(True, release("1.0", proven=True), False, True, False),
            "1.0 still answers: `make rollout`, or `make release VERSION=1.1` without proof",
        ),
        (False, release("1.0"), False, False, False, ""),
        (False, release("1.1"), True, True, False, ""),
    ],
)
def test_what_a_new_archive_means(
    new: bool, released: Release | None, running: bool, proven: bool, becomes: bool, words: str
) -> None:
    standing = journal.after_archive("1.1", new=new, released=released, running=running, proven=proven)
    assert (standing.releases, standing.sentence) == (becomes, words)


def test_the_last_release_of_each_model_is_the_truth(tmp_path: Path) -> None:
    with journal.open(tmp_path) as book:
        assert book.released("digits") is None
        book.release("digits", "1.0", proven=False, why="first")
        book.release("cifar10", "1.0", proven=False, why="first")
        book.release("digits", "1.1", proven=True, why="rollout")
        book.add("digits", "1.2", "archived", run="r")
    with journal.open(tmp_path) as book:
        assert {model: found.version for model, found in book.releases().items()} == {"cifar10": "1.0", "digits": "1.1"}
        assert book.has_proven_rollout("digits")
        assert not book.has_proven_rollout("cifar10")
        book.release("digits", "1.0", proven=False, why="by hand")
        assert book.released("digits") == Release("digits", "1.0", False, "by hand", book.entries()[-1].at)
        assert book.has_proven_rollout("digits"), "once proven, for ever"
        assert [entry.detail["was"] for entry in book.entries("digits", event="released")] == [None, "1.0", "1.1"]


def _write(store: Path, name: str) -> None:
    for number in range(25):
        with journal.open(store) as book:
            book.add(name, f"1.{number}", "archived")


def test_several_processes_lose_no_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(tmp_path, f"model-{number}")) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
        assert writer.exitcode == 0
    with journal.open(tmp_path) as book:
        entries = book.entries()
        assert len(entries) == 100
        for number in range(4):
            versions = [entry.version for entry in book.entries(f"model-{number}")]
            assert versions == [f"1.{count}" for count in range(25)]


def test_a_journal_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / journal.FILE).write_bytes(b"this is no database, and long enough to be looked at as one" * 20)
    with pytest.raises(RolloutError, match=r"journal\.db cannot be used"), journal.open(tmp_path):
        pass


def test_an_error_of_the_caller_is_not_taken_for_the_journals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), journal.open(tmp_path):
        raise FileNotFoundError("somebody else's")


def test_serving_properties_follow_the_journal_and_the_configuration(tmp_path: Path) -> None:
    config, store = tmp_path / "config.properties", tmp_path / "store"
    torchserve.write_config(config, {})
    assert not serving.refresh(config, store), "nothing was released, nothing is served"
    store.mkdir()
    (store / "serving.properties").write_text("load_models=digits-9.9.mar\n")
    assert serving.refresh(config, store), "left by a store whose journal is gone"
    assert "load_models" not in (store / "serving.properties").read_text()
    with journal.open(store) as book:
        book.release("digits", "1.0", proven=False, why="test")
        book.release("digits", "1.10", proven=False, why="test")
        book.release("cifar10", "2.0", proven=False, why="test")
    assert serving.refresh(config, store)
    text = (store / "serving.properties").read_text()
    assert "load_models=cifar10-2.0.mar,digits-1.10.mar\n" in text
    assert f"model_store={store.resolve()}\n" in text
    assert not serving.refresh(config, store), "it was right already"
    config.write_text(config.read_text().replace("job_queue_size=100", "job_queue_size=7"))
    assert serving.refresh(config, store)
    assert "job_queue_size=7\n" in (store / "serving.properties").read_text()
    with sqlite3.connect(store / journal.FILE) as database:
        database.execute("delete from entries where model = 'cifar10'")
    database.close()
    assert serving.refresh(config, store)
    assert "load_models=digits-1.10.mar\n" in (store / "serving.properties").read_text()
