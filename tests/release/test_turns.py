"""One change of a model at a time; a mere look at who holds it stops nobody."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import filelock
import pytest

from marwright.errors import RolloutError
from marwright.release import turns


def test_a_second_one_is_told_who_holds_the_model(tmp_path: Path) -> None:
    with turns.only_one(tmp_path, "digits", what="rollout of digits 1.1"):
        assert turns.holder(tmp_path, "digits").startswith(f"rollout of digits 1.1, process {os.getpid()}, since ")
        with (
            pytest.raises(RolloutError, match=rf"rollout of digits 1\.1, process {os.getpid()}, since"),
            turns.only_one(tmp_path, "digits", what="another"),
        ):
            pass
        with turns.only_one(tmp_path, "cifar10", what="another model"):
            pass
    assert turns.holder(tmp_path, "digits") == ""


def test_one_that_only_looks_whether_it_is_held_stops_nobody(tmp_path: Path) -> None:
    """`status` holds the lock at the very moment at which a rollout begins."""
    with turns.only_one(tmp_path, "digits", what="earlier"):
        (lock,) = tmp_path.glob("*.lock")
    holds = threading.Event()

    def look() -> None:
        with filelock.FileLock(lock):
            holds.set()
            time.sleep(0.2)

    status = threading.Thread(target=look)
    status.start()
    assert holds.wait(30)
    with turns.only_one(tmp_path, "digits", what="rollout"):
        assert turns.holder(tmp_path, "digits").startswith("rollout, ")
    status.join()


def test_looking_all_the_time_stops_nobody(tmp_path: Path) -> None:
    stop = threading.Event()
    with turns.only_one(tmp_path, "digits", what="earlier"):
        pass

    def look() -> None:
        while not stop.wait(0.001):
            turns.holder(tmp_path, "digits")

    status = threading.Thread(target=look)
    status.start()
    try:
        for number in range(200):
            with turns.only_one(tmp_path, "digits", what=f"rollout {number}"):
                pass
    finally:
        stop.set()
        status.join()
