"""TorchServe's gRPC calls: channels, deadlines, tokens, and its errors as ours. `client.Client` is the only user.

Needs no generated stubs: a call is a path and two message types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from marwright.errors import ServerUnreachable
from marwright.release import answers
from marwright.release.patience import Patience
from marwright.release.properties import ServerConfig
from marwright.release.protos import inference_pb2, management_pb2
from marwright.release.tokens import Kind, Tokens

_Reply = TypeVar("_Reply")
_Metadata = tuple[tuple[str, str | bytes], ...]

_INFERENCE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/"
_MANAGEMENT = "/org.pytorch.serve.grpc.management.ManagementAPIsService/"

_STATUS_BY_KIND = {
    "ModelNotFoundException": 404,
    "ModelVersionNotFoundException": 404,
    "ConflictStatusException": 409,
    "InvalidModelVersionException": 403,
    "BadRequestException": 400,
    "MethodNotAllowedException": 405,
    "InvalidKeyException": 400,
}
_STATUS_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNIMPLEMENTED: 405,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
    grpc.StatusCode.UNAVAILABLE: 503,
}


class GrpcApi:
    """One channel to each of the two gRPC ports; safe to share between threads."""

    def __init__(
        self,
        config: ServerConfig,
        tokens: Tokens | None,
        *,
        patience: Patience | None = None,
        told: Callable[[str], object] | None = None,
    ) -> None:
        self._tokens = tokens
        self._patience = patience
        self._told = told
        self._max_request_size = config.max_request_size
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", config.max_response_size + 65536),
            ("grpc.enable_http_proxy", 0),
        ]
        self._targets: dict[Kind, str] = {"inference": config.grpc_inference, "management": config.grpc_management}
        self._channels: dict[Kind, grpc.Channel] = {
            kind: grpc.insecure_channel(target, options=options) for kind, target in self._targets.items()
        }

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def ping(self, *, timeout: float) -> str:
        reply = self._call("inference", _INFERENCE + "Ping", Empty(), inference_pb2.TorchServeHealthResponse, timeout)
        return str(reply.health)

    def predict(self, request: inference_pb2.PredictionsRequest, *, timeout: float) -> bytes:
        self._fits(request)
        path = _INFERENCE + "Predictions"
        return bytes(self._call("inference", path, request, inference_pb2.PredictionResponse, timeout).prediction)

    def stream(self, request: inference_pb2.PredictionsRequest, *, timeout: float) -> Iterator[bytes]:
        self._fits(request)
        call = self._channels["inference"].unary_stream(
            _INFERENCE + "StreamPredictions",
            request_serializer=type(request).SerializeToString,
            response_deserializer=inference_pb2.PredictionResponse.FromString,
        )

        def first_and_rest(metadata: _Metadata) -> tuple[Iterator[Any], Any]:
            replies = iter(call(request, timeout=timeout, metadata=metadata))
            return replies, next(replies, None)

        replies, reply = self._with_token("inference", first_and_rest, "StreamPredictions", timeout)
        try:
            while reply is not None:
                yield bytes(reply.prediction)
                reply = next(replies, None)
        except grpc.RpcError as error:
            self._raise(error, "StreamPredictions", "inference", timeout)

    def manage(self, name: str, request: Message, *, timeout: float) -> str:
        """One call of the management service, insisted on unless it registers; its reply is JSON or a sentence."""

        def once() -> str:
            reply = self._call("management", _MANAGEMENT + name, request, management_pb2.ManagementResponse, timeout)
            return str(reply.msg)

        if self._patience is None or name == "RegisterModel":
            return once()
        return self._patience.insist(once)

    def _fits(self, request: Message) -> None:
        """The server only resets the stream of a request that is too large; REST has a 413 for it."""
        if request.ByteSize() > self._max_request_size:
            answers.raise_refusal("gRPC prediction", 413, b"the request is larger than max_request_size")

    def _call(self, kind: Kind, path: str, request: Message, reply: Any, timeout: float) -> Any:
        if self._told is not None:
            fields = [str(value) for field, value in request.ListFields() if field.cpp_type == field.CPPTYPE_STRING]
            self._told(" ".join(["gRPC", path.rpartition("/")[2], *fields]))
        call = self._channels[kind].unary_unary(
            path,
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        return self._with_token(
            kind,
            lambda metadata: call(request, timeout=timeout, metadata=metadata),
            path.rpartition("/")[2],
            timeout,
        )

    def _with_token(self, kind: Kind, attempt: Callable[[_Metadata], _Reply], what: str, timeout: float) -> _Reply:
        """Make a call with the current token, and once more when that was refused and there is a better one."""
        if self._tokens is None:
            return self._attempt(attempt, (), what, kind, timeout)
        token = self._tokens.key(kind)
        try:
            return attempt((("authorization", f"Bearer {token}"),))
        except grpc.RpcError as error:
            better = self._tokens.after_refusal(kind, token) if _is_token_refusal(error) else None
            if better is None:
                self._raise(error, what, kind, timeout)
        return self._attempt(attempt, (("authorization", f"Bearer {better}"),), what, kind, timeout)

    def _attempt(
        self,
        attempt: Callable[[_Metadata], _Reply],
        metadata: _Metadata,
        what: str,
        kind: Kind,
        timeout: float,
    ) -> _Reply:
        try:
            return attempt(metadata)
        except grpc.RpcError as error:
            self._raise(error, what, kind, timeout)

    def _raise(self, error: grpc.RpcError, what: str, kind: Kind, timeout: float) -> NoReturn:
        code, details = _code(error), _details(error)
        target = self._targets[kind]
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise ServerUnreachable(
                f"gRPC {what} at {target}: no answer within {timeout:g} s",
                hint="`make status` shows whether workers are ready; a request can be given more time",
            ) from error
        lines = details.splitlines() or [""]
        name = lines[-1].strip().removesuffix(".()").rpartition(".")[2]
        if _is_token_refusal(error):
            name, lines = "InvalidKeyException", [details]
        elif details.startswith("Model API disabled"):
            name, lines = "MethodNotAllowedException", lines[:1]
        elif not name.endswith("Exception"):
            name, lines = "", [details]
        else:
            lines = lines[:-1] or lines
        if code is grpc.StatusCode.UNAVAILABLE and not name:
            raise ServerUnreachable(
                f"gRPC {what}: nobody answers at {target}: {details}", hint="`make serve` starts the server"
            ) from error
        status = _STATUS_BY_KIND.get(name) or _STATUS_BY_CODE.get(code, 500)
        if what in ("Predictions", "StreamPredictions") and name == "InternalServerException" and "worker" in details:
            status = 503
        if not details:
            lines = ["TorchServe gives no reason over gRPC; the same call over REST says why"]
        key_file = str(self._tokens.key_file) if self._tokens else "key_file.json"
        answers.raise_refusal(
            f"gRPC {what}", status, {"type": name, "message": "\n".join(lines).strip()}, key_file=key_file
        )


def _is_token_refusal(error: grpc.RpcError) -> bool:
    return _code(error) is grpc.StatusCode.PERMISSION_DENIED and "Token Authorization failed" in _details(error)


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def _details(error: grpc.RpcError) -> str:
    return str(error.details() or "") if isinstance(error, grpc.Call) else str(error)
