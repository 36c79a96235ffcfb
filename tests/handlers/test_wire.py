"""The lean codec against TorchServe's own: the same frames give the same requests, the same answers the same bytes."""

from __future__ import annotations

import importlib
import json
import logging
import struct
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

from handlers import wire

pytestmark = pytest.mark.filterwarnings(
    # torchserve: ts/version.py opens version.txt at import and leaves it to the garbage collector
    "ignore:Exception ignored in.*version.txt:pytest.PytestUnraisableExceptionWarning"
)

FAST = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def stock() -> Any:
    return importlib.import_module("ts.protocol.otf_message_handler")


@pytest.fixture(scope="module")
def service() -> Any:
    return importlib.import_module("ts.service")


class Scripted:
    """A connection whose `recv` gives pieces of these sizes, then one byte at a time, then the end."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes = data, sizes
        self.asked = 0
        """The most that was asked for at a time: a socket reserves as much."""

    def recv(self, length: int) -> bytes:
        self.asked = max(self.asked, length)
        size = min(length, self._sizes.pop(0) if self._sizes else 4096)
        piece, self._data = self._data[:size], self._data[size:]
        return piece


def read_by_ts(data: bytes, sizes: list[int]) -> Any:
    """What a handler is given, by `ts`; or the kind of the exception that ends the worker."""
    stock = importlib.import_module("ts.protocol.otf_message_handler")
    service = importlib.import_module("ts.service")
    conn, found = Scripted(data, list(sizes)), []
    try:
        while True:
            command, read = stock.retrieve_msg(conn)
            if command != b"I":
                found.append((bytes(command), read))
                continue
            headers, fields, ids = service.Service.retrieve_data_for_inference(read)
            found.append((b"I", [one.get_request_properties() for one in headers], fields, ids))
    except (SystemExit, Exception) as error:
        return found, type(error)


def read_by_ours(data: bytes, sizes: list[int]) -> Any:
    conn, found, messages = Scripted(data, list(sizes)), [], wire.Messages()
    try:
        while True:
            command, read = messages.retrieve(conn)
            if command != b"I":
                found.append((bytes(command), read))
                continue
            found.append((b"I", [slot.get_request_properties() for slot in read.slots], read.fields, read.ids))
    except (SystemExit, Exception) as error:
        return found, type(error)


def plain(value: Any) -> str:
    """To compare: NaN equals NaN, a bytearray equals bytes."""

    def thawed(one: Any) -> Any:
        if isinstance(one, bytearray):
            return bytes(one)
        if isinstance(one, dict):
            return {key: thawed(inside) for key, inside in one.items()}
        return type(one)(map(thawed, one)) if isinstance(one, list | tuple) else one

    return repr(thawed(value))


NAMES = some.text(max_size=12)
KINDS = some.sampled_from(
    ["application/json", "image/png", "", "text/plain; charset=utf-8", "text", "application/jsonx"]
)
JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats(allow_nan=True) | some.text(max_size=5),
    lambda inside: some.lists(inside, max_size=3) | some.dictionaries(some.text(max_size=3), inside, max_size=3),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode())
VALUES = some.binary(max_size=60) | JSON | some.text(max_size=8).map(str.encode) | some.just(b"\xff{") | some.just(b"")
REQUESTS = some.builds(
    wire.frame,
    NAMES,
    some.dictionaries(NAMES, some.text(max_size=8), max_size=4),
    some.lists(some.tuples(NAMES, KINDS, VALUES), max_size=3),
)
MESSAGES = some.lists(some.lists(REQUESTS, max_size=4), min_size=1, max_size=3).map(
    lambda messages: b"".join(b"I" + b"".join(requests) + struct.pack("!i", -1) for requests in messages)
)
SIZES = some.lists(some.integers(1, 40), max_size=30)


@FAST
@given(MESSAGES, SIZES)
@example(wire.sample() * 2, [1] * 30)
def test_requests_are_read_alike_however_they_are_cut(data: bytes, sizes: list[int]) -> None:
    """Several messages after one another, JSON and text decoded or not, and the frontend's end: exit 0."""
    assert plain(read_by_ours(data, sizes)) == plain(read_by_ts(data, sizes))


@FAST
@given(MESSAGES, some.lists(some.tuples(some.integers(0, 400), some.integers(0, 255)), min_size=1, max_size=4), SIZES)
def test_damaged_frames_end_alike(data: bytes, changes: list[tuple[int, int]], sizes: list[int]) -> None:
    """The same messages before the damage; then the worker ends. With what words may differ: ours may look earlier."""
    damaged = bytearray(data)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    (ours, _), (theirs, _) = read_by_ours(bytes(damaged), sizes), read_by_ts(bytes(damaged), sizes)
    assert plain(ours) == plain(theirs)


@FAST
@given(MESSAGES, some.integers(0, 600))
def test_a_frontend_that_goes_in_the_middle_of_a_message_ends_the_process(data: bytes, length: int) -> None:
    cut = data[: length % (len(data) + 1)]
    found, error = read_by_ours(cut, [])
    assert error is SystemExit
    assert (found, error) == read_by_ts(cut, [])


@pytest.mark.parametrize("said", ["true", "false", "nonsense"])
def test_decoding_is_switched_as_with_ts(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", said)
    ours = read_by_ours(wire.sample(), [])
    assert ours == read_by_ts(wire.sample(), [])
    assert isinstance(ours[0][0][2][1]["body"], dict) == (said == "true")


def test_what_cannot_be_decoded_is_handed_on_with_the_same_words(caplog: pytest.LogCaptureFixture) -> None:
    values = [("a", "application/json", b"{"), ("b", "text/plain", b"\xff"), ("c", "application/json", b"NaN")]
    data = b"I" + wire.frame("x", {}, values) + b"\xff\xff\xff\xff"
    said = []
    for read in (read_by_ours, read_by_ts):
        caplog.clear()
        (message,), _ = read(data, [])
        assert [bytes(message[2][0][name]) for name in "ab"] == [b"{", b"\xff"]
        said.append([(record.levelname, record.getMessage()) for record in caplog.records if record.levelno > 20])
    assert said[0] == said[1]
    assert len(said[0]) == 2


def test_a_large_body_comes_whole_and_is_not_kept(stock: Any) -> None:
    body = bytes(range(256)) * (20 * 2**20 // 256)
    data = b"I" + wire.frame("x", {}, [("body", "image/png", body)]) + b"\xff\xff\xff\xff"
    messages = wire.Messages()
    _, read = messages.retrieve(wire.Pieces(data, 1 << 20))
    assert read.fields == [{"body": body}]
    assert messages._data == b""


def test_a_length_that_is_a_lie_reserves_nothing() -> None:
    """Two gigabytes announced: memory grows with what arrives."""
    data = (
        b"I"
        + wire._text("x")
        + b"\xff\xff\xff\xff"
        + wire._text("body")
        + wire._text("")
        + struct.pack("!i", 2**31 - 1)
    )
    conn = Scripted(data + b"abc", [])
    with pytest.raises(SystemExit):
        wire.Messages().retrieve(conn)
    assert 0 < conn.asked <= 2**20


@pytest.mark.parametrize("piece", [100, 4096])
def test_many_small_fields_and_large_bodies_are_looked_at_once(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the pieces in which they come: each number is read a single time, and what was read is let go."""
    fields = [(f"f{number}", "", b"x") for number in range(5000)]
    requests = [wire.frame("many", {}, fields), *[wire.frame("large", {}, [("body", "", bytes(200_000))])] * 4]
    read, number = [0], wire._number

    def counted(data: Any, at: int) -> Any:
        read[0] += 1
        assert len(data) < 600_000
        return number(data, at)

    monkeypatch.setattr(wire, "_number", counted)
    data = b"I" + b"".join(requests) + struct.pack("!i", -1)
    _, message = wire.Messages().retrieve(wire.Pieces(data, piece))
    assert [len(one) for one in message.fields] == [5000, 1, 1, 1, 1]
    assert read[0] == 3 * 5000 + 4 * 3 + 5 * 3 + 1


def load_frame() -> bytes:
    text = wire._text
    return b"".join([b"L", text("digits"), text("/models/x"), struct.pack("!i", 8), text("handlers.image_classifier"),
                     struct.pack("!i", -1), text(""), b"\x01"])  # fmt: skip


@pytest.mark.parametrize("size", [1, 5, 4096])
def test_models_to_load_are_left_to_ts(size: int) -> None:
    data = wire.sample() + load_frame() + wire.sample()
    ours = read_by_ours(data, [size] * 2000)
    assert ours == read_by_ts(data, [size] * 2000)
    assert ours[0][1][0] == b"L"
    assert ours[0][1][1]["batchSize"] == 8


def test_an_unknown_command_is_refused_alike() -> None:
    assert read_by_ours(b"X", []) == read_by_ts(b"X", []) == ([], ValueError)


def test_a_new_connection_begins_anew() -> None:
    messages = wire.Messages()
    messages.retrieve(Scripted(wire.sample() + b"I left over", []))
    _, read = messages.retrieve(Scripted(wire.sample(), []))
    assert len(read.fields) == 5


class Metrics:
    def __init__(self) -> None:
        self.request_ids: Any = None
        self.told: list[tuple[str, float]] = []

    def add_time(self, name: str, value: float) -> None:
        self.told.append((name, value))


def context(slots: list[Any]) -> Any:
    made = importlib.import_module("ts.context").Context("m", "", None, 1, None, "0.12.0", True, Metrics())
    made.request_processor = slots
    return made


BYTES = some.binary(max_size=40)
HEADER = some.dictionaries(
    some.sampled_from(["content-type", "X-Model-Name", "ts_stream_next", "X-Größe"]),
    some.sampled_from(["application/json", "", "true", "false", "wert ü"]),
)
ANSWERS = some.lists(
    some.tuples(some.text(max_size=6), BYTES, HEADER.filter(lambda one: one.get("content-type", "").isascii()),
                some.none() | some.tuples(some.sampled_from([200, 415, 503]), some.sampled_from([None, "", "No"]))),
    max_size=5,
)  # fmt: skip


@FAST
@given(ANSWERS)
def test_answers_are_written_alike(answers: list[Any]) -> None:
    stock = importlib.import_module("ts.protocol.otf_message_handler")
    processor = importlib.import_module("ts.context").RequestProcessor
    ids = {index: one[0] for index, one in enumerate(answers)}
    theirs, ours = [processor({}) for _ in answers], [wire.Slot({}) for _ in answers]
    for slots in (theirs, ours):
        for slot, (_, _, headers, status) in zip(slots, answers, strict=True):
            for name, value in headers.items():
                slot.add_response_property(name, value)
            if status is not None:
                slot.report_status(*status)
    bodies = [one[1] for one in answers]
    expected = stock.create_predict_response(bodies, ids, "Prediction success", 200, context(theirs))
    assert wire.respond(bodies, ids, ours) == expected
    assert [one.get_response_headers() for one in ours] == [one.get_response_headers() for one in theirs]


def raising(error: BaseException) -> Any:
    def handle(data: Any, context: Any) -> Any:
        raise error

    return handle


def whole(data: Any, context: Any) -> list[bytes]:
    """Looks at what it is given, and says something of it in every way that there is."""
    for index, fields in enumerate(data):
        context.set_response_header(index, "X-Seen", str(context.get_all_request_header(index).get("Host")))
        context.set_response_content_type(index, "application/json")
        if not fields:
            context.set_response_status(400, "Bad Request", index)
        assert context.get_request_id(index)
    return [repr(sorted(fields)).encode() for fields in data]


def streaming(data: Any, context: Any) -> list[Any]:
    context.stopping_criteria = [lambda answer: answer == b"end" for _ in data]
    return [b"end", b"more", b"end", b"more", b"end"]


def cases() -> Iterator[tuple[str, Any]]:
    yield "whole", whole
    yield "no list", lambda data, context: "text"
    yield "too short", lambda data, context: [b"one"]
    yield "text and values", lambda data, context: ["text", {"a": 1}, b"x", bytearray(b"y"), [1, None]]
    yield "not for JSON", lambda data, context: [b"", object(), b"", b"", b""]
    yield "a stream", streaming
    yield "out of memory", raising(MemoryError())
    yield "CUDA", raising(RuntimeError("CUDA error: out of memory"))
    yield "an exception", raising(ValueError("no"))


@pytest.mark.parametrize(("name", "handle"), list(cases()), ids=[name for name, _ in cases()])
def test_a_batch_goes_through_alike(
    name: str, handle: Any, stock: Any, service: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the frame to the frame, with what is logged, for handlers that answer and that fail in every way."""
    monkeypatch.setitem(wire._STOCK, "respond", stock.create_predict_response)
    monkeypatch.setitem(wire._told, "at", 0.0)
    outcomes = []
    for lean in (False, True):
        metrics = Metrics()
        made = service.Service("m", "", None, handle, None, 1, True, metrics)
        made.set_cl_socket(None)
        caplog.clear()
        conn = Scripted(wire.sample(), [])
        if lean:
            _, message = wire.Messages().retrieve(conn)
            answer = wire.predict(made, message)
        else:
            _, message = stock.retrieve_msg(conn)
            answer = made.predict(message)
        logged = [(one.name, one.levelname, one.getMessage()) for one in caplog.records if one.levelno > 20]
        outcomes.append((bytes(answer or b""), logged, [name for name, _ in metrics.told], metrics.request_ids))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0]


def test_a_prediction_exception_says_its_own_code_and_an_exit_is_let_through(service: Any) -> None:
    known = importlib.import_module("ts.utils.util").PredictionException("busy", 529)
    _, message = wire.Messages().retrieve(Scripted(wire.sample(), []))
    made = service.Service("m", "", None, raising(known), None, 1, True, Metrics())
    made.set_cl_socket(None)
    answer = wire.predict(made, message)
    assert answer == wire.failure(message.ids, "busy", 529)
    made._entry_point = raising(SystemExit(3))
    with pytest.raises(SystemExit):
        wire.predict(made, message)


def test_prediction_time_is_told_once_a_second(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(wire, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setitem(wire._told, "at", 0.0)
    metrics = Metrics()
    made = service.Service("m", "", None, whole, None, 1, True, metrics)
    made.set_cl_socket(None)
    for _ in range(25):
        _, message = wire.Messages().retrieve(Scripted(wire.sample(), []))
        wire.predict(made, message)
        now[0] += 0.1
    assert [name for name, _ in metrics.told] == ["PredictionTime"] * 3


@pytest.fixture
def worker(stock: Any, service: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process as a worker's: its main module reads messages as `ts` does."""
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "retrieve_msg", stock.retrieve_msg, raising=False)
    monkeypatch.setattr(service.Service, "predict", service.Service.predict)
    monkeypatch.setattr(wire, "_STOCK", {})
    return main


def test_it_takes_the_place_of_ts(worker: Any, service: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert wire.install(on=True) == "lean"
    assert service.Service.predict is wire.predict
    _, message = worker.retrieve_msg(Scripted(wire.sample(), []))
    made = service.Service("m", "", None, whole, None, 1, True, Metrics())
    made.set_cl_socket(None)
    assert made.predict(message)[:4] == struct.pack("!i", 200)
    # What somebody else has read, `ts` answers.
    assert made.predict(read_by_hand())[:4] == struct.pack("!i", 200)
    assert not caplog.records or caplog.records[-1].levelno <= logging.INFO


def read_by_hand() -> list[dict[str, Any]]:
    return [{"requestId": b"x", "headers": [], "parameters": [{"name": "body", "contentType": "", "value": b""}]}]


def test_off_it_leaves_ts_alone_without_a_word(worker: Any, stock: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert wire.install(on=False) == "stock: switched off"
    assert worker.retrieve_msg is stock.retrieve_msg
    assert not caplog.records


CHANGES: dict[str, Any] = {
    "another version": lambda patch, stock, service: patch.setattr(sys.modules["ts"], "__version__", "0.13.0"),
    "a rank": lambda patch, stock, service: patch.setenv("LOCAL_RANK", "1"),
    "another reader": lambda patch, stock, service: patch.setattr(sys.modules["__main__"], "retrieve_msg", print),
    "another predict": lambda patch, stock, service: patch.setattr(service.Service, "predict", wire.predict),
    "headers read otherwise": lambda patch, stock, service: patch.setattr(
        stock,
        "_retrieve_reqest_header",
        _changed(stock._retrieve_reqest_header, lambda one: one and {**one, "name": b"x"}),
    ),
    "values read otherwise": lambda patch, stock, service: patch.setattr(
        stock, "_retrieve_input_data", _changed(stock._retrieve_input_data, lambda one: one and {**one, "value": b"x"})
    ),
    "answers written otherwise": lambda patch, stock, service: patch.setattr(
        stock, "encode_response_headers", _changed(stock.encode_response_headers, lambda one: one + b"\0")
    ),
    "a frame is longer": lambda patch, stock, service: patch.setattr(stock, "_retrieve_request", _longer(stock)),
    "gone": lambda patch, stock, service: patch.delattr(stock, "create_predict_response"),
}  # fmt: skip


def _longer(stock: Any) -> Any:
    """One more number at the end of the list of requests."""
    request = stock._retrieve_request

    def retrieve(conn: Any) -> Any:
        found = request(conn)
        return found if found is not None else stock._retrieve_int(conn) and None

    return retrieve


def _changed(function: Any, change: Any) -> Any:
    return lambda *arguments: change(function(*arguments))


@pytest.mark.parametrize("change", list(CHANGES))
def test_it_is_inert_with_one_line_where_anything_differs(
    change: str,
    worker: Any,
    stock: Any,
    service: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    CHANGES[change](monkeypatch, stock, service)
    before = vars(worker)["retrieve_msg"], service.Service.predict
    said = wire.install(on=True)
    assert said.startswith("stock: ")
    assert (vars(worker)["retrieve_msg"], service.Service.predict) == before
    lines = [record for record in caplog.records if record.name == "handlers.wire"]
    assert len(lines) == 1
    assert "stays in place" in lines[0].getMessage()
