"""The journal: what answers, through any number of processes, for ever; and what a new archive means for it."""

from __future__ import annotations

import errno
import multiprocessing
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import filelock
import psutil
import pytest

from marwright import files
from marwright.errors import RolloutError
from marwright.release import journal, properties, rollout, serving
from marwright.release.journal import Release
from marwright.settings import ReleasesSettings
from scripts import releases
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
    config.write_text(config.read_text().replace("job_queue_size=2000", "job_queue_size=7"))
    assert serving.refresh(config, store)
    assert "job_queue_size=7\n" in (store / "serving.properties").read_text()
    with sqlite3.connect(store / journal.FILE) as database:
        database.execute("delete from entries where model = 'cifar10'")
    database.close()
    assert serving.refresh(config, store)
    assert "load_models=digits-1.10.mar\n" in (store / "serving.properties").read_text()


def test_of_two_refreshes_at_a_time_the_last_release_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `status` that has read 1.0 and is slow to write; a rollout releases 1.1 and refreshes meanwhile."""
    config, store = tmp_path / "config.properties", tmp_path / "store"
    torchserve.write_config(config, {})
    with journal.open(store) as book:
        book.release("digits", "1.0", proven=False, why="test")
    has_read, has_written = threading.Event(), threading.Event()
    write = properties.write_serving

    def slowly(config: Path, store: Path, archives: Sequence[str]) -> bool:
        if list(archives) == ["digits-1.0.mar"]:
            has_read.set()
            has_written.wait(1)  # in vain, where the other one is kept waiting
        return write(config, store, archives)

    monkeypatch.setattr(properties, "write_serving", slowly)
    status = threading.Thread(target=serving.refresh, args=(config, store))
    status.start()
    assert has_read.wait(30)
    with journal.open(store) as book:
        book.release("digits", "1.1", proven=True, why="rollout", running=True)
    serving.refresh(config, store)
    has_written.set()
    status.join(30)
    assert "load_models=digits-1.1.mar\n" in (store / "serving.properties").read_text()


def test_many_processes_refresh_and_the_journals_last_word_stays(tmp_path: Path) -> None:
    config, store = tmp_path / "config.properties", tmp_path / "store"
    torchserve.write_config(config, {})
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_release, args=(config, store, f"model-{number}")) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
        assert writer.exitcode == 0
    archives = ",".join(f"model-{number}-1.9.mar" for number in range(3))
    assert f"load_models={archives}\n" in (store / "serving.properties").read_text()


def _release(config: Path, store: Path, name: str) -> None:
    for number in range(10):
        with journal.open(store) as book:
            book.release(name, f"1.{number}", proven=False, why="test")
        serving.refresh(config, store)


def test_a_store_without_room_for_a_lock_is_told_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: what is right already needs no writing, the rest says which file cannot be written."""
    config, store = tmp_path / "config.properties", tmp_path / "store"
    torchserve.write_config(config, {})
    with journal.open(store) as book:
        book.release("digits", "1.0", proven=False, why="test")
    serving.refresh(config, store)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(filelock.FileLock, "acquire", full)
    monkeypatch.setattr(files, "write_text", full)
    assert not serving.refresh(config, store)
    with journal.open(store) as book:
        book.release("digits", "1.1", proven=False, why="test")
    with pytest.raises(RolloutError, match=r"serving\.properties, which TorchServe reads at its next start, cannot be"):
        serving.refresh(config, store)


def test_what_may_answer_when(tmp_path: Path) -> None:
    """A rollout that settles, one that is rolled back after its switch, and what is retired."""
    with journal.open(tmp_path) as book:
        book.release("digits", "1.0", proven=False, why="first")
        assert book.live("digits") == {"1.0"}

        def phase(version: str, name: str, step: str, number: int = 1) -> None:
            book.add("digits", version, "rollout", id=number, phase=name, step=step, champion="1.0")

        phase("1.1", "registered", "begin")
        assert book.live("digits") == {"1.0"}, "nobody may call it yet"
        phase("1.1", "ready", "done")
        assert book.live("digits") == {"1.0", "1.1"}
        book.add("digits", "1.1", "switching", why="")
        book.release("digits", "1.1", proven=True, why="", running=True)
        book.add("digits", "1.0", "retiring", why="")
        assert book.live("digits") == {"1.1"}
        book.add("digits", "1.0", "kept", why="")
        assert book.live("digits") == {"1.0", "1.1"}
        book.add("digits", "1.0", "retired", why="")
        phase("1.2", "ready", "done", 2)
        book.add("digits", "1.2", "switching", why="")
        book.release("digits", "1.2", proven=True, why="", running=True)
        book.add("digits", "1.2", "rolling back", id=2, reason="")
        assert book.live("digits") == {"1.1"}
        book.add("digits", "1.1", "switching", why="")
        book.release("digits", "1.1", proven=True, why="", running=True, back=True)
        book.add("digits", "1.2", "rolled back", id=2, reason="")
        spans = book.spans("digits")
        times = {(entry.version, entry.event): entry.time for entry in book.entries("digits")}
    defaults = [(span.version, span.until) for span in spans if span.default]
    assert defaults == [
        ("1.0", pytest.approx(next(span.since for span in spans if span.version == "1.1" and span.default), abs=1)),
        ("1.1", pytest.approx(times["1.2", "released"])),
        ("1.2", pytest.approx(times["1.1", "released"])),
        ("1.1", None),
    ]
    pinned = {span.version: span.until for span in spans if not span.default}
    assert pinned == {"1.0": times["1.0", "retired"], "1.2": times["1.2", "rolled back"], "1.1": None}


def test_what_a_rollback_leads_to(tmp_path: Path) -> None:
    with journal.open(tmp_path) as book:
        for version in ("1.0", "1.1", "1.2"):
            book.release("digits", version, proven=True, why="", running=True)
        assert book.previous("digits") == "1.1"
        book.release("digits", "1.1", proven=True, why="rollback", running=True, back=True)
        assert book.previous("digits") == "1.0", "a second rollback goes further back"
        book.release("digits", "1.3", proven=True, why="", running=True)
        assert book.previous("digits") == "1.1", "1.2 was found wanting"
        assert book.previous("other") is None


def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such thing can be mounted here: the table of mounts says that there is one."""

    class Mount:
        mountpoint = str(tmp_path)
        fstype = "nfs4"

    real = psutil.disk_partitions(all=True)
    holding = [mount for mount in real if tmp_path.is_relative_to(mount.mountpoint)]
    assert journal.filesystem(tmp_path) == sorted(holding, key=lambda mount: len(mount.mountpoint))[-1].fstype
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [*real, Mount()])
    with pytest.raises(RolloutError, match="network file system \\(nfs4\\)") as told, journal.open(tmp_path / "store"):
        pass
    assert "local disk" in str(told.value)


@pytest.mark.parametrize(("order", "kind"), [(("autofs", "nfs4"), "nfs4"), (("nfs4", "ext4"), "ext4")])
def test_of_two_mounts_at_one_place_the_later_one_counts(
    order: tuple[str, str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mount:
        def __init__(self, mountpoint: str, fstype: str) -> None:
            self.mountpoint, self.fstype = mountpoint, fstype

    here = [Mount(str(tmp_path), each) for each in order]
    table = [Mount("/", "ext4"), *here, Mount(str(tmp_path / "elsewhere"), "tmpfs"), Mount(str(tmp_path.parent), "xfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: table)
    assert journal.filesystem(tmp_path / "store") == kind


def test_a_store_that_cannot_be_written_is_refused() -> None:
    """/proc takes no files, also from root."""
    with pytest.raises(RolloutError, match="cannot be used") as told, journal.open(Path("/proc")):
        pass
    assert "writable folder on a local disk" in str(told.value)


def test_a_journal_from_before_there_were_phases_is_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As 0.1 first wrote it: rollouts without a number, releases that say nothing of the server."""
    with journal.open(tmp_path) as book:
        book.add("digits", "1.0", "released", proven=False, why="first archive", was=None)
        book.add("digits", "1.1", "rollout", phase="registered", champion="1.0")
        book.add("digits", "1.1", "rollout", phase="promoted", champion="1.0")
        book.add("digits", "1.1", "released", proven=True, why="rollout: golden examples over REST and gRPC", was="1.0")
        book.add("digits", "1.2", "rollout", phase="registered", champion="1.1")
        book.add("digits", "1.2", "rolled back", reason="no ready workers", champion="1.1")
        assert rollout.unfinished(book, "digits") is None
        assert rollout.due(book, "digits") == {}
        assert rollout.last_verdict(book, "digits", "1.1") is None
        assert book.live("digits") == {"1.1"}
        assert book.previous("digits") == "1.0"
        assert [span.version for span in book.spans("digits") if span.until is None] == ["1.1", "1.1"]
    config = tmp_path / "config.properties"
    torchserve.write_config(config, {})
    assert releases.main(ReleasesSettings(store=tmp_path, config=config, all=True)) == 0
    assert "no ready workers" in capsys.readouterr().out
