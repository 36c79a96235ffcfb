"""What production sees, kept for whoever learns from it: a share of the requests with their answers, in the spool.

    recorder = Recorder(settings, spec, model="digits", version="1.0", bundle=digest, count=meters.captured)
    recorder.begin()
    recorder.batch(data, requests, outputs, context)         # after the answers are made
    arrays = instances(entry, body, spec)                    # much later, elsewhere: what the net saw

A request pays for keeping a few references. Ten times a second a thread of its own takes what waits, hashes and redacts
bodies, and appends frames to a segment (`handlers.spool`, kind "requests"). What waits is bounded; whatever goes wrong
costs the capture and never an answer: it is counted by its reason, and said once in the log. A killed worker (SIGKILL)
takes with it what waits, and leaves a segment that others take over; SIGTERM and a normal end lose nothing.

The head of a segment is `{"v": 1, "model", "version", "bundle", "spec"}`. A frame's header is

    {"time": seconds since 1970 of the earliest of its answers,
     "requests": [{"id", "rows", "body": [offset, length] or null, "type", "http", "form"?, "redacted"?, "sha256"?}],
     "outputs": {"probabilities" or "value": [offset, N, K, "float32"], "embedding": [offset, N, D, "float16"]}}

with offsets into its payload; the rows of all its requests are in order, little-endian. A body is as the worker got it:
the bytes that were sent, but for JSON, which TorchServe takes apart itself ("form": "json", written again with its keys
sorted), and for text ("form": "text", as UTF-8). `sha256` is of that body, and stands where the frame has none, or a
redacted one. `type` is the content type of the input's field. Only predict requests that were answered with 200 are
here, and none that said `capture` off.

Which requests are chosen depends on their ids and the seed alone: every worker and every process chooses the same, and
a larger share holds all of a smaller one. `handlers.redaction` says what a redaction hook is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import marshal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from handlers import ending, payloads, spool
from handlers.errors import BadRequest
from handlers.instances import array
from handlers.payloads import Headers, Payload
from handlers.redaction import Redaction, Unredacted
from handlers.spec import ModelSpec

if TYPE_CHECKING:  # it imports torch, and whoever reads captured requests needs none
    from handlers.settings import WorkerSettings

KIND = "requests"
FOR_LABELS = 0.1
"""Share of the spool that requests leave free: labels cannot be had again."""

_WAITING = 32 * 2**20
"""Bytes, about, that may wait for the thread; what comes upon more is dropped."""
_PERIOD = 0.1
"""Seconds between two looks at what waits."""
_APART = 0.25
"""Seconds between the answers of one frame, at most."""
_TOGETHER = 256
"""Requests in one frame, about."""
_FRAME = 2**20
"""Bytes of one frame, about."""
_TIDY = 60.0
"""Seconds between two looks for segments that are too old."""
_AT_ONCE = 16
"""Segments that are removed at one such look."""
_LARGEST_HALF = float(np.finfo(np.float16).max)

_log = logging.getLogger(__name__)
_BYTES = (bytes, bytearray)
_SIZED = (bytes, bytearray, str)
_JSON = json.JSONEncoder(separators=(",", ":"), sort_keys=True)


class Answered(Protocol):
    """What is asked of a request when its batch is over."""

    headers: Headers
    call: str
    payload: Payload | None
    rows: slice
    """Its instances in the batch's outputs."""
    status: int


class _Request(NamedTuple):
    id: str
    fields: Mapping[str, Any]
    headers: Mapping[str, Any]
    rows: slice
    http: bool


class _Batch(NamedTuple):
    time: float
    requests: list[_Request]
    outputs: Mapping[str, NDArray[Any]]
    bytes: int
    """About what it keeps in memory."""


def chosen(request: str, share: float, seed: int) -> bool:
    """Whether the request of this id is one of the `share` that is captured."""
    key = seed.to_bytes(8, "big")
    digest = hashlib.blake2b(request.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def instances(entry: Mapping[str, Any], body: bytes, spec: ModelSpec) -> list[NDArray[Any]]:
    """The arrays that the net saw, uint8 C×H×W or float32 F, one for each row of the entry.

    `BadRequest` where the body cannot be read, as after a redaction, or has another number of instances.
    """
    given: Any = body
    try:
        if entry.get("form") == "json":
            given = json.loads(body)
        elif entry.get("form") == "text":
            given = body.decode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        raise BadRequest(400, f"the body is not the {entry['form']} that was captured") from None
    payload = payloads.parse({"data": given}, Headers(http=bool(entry.get("http"))), spec)
    arrays = [array(one, spec) for one in payload.instances]
    if len(arrays) != entry["rows"]:
        raise BadRequest(422, f"the body holds {len(arrays)} instances; {entry['rows']} were answered")
    return arrays


class Recorder:
    """One worker's captures. The worker's thread calls `batch`; `flush` may be called from any. None of it raises."""

    def __init__(
        self,
        settings: WorkerSettings,
        spec: ModelSpec,
        *,
        model: str,
        version: str,
        bundle: str,
        count: Callable[[int, str], object],
    ) -> None:
        """`count` is told how many requests are in the spool (reason ""), or are not (`metrics.DROPS`)."""
        self.share = settings.capture if settings.captures else 0.0
        self._settings = settings
        self._spec = spec
        self._count = count
        self._folder = settings.spool or Path("/nonexistent")
        head = {"v": 1, "model": model, "version": version, "bundle": bundle, "spec": json.loads(spec.to_json())}
        self._writer = spool.Writer(self._folder, KIND, head)
        self._redact = Redaction(settings.capture_redact if settings.capture_bodies else "")
        self._waiting: deque[_Batch] = deque()
        # Bytes. One is written by the worker's thread alone, the other by whoever holds the lock.
        self._put = self._taken = 0
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._said: set[str] = set()
        self._used = 0
        self._looked = self._tidied = -1e9

    def begin(self) -> None:
        """A worker is about to be ready. Nothing is done, and no folder made, where nothing is captured."""
        if not self.share:
            return
        try:
            self._redact.load()
        except Exception:
            self._say("redact", f"the redaction hook {self._redact.name} cannot be had: nothing is captured")
        threading.Thread(target=self._run, name="marwright-capture", daemon=True).start()
        ending.before(self.close)

    def batch(
        self, data: Sequence[Any], requests: Sequence[Answered], outputs: Mapping[str, NDArray[Any]], context: Any
    ) -> None:
        """A batch is answered. All that is given is kept for a moment: it must not be written to."""
        if self.share and not self._over.is_set():
            try:
                self._keep(data, requests, outputs, context)
            except Exception:
                self._drop(len(requests), "failed", "a batch was not captured")

    def flush(self) -> None:
        """Write what waits."""
        # Its thread may be stuck in the disk's hands: rather lost than late.
        if self._turn.acquire(timeout=1.0):
            try:
                self._work_off()
            finally:
                self._turn.release()

    def close(self) -> None:
        """Write what is left, and finish the segment; nothing is written afterwards."""
        self._over.set()
        ending.forget(self.close)
        if self._turn.acquire(timeout=1.0):
            try:
                self._work_off()
                self._safely(self._writer.close)
            finally:
                self._turn.release()

    def _keep(
        self, data: Sequence[Any], requests: Sequence[Answered], outputs: Mapping[str, NDArray[Any]], context: Any
    ) -> None:
        """What a request waits for: references, no figures."""
        share, seed = self.share, self._settings.capture_seed
        kept: list[_Request] = []
        size = sum(rows.nbytes for rows in outputs.values())
        for index, one in enumerate(requests):
            if one.status != 200 or one.call != "predict" or one.payload is None or not one.payload.capture:
                continue
            id = context.get_request_id(index)
            if share < 1.0 and not chosen(id, share, seed):
                continue
            fields = data[index]
            kept.append(_Request(id, fields, context.get_all_request_header(index), one.rows, one.headers.http))
            size += 1000
            for value in fields.values():
                size += len(value) if isinstance(value, _SIZED) else _decoded_bytes(value, one.headers.length)
        if not kept:
            return
        if self._put - self._taken + size > _WAITING:
            self._drop(len(kept), "queue", "the disk is slower than the requests: some are not captured")
            return
        self._put += size
        self._waiting.append(_Batch(time.time(), kept, outputs, size))

    def _run(self) -> None:
        while not self._over.wait(_PERIOD):
            self._safely(self.flush)
            with self._turn:
                if self._over.is_set():
                    return
                self._safely(self._writer.turn)
                if time.monotonic() - self._tidied > _TIDY:
                    self._tidied = time.monotonic()
                    self._safely(self._tidy)

    def _work_off(self) -> None:
        while self._waiting:
            group = [self._waiting.popleft()]
            count, size = len(group[0].requests), group[0].bytes
            while self._waiting and count < _TOGETHER and size < _FRAME:
                if not 0 <= self._waiting[0].time - group[0].time <= _APART:
                    break
                group.append(self._waiting.popleft())
                count, size = count + len(group[-1].requests), size + group[-1].bytes
            try:
                self._write(group)
            except Exception:  # whatever that was, the thread lives on
                self._drop(count, "failed", "requests could not be captured")
            finally:
                self._taken += sum(one.bytes for one in group)

    def _write(self, group: Sequence[_Batch]) -> None:
        """One frame of these batches."""
        entries: list[dict[str, Any]] = []
        pieces: list[bytes | bytearray] = []
        rows: dict[str, list[NDArray[Any]]] = {name: [] for name in self._spec.outputs}
        at = 0
        for batch in group:
            kept: list[slice] = []
            for one in batch.requests:
                if len(entries) % 64 == 63:
                    time.sleep(0)  # a request that waits for the interpreter goes first
                try:
                    entry, piece = self._entry(one)
                except Unredacted:
                    self._drop(1, "redact", "the redaction hook failed: such requests are not captured")
                    continue
                except Exception:
                    self._drop(1, "failed", "a request could not be captured")
                    continue
                if piece is not None:
                    entry["body"] = [at, len(piece)]
                    pieces.append(piece)
                    at += len(piece)
                entries.append(entry)
                kept.append(one.rows)
            for name, found in rows.items() if kept else ():
                found.append(_of(batch.outputs[name], kept))
        if not entries:
            return
        try:
            outputs: dict[str, list[Any]] = {}
            for name, found in rows.items():
                values = _little(np.concatenate(found), half=name == "embedding")
                pieces.append(bytes(-at % 8))
                at += -at % 8
                outputs[name] = [at, *values.shape, values.dtype.name]
                pieces.append(values.tobytes())
                at += values.nbytes
            header = {"time": group[0].time, "requests": entries, "outputs": outputs}
            if not self._room(at + 250 * len(entries)):
                self._drop(len(entries), "full", f"the spool {self._folder} is full")
                return
            self._writer.append(header, b"".join(pieces))
        except OSError:
            self._drop(len(entries), "disk", f"the spool {self._folder} cannot be written")
        except Exception:
            self._drop(len(entries), "failed", "requests could not be captured")
        else:
            self._count(len(entries), "")

    def _entry(self, one: _Request) -> tuple[dict[str, Any], bytes | bytearray | None]:
        """What the header says of a request, and its body where that is to be kept."""
        (name,) = one.fields if len(one.fields) == 1 else payloads.inputs(one.fields)
        given = one.fields[name]
        said = one.headers.get(name)
        kind = str(said.get("content-type") or "") if isinstance(said, dict) else ""
        form = ""
        if isinstance(given, _BYTES):
            body: bytes | bytearray = given
        elif isinstance(given, str):
            body, form = given.encode("utf-8", "surrogatepass"), "text"
        else:
            body, form = _JSON.encode(given).encode(), "json"
        entry: dict[str, Any] = {
            "id": one.id,
            "rows": one.rows.stop - one.rows.start,
            "body": None,
            "type": kind,
            "http": one.http,
        }
        if form:
            entry["form"] = form
        if self._settings.capture_bodies and not self._redact:
            return entry, body
        entry["sha256"] = hashlib.sha256(body).hexdigest()
        if not self._settings.capture_bodies:
            return entry, None
        entry["redacted"] = True
        return entry, self._redact(bytes(body), kind)

    def _room(self, size: int) -> bool:
        """Whether so many bytes more fit into the spool; it is looked at once a second at most."""
        now = time.monotonic()
        if now - self._looked >= 1.0:
            self._looked, self._used = now, spool.used(self._folder)
        if self._used + size > self._settings.spool_mb * 2**20 * (1 - FOR_LABELS):
            return False
        self._used += size
        return True

    def _tidy(self) -> None:
        """Remove captured requests that nobody took in time."""
        oldest = time.time() - self._settings.spool_hours * 3600
        for path in spool.finished(self._folder, KIND)[:_AT_ONCE]:
            try:
                if path.stat().st_mtime >= oldest:
                    return
                lost = sum(len(frame.header.get("requests", ())) for frame in spool.frames(path))
                path.unlink()
            except FileNotFoundError:
                continue  # somebody took it after all
            self._drop(lost, "old", f"captured requests older than {self._settings.spool_hours:g} hours were removed")

    def _safely(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception:
            self._say("disk", f"the spool {self._folder} gives trouble")

    def _drop(self, requests: int, reason: str, message: str) -> None:
        self._count(requests, reason)
        self._say(reason, message)

    def _say(self, reason: str, message: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("%s; said once, the metrics count on", message, exc_info=sys.exc_info()[0] is not None)


def _decoded_bytes(value: Any, length: int) -> int:
    """About what decoded JSON of so many bytes takes in memory."""
    return 8 * (length or len(marshal.dumps(value)))


def _of(values: NDArray[Any], rows: Sequence[slice]) -> NDArray[Any]:
    """These rows, in order; mostly they are all that there are."""
    if sum(part.stop - part.start for part in rows) == len(values):
        return values
    return np.concatenate([values[part] for part in rows])


def _little(values: NDArray[Any], *, half: bool) -> NDArray[Any]:
    """As it is written: embeddings with half the bits, those that do not fit at the largest."""
    if not half:
        return np.ascontiguousarray(values, "<f4")
    return values.clip(-_LARGEST_HALF, _LARGEST_HALF).astype("<f2")
