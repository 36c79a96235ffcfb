"""TorchServe's inference and management API as an object. Nothing else sees an HTTP response or a gRPC stub.

    with Client(config, Tokens(Path("key_file.json"), config)) as client:
        answer = client.predict("digits", image_bytes)
        answer.json(), answer.version, answer.bundle
        client.ask("digits", image_bytes, explain=True, controls={"method": "saliency"}, grpc=True)

Every call has a timeout, carries the right token and is made once more when the token had just been renewed by
somebody else. Every refusal is a `ServerRefused` with TorchServe's own words and what to do about it; nobody answering
is a `ServerUnreachable`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypedDict, Unpack
from urllib.parse import quote

from marwright.errors import SettingsError
from marwright.release.answers import Answer, ModelStatus
from marwright.release.grpc_api import GrpcApi
from marwright.release.patience import Patience
from marwright.release.properties import ServerConfig
from marwright.release.protos import inference_pb2, management_pb2
from marwright.release.rest_api import RestApi
from marwright.release.tokens import Kind, Tokens

Fields = Mapping[str, bytes | str]
Body = bytes | Mapping[str, Any] | Sequence[Any]

CONTROLS = {
    "top_k": "X-Top-K",
    "method": "X-Explain-Method",
    "target": "X-Explain-Target",
    "baseline": "X-Explain-Baseline",
    "steps": "X-Explain-Steps",
    "format": "X-Explain-Format",
}
"""What a request may ask beside its input: name of the field (gRPC, multipart, JSON) → name of the header (REST)."""


class Rest(TypedDict, total=False):
    """What may go with a body over REST; with `fields` it is sent as multipart, and the body stays away.

    A request of the tool's own says `capture=False`, so that nobody learns from it.
    """

    fields: Fields | None
    version: str | None
    headers: Mapping[str, str] | None
    content_type: str | None
    timeout: float | None
    capture: bool


class Grpc(TypedDict, total=False):
    """What may go with fields over gRPC; without `meta` the handler's bare answer comes back.

    `capture=False` is a field here: a version that does not know it (its description has no "capture") refuses it.
    """

    version: str | None
    meta: bool
    timeout: float | None
    capture: bool


class Client:
    """One server. Safe to share between threads that only call; close it, or use it in a `with`."""

    def __init__(
        self,
        config: ServerConfig,
        tokens: Tokens | None,
        *,
        timeout: float = 10.0,
        patience: Patience | None = None,
        told: Callable[[str], object] | None = None,
    ) -> None:
        """`tokens` may be None when the configuration turns token authorization off.

        `patience` is for management calls that fail in passing; `told` hears of every call before it is made.
        """
        self.config = config
        self.timeout = timeout
        self._tokens = tokens if config.token_auth else None
        self._patience = patience
        self._told = told
        self._rest = RestApi(config, self._tokens, timeout=timeout, patience=patience, told=told)
        self._grpc: GrpcApi | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._rest.close()
        if self._grpc is not None:
            self._grpc.close()
            self._grpc = None

    # ---------------------------------------------------------------- inference

    def ask(
        self,
        model: str,
        body: bytes,
        *,
        explain: bool = False,
        grpc: bool = False,
        controls: Mapping[str, str] | None = None,
        version: str | None = None,
        content_type: str | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """One body over REST or gRPC, to the same answer. `controls` (names: `CONTROLS`) travel as headers or fields.

        `content_type` is for REST; over gRPC the handler looks at the body.
        """
        wanted = controls or {}
        if grpc:
            call = self.explain_grpc if explain else self.predict_grpc
            return call(model, {"data": body, **wanted}, version=version, timeout=timeout)
        post = self.explain if explain else self.predict
        headers = {CONTROLS[name]: _header(value) for name, value in wanted.items()}
        return post(model, body, version=version, headers=headers, content_type=content_type, timeout=timeout)

    def predict(self, model: str, body: Body = b"", **how: Unpack[Rest]) -> Answer:
        """One prediction over REST: of raw bytes, of a value sent as JSON, or of `fields` sent as multipart."""
        return self._infer(_path("predictions", model, how.get("version")), body, how)

    def explain(self, model: str, body: Body = b"", **how: Unpack[Rest]) -> Answer:
        """As `predict`, with the handler asked to explain: JSON, a PNG or an `.npy`, as the answer's content type."""
        return self._infer(_path("explanations", model, how.get("version")), body, how)

    def predict_kserve_v1(self, model: str, body: Mapping[str, Any], *, timeout: float | None = None) -> Answer:
        """`{"instances": […]}` to the default version: this URL cannot name another."""
        return self._infer(f"/v1/models/{_name(model)}:predict", body, {"timeout": timeout})

    def explain_kserve_v1(self, model: str, body: Mapping[str, Any], *, timeout: float | None = None) -> Answer:
        return self._infer(f"/v1/models/{_name(model)}:explain", body, {"timeout": timeout})

    def predict_kserve_v2(self, model: str, body: Mapping[str, Any], *, timeout: float | None = None) -> Answer:
        """`{"inputs": […]}` to the default version: this URL cannot name another."""
        return self._infer(f"/v2/models/{_name(model)}/infer", body, {"timeout": timeout})

    def ready_kserve_v1(self, model: str) -> bool:
        """KServe's own readiness. True as soon as a worker thread exists; `describe` knows better.

        TorchServe serves it on the management port, and no other of KServe's health and metadata calls over REST.
        """
        return bool(self._rest.call("GET", "management", f"/v1/models/{_name(model)}").json()["ready"])

    def ping(self) -> str:
        """TorchServe's word for its health: "Healthy" also while no worker can start, so ask `describe`."""
        return str(self._rest.call("GET", "inference", "/ping").json()["status"])

    def api_description(self, kind: Kind = "inference") -> dict[str, Any]:
        """OpenAPI description of one of the two APIs."""
        return dict(self._rest.call("OPTIONS", kind, "/").json())

    def metrics(self, names: Sequence[str] = ()) -> str:
        """What Prometheus would scrape, all of it or the metrics named."""
        parameters = [("name[]", name) for name in names]
        return self._rest.call("GET", "metrics", "/metrics", params=parameters).text

    # ---------------------------------------------------------------- management

    def models(self) -> dict[str, str]:
        """Every model's name and the file of its default version, however many pages that takes."""
        found: dict[str, str] = {}
        page = "0"
        while page:
            value = self._rest.call(
                "GET", "management", "/models", params={"limit": "100", "next_page_token": page}
            ).json()
            found |= {model["modelName"]: model["modelUrl"] for model in value["models"]}
            page = value.get("nextPageToken", "")
        return found

    def describe(
        self,
        model: str,
        version: str | None = None,
        *,
        customized: bool = False,
        timeout: float | None = None,
    ) -> tuple[ModelStatus, ...]:
        """The default version, one version, or `"all"`; `customized` has the handler's own words with it.

        TorchServe names the default version only by answering with it, and gives metadata for one version at a time.
        """

        def described(version: str | None, customized: bool) -> list[dict[str, Any]]:
            return list(
                self._rest.call(
                    "GET",
                    "management",
                    _path("models", model, version),
                    params={"customized": "true"} if customized else {},
                    timeout=timeout,
                ).json()
            )

        if version is None:
            values = described(None, customized)
            default = values[0]["modelVersion"]
        else:
            default = described(None, False)[0]["modelVersion"]
            values = described(version, customized)
            if version == "all" and customized:
                values = [described(value["modelVersion"], True)[0] for value in values]
        return tuple(ModelStatus.from_json(value, default=value["modelVersion"] == default) for value in values)

    def register(
        self,
        file_name: str,
        *,
        initial_workers: int | None = None,
        synchronous: bool = False,
        batch_size: int | None = None,
        max_batch_delay: int | None = None,
        response_timeout: int | None = None,
        startup_timeout: int | None = None,
        timeout: float | None = None,
    ) -> str:
        """Load a `.mar` of the model store; with `synchronous`, return when its workers are ready.

        What the archive's own model-config.yaml says beats these numbers.
        """
        parameters = {
            "url": _bare(file_name),
            "initial_workers": initial_workers,
            "synchronous": "true" if synchronous else None,
            "batch_size": batch_size,
            "max_batch_delay": max_batch_delay,
            "response_timeout": response_timeout,
            "startup_timeout": startup_timeout,
        }
        if timeout is None and synchronous:
            timeout = float(startup_timeout or self.config.startup_timeout) + self.timeout
        return self._managed("POST", "/models", parameters, timeout)

    def scale(
        self,
        model: str,
        version: str | None = None,
        *,
        min_workers: int,
        max_workers: int | None = None,
        synchronous: bool = False,
        timeout: float | None = None,
    ) -> str:
        """Set the number of workers. Scaling down kills at once: requests in flight get a 500 or hang."""
        parameters = {
            "min_worker": min_workers,
            "max_worker": min_workers if max_workers is None else max_workers,
            "synchronous": "true" if synchronous else None,
        }
        if timeout is None and synchronous:
            timeout = self.config.startup_timeout + self.timeout
        return self._managed("PUT", _path("models", model, version), parameters, timeout)

    def set_default(self, model: str, version: str) -> str:
        """Let `version` answer requests that name none."""
        return self._managed("PUT", _path("models", model, version) + "/set-default", {}, None)

    def unregister(self, model: str, version: str | None = None, *, timeout: float | None = None) -> str:
        """Remove one version (without a version: the default, when it is the only one). Its workers die at once."""
        return self._managed("DELETE", _path("models", model, version), {}, timeout)

    def renew_token(self, kind: Kind) -> None:
        """Have the server make a new key, which is then in the key file. The old one is refused from now on."""
        if self._tokens is None:
            raise SettingsError("the server asks for no tokens", hint="disable_token_authorization=false turns them on")
        self._tokens.renew(kind)

    # ---------------------------------------------------------------- gRPC

    def predict_grpc(self, model: str, fields: Fields, **how: Unpack[Grpc]) -> Answer:
        """One prediction over gRPC. With `meta`, our handlers wrap the answer: it tells as much as a REST one."""
        body = self._api().predict(_prediction(model, fields, how), timeout=how.get("timeout") or self.timeout)
        return Answer.from_envelope(body, what=f"gRPC prediction of {model}")

    def explain_grpc(self, model: str, fields: Fields, **how: Unpack[Grpc]) -> Answer:
        """As `predict_grpc`, with the handler asked to explain: TorchServe has no such call, so by a field."""
        body = self._api().predict(
            _prediction(model, {**fields, "explain": "1"}, how), timeout=how.get("timeout") or self.timeout
        )
        return Answer.from_envelope(body, what=f"gRPC explanation of {model}")

    def stream_grpc(self, model: str, fields: Fields, **how: Unpack[Grpc]) -> Iterator[Answer]:
        """The pieces of one answer. Only for handlers that set ts_stream_next: the worker of another dies of it."""
        for body in self._api().stream(_prediction(model, fields, how), timeout=how.get("timeout") or self.timeout):
            yield Answer.from_envelope(body, what=f"gRPC stream of {model}")

    def ping_grpc(self) -> str:
        return str(json.loads(self._api().ping(timeout=self.timeout))["status"])

    def models_grpc(self) -> dict[str, str]:
        found: dict[str, str] = {}
        page = 0
        while True:
            request = management_pb2.ListModelsRequest(limit=100, next_page_token=page)
            value = json.loads(self._api().manage("ListModels", request, timeout=self.timeout))
            found |= {model["modelName"]: model["modelUrl"] for model in value["models"]}
            page = int(value.get("nextPageToken") or 0)
            if not page:
                return found

    def describe_grpc(
        self, model: str, version: str | None = None, *, customized: bool = False
    ) -> tuple[ModelStatus, ...]:
        def described(version: str, customized: bool) -> list[dict[str, Any]]:
            request = management_pb2.DescribeModelRequest(
                model_name=model, model_version=version, customized=customized
            )
            value = json.loads(self._api().manage("DescribeModel", request, timeout=self.timeout))
            return list(value) if isinstance(value, list) else [value]

        default = self.describe(model)[0].version
        values = described(version or default, customized)
        return tuple(ModelStatus.from_json(value, default=value["modelVersion"] == default) for value in values)

    def register_grpc(
        self,
        file_name: str,
        *,
        initial_workers: int = 0,
        synchronous: bool = False,
        timeout: float | None = None,
    ) -> str:
        request = management_pb2.RegisterModelRequest(
            url=_bare(file_name), initial_workers=initial_workers, synchronous=synchronous
        )
        if timeout is None and synchronous:
            timeout = self.config.startup_timeout + self.timeout
        return self._api().manage("RegisterModel", request, timeout=timeout or self.timeout)

    def scale_grpc(
        self,
        model: str,
        version: str | None = None,
        *,
        min_workers: int,
        max_workers: int | None = None,
        synchronous: bool = False,
        timeout: float | None = None,
    ) -> str:
        """As `scale`, but TorchServe turns 0 into 1 here, so 0 is refused."""
        if min_workers < 1:
            raise SettingsError("over gRPC TorchServe turns 0 workers into 1", hint="use scale(), or unregister it")
        request = management_pb2.ScaleWorkerRequest(
            model_name=model,
            model_version=version or "",
            min_worker=min_workers,
            max_worker=max_workers or min_workers,
            synchronous=synchronous,
        )
        return self._api().manage("ScaleWorker", request, timeout=timeout or self.timeout)

    def set_default_grpc(self, model: str, version: str) -> str:
        request = management_pb2.SetDefaultRequest(model_name=model, model_version=version)
        return self._api().manage("SetDefault", request, timeout=self.timeout)

    def unregister_grpc(self, model: str, version: str | None = None, *, timeout: float | None = None) -> str:
        request = management_pb2.UnregisterModelRequest(model_name=model, model_version=version or "")
        return self._api().manage("UnregisterModel", request, timeout=timeout or self.timeout)

    # ---------------------------------------------------------------- private

    def _api(self) -> GrpcApi:
        if self._grpc is None:
            self._grpc = GrpcApi(self.config, self._tokens, patience=self._patience, told=self._told)
        return self._grpc

    def _infer(self, path: str, body: Body, how: Rest) -> Answer:
        sent = dict(how.get("headers") or {})
        if not how.get("capture", True):
            sent["X-Capture"] = "off"
        files = None
        data: bytes | None = None
        if (fields := how.get("fields")) is not None:
            # without a file name TorchServe takes a field for text, and bytes would be mangled
            files = {name: (None if isinstance(value, str) else name, value) for name, value in fields.items()}
        else:
            data = bytes(body) if isinstance(body, bytes | bytearray) else json.dumps(body).encode()
            raw = isinstance(body, bytes | bytearray)
            kind = "application/octet-stream" if raw else "application/json"
            sent["Content-Type"] = how.get("content_type") or kind
        response = self._rest.call(
            "POST", "inference", path, headers=sent, data=data, files=files, timeout=how.get("timeout")
        )
        return Answer.from_headers(response.content, response.status_code, response.headers)

    def _managed(self, method: str, path: str, parameters: Mapping[str, Any], timeout: float | None) -> str:
        given = {name: str(value) for name, value in parameters.items() if value is not None}
        return str(self._rest.call(method, "management", path, params=given, timeout=timeout).json()["status"])


def _path(first: str, model: str, version: str | None) -> str:
    return f"/{first}/{_name(model)}" + (f"/{quote(version, safe='')}" if version is not None else "")


def _name(model: str) -> str:
    """A model's name as part of a path."""
    if not model or model.startswith("token"):
        raise SettingsError(
            f"{model!r} cannot be the name of a model: TorchServe takes every path with /token for a token call",
            hint="give the model another name",
        )
    return quote(model, safe="")


def _header(value: str) -> str:
    """A label that no header can hold travels percent-encoded; the handlers understand both."""
    return value if value.isascii() and value.isprintable() and value == value.strip() else quote(value, safe="")


def _bare(file_name: str) -> str:
    """TorchServe deletes the `.mar` of a model that was registered by URL, as soon as that is unregistered."""
    if not re.fullmatch(r"[^/\\:]+", file_name):
        raise SettingsError(
            f"{file_name!r} is not the bare name of a file in the model store",
            hint="copy the .mar into model_store/ and register it by its name, as in digits-1.0.mar",
        )
    return file_name


def _prediction(model: str, fields: Fields, how: Grpc) -> inference_pb2.PredictionsRequest:
    given = {name: value.encode() if isinstance(value, str) else value for name, value in fields.items()}
    if how.get("meta", True):
        given["meta"] = b"1"
    if not how.get("capture", True):
        given["capture"] = b"off"
    return inference_pb2.PredictionsRequest(model_name=model, model_version=how.get("version") or "", input=given)
