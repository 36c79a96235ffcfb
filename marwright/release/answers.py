"""What TorchServe answers, as values, and what it refuses, as errors: the same over REST and gRPC.

Our handlers name the model, the version and the bundle of every answer. REST has headers for that. gRPC has none, nor
a status of its own for one item of a batch, so there a handler that is asked for `meta` wraps its answer in an
envelope (docs of the handlers); both become the same `Answer` and the same `ServerRefused`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from marwright.errors import ServerRefused


@dataclass(frozen=True)
class Answer:
    """One prediction: its bytes, and who made it (empty where a foreign handler does not say)."""

    body: bytes
    status: int = 200
    model: str = ""
    version: str = ""
    bundle: str = ""
    request_id: str = ""
    worker: int = 0
    """Process id of the worker that answered; a drain wants an answer from each."""
    content_type: str = "application/json"
    """Of `body`: explanations may also be image/png or application/octet-stream (`.npy`)."""

    @classmethod
    def from_headers(cls, body: bytes, status: int, headers: Mapping[str, str]) -> Answer:
        """A REST answer; `headers` looks names up in any case."""
        return cls(
            body=body,
            status=status,
            model=headers.get("X-Model-Name", ""),
            version=headers.get("X-Model-Version", ""),
            bundle=headers.get("X-Bundle-Digest", ""),
            request_id=headers.get("x-request-id", ""),
            worker=int(headers.get("X-Worker-Pid", "0")),
            content_type=headers.get("Content-Type", "application/json"),
        )

    @classmethod
    def from_envelope(cls, body: bytes, *, what: str) -> Answer:
        """A gRPC answer, in its envelope or bare; raises ServerRefused when the envelope holds a refusal."""
        value = _parsed(body)
        if isinstance(value, dict) and {"prediction", "status", "model", "version"} <= value.keys():
            if int(value["status"]) >= 400:
                refusal = {"reason": value["reason"]} if "reason" in value else value["prediction"]
                raise_refusal(what, int(value["status"]), refusal)
            kind = value.get("content_type")  # said of bytes alone, which JSON can hold as base64 only
            return cls(
                body=base64.b64decode(value["prediction"]) if kind else _as_rest_sends(value["prediction"]),
                status=int(value["status"]),
                model=str(value["model"]),
                version=str(value["version"]),
                bundle=str(value.get("bundle", "")),
                request_id=str(value.get("request_id", "")),
                worker=int(value.get("worker", 0)),
                content_type=kind or "application/json",
            )
        if isinstance(value, dict) and value.keys() == {"code", "reason"} and int(value["code"]) >= 400:
            raise_refusal(what, int(value["code"]), value)
        return cls(body=body)

    def json(self) -> Any:
        """The body as JSON; ValueError when it is something else."""
        return json.loads(self.body)


@dataclass(frozen=True)
class WorkerStatus:
    """One worker process, as TorchServe sees it."""

    id: str
    pid: int
    status: str
    memory: int
    """Bytes; 0 until TorchServe has looked for the first time."""
    gpu: bool = False

    @property
    def ready(self) -> bool:
        return self.status == "READY"


@dataclass(frozen=True)
class ModelStatus:
    """One version of a model, as TorchServe describes it."""

    name: str
    version: str
    file: str
    default: bool
    workers: tuple[WorkerStatus, ...]
    min_workers: int
    max_workers: int
    batch_size: int
    batch_delay: int
    """Milliseconds."""
    response_timeout: int
    startup_timeout: int
    pending: int
    queue_left: int
    loaded_at_startup: bool
    customized: Mapping[str, Any] = field(default_factory=dict)
    """What the handler says of itself, when it was asked (`customized`)."""

    @property
    def ready_workers(self) -> int:
        return sum(worker.ready for worker in self.workers)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, default: bool) -> ModelStatus:
        queue = value.get("jobQueueStatus") or {}
        return cls(
            name=value["modelName"],
            version=value["modelVersion"],
            file=value["modelUrl"],
            default=default,
            workers=tuple(
                WorkerStatus(
                    id=str(worker["id"]),
                    pid=int(worker["pid"]),
                    status=worker["status"],
                    memory=int(worker["memoryUsage"]),
                    gpu=bool(worker["gpu"]),
                )
                for worker in value.get("workers") or ()
            ),
            min_workers=int(value["minWorkers"]),
            max_workers=int(value["maxWorkers"]),
            batch_size=int(value["batchSize"]),
            batch_delay=int(value["maxBatchDelay"]),
            response_timeout=int(value["responseTimeout"]),
            startup_timeout=int(value["startupTimeout"]),
            pending=int(queue.get("pendingRequests", 0)),
            queue_left=int(queue.get("remainingCapacity", 0)),
            loaded_at_startup=bool(value["loadedAtStartup"]),
            customized=value.get("customizedMetadata") or {},
        )


def raise_refusal(what: str, status: int, body: Any, *, key_file: str = "key_file.json") -> NoReturn:
    """Raise the ServerRefused for a refused call: `what` was asked, `body` is what came back (bytes or parsed JSON).

    TorchServe itself says {"code", "type", "message"}; our handlers say {"code", "reason"}.
    """
    value = _parsed(body) if isinstance(body, bytes) else body
    kind, reason = "", body.decode("utf-8", "replace").strip() if isinstance(body, bytes) else str(body)
    if isinstance(value, dict):
        kind = str(value.get("type", ""))
        reason = str(value.get("reason", value.get("message", reason)))
    reason = reason or "no reason was given"
    raise ServerRefused(
        f"{what}: refused with {status}: {reason}", status=status, reason=reason, hint=_hint(status, kind, key_file)
    )


def _hint(status: int, kind: str, key_file: str) -> str:
    by_kind = {
        "InvalidKeyException": f"wrong or expired token: {key_file} must be the running server's; `marwright token`",
        "ModelNotFoundException": "`make status` shows which models are loaded; a .mar is registered by its bare name",
        "ModelVersionNotFoundException": "`make status` shows which versions are loaded",
        "InvalidModelVersionException": "make another version the default first; the default version cannot be removed",
        "ErrorDataDecoderException": "`curl --data-binary` mangles an image by form encoding; send it with `curl -T`",
        "ConflictStatusException": "that version is registered already; `make status`, or unregister it first",
        "WorkerInitializationException": "the workers' own words are in logs/model_log.log",
    }
    by_status = {
        400: "the reason says what to correct in the request",
        404: "`make status` shows what is loaded",
        405: "set enable_model_api=true in config.properties and restart the server",
        408: "the server gave up waiting; logs/model_log.log has the worker's own words",
        409: "that version is registered already; `make status`, or unregister it first",
        413: "send or ask for less; where it is TorchServe that refuses: max_request_size in config.properties",
        415: "send an image, JSON or .npy that the model's spec allows",
        429: "other explanations were asked for at the same time: try again, or for fewer steps",
        500: "the workers' own words are in logs/model_log.log",
        501: "explain = true under [serving] in the recipe, then `make archive` and `make rollout`",
        503: "the queue is full or no worker is ready: `make status`; then send more slowly, or scale up",
        507: "out of memory: fewer workers or a smaller batch; logs/model_log.log has the worker's own words",
    }
    return by_kind.get(kind) or by_status.get(status, "")


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _as_rest_sends(prediction: Any) -> bytes:
    """The bytes that TorchServe's worker would have put on a REST answer."""
    if isinstance(prediction, str):
        return prediction.encode()
    return json.dumps(prediction, indent=2).encode()
