"""What a worker captures is what it was asked and what it answered; and capturing is in nobody's way."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers import base, bundle, capture, ending, spool
from handlers.capture import Recorder, chosen, instances
from handlers.errors import BadRequest, LoadError
from handlers.payloads import Headers, Payload
from handlers.settings import WorkerSettings
from handlers.spec import ModelSpec
from tests import zoo
from tests.handlers import archives
from tests.handlers.conftest import handler_class
from tests.handlers.context import Answer, FakeContext, Sent

ROOT = Path(__file__).parent.parent.parent
HTTP = {"Host": "localhost:8080"}
PNG = zoo.encoded(zoo.picture("L", (16, 16)))
FROZEN = [number in (5, 10) for number in range(12)]
V1 = {"instances": [{"b64": zoo.b64(PNG)}, {"b64": zoo.b64(zoo.PNG)}]}


@dataclass
class Captured:
    """One request as the spool has it."""

    entry: dict[str, Any]
    body: bytes | None
    outputs: dict[str, Any]
    head: dict[str, Any]
    time: float

    @property
    def id(self) -> str:
        return str(self.entry["id"])

    @property
    def arrays(self) -> list[Any]:
        """What the net saw, made again from nothing but the segment."""
        assert self.body is not None
        return instances(self.entry, self.body, ModelSpec.from_json(json.dumps(self.head["spec"])))


def read(folder: Path) -> list[Captured]:
    """Everything in the finished segments of a spool, in order."""
    found = []
    for path in spool.finished(folder, "requests"):
        head, *frames = spool.frames(path)
        assert spool.whole(path)
        for frame in frames:
            row = 0
            for entry in frame.header["requests"]:
                body = None
                if entry["body"] is not None:
                    at, length = entry["body"]
                    body = frame.payload[at : at + length]
                    assert len(body) == length
                rows = slice(row, row := row + entry["rows"])
                outputs = {}
                for name, (at, count, width, dtype) in frame.header["outputs"].items():
                    flat = np.frombuffer(frame.payload, dtype, count=count * width, offset=at)
                    outputs[name] = flat.reshape(count, width)[rows]
                found.append(Captured(entry, body, outputs, head.header, frame.header["time"]))
            assert all(count == row for _, count, _, _ in frame.header["outputs"].values())
    return found


@dataclass
class Capturing:
    """A started handler that captures; its thread waits for hours, so that `read` decides when anything is written."""

    handler: base.BatchHandler
    context: FakeContext
    folder: Path
    arrays: list[Any]
    """What the net saw, one array for each batch."""
    outputs: list[dict[str, Any]]
    counts: Counter[str]

    def ask(self, *batch: Sent) -> list[Answer]:
        return self.context.ask(self.handler, batch)

    def read(self) -> list[Captured]:
        self.handler.recorder.close()
        return read(self.folder)


@pytest.fixture
def capturing(
    unpacked: Any, threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Capturing]]:
    """`capturing("digits", share="0.5", capture_bodies="off")`: the rest are variables, less their MARWRIGHT_."""
    monkeypatch.setattr(capture, "_PERIOD", 3600.0)
    monkeypatch.setattr(ending, "_before_sigterm", lambda: None)
    begun: list[base.BatchHandler] = []

    def start(model: str = "digits", *, share: str = "1", folder: Path | None = None, **more: str) -> Capturing:
        model_dir = unpacked(model, "eager")
        folder = folder or tmp_path / "spool"
        monkeypatch.setattr(bundle, "HOME", model_dir.resolve() / "handlers")
        monkeypatch.setenv("MARWRIGHT_SPOOL", str(folder))
        monkeypatch.setenv("MARWRIGHT_CAPTURE", share)
        for name, value in more.items():
            monkeypatch.setenv(f"MARWRIGHT_{name.upper()}", value)
        context = FakeContext.at(model_dir, batch_size=8)
        handler = handler_class(model)()
        handler.initialize(context)
        begun.append(handler)
        made = Capturing(handler, context, folder, [], [], Counter())
        infer = handler.inference

        def seen(batch: base.Batch) -> dict[str, Any]:
            made.arrays.append(batch.array.copy())
            made.outputs.append(infer(batch))
            return made.outputs[-1]

        handler.inference = seen
        handler.recorder._count = lambda count, reason: made.counts.update({reason: count})
        return made

    yield start
    for handler in begun:
        handler.recorder.close()


@pytest.mark.parametrize("model", ["digits", "diabetes"])
@pytest.mark.parametrize("way", ["http", "grpc"])
def test_what_was_captured_is_what_was_asked_and_answered(capturing: Any, model: str, way: str) -> None:
    """The whole zoo in one batch: each good request is there, bit for bit, and no refused one."""
    worker = capturing(model)
    zoo_of_model = [one for one in zoo.ZOO.values() if one.model == model and (way == "http" or one.grpc is not None)]
    if way == "http":
        sent = [one.sent for one in zoo_of_model]
    else:
        sent = [Sent(one.grpc or {}, {name: {"content-type": ""} for name in one.grpc or {}}) for one in zoo_of_model]
    answers = worker.ask(*sent)
    wanted = [f"request-{index}" for index, answer in enumerate(answers) if answer.status == 200 and _good(answer)]
    found = {one.id: one for one in worker.read()}
    assert list(found) == wanted
    assert len(wanted) >= 9
    assert worker.counts == {"": len(wanted)}
    (array,), (outputs,) = worker.arrays, worker.outputs
    row = 0
    for one in found.values():
        rows = slice(row, row := row + one.entry["rows"])
        saw = array[rows]
        again = one.arrays
        assert len(again) == len(saw)
        for made, given_to_net in zip(again, saw, strict=True):
            assert made.dtype == given_to_net.dtype
            assert np.array_equal(made, given_to_net), one.id
        first = worker.handler.spec.outputs[0]
        assert one.outputs[first].dtype == np.float32
        assert np.array_equal(one.outputs[first], outputs[first][rows])
        assert one.outputs["embedding"].dtype == np.float16
        assert np.allclose(one.outputs["embedding"], outputs["embedding"][rows], rtol=2e-3, atol=1e-3)
        assert one.body is not None
        assert "sha256" not in one.entry, "the body is there"
        assert one.entry["http"] is (way == "http")
        assert "redacted" not in one.entry
    assert row == len(array)


def _good(answer: Answer) -> bool:
    """Over gRPC a refusal has the status 200 as well, for the server; the handler's own says more."""
    value = answer.json
    return not (isinstance(value, dict) and value.keys() == {"code", "reason"})


def test_a_body_is_kept_as_it_came(capturing: Any) -> None:
    worker = capturing()
    document = {"top_k": 2, "data": zoo.b64(PNG)}
    json_type, text_type = {"body": {"content-type": "application/json"}}, {"body": {"content-type": "text/plain"}}
    began = time.time()
    worker.ask(
        Sent({"body": bytearray(zoo.JPEG)}, {**HTTP, "body": {"content-type": "image/jpeg"}}),
        Sent({"body": document}, {**HTTP, **json_type, "Content-Length": "999"}),
        Sent({"body": zoo.b64(PNG)}, {**HTTP, **text_type}),
        Sent({"top_k": b"3", "picture": PNG}, {"picture": {"content-type": ""}, "top_k": {"content-type": ""}}),
    )
    jpeg, from_json, text, grpc = worker.read()
    assert (jpeg.body, jpeg.entry["type"], jpeg.entry.get("form")) == (zoo.JPEG, "image/jpeg", None)
    assert from_json.body == json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    assert (from_json.entry["type"], from_json.entry["form"]) == ("application/json", "json")
    assert (text.body, text.entry["form"]) == (zoo.b64(PNG).encode(), "text")
    assert (grpc.body, grpc.entry["type"], grpc.entry["http"]) == (PNG, "", False)
    assert all(began <= one.time <= time.time() for one in (jpeg, from_json, text, grpc))
    assert jpeg.head == {
        "v": 1,
        "model": "digits",
        "version": "1.0",
        "bundle": worker.handler.bundle.digest,
        "spec": json.loads(worker.handler.spec.to_json()),
    }


def test_a_body_of_another_number_of_instances_is_not_taken_for_the_one_that_was_answered(capturing: Any) -> None:
    worker = capturing()
    worker.ask(Sent({"body": V1}, HTTP))
    (found,) = worker.read()
    spec = worker.handler.spec
    assert len(instances(found.entry, found.body, spec)) == 2
    for body, words in ((json.dumps({"instances": V1["instances"][:1]}).encode(), "1 instances; 2"), (b"{", "JSON")):
        with pytest.raises(BadRequest) as refused:
            instances(found.entry, body, spec)
        assert words.lower() in refused.value.reason.lower()


def test_only_predictions_that_were_answered_are_captured(capturing: Any) -> None:
    worker = capturing()
    statuses = worker.ask(
        Sent({"body": PNG}, {**HTTP, "explain": "True"}),
        Sent({}, {"describe": "True"}),
        Sent({"body": b"no"}, HTTP),
        Sent({"body": PNG}, HTTP),
        Sent({"body": {"instances": []}}, HTTP),
    )
    assert [answer.status for answer in statuses] == [501, 200, 415, 200, 400]
    assert [one.id for one in worker.read()] == ["request-3"]


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"body": PNG}, {**HTTP, "X-Capture": "off"}),
        ({"body": PNG}, {**HTTP, "x-capture": "False"}),
        ({"body": PNG}, {**HTTP, "X-CAPTURE": "0"}),
        ({"data": PNG, "capture": b"off"}, {"data": {"content-type": ""}}),
        ({"data": PNG, "capture": b"no", "meta": b"1"}, {"data": {"content-type": ""}}),
        ({"body": {"data": zoo.b64(PNG), "capture": "off"}}, HTTP),
        ({"body": {"data": zoo.b64(PNG), "capture": False}}, {**HTTP, "X-Capture": "on"}),
        ({"body": {**V1, "parameters": {"capture": "off"}}}, HTTP),
    ],
)
def test_a_request_can_ask_not_to_be_captured(capturing: Any, fields: Any, headers: Any) -> None:
    worker = capturing()
    answers = worker.ask(Sent(fields, headers), Sent({"body": PNG}, {**HTTP, "X-Capture": "on"}))
    assert [answer.status for answer in answers] == [200, 200]
    assert _good(answers[0])
    assert [one.id for one in worker.read()] == ["request-1"]
    assert worker.counts == {"": 1}


def test_nonsense_about_capture_is_refused_and_never_taken_for_yes(capturing: Any) -> None:
    worker = capturing()
    answers = worker.ask(
        Sent({"body": PNG}, {**HTTP, "X-Capture": "please not"}), Sent({"data": PNG, "capture": b"never"}, HTTP)
    )
    assert [answer.status for answer in answers] == [400, 400]
    assert "capture must be 1 or 0" in answers[0].json["reason"]
    assert worker.read() == []


@pytest.mark.parametrize("missing", ["MARWRIGHT_SPOOL", "MARWRIGHT_CAPTURE"])
def test_nothing_is_captured_unless_there_are_both_a_spool_and_a_share(
    unpacked: Any, threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    model_dir = unpacked("digits", "eager")
    monkeypatch.setattr(bundle, "HOME", model_dir.resolve() / "handlers")
    environment = {"MARWRIGHT_SPOOL": str(tmp_path / "spool"), "MARWRIGHT_CAPTURE": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, "" if name == missing else value)
    before = set(threading.enumerate())
    handler, context = handler_class("digits")(), FakeContext.at(model_dir)
    handler.initialize(context)
    assert context.ask(handler, [Sent({"body": PNG}, HTTP)])[0].status == 200
    handler.recorder.flush()
    assert not [one for one in set(threading.enumerate()) - before if one.name == "marwright-capture"]
    assert handler.describe()["capture"] == 0.0
    assert handler.recorder._put == 0
    assert not (tmp_path / "spool").exists()


def test_a_worker_says_what_share_it_captures(capturing: Any) -> None:
    worker = capturing(share="0.25")
    assert worker.ask(Sent({}, {"describe": "True"}))[0].json["capture"] == 0.25


# ---------------------------------------------------------------- which requests


@given(st.text(max_size=60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_a_larger_share_holds_all_of_a_smaller_one(request_id: str, one: float, other: float, seed: int) -> None:
    low, high = sorted((one, other))
    assert chosen(request_id, low, seed) <= chosen(request_id, high, seed)
    assert chosen(request_id, 1.0, seed)
    assert not chosen(request_id, 0.0, seed)


def test_a_share_is_a_share_whatever_the_seed() -> None:
    ids = [f"{number:08x}-51b3-4a8e-9a57-2f6c9d0e1b7a" for number in range(20_000)]
    taken = {}
    for seed in (0, 1):
        taken[seed] = {id for id in ids if chosen(id, 0.3, seed)}
        spread = math.sqrt(len(ids) * 0.3 * 0.7)
        assert abs(len(taken[seed]) - 0.3 * len(ids)) < 4 * spread
    both = len(taken[0] & taken[1])
    assert abs(both - 0.09 * len(ids)) < 4 * math.sqrt(len(ids) * 0.09 * 0.91), "two seeds choose independently"


def test_every_process_chooses_the_same() -> None:
    """Frozen: another machine, another year, another version of the handlers."""
    assert [chosen(f"id-{number}", 0.3, 7) for number in range(12)] == FROZEN


def test_a_worker_captures_what_was_chosen(capturing: Any) -> None:
    worker = capturing(share="0.3", capture_seed="7")
    worker.ask(*[Sent({"body": PNG}, HTTP)] * 64)
    assert [one.id for one in worker.read()] == [f"request-{n}" for n in range(64) if chosen(f"request-{n}", 0.3, 7)]


# ---------------------------------------------------------------- privacy


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of one's own, as the server's PYTHONPATH would have it."""
    module = ModuleType("hooks_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_without_bodies_there_are_hashes_and_not_one_byte_of_them(capturing: Any) -> None:
    worker = capturing(capture_bodies="off")
    worker.ask(Sent({"body": zoo.JPEG}, HTTP), Sent({"body": V1}, HTTP))
    jpeg, kserve = worker.read()
    assert (jpeg.body, kserve.body) == (None, None)
    assert jpeg.entry["sha256"] == hashlib.sha256(zoo.JPEG).hexdigest()
    assert kserve.outputs["probabilities"].shape == (2, 10)
    found = everything(worker.folder)
    assert zoo.JPEG[20:60] not in found
    assert zoo.b64(PNG)[:40].encode() not in found


def test_a_hook_sees_every_body_first_and_what_it_gives_is_kept(capturing: Any, hooks: Any) -> None:
    asked: list[tuple[bytes, str, str]] = []

    def black(body: bytes, content_type: str) -> bytes | None:
        asked.append((body, content_type, threading.current_thread().name))
        return None if content_type == "image/jpeg" else PNG

    hooks.black = black
    worker = capturing(capture_redact="hooks_of_a_test:black")
    bmp = zoo.encoded(zoo.picture(), "BMP")
    worker.ask(
        Sent({"body": bytearray(zoo.JPEG)}, {**HTTP, "body": {"content-type": "image/jpeg"}}),
        Sent({"body": bytearray(bmp)}, {**HTTP, "body": {"content-type": "image/bmp"}}),
    )
    assert asked == [], "not in a request's way"
    jpeg, redacted = worker.read()
    assert [(body, kind) for body, kind, _ in asked] == [(zoo.JPEG, "image/jpeg"), (bmp, "image/bmp")]
    assert all(type(body) is bytes for body, _, _ in asked)
    assert (jpeg.body, redacted.body) == (None, PNG)
    assert jpeg.entry["redacted"] is redacted.entry["redacted"] is True
    assert redacted.entry["sha256"] == hashlib.sha256(bmp).hexdigest()
    assert len(redacted.arrays) == 1
    assert bmp[100:160] not in everything(worker.folder)


@pytest.mark.parametrize("fault", ["raises", "gives text", "is not there", "no such module"])
def test_what_could_not_be_redacted_is_captured_nowhere(
    capturing: Any, hooks: Any, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    def odd(body: bytes, content_type: str) -> Any:
        if body != PNG:
            return body
        if fault == "raises":
            raise ValueError("odd")
        return "text"

    if fault != "is not there":
        hooks.odd = odd
    module = "no_such_module_of_a_test" if fault == "no such module" else "hooks_of_a_test"
    worker = capturing(capture_redact=f"{module}:odd")
    answers = worker.ask(Sent({"body": PNG}, HTTP), Sent({"body": zoo.PNG}, HTTP), Sent({"body": PNG}, HTTP))
    assert [answer.status for answer in answers] == [200] * 3
    partly = fault in ("raises", "gives text")
    assert [one.body for one in worker.read()] == ([zoo.PNG] if partly else [])
    assert worker.counts == ({"redact": 2, "": 1} if partly else {"redact": 3})
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "redaction hook" in said[0].getMessage()


# ---------------------------------------------------------------- in nobody's way


class Blocked:
    """A disk that takes nothing until it is told to go on."""

    def __init__(self, writer: spool.Writer) -> None:
        self.go_on, self.reached = threading.Event(), threading.Event()
        self._append = writer.append
        writer.append = self.append  # type: ignore[method-assign]

    def append(self, *what: Any, **how: Any) -> None:
        self.reached.set()
        assert self.go_on.wait(60)
        self._append(*what, **how)


def test_a_disk_that_hangs_costs_captures_and_no_answer(
    capturing: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(capture, "_WAITING", 200_000)
    worker = capturing()
    recorder = worker.handler.recorder
    disk = Blocked(recorder._writer)
    expected = worker.ask(*[Sent({"body": PNG}, HTTP)] * 8)[0]
    thread = threading.Thread(target=recorder.flush)
    thread.start()
    assert disk.reached.wait(20)
    most = 0
    for _ in range(100):
        answers = worker.ask(*[Sent({"body": PNG}, HTTP)] * 8)
        assert all((answer.status, answer.body) == (200, expected.body) for answer in answers)
        most = max(most, recorder._put - recorder._taken)
    assert 100_000 < most <= 200_000
    assert worker.counts.keys() == {"queue"}
    disk.go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    recorder.flush()
    assert recorder._put == recorder._taken
    assert worker.counts["queue"] + worker.counts[""] == 808
    worker.ask(Sent({"body": zoo.PNG}, HTTP))
    found = worker.read()
    assert len(found) == worker.counts[""]
    assert found[-1].body == zoo.PNG, "it goes on when the disk does"
    assert len([record for record in caplog.records if "slower" in record.getMessage()]) == 1


def test_a_batch_that_nobody_understands_costs_itself_alone(capturing: Any, caplog: pytest.LogCaptureFixture) -> None:
    worker = capturing()
    recorder = worker.handler.recorder
    worker.ask(Sent({"body": PNG}, HTTP))
    recorder._waiting[0] = recorder._waiting[0]._replace(outputs={})
    worker.ask(Sent({"body": PNG}, HTTP))
    recorder._waiting[1] = recorder._waiting[1]._replace(time=recorder._waiting[0].time + 60)  # a frame of its own
    recorder.flush()
    assert recorder._put == recorder._taken
    assert len(worker.read()) == 1
    assert worker.counts == {"failed": 1, "": 1}
    assert "could not be captured" in caplog.text


def test_an_end_does_not_wait_for_a_disk_that_hangs(capturing: Any) -> None:
    worker = capturing()
    recorder = worker.handler.recorder
    disk = Blocked(recorder._writer)
    worker.ask(Sent({"body": PNG}, HTTP))
    thread = threading.Thread(target=recorder.flush)
    thread.start()
    assert disk.reached.wait(20)
    recorder.close()
    assert thread.is_alive()
    disk.go_on.set()
    thread.join(60)
    assert worker.ask(Sent({"body": PNG}, HTTP))[0].status == 200
    assert recorder._put == recorder._taken


@pytest.mark.parametrize("where", ["a file", "below a file", "read only"])
def test_a_spool_that_cannot_be_written_is_counted_and_said_once(
    capturing: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "spool"}.get(where, Path("/proc/spool"))
    worker = capturing(folder=folder)
    for _ in range(3):
        assert worker.ask(Sent({"body": PNG}, HTTP))[0].status == 200
        worker.handler.recorder.flush()
    assert worker.counts == {"disk": 3}
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert str(folder) in said[0].getMessage()
    if where != "read only":
        (tmp_path / "file").unlink()
        worker.ask(Sent({"body": PNG}, HTTP))
        assert len(worker.read()) == 1, "it captures again as soon as it can"


def test_a_full_disk_is_counted_and_leaves_whole_frames(capturing: Any) -> None:
    worker = capturing()
    recorder = worker.handler.recorder
    worker.ask(Sent({"body": PNG}, HTTP))
    recorder.flush()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (spool.used(worker.folder) + 100, before[1]))
        for _ in range(2):
            assert worker.ask(*[Sent({"body": zoo.JPEG}, HTTP)] * 4)[0].status == 200
            recorder.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert worker.counts[""] + worker.counts["disk"] == 9
    assert worker.counts["disk"] >= 4
    worker.ask(Sent({"body": zoo.PNG}, HTTP))
    found = worker.read()
    assert [one.body for one in found][:: len(found) - 1] == [PNG, zoo.PNG]
    assert len(found) == worker.counts[""]


def test_a_full_spool_takes_no_more_requests_and_leaves_room_for_labels(capturing: Any) -> None:
    worker = capturing(spool_mb="1")
    recorder = worker.handler.recorder
    noise = np.random.default_rng(0).integers(0, 256, (100, 100), np.uint8)
    body = zoo.npy(noise)
    for _ in range(150):
        assert worker.ask(Sent({"body": body}, HTTP))[0].status == 200
        recorder.flush()
    used = spool.used(worker.folder)
    assert 0.8 * 2**20 < used <= 0.9 * 2**20
    assert worker.counts[""] + worker.counts["full"] == 150
    assert worker.counts["full"] > 50
    recorder._writer.close()
    for path in spool.finished(worker.folder):
        path.unlink()
    recorder._looked = -1e9  # a second later
    worker.ask(Sent({"body": body}, HTTP))
    assert len(worker.read()) == 1


def test_what_nobody_took_in_time_is_removed_and_labels_never(capturing: Any) -> None:
    worker = capturing(spool_hours="24")
    recorder = worker.handler.recorder
    worker.ask(Sent({"body": PNG}, HTTP), Sent({"body": PNG}, HTTP))
    recorder.flush()
    recorder._writer.close()
    labels = spool.Writer(worker.folder, "labels", {})
    labels.append({"labels": []})
    labels.close()
    for path in spool.finished(worker.folder):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    worker.ask(Sent({"body": PNG}, HTTP))
    recorder.flush()
    recorder._tidy()
    assert worker.counts == {"": 3, "old": 2}
    assert len(worker.read()) == 1
    assert len(spool.finished(worker.folder, "labels")) == 1


def test_its_own_thread_writes_by_itself(capturing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_PERIOD", 0.01)
    worker = capturing()
    worker.handler.recorder._writer._seconds = 0.05
    worker.ask(Sent({"body": PNG}, HTTP))
    until = time.monotonic() + 20
    while not spool.finished(worker.folder) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(read(worker.folder)) == 1, "a segment is finished without another request"


# ---------------------------------------------------------------- frames


@dataclass
class Done:
    """A request whose batch is over."""

    rows: slice
    headers: Headers = field(default_factory=lambda: Headers(http=True))
    call: str = "predict"
    payload: Payload | None = field(default_factory=lambda: Payload([b""], "stock", 5))
    status: int = 200


class Ids:
    """A context that knows nothing but ids."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids

    def get_request_id(self, index: int) -> str:
        return self._ids[index]

    def get_all_request_header(self, index: int) -> dict[str, Any]:
        return {"body": {"content-type": "x"}}


def bare(folder: Path, **changes: Any) -> tuple[Recorder, Counter[str]]:
    """A recorder of digits, without a worker around it."""
    counts: Counter[str] = Counter()
    given_settings = replace(WorkerSettings(capture=1.0, spool=folder), **changes)
    spec = archives.spec("digits", "eager", "weights.pt")
    names = {"model": "digits", "version": "1.0", "bundle": "b" * 16}
    return Recorder(given_settings, spec, count=lambda n, reason: counts.update({reason: n}), **names), counts


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.binary(max_size=9)), max_size=5), st.booleans()
        ),
        max_size=8,
    )
)
def test_each_request_has_its_own_body_and_its_own_rows(
    batches: list[tuple[list[tuple[int, bool, bytes]], bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("frames")
    recorder, counts = bare(folder)
    random = np.random.default_rng(0)
    expected = []
    for number, (requests, flush) in enumerate(batches):
        total = sum(rows for rows, _, _ in requests)
        probabilities = random.random((total, 10), np.float32)
        embedding = random.random((total, 4), np.float32).astype(np.float16).astype(np.float32)
        done, row = [], 0
        for index, (rows, good, body) in enumerate(requests):
            done.append(Done(slice(row, row + rows), status=200 if good else 500))
            if good:
                expected.append(
                    (f"{number}-{index}", body, probabilities[row : row + rows], embedding[row : row + rows])
                )
            row += rows
        outputs = {"probabilities": probabilities, "embedding": embedding}
        data = [{"body": body} for _, _, body in requests]
        recorder.batch(data, done, outputs, Ids([f"{number}-{index}" for index in range(len(requests))]))
        if flush:
            recorder.flush()
    recorder.close()
    found = read(folder)
    assert [one.id for one in found] == [id for id, *_ in expected]
    assert counts[""] == len(expected)
    for one, (_, body, probabilities, embedding) in zip(found, expected, strict=True):
        assert one.body == body
        assert np.array_equal(one.outputs["probabilities"], probabilities)
        assert np.array_equal(one.outputs["embedding"], embedding)


def test_a_frame_is_bounded_and_its_time_is_near_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(capture.time, "time", lambda: now[0])
    recorder, _ = bare(tmp_path)
    outputs = {"probabilities": np.zeros((100, 10), np.float32), "embedding": np.zeros((100, 4), np.float32)}
    done = [Done(slice(row, row + 1)) for row in range(100)]
    for number in range(10):
        recorder.batch([{"body": b"x"}] * 100, done, outputs, Ids([f"{number}-{n}" for n in range(100)]))
        now[0] += 0.2
    recorder.close()
    frames = [frame.header for path in spool.finished(tmp_path) for frame in list(spool.frames(path))[1:]]
    assert [frame["time"] for frame in frames] == pytest.approx([1000.0 + 0.4 * n for n in range(5)])
    assert [len(frame["requests"]) for frame in frames] == [200] * 5


def test_an_embedding_too_large_for_half_precision_is_the_largest(tmp_path: Path) -> None:
    recorder, counts = bare(tmp_path)
    odd = np.array([[1e9, -1e9, np.nan, 0.1]], np.float32)
    outputs = {"probabilities": np.full((1, 10), 0.1, np.float32), "embedding": odd}
    recorder.batch([{"body": b"x"}], [Done(slice(0, 1))], outputs, Ids(["a"]))
    recorder.close()
    (found,) = read(tmp_path)
    assert counts == {"": 1}
    assert found.outputs["embedding"][0].tolist() == pytest.approx(
        [65504, -65504, math.nan, 0.1], rel=1e-3, nan_ok=True
    )


def test_a_request_that_nobody_thought_of_is_counted_and_the_others_are_kept(tmp_path: Path) -> None:
    recorder, counts = bare(tmp_path)
    outputs = {"probabilities": np.full((2, 10), 0.1, np.float32), "embedding": np.zeros((2, 4), np.float32)}
    recorder.batch([{"body": b"x", "b": b"y"}, {"body": b"z"}], [Done(slice(n, n + 1)) for n in (0, 1)], outputs,
                   Ids(["a", "b"]))  # fmt: skip
    recorder.batch([{}], [Done(slice(0, 1))], outputs, object())
    recorder.close()
    assert [one.id for one in read(tmp_path)] == ["b"]
    assert counts == {"failed": 2, "": 1}


# ---------------------------------------------------------------- the end of a worker

CHILD = """
import sys, time
from pathlib import Path
import numpy as np
from handlers import capture
from tests.handlers.test_capture import Done, Ids, bare

capture._PERIOD = 0.02 if sys.argv[2] == "kill" else 3600.0
recorder, _ = bare(Path(sys.argv[1]))
recorder.begin()
outputs = {"probabilities": np.zeros((1, 10), np.float32), "embedding": np.zeros((1, 4), np.float32)}
for number in range(20):
    recorder.batch([{"body": b"x"}], [Done(slice(0, 1))], outputs, Ids([str(number)]))
if sys.argv[2] == "kill":
    while recorder._put > recorder._taken:
        time.sleep(0.01)
    time.sleep(0.1)
print("ready", flush=True)
if sys.argv[2] != "end":
    sys.stdin.read()
"""


@pytest.mark.parametrize("ended", ["end", "term", "kill"])
def test_a_worker_that_ends_loses_nothing_that_was_written(tmp_path: Path, ended: str) -> None:
    """By itself or told to: not even what waited."""
    words = [sys.executable, "-c", CHILD, str(tmp_path), ended]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        if ended == "kill":
            assert list(tmp_path.glob("*.open")), "its segment grows"
            assert spool.finished(tmp_path) == []
        if ended != "end":
            os.kill(child.pid, signal.SIGKILL if ended == "kill" else signal.SIGTERM)
        child.wait(60)
    assert child.returncode == {"end": 0, "term": -signal.SIGTERM, "kill": -signal.SIGKILL}[ended]
    if ended != "kill":
        assert not list(tmp_path.glob("*.open"))
    assert [one.id for one in read(tmp_path)] == [str(number) for number in range(20)]


# ---------------------------------------------------------------- settings


def test_the_environment_beats_the_archive_and_the_machine_alone_says_where() -> None:
    section = {"handler": {"capture": 0.5, "capture_bodies": False, "capture_redact": "a.b:c"}}
    plain = WorkerSettings.read({}, section)
    assert (plain.capture, plain.capture_bodies, plain.capture_redact, plain.spool) == (0.5, False, "a.b:c", None)
    assert not plain.captures
    environ = {"MARWRIGHT_SPOOL": "/srv/spool", "MARWRIGHT_CAPTURE": "0.1", "MARWRIGHT_CAPTURE_SEED": "4"}
    environ |= {"MARWRIGHT_CAPTURE_BODIES": "on", "MARWRIGHT_SPOOL_MB": "10", "MARWRIGHT_SPOOL_HOURS": "1.5"}
    told = WorkerSettings.read(environ, section)
    assert (told.capture, told.capture_bodies, told.capture_seed, told.spool) == (0.1, True, 4, Path("/srv/spool"))
    assert (told.spool_mb, told.spool_hours, told.captures) == (10, 1.5, True)
    assert not WorkerSettings.read({**environ, "MARWRIGHT_CAPTURE": "0"}, section).captures
    assert WorkerSettings.read({}, {}) == WorkerSettings()


@pytest.mark.parametrize(
    ("environ", "section", "words"),
    [
        ({"MARWRIGHT_CAPTURE": "much"}, {}, "MARWRIGHT_CAPTURE is 'much'; allowed: a number from 0 to 1"),
        ({"MARWRIGHT_CAPTURE": "nan"}, {}, "MARWRIGHT_CAPTURE is 'nan'"),
        ({"MARWRIGHT_CAPTURE": "1.1"}, {}, "MARWRIGHT_CAPTURE is '1.1'"),
        ({}, {"capture": True}, "handler.capture is True"),
        ({}, {"capture": [1]}, "handler.capture is [1]"),
        ({"MARWRIGHT_CAPTURE_SEED": "-1"}, {}, "MARWRIGHT_CAPTURE_SEED is '-1'"),
        ({"MARWRIGHT_CAPTURE_BODIES": "some"}, {}, "MARWRIGHT_CAPTURE_BODIES is 'some'"),
        ({"MARWRIGHT_CAPTURE_REDACT": "module"}, {}, "allowed: module:function"),
        ({}, {"capture_redact": 5}, "handler.capture_redact is 5"),
        ({"MARWRIGHT_SPOOL": "feedback/spool"}, {}, "MARWRIGHT_SPOOL is 'feedback/spool'; allowed: an absolute path"),
        ({"MARWRIGHT_SPOOL_MB": "0"}, {}, "MARWRIGHT_SPOOL_MB is '0'"),
        ({"MARWRIGHT_SPOOL_HOURS": "-2"}, {}, "MARWRIGHT_SPOOL_HOURS is '-2'"),
        ({}, {"spool": "/srv"}, "unknown keys spool"),
        ({}, {"capture_seed": 1}, "unknown keys capture_seed"),
    ],
)
def test_an_unusable_setting_is_named(environ: Any, section: Any, words: str) -> None:
    with pytest.raises(LoadError) as refused:
        WorkerSettings.read(environ, {"handler": section})
    assert words in str(refused.value)
