"""What goes around an answer: who gave it, its status, and over gRPC a body that says so.

envelope = Envelope("digits", "1.0", bundle.digest)
envelope.head(context, index, request.headers, "application/json", error)
envelope.body(answer, "application/json", error, context, index)     # where the caller sets `meta`
"""

from __future__ import annotations

import base64
import os
from typing import Any

from handlers import answers
from handlers.errors import PHRASES, BadRequest
from handlers.payloads import Headers


class Envelope:
    """One worker's name on its answers."""

    def __init__(self, model: str, version: str, bundle: str) -> None:
        self._said = {"model": model, "version": version, "bundle": bundle, "worker": os.getpid()}
        identity = {
            "X-Model-Name": model,
            "X-Model-Version": version,
            "X-Bundle-Digest": bundle,
            "X-Worker-Pid": str(os.getpid()),
        }
        self._heads = {kind: identity | {"content-type": kind} for kind in answers.CONTENT_TYPES.values()}

    def head(self, context: Any, index: int, headers: Headers, content_type: str, error: BadRequest | None) -> None:
        """Headers and status. `content_type` is that of an answer; a refusal is JSON."""
        if headers.http:
            context.get_response_headers(index).update(self._heads[content_type if error is None else answers.JSON])
            if error is not None:
                context.set_response_status(error.status, PHRASES[error.status], index)
        elif not headers.describe:
            # A gRPC stream waits for this header; a REST answer would break on it.
            context.set_response_header(index, "ts_stream_next", "false")

    def body(self, value: Any, content_type: str, error: BadRequest | None, context: Any, index: int) -> bytes:
        """For a caller over gRPC who sets `meta`: that protocol's answers have neither headers nor statuses."""
        if isinstance(value, bytes):
            said = {"content_type": content_type}
            value = base64.b64encode(value).decode("ascii")
        else:
            said = {}
        document = {
            "prediction": value if error is None else None,
            "status": 200 if error is None else error.status,
            **self._said,
            "request_id": context.get_request_id(index),
            **said,
        }
        return answers.encode(document if error is None else {**document, "reason": error.reason})
