"""What a version still owes: pinned callers, its queue, the batch inside a worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from marwright.errors import MarwrightError, NotReady
from marwright.release import journal, loading, retiring, shadow
from marwright.release.answers import Answer
from marwright.release.shadow import Sample
from tests import archives, rollouts
from tests.archives import Built
from tests.rollouts import Stage

pytestmark = pytest.mark.server

SLOW = {"batch_size": 8, "max_batch_delay": 2500, "workers": 2}
"""Two workers, and a lone request waits two and a half seconds for company: not in the queue, and not answered."""


@pytest.fixture(scope="module")
def stage(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with rollouts.stage(tmp_path_factory.mktemp("retiring"), digits, others=0) as made:
        archives.build(digits.run, made.store, **SLOW)
        yield made


@pytest.fixture
def slow(stage: Stage) -> Iterator[str]:
    """1.1, loaded and ready beside 1.0."""
    record = stage.record("1.1")
    with stage.client() as client:
        began = time.time()
        loading.register(client, record, seconds=30)
        loading.wait_ready(client, record, server=stage.home.server, since=began, seconds=60)
        yield record.version
        loading.remove(client, "digits", record.version)


@pytest.fixture
def sample(digits: Built) -> Sample:
    return shadow.from_golden(digits.golden)[0]


def test_what_is_in_a_worker_is_answered_before_it_goes(stage: Stage, slow: str, sample: Sample) -> None:
    answers: list[Answer | MarwrightError] = []

    def ask() -> None:
        with stage.client() as client:
            try:
                answers.append(client.predict("digits", sample.body, version=slow))
            except MarwrightError as error:
                answers.append(error)

    with stage.client() as client, journal.open(stage.store) as book:
        thread = threading.Thread(target=ask)
        thread.start()
        until = time.monotonic() + 10
        while not retiring.pinned_requests(client, "digits", slow):
            assert time.monotonic() < until
        status = loading.loaded(client, "digits", slow)
        assert status is not None
        assert status.pending == 0, "the queue does not show it"
        assert not answers
        left = retiring.retire(client, book, "digits", slow, sample, why="test", idle=0.2, seconds=20)
        assert left == ""
        assert loading.loaded(client, "digits", slow) is None
        thread.join(5)
    assert [type(answer) for answer in answers] == [Answer]
    with journal.open(stage.store) as book:
        assert [entry.event for entry in book.entries("digits")][-2:] == ["retiring", "retired"]


def test_each_worker_is_asked(stage: Stage, slow: str, sample: Sample) -> None:
    with stage.client() as client:
        status = loading.loaded(client, "digits", slow)
        before = retiring.pinned_requests(client, "digits", slow)
        retiring.drain(client, "digits", slow, sample, idle=0, seconds=30)
        assert retiring.pinned_requests(client, "digits", slow) >= before + 2
        assert len(loading.ready_pids(status)) == 2


def test_over_both_protocols_pinned_requests_are_seen(stage: Stage, sample: Sample) -> None:
    with stage.client() as client:
        before = retiring.pinned_requests(client, "digits", "1.0")
        client.predict("digits", sample.body, version="1.0")
        client.predict_grpc("digits", {"data": sample.body}, version="1.0")
        client.predict("digits", sample.body)
        assert retiring.pinned_requests(client, "digits", "1.0") == before + 2


def test_a_version_that_never_rests_is_kept_and_said_so(stage: Stage, sample: Sample) -> None:
    stop = threading.Event()

    def pin() -> None:
        with stage.client() as client:
            while not stop.wait(0.05):
                client.predict("digits", sample.body, version="1.0")

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        with stage.client() as client, pytest.raises(NotReady, match="its pinned URL is still called"):
            retiring.drain(client, "digits", "1.0", sample, idle=0.5, seconds=2)
    finally:
        stop.set()
        thread.join()


def test_what_is_not_loaded_owes_nothing(stage: Stage, sample: Sample) -> None:
    with stage.client() as client:
        retiring.drain(client, "digits", "7.7", sample, idle=0.2, seconds=2)
        loading.remove(client, "digits", "7.7")
