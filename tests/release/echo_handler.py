"""A handler that answers with what it was sent: the smallest model that behaves like ours towards a client.

It runs inside a TorchServe worker (the tests zip this file into an archive) and imports nothing but the standard
library. A JSON body or field may ask for more: `{"refuse": 415}`, `{"sleep": 0.5}`, `{"die": true}`.
"""

import json
import os
import time


class EchoHandler:
    """One answer for each request, in order, with the headers and the envelope that our handlers give."""

    def initialize(self, context):
        self.model = context.manifest["model"]["modelName"]
        self.version = context.manifest["model"]["modelVersion"]

    def handle(self, requests, context):
        if (context.get_request_header(0, "describe") or "").lower() == "true":
            return [{"model": self.model, "labels": ["a", "b"]}]
        return [self.answer(at, request, context) for at, request in enumerate(requests)]

    def answer(self, at, request, context):
        over_rest = bool(context.get_all_request_header(at).get("Host"))
        fields = {name: bytes(value) if isinstance(value, bytearray) else value for name, value in request.items()}
        wanted = fields.get("body", fields.get("data", b""))
        wanted = wanted if isinstance(wanted, dict) else self.parsed(wanted)
        time.sleep(wanted.get("sleep", 0))
        if wanted.get("die"):
            os._exit(3)
        status = wanted.get("refuse", 200)
        prediction = {
            "fields": {
                name: value.decode("latin-1") if isinstance(value, bytes) else value for name, value in fields.items()
            },
            "explain": str(context.get_request_header(at, "explain")),
            "asked": {
                name: value for name, value in context.get_all_request_header(at).items() if name.startswith("X-")
            },
            "unicode": "Grüße",
        }
        refusal = {"code": status, "reason": "the request asked for a refusal"}
        if over_rest:
            context.set_response_header(at, "X-Model-Name", self.model)
            context.set_response_header(at, "X-Model-Version", self.version)
            context.set_response_header(at, "X-Bundle-Digest", "0123456789abcdef")
            if status != 200:
                context.set_response_status(status, "Refused", at)
                return refusal
            return prediction
        context.set_response_header(at, "ts_stream_next", "false")
        if fields.get("meta") != b"1":
            return refusal if status != 200 else prediction
        return {
            "prediction": refusal if status != 200 else prediction,
            "status": status,
            "model": self.model,
            "version": self.version,
            "bundle": "0123456789abcdef",
            "request_id": context.get_request_id(at),
        }

    @staticmethod
    def parsed(body):
        try:
            value = json.loads(body)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}
