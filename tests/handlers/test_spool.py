"""Segments: whole or not there, whoever is killed, whatever the disk does."""

from __future__ import annotations

import fcntl
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers import spool


def test_what_was_appended_is_read_again_in_order(tmp_path: Path) -> None:
    writer = spool.Writer(tmp_path, "requests", {"model": "m"})
    writer.append({"n": 1}, b"body")
    writer.append({"n": 2, "text": "ä\ud800"})
    assert spool.finished(tmp_path) == [], "it still grows"
    writer.close()
    (path,) = spool.finished(tmp_path, "requests")
    assert [(frame.header, frame.payload) for frame in spool.frames(path)] == [
        ({"model": "m"}, b""),
        ({"n": 1}, b"body"),
        ({"n": 2, "text": "ä\ud800"}, b""),
    ]
    assert spool.whole(path)
    assert spool.finished(tmp_path, "labels") == []
    assert spool.used(tmp_path) == path.stat().st_size


def test_a_full_segment_and_an_old_one_are_finished(tmp_path: Path) -> None:
    full = spool.Writer(tmp_path / "full", "requests", {}, segment_bytes=1000)
    for _ in range(3):
        full.append({}, bytes(600))
    assert len(spool.finished(tmp_path / "full")) == 1
    full.close()
    assert len(spool.finished(tmp_path / "full")) == 2
    old = spool.Writer(tmp_path / "old", "requests", {}, segment_seconds=0.05)
    old.append({})
    time.sleep(0.06)
    old.turn()
    assert not old.open
    assert len(spool.finished(tmp_path / "old")) == 1


def test_segments_are_in_the_order_of_their_beginning(tmp_path: Path) -> None:
    writer = spool.Writer(tmp_path, "labels", {}, segment_bytes=1)
    for n in range(12):
        writer.append({"n": n})
    found = [
        next(frame.header["n"] for frame in spool.frames(path) if frame.header) for path in spool.finished(tmp_path)
    ]
    assert found == list(range(12))


def test_what_a_killed_writer_left_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from handlers import spool\n"
        "w = spool.Writer(Path(sys.argv[1]), 'labels', {'head': 1})\n"
        "w.append({'n': 1}); print('there', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        assert spool.finished(tmp_path) == [], "its writer lives"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        assert process.stdout is not None
        process.stdout.close()
    (path,) = spool.finished(tmp_path)
    assert [frame.header for frame in spool.frames(path)] == [{"head": 1}, {"n": 1}]


@given(cut=st.integers(min_value=0, max_value=200), flip=st.booleans())
def test_damage_ends_a_segment_at_the_last_whole_frame(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: bool
) -> None:
    path = tmp_path_factory.mktemp("segments") / "x.seg"
    parts = [spool.encode({"n": n}, bytes(n)) for n in range(5)]
    data = bytearray(b"".join(parts))
    cut = min(cut, len(data) - 1)
    if flip:
        data[cut] ^= 0xFF
    else:
        data = data[:cut]
    path.write_bytes(data)
    expected, at = 0, 0
    for part in parts:
        at += len(part)
        if at > cut:
            break
        expected += 1
    assert [frame.header["n"] for frame in spool.frames(path)] == list(range(expected))
    assert spool.whole(path) is (not flip and cut in {sum(map(len, parts[:k])) for k in range(6)})


def test_a_disk_that_fails_in_the_middle_leaves_whole_frames(tmp_path: Path) -> None:
    writer = spool.Writer(tmp_path, "requests", {})
    writer.append({"n": 1})
    file = writer._file
    assert file is not None
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / Path(file.name).name).stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
        with pytest.raises(OSError, match="File too large"):
            writer.append({"n": 2}, bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not writer.open
    (path,) = spool.finished(tmp_path)
    assert [frame.header for frame in spool.frames(path)] == [{}, {"n": 1}]
    writer.append({"n": 3})
    writer.close()
    assert len(spool.finished(tmp_path)) == 2


def test_a_folder_that_cannot_be_written_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        spool.Writer(tmp_path / "file", "requests", {}).append({})
    assert spool.finished(tmp_path / "gone") == []
    assert spool.used(tmp_path / "gone") == 0


def test_a_spool_that_was_removed_under_its_writer_is_made_again(tmp_path: Path) -> None:
    writer = spool.Writer(tmp_path / "spool", "labels", {})
    writer.append({"n": 1})
    shutil.rmtree(tmp_path / "spool")
    writer.append({"n": 2})
    writer.close()
    (path,) = spool.finished(tmp_path / "spool")
    assert [frame.header for frame in spool.frames(path)] == [{}, {"n": 2}]


def test_what_is_taken_over_before_its_lock_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks between the making of a file and its lock takes it for a dead writer's, and removes it."""
    lock, looked = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        if not looked:
            looked.append(how)
            assert spool.finished(tmp_path) == []
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    writer = spool.Writer(tmp_path, "labels", {})
    writer.append({"n": 1}, sync=True)
    writer.append({"n": 2}, sync=True)
    writer.close()
    assert looked
    (path,) = spool.finished(tmp_path)
    assert [frame.header for frame in spool.frames(path)] == [{}, {"n": 1}, {"n": 2}]
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_holds_every_new_segment_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(file: Any, how: int) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", taken)
    with pytest.raises(OSError, match="others take"):
        spool.Writer(tmp_path, "labels", {}).append({"n": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_filled_with_segments_of_nothing(tmp_path: Path) -> None:
    """Each head still fits, and no frame does."""
    code = """if True:
        import resource, signal, sys
        from pathlib import Path
        from handlers import spool
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = spool.Writer(Path(sys.argv[1]), "requests", {"spec": "x" * 2000})
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        refused = 0
        for number in range(20):
            try:
                writer.append({"n": number}, bytes(5000))
            except OSError:
                refused += 1
        print(refused)
    """
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert said.stdout == "20\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("header", [b"{", b"[1]", b"[" * 100_000, b"\xff\xfe"])
def test_a_header_that_is_no_json_object_is_damage(tmp_path: Path, header: bytes) -> None:
    good = spool.encode({"n": 1})
    crc = zlib.crc32(b"", zlib.crc32(header))
    (tmp_path / ".labels-1-1-0.seg.open").write_bytes(
        good + struct.pack("<4sIII", b"MWF1", len(header), 0, crc) + header
    )
    (path,) = spool.finished(tmp_path)
    assert [frame.header for frame in spool.frames(path)] == [{"n": 1}]
