"""The model `feedback`, in this process: what counts as a label, what is kept, what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from handlers import bundle, inbox, labels, spool
from handlers.errors import BadRequest
from handlers.feedback_collector import FeedbackCollector
from handlers.inbox import Inbox
from marwright.packing import collector, container
from tests.handlers.context import FakeContext, KnownMetrics, Sent

NOW = 1_800_000_000.0
ROOT = Path(__file__).parent.parent.parent
GOOD = {"request": "4f0c", "label": "cat"}
JSON = {"Host": "localhost", "Content-Type": "application/json"}


def read(document: Any) -> list[dict[str, Any]]:
    return [dict(label) for label in labels.read({"body": document}, now=NOW).labels]


def refused(document: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        labels.read({"body": document}, now=NOW)
    return caught.value


# ------------------------------------------------------------------ the form


def test_the_least_that_is_a_label() -> None:
    [label] = read(GOOD)
    assert len(label.pop("uid")) == 32
    assert label == {"request": "4f0c", "instance": 0, "label": "cat", "source": "api", "time": None}


def test_all_that_a_label_may_say_is_kept_as_it_is() -> None:
    said = {"request": "4f0c", "instance": 7, "label": "Grüße 猫", "source": "Ann", "time": 1.7e9, "uid": "u-1"}
    assert read(said) == [said]


@pytest.mark.parametrize("label", ["7", 7, 7.5, -3, 0, "x" * 200, " cat ", "میخواهم"])
def test_a_label_is_text_or_a_number_and_stays_what_it_is(label: Any) -> None:
    [found] = read({"request": "a", "label": label})
    assert (found["label"], type(found["label"])) == (label, type(label))


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (1_700_000_000, 1_700_000_000.0),
        ("1700000000.5", 1_700_000_000.5),
        ("2023-11-14T22:13:20Z", 1_700_000_000.0),
        ("2023-11-14T23:13:20+01:00", 1_700_000_000.0),
        ("2023-11-14T22:13:20", 1_700_000_000.0),
        ("2023-11-14", 1_699_920_000.0),
        (NOW + 86_000, NOW + 86_000),
    ],
)
def test_a_time_is_unix_seconds_or_iso_8601(given: Any, seconds: float) -> None:
    assert read({**GOOD, "time": given})[0]["time"] == seconds


BAD = {
    "request": ["", "x" * 201, "é", "a\nb", "a\x00", 7, ["a"], True],
    "label": [
        "",
        "   ",
        "x" * 201,
        "a\nb",
        "nul\x00",
        "\ud800",
        True,
        float("nan"),
        float("inf"),
        10**400,
        ["cat"],
        {},
    ],
    "instance": [-1, 1.0, "one", "-1", True, 2**31, "9" * 30, [0]],
    "source": ["", " ", "x" * 201, "a\x1b[0m", 7],
    "time": ["yesterday", 0, -1, 9e9, NOW + 90_000, float("nan"), float("inf"), "nan", True, [1], "1e999", 10**400],
    "uid": ["", "x" * 65, "ü", "a\tb", 7],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_anything_else_is_a_400_that_names_the_key(key: str, value: Any) -> None:
    error = refused({**GOOD, key: value})
    assert error.status == 400
    assert error.reason.startswith(f"{key} must be")
    assert len(error.reason) < 200


def test_a_key_that_is_left_out_or_null_is_named_or_has_its_default() -> None:
    assert refused({}).reason == "request and label must be said"
    assert refused({"request": "a", "label": None}).reason == "label must be said"
    assert read({**GOOD, "time": None, "instance": None})[0]["instance"] == 0


def test_unknown_keys_are_named_and_cut_short() -> None:
    error = refused({**GOOD, "lable": 1, "x" * 5000: 2, "ünï": 3})
    assert error.status == 400
    assert "'lable'" in error.reason
    assert len(error.reason) < 400
    assert refused({**GOOD, **{f"key{number}": 0 for number in range(1000)}}).reason.endswith("and more")


def test_every_fault_of_one_label_is_said_at_once() -> None:
    reason = refused({"request": "", "label": "", "uid": ""}).reason
    assert [part.split()[0] for part in reason.split("; ")] == ["uid", "request", "label"]


def test_a_list_with_bad_labels_names_each_position_and_is_refused_whole() -> None:
    many: list[Any] = [dict(GOOD) for _ in range(300)]
    for index in range(0, 300, 2):
        many[index] = {"request": "a"}
    many[1] = "cat"
    reason = refused({"labels": many}).reason
    assert reason.startswith(
        "151 of 300 labels are bad, none is kept: label 0: label must be said; label 1: a label is"
    )
    assert "131 more, at 38, 40, 42" in reason
    assert reason.endswith(", …")
    assert len(reason) < 3000
    assert refused({"labels": [GOOD, {**GOOD, "instance": -1}]}).reason.endswith(
        "label 1: instance must be a whole number, 0 or more"
    )


def test_lists_have_one_to_ten_thousand_labels_and_each_uid_once() -> None:
    assert len(read({"labels": [GOOD] * 10_000})) == 10_000
    assert refused({"labels": [GOOD] * 10_001}).status == 413
    for nothing in ([], {}, "cat", None, 7):
        assert refused({"labels": nothing}).status == 400
    assert "label 2: uid is that of label 0" in refused({"labels": [{**GOOD, "uid": uid} for uid in "aba"]}).reason
    assert (
        "beside labels there is 'request', 'source'"
        in refused({"labels": [GOOD], "request": "a", "source": "b"}).reason
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"body": json.dumps(GOOD).encode()},
        {"body": bytearray(json.dumps({"labels": [GOOD]}).encode())},
        {"body": json.dumps(GOOD)},
        {"data": json.dumps(GOOD).encode(), "top_k": b"1", "meta": b"1", "capture": b"off"},
        {"request": b"4f0c", "label": b"cat"},
        {"request": "4f0c", "label": bytearray(b"cat"), "instance": b"0", "meta": b"1"},
        {"labels": json.dumps([GOOD]).encode()},
    ],
)
def test_the_same_label_however_it_was_sent(fields: dict[str, Any]) -> None:
    [label] = labels.read(fields, now=NOW).labels
    assert (label["request"], label["label"], label["instance"]) == ("4f0c", "cat", 0)


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        (None, 400, "the request holds no label"),
        ({}, 400, "request and label must be said"),
        ({"body": b""}, 400, "the body is not JSON"),
        ({"body": b"{"}, 400, "the body is not JSON"),
        ({"body": b"[" * 100_000}, 400, "the body is not JSON"),
        ({"body": b"\xff\xfe"}, 400, "the body is not JSON"),
        ({"body": [GOOD]}, 400, "a label is a JSON object"),
        ({"body": GOOD, "label": b"dog"}, 400, "beside body there is 'label'"),
        ({"body": GOOD, "data": GOOD}, 400, "beside body there is 'data'"),
        ({"request": b"a", "label": b"\xff"}, 400, "'label' is not UTF-8"),
        ({"request": b"a", "label": b"b", "file": b"c"}, 400, "unknown: 'file'"),
        ({json.dumps(GOOD): b""}, 415, "Content-Type: application/json"),
        ({"body": {**GOOD, "check": "perhaps"}}, 400, "check must be 1 or 0"),
        ({"labels": b"{"}, 400, "the body is not JSON"),
    ],
)
def test_what_is_no_label_at_all_is_said_in_words(fields: Any, status: int, reason: str) -> None:
    with pytest.raises(BadRequest) as caught:
        labels.read(fields, now=NOW)
    assert caught.value.status == status
    assert reason in caught.value.reason


def test_json_that_was_sent_as_a_form_is_told_how_to_be_sent() -> None:
    with pytest.raises(BadRequest, match="Content-Type: application/json") as caught:
        labels.read({}, now=NOW, form_encoded=True)
    assert caught.value.status == 415


def test_check_is_asked_for_by_json_or_field() -> None:
    assert labels.read({"body": {**GOOD, "check": True}}, now=NOW).check
    assert labels.read({"request": b"a", "label": b"b", "check": b"1"}, now=NOW).check
    assert not labels.read({"body": {**GOOD, "check": False}}, now=NOW).check


# ------------------------------------------------------------------ the inbox


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "feedback" / "spool"


@pytest.fixture
def make(folder: Path) -> Iterator[Callable[..., Inbox]]:
    made: list[Inbox] = []

    def build(**how: Any) -> Inbox:
        made.append(Inbox(folder, {"v": 1, "collector": "1.0"}, **({"megabytes": 1024} | how)))
        made[-1].begin()
        return made[-1]

    yield build
    for each in made:
        each.close()


def kept(folder: Path) -> list[dict[str, Any]]:
    """The labels in finished segments."""
    found = []
    for path in spool.finished(folder, inbox.KIND):
        head, *frames = spool.frames(path)
        assert head.header == {"v": 1, "collector": "1.0"}
        assert spool.whole(path)
        for frame in frames:
            assert abs(frame.header["received"] - time.time()) < 600
            assert frame.payload == b""
            found += frame.header["labels"]
    return found


def eventually(true: Callable[[], Any], seconds: float = 20.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)
    return found


def test_a_segment_gets_its_name_without_further_labels(make: Callable[..., Inbox], folder: Path) -> None:
    box = make(seconds=0.2)
    assert not folder.exists(), "nothing is made before the first label"
    box.keep([{"uid": "1"}, {"uid": "2"}])
    assert eventually(lambda: kept(folder)) == [{"uid": "1"}, {"uid": "2"}]
    box.keep([{"uid": "3"}])
    assert eventually(lambda: kept(folder)[2:]) == [{"uid": "3"}]


def test_what_is_kept_is_on_the_disk_before_the_answer(
    make: Callable[..., Inbox], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    box = make(seconds=60)
    box.keep([{"uid": "1"}])
    first, second = synced
    assert first.startswith(".labels-")
    assert second == "spool", "a new file's name is in its folder"
    box.keep([{"uid": "2"}])
    assert synced == [first, second, first]


def test_a_closed_inbox_refuses_and_leaves_a_finished_segment(make: Callable[..., Inbox], folder: Path) -> None:
    box = make(seconds=60)
    box.keep([{"uid": "1"}])
    box.close()
    with pytest.raises(BadRequest, match="ending") as caught:
        box.keep([{"uid": "2"}])
    assert caught.value.status == 503
    assert kept(folder) == [{"uid": "1"}]


def test_a_full_spool_refuses_until_it_is_emptied(make: Callable[..., Inbox], folder: Path) -> None:
    folder.mkdir(parents=True)
    other = folder / "requests-1-1-1.seg"
    other.write_bytes(b"x" * 2**20)
    box = make(megabytes=1)
    with pytest.raises(BadRequest, match="spool is full") as caught:
        box.keep([{"uid": "1"}])
    assert caught.value.status == 503
    other.unlink()

    def keeps() -> bool:
        try:
            box.keep([{"uid": "2"}])
        except BadRequest:
            return False
        return True

    eventually(keeps)
    box.close()
    assert kept(folder) == [{"uid": "2"}]


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_when_the_disk_refuses_nothing_of_it_is_kept_and_the_next_is(
    fails: str, make: Callable[..., Inbox], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = make(seconds=60)
    box.keep([{"uid": "1"}])

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if fails == "fsync":
            patch.setattr(os, "fsync", refuse)
        else:
            patch.setattr(spool, "encode", refuse)
        with pytest.raises(BadRequest, match="No space left on device; send it again later") as caught:
            box.keep([{"uid": "2"}, {"uid": "3"}])
    assert caught.value.status == 503
    box.keep([{"uid": "4"}])
    box.close()
    assert kept(folder) == [{"uid": "1"}, {"uid": "4"}]


def test_a_disk_that_takes_half_a_frame_has_none_of_it() -> None:
    """A file size limit (RLIMIT_FSIZE) stops the write in its middle, as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", HALF],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["1"], 503, ["1", "3"]]


HALF = """
import json, resource, signal, tempfile
from pathlib import Path
from handlers import spool
from handlers.errors import BadRequest
from handlers.inbox import Inbox

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(tempfile.mkdtemp())
box = Inbox(folder, {"v": 1}, megabytes=1024, seconds=60)

def kept():
    return [label["uid"] for path in spool.finished(folder) for frame in list(spool.frames(path))[1:]
            for label in frame.header["labels"]]

box.keep([{"uid": "1"}])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    box.keep([{"uid": str(n), "label": "x" * 1000} for n in range(100, 200)])
    status = 200
except BadRequest as error:
    status = error.status
first = kept()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
box.keep([{"uid": "3"}])
box.close()
print(json.dumps([first, status, kept()]))
"""


@pytest.mark.parametrize(("number", "adopted"), [(signal.SIGTERM, False), (signal.SIGKILL, True)])
def test_a_worker_that_ends_leaves_its_labels_readable(number: signal.Signals, adopted: bool, folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ENDS, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "kept\n"
        child.send_signal(number)
        assert child.wait(timeout=30) == -number
        [name] = [path.name for path in folder.iterdir()]
        assert name.startswith(".") == adopted
        assert kept(folder) == [{"uid": "1"}]
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


ENDS = """
import sys, time
from pathlib import Path
from handlers.inbox import Inbox
box = Inbox(Path(sys.argv[1]), {"v": 1, "collector": "1.0"}, megabytes=1024, seconds=60)
box.begin()
box.keep([{"uid": "1"}])
print("kept", flush=True)
time.sleep(60)
"""


# ------------------------------------------------------------------ the handler


@pytest.fixture(scope="module")
def unzipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collector's archive, as TorchServe unpacks it."""
    folder = tmp_path_factory.mktemp("collector")
    record, _ = collector.write(folder / "store")
    container.unpack(folder / "store" / record.file, folder / "unzipped")
    return folder / "unzipped"


Started = tuple[FeedbackCollector, FakeContext]


@pytest.fixture
def started(
    unzipped: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> Iterator[Callable[..., Started]]:
    """`started(**environment)`: a handler that is ready, with its spool in `folder` unless told otherwise."""
    made: list[FeedbackCollector] = []

    def start(**environment: str) -> Started:
        monkeypatch.setattr(bundle, "HOME", unzipped.resolve() / "handlers")
        for name, value in ({"MARWRIGHT_SPOOL": str(folder)} | environment).items():
            monkeypatch.setenv(name, value)
        context = FakeContext.at(unzipped, batch_size=32)
        context.metrics = KnownMetrics(ROOT / "deploy" / "metrics.yaml")
        made.append(FeedbackCollector())
        made[-1].initialize(context)
        return made[-1], context

    yield start
    for each in made:
        each.inbox.close()


def test_a_batch_keeps_the_good_and_refuses_the_bad_each_by_itself(
    started: Callable[..., Started], folder: Path
) -> None:
    handler, context = started()
    answers = context.ask(
        handler,
        [
            Sent({"body": {**GOOD, "uid": "1"}}, JSON),
            Sent({"body": {"request": "a"}}, JSON),
            Sent({"body": {"labels": [{**GOOD, "uid": "2"}, {**GOOD, "uid": "3"}]}}, JSON),
            Sent({"body": {**GOOD, "check": True}}, JSON),
            Sent({"body": GOOD}, {**JSON, "explain": "True"}),
            Sent({}, {"describe": "True"}),
            Sent({"request": b"a", "label": b"b", "uid": b"4", "meta": b"1"}, {}),
            Sent({"data": b"{", "meta": b"1"}, {}),
        ],
    )
    assert [answer.status for answer in answers] == [200, 400, 200, 200, 501, 200, 200, 200]
    assert answers[0].json == {"accepted": 1, "uids": ["1"]}
    assert answers[1].json == {"code": 400, "reason": "label must be said"}
    assert answers[2].json == {"accepted": 2, "uids": ["2", "3"]}
    assert answers[3].json == {"checked": 1}
    assert answers[5].json["keeps"] is True
    assert answers[6].json["prediction"] == {"accepted": 1, "uids": ["4"]}
    assert answers[6].json["request_id"] == "request-6"
    assert (answers[7].json["status"], answers[7].json["reason"]) == (400, "the body is not JSON")
    assert answers[7].headers == {"ts_stream_next": "false"}
    for answer in answers[:5]:
        assert answer.headers["X-Model-Name"] == "feedback"
        assert answer.headers["X-Bundle-Digest"] == handler.bundle.digest
        assert answer.headers["content-type"] == "application/json"
    handler.inbox.close()
    assert [label["uid"] for label in kept(folder)] == ["1", "2", "3", "4"]
    [path] = spool.finished(folder)
    assert len(list(spool.frames(path))) == 2, "one frame, one wait for the disk, for the whole batch"


def test_no_spool_is_a_503_with_its_reason_and_checks_go_on(started: Callable[..., Started]) -> None:
    handler, context = started(MARWRIGHT_SPOOL="")
    label, check, about = context.ask(
        handler,
        [
            Sent({"body": GOOD}, JSON),
            Sent({"body": {**GOOD, "check": True}}, JSON),
            Sent({}, {"describe": "True"}),
        ],
    )
    assert (label.status, label.json["code"]) == (503, 503)
    assert "MARWRIGHT_SPOOL" in label.json["reason"]
    assert check.json == {"checked": 1}
    assert about.json["keeps"] is False


def test_a_spool_that_cannot_be_written_is_a_503_for_what_would_be_kept_alone(
    started: Callable[..., Started], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    handler, context = started(MARWRIGHT_SPOOL=str(file / "spool"))
    label, bad = context.ask(handler, [Sent({"body": GOOD}, JSON), Sent({"body": {}}, JSON)])
    assert (label.status, bad.status) == (503, 400)
    assert "Not a directory" in label.json["reason"]


def test_a_fault_of_ours_is_a_500_or_503_in_our_words(
    started: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, context = started()
    monkeypatch.setattr(handler.inbox, "keep", lambda labels: 1 / 0)
    assert context.ask(handler, [Sent({"body": GOOD}, JSON)])[0].status == 503
    monkeypatch.setattr(labels, "read", lambda fields, now, form_encoded: 1 / 0)
    assert context.ask(handler, [Sent({"body": GOOD}, JSON)])[0].status == 500


def test_requests_and_errors_are_counted_like_those_of_other_models(started: Callable[..., Started]) -> None:
    handler, context = started()
    sums = context.metrics.sums  # type: ignore[union-attr]
    assert sums["marwright_requests_total", "feedback", "1.0", "predict", "503"] == 0
    context.ask(handler, [Sent({"body": {**GOOD, "check": True}}, JSON), Sent({"body": {}}, JSON)])
    context.ask(handler, [Sent({"body": {**GOOD, "check": True}}, JSON)])
    sums = context.metrics.sums  # type: ignore[union-attr]
    assert sums["marwright_requests_total", "feedback", "1.0", "predict", "200"] == 2
    assert sums["marwright_requests_total", "feedback", "1.0", "predict", "400"] == 1
    assert sums["marwright_errors_total", "feedback", "1.0", "predict", "malformed"] == 1


def test_a_server_whose_metrics_file_lacks_the_counters_answers_all_the_same(
    started: Callable[..., Started], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handler, context = started(MARWRIGHT_METRICS="off")
    assert context.ask(handler, [Sent({"body": {**GOOD, "check": True}}, JSON)])[0].status == 200
    handler._metrics = KnownMetrics(_empty(tmp_path))
    assert context.ask(handler, [Sent({"body": {**GOOD, "check": True}}, JSON)])[0].status == 200
    assert context.ask(handler, [Sent({"body": {**GOOD, "check": True}}, JSON)])[0].status == 200
    assert [record.message for record in caplog.records].count(
        "requests of this worker are not counted from here on (said once)"
    ) == 1


def _empty(folder: Path) -> Path:
    (folder / "metrics.yaml").write_text("model_metrics: {}\n")
    return folder / "metrics.yaml"


def test_an_archive_that_was_changed_does_not_start(
    unzipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(unzipped, tmp_path / "archive"))
    (copy / "handlers" / "labels.py").write_text("MOST = 1\n")
    monkeypatch.setattr(bundle, "HOME", copy.resolve() / "handlers")
    with pytest.raises(RuntimeError, match=r"handlers/labels\.py was changed"):
        FeedbackCollector().initialize(FakeContext.at(copy))
    assert "MARWRIGHT-FAILED" in caplog.text


# ------------------------------------------------------------------ the archive


def test_the_same_handlers_make_the_same_archive(tmp_path: Path) -> None:
    first, built = collector.write(tmp_path / "one")
    again, twice = collector.write(tmp_path / "one")
    other, _ = collector.write(tmp_path / "two")
    assert (built, twice) == (True, False)
    assert first == again == other
    assert (first.model, first.version, first.file) == ("feedback", "1.0", "feedback-1.0.mar")
