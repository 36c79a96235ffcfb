"""Labels come back by request id: `POST /predictions/feedback`, over REST and gRPC.

It looks at the form of what it is sent (`labels`), puts it into the spool (`inbox`), and nothing more: no net, no
store, no look at what other models have answered. A batch of requests is one write and one wait for the disk; a request
that is refused harms none of its neighbours.

    {"request": "4f0c…", "label": "cat"}   →   {"accepted": 1, "uids": ["…"]}

A 200 means that the labels are on the disk. Anything from 500 on means: send them again; with the same `uid`s that is
harmless, even where the first try was kept after all. TorchServe says 507 "Worker died." (over gRPC RESOURCE_EXHAUSTED)
where a worker was killed with a request in its hands.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handlers import answers, labels, payloads, wire
from handlers.base import FAILED
from handlers.bundle import Bundle
from handlers.envelope import Envelope
from handlers.errors import KINDS, BadRequest, LoadError
from handlers.inbox import Inbox
from handlers.labels import Request
from handlers.payloads import Headers
from handlers.settings import WorkerSettings

_log = logging.getLogger(__name__)
_OURS = "the server failed on this request; its log says why"


class FeedbackCollector:
    """What TorchServe calls."""

    explainer = None
    """Nothing here can be explained; whoever replays golden examples asks."""

    def initialize(self, context: Any) -> None:
        """Any failure is one line in the log and a RuntimeError."""
        try:
            self._start(context)
        except Exception as error:
            cause = " ".join((str(error) or type(error).__name__).split())[:1000]
            _log.error("%s %s", FAILED, cause)
            raise RuntimeError(cause) from None if isinstance(error, LoadError) else error

    def handle(self, data: Sequence[Any] | None, context: Any) -> list[bytes]:
        """One body for each request, in order."""
        if not data:
            return []
        now = time.time()
        requests = [self._read(index, fields, context, now) for index, fields in enumerate(data)]
        self._keep(requests)
        bodies = [self._reply(index, request, context) for index, request in enumerate(requests)]
        self._count(Counter((one.call, one.error.status if one.error else 200) for one in requests))
        return bodies

    def describe(self) -> dict[str, Any]:
        """The answer to `GET /models/feedback?customized=true`."""
        return {
            "model": self.model,
            "version": self.version,
            "bundle": self.bundle.digest,
            "task": "feedback",
            "keeps": self.inbox.folder is not None,
            "wire": self.wire,
            "pid": os.getpid(),
        }

    def _start(self, context: Any) -> None:
        self.bundle = Bundle.verify(Path(context.system_properties["model_dir"]))
        self.bundle.require("MAR-INF/MANIFEST.json")
        manifest = (context.manifest or {}).get("model", {})
        self.model, self.version = str(manifest.get("modelName", "")), str(manifest.get("modelVersion", ""))
        for name, value in (("modelName", self.model), ("modelVersion", self.version)):
            if not re.fullmatch(r"[\x21-\x7e]+", value):
                raise LoadError(f"MAR-INF/MANIFEST.json: {name} is {value!r}; expected printable ASCII")
        settings = WorkerSettings.read(os.environ, context.model_yaml_config)
        settings.apply()
        self.envelope = Envelope(self.model, self.version, self.bundle.digest)
        self._metrics = context.metrics if settings.metrics else None
        self._count({("predict", status): 0 for status in (200, 400, 413, 415, 500, 501, 503)} | {("describe", 200): 0})
        self.inbox = Inbox(settings.spool, {"v": 1, "collector": self.version}, megabytes=settings.spool_mb)
        self.inbox.begin()
        self.wire = wire.install(on=settings.wire)

    def _read(self, index: int, fields: Any, context: Any, now: float) -> Request:
        request = Request()
        try:
            request.headers = Headers.read(context.get_all_request_header(index) or {})
            if request.headers.describe:
                return request
            if isinstance(fields, dict):
                request.meta = not request.headers.http and payloads.flag(fields, "meta")
            if request.headers.explain:
                raise BadRequest(501, "there is nothing to explain about a label")
            request.sent = labels.read(fields, now=now, form_encoded=request.headers.form_encoded)
        except BadRequest as error:
            request.error = error
        except Exception:
            _log.exception("request %s could not be read", context.get_request_id(index))
            request.error = BadRequest(500, _OURS)
        return request

    def _keep(self, requests: Sequence[Request]) -> None:
        """Every good request's labels together."""
        good = [one for one in requests if one.sent is not None and not one.sent.check]
        if not good:
            return
        try:
            self.inbox.keep([label for one in good if one.sent for label in one.sent.labels])
        except Exception as error:
            if not isinstance(error, BadRequest):
                _log.exception("labels of %d requests could not be kept", len(good))
                error = BadRequest(503, _OURS)
            for one in good:
                one.error = error

    def _reply(self, index: int, request: Request, context: Any) -> bytes:
        error = request.error
        self.envelope.head(context, index, request.headers, answers.JSON, error)
        answer = self._answer(request) if error is None else answers.refusal(error)
        if request.meta:
            return self.envelope.body(answer, answers.JSON, error, context, index)
        return answers.encode(answer)

    def _answer(self, request: Request) -> dict[str, Any]:
        if request.sent is None:
            return self.describe()
        if request.sent.check:
            return {"checked": len(request.sent.labels)}
        uids = [label["uid"] for label in request.sent.labels]
        return {"accepted": len(uids), "uids": uids}

    def _count(self, answered: dict[tuple[str, int], int]) -> None:
        """Requests and errors, as the other handlers count theirs; there are few, so each batch is told at once."""
        if self._metrics is None:
            return
        try:
            for (call, status), by in answered.items():
                identity = [self.model, self.version, call]
                self._metrics.get_metric("marwright_requests_total").add_or_update(by, [*identity, str(status)])
                if status >= 400:
                    kind = [*identity, KINDS[status]]
                    self._metrics.get_metric("marwright_errors_total").add_or_update(by, kind)
        except Exception:
            self._metrics = None
            _log.exception("requests of this worker are not counted from here on (said once)")
