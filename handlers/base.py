"""A request's way through a worker, to be read from top to bottom.

    preprocess    requests → Batch: one array N×…, where each request's rows are, and an error for each that has none
    inference     array → {"probabilities": N×K, "embedding": N×D where the net has one}
    explain       attributions for each request that asks for an explanation
    postprocess   one answer for each request, in order; a failed one gets its own status and reason

A request's fault stays with that request. One batch may hold requests over REST and gRPC, in KServe's forms and the
stock one, with several instances each, calls for explanations and for the model's description.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers import answers, explanations, images, instances, payloads, runtime, wire
from handlers.answers import Sheet
from handlers.bundle import Bundle
from handlers.capture import Recorder
from handlers.envelope import Envelope
from handlers.errors import BadRequest, LoadError
from handlers.explanations import Explanation
from handlers.metrics import Meters
from handlers.payloads import Headers, Payload
from handlers.settings import WorkerSettings
from handlers.spec import ImageInput, ModelSpec, SpecError

FAILED = "MARWRIGHT-FAILED"
"""Begins the one line in the model log that says why a worker did not start."""

_log = logging.getLogger(__name__)
_OURS = "the server failed on this request; its log says why"
_CHUNK = 64
"""Instances in one forward pass at most (or the configured batch size, if larger): bounds memory."""


_NO_HEADERS = Headers()
_NO_ROWS = slice(0)


@dataclass(slots=True)
class Request:
    """One request of a batch, and what has become of it."""

    headers: Headers = _NO_HEADERS
    call: str = "predict"
    """Or "explain", or "describe": what metrics count it as."""
    meta: bool = False
    payload: Payload | None = None
    rows: slice = field(default_factory=lambda: _NO_ROWS)
    """Its instances in the batch's array."""
    explanation: Explanation | None = None
    error: BadRequest | None = None
    seconds: float = 0.0
    """What parsing and decoding took."""
    status: int = 0
    """Of its answer; over gRPC too, which sends none."""

    @property
    def content_type(self) -> str:
        """Of an answer that is no refusal."""
        ask = None if self.payload is None else self.payload.ask
        return answers.JSON if ask is None else answers.CONTENT_TYPES[ask.format]


@dataclass
class Batch:
    """What preprocessing makes of a list of requests."""

    array: NDArray[Any]
    """Every instance of every good request, in order."""
    requests: list[Request]


def _grown(array: NDArray[Any], filled: int, room: NDArray[Any]) -> NDArray[Any]:
    """The filled rows in a larger array."""
    room[:filled] = array[:filled]
    return room


class BatchHandler:
    """What TorchServe calls. A subclass says which task it answers for."""

    task = ""

    def initialize(self, context: Any) -> None:
        """Verify, load, warm up. Any failure is one line in the log and a RuntimeError."""
        try:
            self._start(context)
        except Exception as error:
            foreseen = isinstance(error, LoadError | SpecError)
            cause = " ".join((str(error) if foreseen else f"{type(error).__name__}: {error}").split())[:1000]
            _log.error("%s %s", FAILED, cause)
            raise RuntimeError(cause) from None if foreseen else error

    def handle(self, data: Sequence[Any] | None, context: Any) -> list[bytes]:
        """One body for each request, in order."""
        if not data:
            return []
        begun = time.perf_counter()
        try:
            batch = self.preprocess(data, context)
            ready = time.perf_counter()
            outputs = self.inference(batch)
            inferred = time.perf_counter()
            self.explain(batch, outputs)
            bodies = self.postprocess(batch, outputs, context)
        except Exception:
            self.meters.lost(len(data))
            raise
        self.meters.batch(batch.requests, batch.array, outputs, inferred - ready, time.perf_counter() - begun)
        self.recorder.batch(data, batch.requests, outputs, context)
        return bodies

    def preprocess(self, data: Sequence[Any], context: Any) -> Batch:
        """Parse and decode each request by itself."""
        requests: list[Request] = []
        array, filled = self._rows(len(data)), 0
        for index, fields in enumerate(data):
            request = Request()
            requests.append(request)
            begun = time.perf_counter()
            try:
                request.headers = Headers.read(context.get_all_request_header(index) or {})
                if request.headers.describe:
                    request.call = "describe"
                    continue
                if request.headers.explain:
                    request.call = "explain"
                if not isinstance(fields, Mapping):
                    raise BadRequest(400, "the request has no input; the field is `data`")
                if payloads.flag(fields, "explain"):
                    request.call = "explain"
                request.meta = not request.headers.http and payloads.flag(fields, "meta")
                request.payload = payloads.parse(fields, request.headers, self.spec)
                if request.payload.ask is not None and self.explainer is not None:
                    request.call = "explain"
                    self.explainer.admit(request.payload.ask)
                end = filled + len(request.payload.instances)
                if end > len(array):
                    array = _grown(array, filled, self._rows(max(end + len(data), 2 * filled)))
                self._decode(request.payload, array[filled:end])
                request.rows, filled = slice(filled, end), end
            except BadRequest as error:
                request.error = error
            except Exception:
                _log.exception("request %s failed before inference", context.get_request_id(index))
                request.error = BadRequest(500, _OURS)
            finally:
                request.seconds = time.perf_counter() - begun
        return Batch(array[:filled], requests)

    def inference(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Run the array in chunks; where a chunk fails, its rows are run one by one, so that only the culprit fails.

        A culprit's outputs are NaN.
        """
        parts = [{name: np.zeros((0, width), np.float32) for name, width in self.widths.items()}]
        for start in range(0, len(batch.array), self.chunk):
            chunk = batch.array[start : start + self.chunk]
            try:
                parts.append(self.runtime.run(chunk))
            except Exception:
                _log.exception("inference failed on %d instances; running them one by one", len(chunk))
                parts += [self._alone(chunk[row : row + 1], start + row) for row in range(len(chunk))]
        if len(parts) == 2:
            return parts[1]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.spec.outputs}

    def explain(self, batch: Batch, outputs: dict[str, NDArray[Any]]) -> None:
        """One by one, in order. What does not fit into `limits.explain_seconds` any more is refused with 429, so that
        neighbours wait no longer than that (or twice that, should the worker have become slower than it was)."""
        spent = 0.0
        for index, request in enumerate(batch.requests):
            ask = request.payload.ask if request.payload is not None and request.error is None else None
            if ask is None or self.explainer is None:
                continue
            row = request.rows.start
            output = outputs[self.spec.outputs[0]][row]
            if not np.isfinite(output).all():
                continue  # it has no answer that could be explained
            begun = time.monotonic()
            try:
                request.explanation = self.explainer.explain(batch.array[row], ask, int(output.argmax()), spent)
                self.meters.explained(time.monotonic() - begun)
            except BadRequest as error:
                request.error = error
            except Exception:
                _log.exception("explaining request %s of the batch failed", index)
                request.error = BadRequest(500, _OURS)
            spent += time.monotonic() - begun

    def postprocess(self, batch: Batch, outputs: dict[str, NDArray[Any]], context: Any) -> list[bytes]:
        """Bodies, statuses and headers."""
        k = max((request.payload.top_k for request in batch.requests if request.payload), default=0)
        sheet = Sheet.of(outputs, self.spec, k)
        return [self._reply(index, request, sheet, context) for index, request in enumerate(batch.requests)]

    def describe(self) -> dict[str, Any]:
        """What exactly is serving: the answer to `GET /models/<name>/<version>?customized=true`."""
        spec = self.spec
        return {
            "model": self.model,
            "version": self.version,
            "bundle": self.bundle.digest,
            "run": spec.run,
            "data_digest": spec.data_digest,
            "artifact": spec.artifact,
            "artifact_sha256": self.bundle.members.get(spec.artifact, ""),
            "format": spec.format,
            "task": spec.task,
            "labels": list(spec.classes),
            "target": spec.target,
            "metrics": dict(spec.metrics),
            "explanations": list(self.explainer.methods) if self.explainer else [],
            "device": self.runtime.device,
            "threads": self.settings.threads,
            "wire": self.wire,
            "capture": self.recorder.share,
            "pid": os.getpid(),
        }

    def _start(self, context: Any) -> None:
        begun = time.perf_counter()
        properties = context.system_properties
        model_dir = Path(properties["model_dir"])
        self.bundle = Bundle.verify(model_dir)
        self.spec = ModelSpec.from_json((model_dir / "spec.json").read_text(encoding="utf-8"))
        for name in ("spec.json", "MAR-INF/MANIFEST.json", self.spec.artifact, self.spec.twin or self.spec.artifact):
            self.bundle.require(name)
        if self.spec.task != self.task:
            raise LoadError(f"{type(self).__name__} answers for {self.task}; spec.json says {self.spec.task}")
        manifest = (context.manifest or {}).get("model", {})
        self.model, self.version = str(manifest.get("modelName", "")), str(manifest.get("modelVersion", ""))
        for name, value in (("modelName", self.model), ("modelVersion", self.version)):
            if not re.fullmatch(r"[\x21-\x7e]+", value):
                raise LoadError(f"MAR-INF/MANIFEST.json: {name} is {value!r}; expected printable ASCII")
        if isinstance(self.spec.input, ImageInput):
            images.require(self.spec.input.decoder)
        self.settings = WorkerSettings.read(os.environ, context.model_yaml_config)
        self.settings.apply()
        gpu = properties.get("gpu_id")
        self.runtime = runtime.load(
            self.spec, model_dir, threads=self.settings.threads, gpu=None if gpu is None else int(gpu)
        )
        self.explainer = explanations.load(self.spec, model_dir, self.runtime.device)
        batch_size = max(1, int(properties.get("batch_size") or 1))
        self.chunk = max(_CHUNK, batch_size)
        self._dtype = runtime.blank(self.spec, 0).dtype
        loaded = time.perf_counter()
        self.widths = runtime.warm_up(self.runtime, self.spec, {1, batch_size})
        self.envelope = Envelope(self.model, self.version, self.bundle.digest)
        cache = context.metrics if self.settings.metrics else None
        names = {"model": self.model, "version": self.version}
        self.meters = Meters(cache, self.spec, captures=self.settings.captures, **names)
        self.meters.begin(loaded - begun, time.perf_counter() - loaded)
        count = self.meters.captured
        self.recorder = Recorder(self.settings, self.spec, bundle=self.bundle.digest, count=count, **names)
        self.recorder.begin()
        self.wire = wire.install(on=self.settings.wire)

    def _rows(self, count: int) -> NDArray[Any]:
        """For so many instances, not yet written."""
        return np.empty((count, *self.spec.input.shape), self._dtype)

    def _decode(self, payload: Payload, rows: NDArray[Any]) -> None:
        """One row for each instance. Of a request that is refused the next one takes the rows."""
        if payload.form == "stock":
            instances.write(rows[0], payload.instances[0], self.spec)
            return
        for index, instance in enumerate(payload.instances):
            try:
                instances.write(rows[index], instance, self.spec)
            except BadRequest as error:
                raise error.at(index) from None

    def _alone(self, row: NDArray[Any], index: int) -> dict[str, NDArray[Any]]:
        try:
            return self.runtime.run(row)
        except Exception:
            _log.exception("the model fails on row %d of the batch", index)
            return {name: np.full((1, width), np.nan, np.float32) for name, width in self.widths.items()}

    def _reply(self, index: int, request: Request, sheet: Sheet, context: Any) -> bytes:
        error: BadRequest | None = None
        try:
            body = self._body(self._answer(request, sheet), None, index, request, context)
            if len(body) > answers.LARGEST:
                less = "format png" if request.explanation else "fewer instances, fewer outputs or a smaller top_k"
                size = f"{len(body) / 1e6:.1f} MB; at most {answers.LARGEST / 1e6:g} MB"
                raise BadRequest(413, f"the answer would have {size}: ask for {less}")
        except BadRequest as refused:
            error = refused
        except Exception:
            _log.exception("request %s failed after inference", context.get_request_id(index))
            error = BadRequest(500, _OURS)
        request.status = 200 if error is None else error.status
        if error is not None:
            body = self._body(answers.refusal(error), error, index, request, context)
        self.envelope.head(context, index, request.headers, request.content_type, error)
        return body

    def _answer(self, request: Request, sheet: Sheet) -> Any:
        if request.error is not None:
            raise request.error
        if request.payload is None:
            return self.describe()
        give = answers.answer if request.explanation is None else partial(answers.explained, request.explanation)
        return give(request.payload, sheet, request.rows, self.spec, model=self.model, version=self.version)

    def _body(self, value: Any, error: BadRequest | None, index: int, request: Request, context: Any) -> bytes:
        if request.meta:
            return self.envelope.body(value, request.content_type, error, context, index)
        if isinstance(value, bytes):
            return value
        # Whatever `answers.answer` gives was looked through for NaN.
        return answers.encode(value, finite=request.explanation is None)
