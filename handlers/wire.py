"""A lean codec for the frames that TorchServe's frontend and its worker exchange, put in place of `ts`'s own.

    wire.install(on=settings.wire)      # "lean", "stock: …why"

`ts` reads a request in some 28 tiny pieces and writes the answer piece by piece, which costs a worker more than a small
net's forward pass. Here a message is taken from the socket as it comes, and parsed once; an answer is joined once. The
bytes on the wire, what a handler is given, streams, what is logged of failures: all of it stays, but for the little
that decision 18 names.

This is the only module of the bundle that touches `ts`. It replaces two names in the worker's process: `retrieve_msg`,
which the worker's main module looks up for every message, and `Service.predict`. Before it does, it compares how
requests are read and answers written with `ts`'s own, on a sample of every kind; where `ts` is not the version that it
knows, or anything differs, it does nothing and says so in one line of the log. `MARWRIGHT_WIRE=off` leaves `ts` alone.

A frame from the frontend (all numbers are big-endian int32, a text is its length and UTF-8 bytes):

    "I"  { id, { name, value }* -1, { name, content type, value }* -1 }* -1        "L" …: a model to load

and back:  code, message, { id, content type, status, phrase, count, { name, value }*, body }* -1

What `ts` does with odd frames is kept: a negative length other than the -1 that ends a list is an empty text.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

VERSION = "0.12.0"
"""The `ts` whose frames are known; it was the last release."""

_PIECE = 1 << 16
"""Bytes asked of the socket at a time; more only where a message is known to be longer."""
_LARGEST_PIECE = 1 << 20
_METRIC_SECONDS = 1.0
_REMEMBERED = 1024

_number = struct.Struct("!i").unpack_from
_pack = struct.Struct("!i").pack
_END = _pack(-1)

_log = logging.getLogger(__name__)


def install(*, on: bool) -> str:
    """Put the lean codec in place, once in a process. Gives "lean", or why `ts`'s own stays. Never raises."""
    if not on:
        return "stock: switched off"
    if "ts" not in sys.modules:
        return "stock: this process is not TorchServe's"
    try:
        why = _unfit() or _differs()
    except (Exception, SystemExit) as error:  # whoever finds a frame too short believes that the frontend has gone
        why = f"{type(error).__name__}: {error}"
    if why:
        _log.warning("TorchServe's own wire protocol stays in place, which is slower: %s", " ".join(why.split())[:300])
        return f"stock: {why}"
    from ts import service
    from ts.protocol import otf_message_handler

    _STOCK.update(predict=service.Service.predict, respond=otf_message_handler.create_predict_response)
    service.Service.predict = predict
    vars(sys.modules["__main__"])["retrieve_msg"] = Messages().retrieve
    return "lean"


class Slot:
    """One request's headers, and what a handler says of its answer: `ts.context.RequestProcessor`, small."""

    __slots__ = ("_phrase", "_request", "_response", "_status")

    def __init__(self, headers: Mapping[str, Any]) -> None:
        self._request = headers
        self._response: dict[str, str] = {}
        self._status = 200
        self._phrase: str | None = None

    def get_request_property(self, key: str) -> Any:
        return self._request.get(key)

    def get_request_properties(self) -> Mapping[str, Any]:
        return self._request

    def report_status(self, code: int, reason_phrase: str | None = None) -> None:
        self._status, self._phrase = code, reason_phrase

    def get_response_status_code(self) -> int:
        return self._status

    def get_response_status_phrase(self) -> str | None:
        return self._phrase

    def add_response_property(self, key: str, value: str) -> None:
        self._response[key] = value

    def get_response_headers(self) -> dict[str, str]:
        return self._response

    def get_response_header(self, key: str) -> str | None:
        return self._response.get(key)


class Message:
    """The requests of one frame, as a handler is given them."""

    __slots__ = ("fields", "ids", "slots")

    def __init__(self) -> None:
        self.ids: dict[int, str] = {}
        """Request ids by position."""
        self.fields: list[dict[str, Any]] = []
        self.slots: list[Slot] = []


class Messages:
    """Messages of one connection at a time. What was received and not yet used is kept between them."""

    def __init__(self) -> None:
        self._conn: Any = None
        self._data = bytearray()
        decode = os.environ.get("TS_DECODE_INPUT_REQUEST")
        self._decode = decode is None or decode == "true"

    def retrieve(self, conn: Any) -> tuple[bytes, Any]:
        """The next message: ("I", Message), or ("L", what `ts` makes of it). Waits; ends the process where the frontend
        has gone, as `ts` does."""
        if conn is not self._conn:
            self._conn, self._data = conn, bytearray()
        self._more(1)
        command = bytes(self._data[:1])
        if command == b"I":
            return command, self._inference()
        if command == b"L":
            from ts.protocol import otf_message_handler

            return otf_message_handler.retrieve_msg(self)  # type: ignore[no-any-return]
        raise ValueError(f"Invalid command: {bytearray(command)}")

    def recv(self, length: int) -> bytes:
        """Like a socket's, for `ts`'s own reader: what was received already comes first."""
        if not self._data:
            return self._conn.recv(length)  # type: ignore[no-any-return]
        piece = bytes(self._data[:length])
        del self._data[:length]
        return piece

    def _more(self, needed: int) -> int:
        """Receive until there are so many bytes; how many there are. Memory grows with what comes, not with what was
        announced."""
        data = self._data
        while len(data) < needed:
            piece = self._conn.recv(min(max(needed - len(data), _PIECE), _LARGEST_PIECE))
            if not piece:
                logging.info("Frontend disconnected.")
                sys.exit(0)
            data += piece
        return len(data)

    def _inference(self) -> Message:
        message, at = Message(), 1
        while at > 0:
            if at > _PIECE:  # what is read is let go
                del self._data[:at]
                at = 0
            at = self._request(at, message)
        del self._data[:-at]
        return message

    def _request(self, at: int, message: Message) -> int:
        """One request from there on: where the next one begins, or minus where the message ended.

        Each text is followed by a number, so that much more is waited for before either is looked at.
        """
        data, more = self._data, self._more
        end = len(data)
        if end < at + 4:
            end = more(at + 4)
        (size,) = _number(data, at)
        at += 4
        if size == -1:
            return -at
        begin = at
        at += size if size > 0 else 0
        if end < at + 4:
            end = more(at + 4)
        identifier = data[begin:at].decode()
        headers: dict[str, Any] = {}
        while True:
            (size,) = _number(data, at)
            at += 4
            if size == -1:
                break
            begin = at
            at += size if size > 0 else 0
            if end < at + 4:
                end = more(at + 4)
            name = data[begin:at].decode()
            (size,) = _number(data, at)
            begin = at = at + 4
            at += size if size > 0 else 0
            if end < at + 4:
                end = more(at + 4)
            headers[name] = data[begin:at].decode()
        fields: dict[str, Any] = {}
        properties: dict[str, Any] = {}
        while True:
            if end < at + 4:
                end = more(at + 4)
            (size,) = _number(data, at)
            at += 4
            if size == -1:
                break
            begin = at
            at += size if size > 0 else 0
            if end < at + 4:
                end = more(at + 4)
            name = data[begin:at].decode()
            (size,) = _number(data, at)
            begin = at = at + 4
            at += size if size > 0 else 0
            if end < at + 4:
                end = more(at + 4)
            content_type = data[begin:at].decode()
            (size,) = _number(data, at)
            begin = at = at + 4
            at += size if size > 0 else 0
            if end < at:
                end = more(at)
            fields[name] = self._value(content_type, data[begin:at])
            properties[name] = {"content-type": content_type}
        properties.update(headers)  # a header wins, as with `ts`
        message.ids[len(message.ids)] = identifier
        message.fields.append(fields)
        message.slots.append(Slot(properties))
        return at

    def _value(self, content_type: str, value: bytearray) -> Any:
        """JSON and text are decoded, unless that fails or TS_DECODE_INPUT_REQUEST says not to."""
        if not content_type or not self._decode:
            return value
        if content_type == "application/json":
            try:
                return json.loads(value.decode())
            except Exception:
                logging.warning("Failed json decoding of input data. Forwarding encoded payload", exc_info=True)
        elif content_type.startswith("text"):
            try:
                return value.decode()
            except Exception:
                logging.warning("Failed utf-8 decoding of input data. Forwarding encoded payload", exc_info=True)
        return value


def predict(service: Any, message: Any) -> bytes | bytearray | None:
    """In place of `Service.predict`: the handler's answers as one frame, failures as `ts` tells them."""
    if not isinstance(message, Message):
        return _STOCK["predict"](service, message)  # type: ignore[no-any-return]
    context = service.context
    metrics = context.metrics
    context.request_ids = metrics.request_ids = message.ids
    context.request_processor = message.slots
    context.cl_socket = service.cl_socket
    begun = time.time()
    try:
        answers = service._entry_point(message.fields, context)
    except BaseException as error:
        return _failed(message.ids, error)
    if not isinstance(answers, list):
        _service_log().warning("model: %s, Invalid return type: %s.", context.model_name, type(answers))
        return failure(message.ids, "Invalid model predict output", 503)
    if len(answers) != len(message.fields):
        _service_log().warning(
            "model: %s, number of batch response mismatched, expect: %d, got: %d.",
            context.model_name,
            len(message.fields),
            len(answers),
        )
        return failure(message.ids, "number of batch response mismatched", 503)
    now = time.time()
    if not 0 <= now - _told["at"] < _METRIC_SECONDS:
        # A gauge: only the last value before a scrape is ever seen.
        _told["at"] = now
        metrics.add_time("PredictionTime", round((now - begun) * 1000, 2))
    if context.stopping_criteria or not all(type(answer) is bytes for answer in answers):
        return _STOCK["respond"](answers, message.ids, "Prediction success", 200, context=context)  # type: ignore[no-any-return]
    return respond(answers, message.ids, message.slots)


def respond(answers: Sequence[bytes], ids: Mapping[int, str], slots: Sequence[Slot]) -> bytes:
    """The frame for answers that are bytes: what `create_predict_response` makes of them."""
    pieces = [_SUCCESS]
    add = pieces.append
    for index, body in enumerate(answers):
        slot = slots[index]
        identifier = ids[index].encode()
        add(_pack(len(identifier)))
        add(identifier)
        headers = slot._response
        if headers.get("ts_stream_next") == "true":
            headers["ts_stream_next"] = "false"
        add(_head(slot._status, slot._phrase, tuple(headers.items())))
        add(_pack(len(body)))
        add(body)
    add(_END)
    return b"".join(pieces)


def failure(ids: Mapping[int, str], message: str, code: int) -> bytes:
    """The frame that refuses a whole batch."""
    pieces = [_pack(code), _text(message)]
    for index in ids:
        pieces += [_text(ids[index]), _pack(0), _pack(code), _pack(0), _pack(0), _text("error")]
    return b"".join([*pieces, _END])


def _head(status: int | None, phrase: str | None, headers: tuple[tuple[str, str], ...]) -> bytes:
    """Of one answer: content type, status, phrase and headers. They are few, so they are remembered."""
    key = (status, phrase, headers)
    found = _heads.get(key)
    if found is None:
        kind = dict(headers).get("content-type") or ""
        # `ts` gives a content type's length in letters, not bytes: the same for the ASCII that it can only be.
        pieces = [_pack(len(kind)), kind.encode(), _pack(200 if status is None else status), _pack(len(phrase or ""))]
        pieces += [(phrase or "").encode(), _pack(len(headers))]
        for name, value in headers:
            pieces += [_text(name), _text(value)]
        found = b"".join(pieces)
        if len(_heads) >= _REMEMBERED:
            _heads.clear()
        _heads[key] = found
    return found


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _pack(len(encoded)) + encoded


def _service_log() -> logging.Logger:
    return logging.getLogger("ts.service")


def _failed(ids: Mapping[int, str], error: BaseException) -> bytes:
    """A handler raised: what `ts` says of each kind. What it lets through ends the worker here too."""
    from ts.utils.util import PredictionException

    log = _service_log()
    if isinstance(error, MemoryError):
        log.error("System out of memory", exc_info=True)
        return failure(ids, "Out of resources", 507)
    if isinstance(error, PredictionException):
        log.error("Prediction error", exc_info=True)
        return failure(ids, error.message, error.error_code)
    if not isinstance(error, Exception):
        raise error
    if "CUDA" in str(error):
        log.error("CUDA out of memory", exc_info=True)
        return failure(ids, "Out of resources", 507)
    log.warning("Invoking custom service failed.", exc_info=True)
    return failure(ids, "Prediction failed", 503)


_SUCCESS = _pack(200) + _text("Prediction success")
_heads: dict[tuple[int | None, str | None, tuple[tuple[str, str], ...]], bytes] = {}
_told = {"at": 0.0}
"""When PredictionTime was last told."""
_STOCK: dict[str, Any] = {}
"""`ts`'s own functions, where the lean ones are in place."""


def _unfit() -> str:
    """Why nothing can be replaced here at all; "" where it can."""
    import ts
    from ts import service
    from ts.protocol import otf_message_handler

    if ts.__version__ != VERSION:
        return f"ts is {ts.__version__}; the one that is known is {VERSION}"
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return "one of several ranks"
    if "--async" in sys.argv:
        return "an asynchronous worker"
    if vars(sys.modules["__main__"]).get("retrieve_msg") is not otf_message_handler.retrieve_msg:
        return "the worker's main module reads messages in another way"
    if vars(service.Service).get("predict").__module__ != service.__name__:
        return "somebody has replaced Service.predict before"
    return ""


def _differs() -> str:
    """Read and answer frames of every kind beside `ts`'s own code: what is not the same; "" where all is."""
    from ts.context import Context, RequestProcessor
    from ts.protocol import otf_message_handler as stock
    from ts.service import Service

    frame = sample()
    for step in (1, 7, len(frame)):
        command, read = stock.retrieve_msg(Pieces(frame, step))
        headers, fields, ids = Service.retrieve_data_for_inference(read)
        ours_command, message = Messages().retrieve(Pieces(frame, step))
        if command != ours_command or ids != message.ids or fields != message.fields:
            return "a request is read in another way"
        if [slot.get_request_properties() for slot in message.slots] != [
            one.get_request_properties() for one in headers
        ]:
            return "headers are read in another way"
    ids = {0: "first", 1: "second", 2: "thïrd"}
    context = Context("m", "", None, 1, None, VERSION)
    context.request_processor = [RequestProcessor({}) for _ in ids]
    slots = [Slot({}) for _ in ids]
    bodies = [b"one", b"", bytes(range(256)) * 300]
    for receiver in (context.request_processor, slots):
        receiver[0].add_response_property("content-type", "application/json")
        receiver[0].add_response_property("X-Naïve", "ö")
        receiver[1].add_response_property("ts_stream_next", "true")
        receiver[2].report_status(415, "Unsupported Media Type")
    if respond(bodies, ids, slots) != stock.create_predict_response(bodies, ids, "Prediction success", 200, context):
        return "answers are written in another way"
    if failure(ids, "Prediction failed", 503) != stock.create_predict_response(None, ids, "Prediction failed", 503):
        return "failures are written in another way"
    return ""


class Pieces:
    """A connection that gives what it is told to, at most so many bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data, self._step, self._at = data, step, 0

    def recv(self, length: int) -> bytes:
        piece = self._data[self._at : self._at + min(length, self._step)]
        self._at += len(piece)
        return piece


def sample() -> bytes:
    """A frame with every kind of request that the frontend sends."""
    requests = [
        frame("a", {"Host": "localhost", "explain": "False"}, [("body", "image/png", bytes(range(256)) * 5)]),
        frame("b", {"Content-Type": "application/json"}, [("body", "application/json", b'{"data": [1, 2.5, null]}')]),
        frame("c", {}, [("data", "text/plain; charset=utf-8", "größe".encode()), ("top_k", "", b"3")]),
        frame("d", {"describe": "True"}, []),
        frame("ë", {"body": "a header that is called like a field"}, [("body", "", b""), ("body", "", b"again")]),
    ]
    return b"I" + b"".join(requests) + _END


def frame(identifier: str, headers: Mapping[str, str], values: Sequence[tuple[str, str, bytes]]) -> bytes:
    """One request as the frontend writes it; `values` are name, content type and bytes."""
    pieces = [_text(identifier)]
    for name, value in headers.items():
        pieces += [_text(name), _text(value)]
    pieces.append(_END)
    for name, kind, given in values:
        pieces += [_text(name), _text(kind), _pack(len(given)), given]
    return b"".join([*pieces, _END])
