"""One request, however it was sent → the instances in it, and the form that its answer must have.

    headers = Headers.read(context.get_all_request_header(0))
    payload = payloads.parse(fields, headers, spec)
    arrays = [instances.array(instance, spec) for instance in payload.instances]

| sent                                                                           | form of the answer |
|--------------------------------------------------------------------------------|--------------------|
| image bytes, `.npy`, base64 text: the body, or any one multipart or gRPC field | stock              |
| JSON `{"data": …}`, `{"image": …}`, `{"b64": …}`, an array, a row, `{"age": …}` | stock              |
| a `.npy` batch, a JSON list of rows or of such objects                         | list               |
| `{"instances": […], "parameters"?}`                                            | kserve-v1          |
| `{"inputs": […], "parameters"?, "outputs"?}`                                   | kserve-v2          |

JSON may arrive decoded or as bytes. Beside the input there may be `top_k`, `explain`, `capture` and, over gRPC, `meta`;
beside `explain` what `explanations.CONTROLS` names. They stand in fields of their own, in the JSON object, or in
KServe's `parameters`; a feature of that name comes first. The headers `X-Top-K`, `X-Explain-Method` and so on beat the
fields; `capture` is off where any place says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from handlers import explanations, instances, kserve
from handlers.errors import BadRequest
from handlers.explanations import Ask
from handlers.spec import ImageInput, ModelSpec, VectorInput

Form = Literal["stock", "list", "kserve-v1", "kserve-v2"]
Fields = Mapping[str, Any]

_CONTROLS = frozenset({"top_k", "meta", "explain", "capture"})
_EVERY_CONTROL = _CONTROLS | explanations.CONTROLS
_EXPLAIN_HEADER = "x-explain-"
_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"", "0", "false", "no", "off"})
_SPECIAL = (_EXPLAIN_HEADER, "ts_")
_NONE: Mapping[str, str] = MappingProxyType({})
_MEANT = frozenset({"describe", "explain", "x-top-k", "content-type", "content-length", "x-capture"})
"""Headers that mean something here, beside `X-Explain-…`."""
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff")
"""How the bodies begin that are what most requests are: nothing else can be meant by them."""


class Headers(NamedTuple):
    """What a handler needs of a request's headers, found in one pass; names come in the case that the client chose."""

    http: bool = False
    """False for gRPC: there only the content type of each field is given."""
    describe: bool = False
    explain: bool = False
    form_encoded: bool = False
    top_k: str | None = None
    controls: Mapping[str, str] = _NONE
    """Of `explanations.CONTROLS`, those that came as headers."""
    capture: str | None = None
    length: int = 0
    """Bytes of the whole body; 0 where that is not said."""

    @property
    def plain(self) -> bool:
        """They ask for nothing but a prediction."""
        return not (self.explain or self.form_encoded) and self.top_k is None and self.capture is None

    @classmethod
    def read(cls, headers: Mapping[str, Any]) -> Headers:
        """`headers` as TorchServe gives them: one text for a header, one dict for a field of the body."""
        http = describe = explain = form_encoded = False
        top_k = capture = None
        length = 0
        controls: dict[str, str] = {}
        for key, value in headers.items():
            if not isinstance(value, str):
                continue
            name = key.lower()
            if name not in _MEANT and not name.startswith(_SPECIAL):
                http = True
            elif name == "describe":
                describe = value == "True"
            elif name == "explain":
                explain = value == "True"
            elif not name.startswith("ts_"):  # the server's own, for sequences of gRPC requests
                http = True
                if name == "x-top-k":
                    top_k = value
                elif name == "content-type":
                    form_encoded = value.lower().startswith("application/x-www-form-urlencoded")
                elif name == "content-length":
                    length = int(value) if value.isascii() and value.isdigit() and len(value) < 12 else 0
                elif name == "x-capture":
                    capture = value
                elif name.startswith(_EXPLAIN_HEADER) and name[len(_EXPLAIN_HEADER) :] in explanations.CONTROLS:
                    controls[name[len(_EXPLAIN_HEADER) :]] = value
        return cls(http, describe, explain, form_encoded, top_k, controls, capture, length)


class Payload(NamedTuple):
    """One request that was understood."""

    instances: Sequence[Any]
    """One or more, as they were sent: `instances.array` decodes one."""
    form: Form
    top_k: int
    """At most the number of classes."""
    identifier: str | None = None
    """KServe v2's `id`."""
    outputs: tuple[str, ...] = ()
    """KServe v2's requested outputs; empty means the usual ones."""
    ask: Ask | None = None
    """The explanation that is wanted of its one instance; None for a prediction."""
    capture: bool = True
    """False where the request asks not to be captured."""


def parse(fields: Fields, headers: Headers, spec: ModelSpec) -> Payload:
    """`BadRequest` says what is wrong with the request as a whole."""
    if len(fields) == 1 and headers.plain and isinstance(spec.input, ImageInput):
        ((name, given),) = fields.items()  # one picture and nothing else, which the rest would come to as well
        if name not in _CONTROLS and isinstance(given, bytes | bytearray) and given.startswith(_PICTURES):
            return Payload([given], "stock", min(spec.top_k, len(spec.classes)))
    if headers.form_encoded:
        send = "send it with `curl -T FILE`, or JSON with `-H 'Content-Type: application/json'`"
        raise BadRequest(415, f"form encoding damages a body: {send}")
    explain = headers.explain or flag(fields, "explain")
    if explain:
        _require_twin(spec)
    names = inputs(fields, explain=explain)
    if len(names) != 1:
        found = f"the fields {', '.join(sorted(names))[:200]}" if names else "none"
        raise BadRequest(400, f"a request holds its input in one field, `data` say; this one has {found}")
    given = _decoded(fields[names[0]])
    inside = _inside(given, spec) if isinstance(given, dict) else {}
    if not explain and flag(inside, "explain"):
        _require_twin(spec)
        explain = True
    beside = {name: value for name, value in fields.items() if name != names[0]}
    wanted = _first("top_k", {} if headers.top_k is None else {"top_k": headers.top_k}, beside, inside)
    payload = _document(given, wanted, spec) if isinstance(given, dict) else _plain(given, wanted, spec)
    said = ({} if headers.capture is None else {"capture": headers.capture}), beside, inside
    if not all(flag(place, "capture") for place in said if "capture" in place):
        payload = payload._replace(capture=False)
    if not explain:
        return payload
    if len(payload.instances) != 1:
        raise BadRequest(422, f"one instance is explained at a time; this request holds {len(payload.instances)}")
    controls = {name: _first(name, headers.controls, beside, inside) for name in explanations.CONTROLS}
    return payload._replace(ask=Ask.read(controls, spec))


def inputs(fields: Fields, *, explain: bool = False) -> list[str]:
    """Names of the fields that hold the input; of a request that was understood there is one."""
    names = [name for name in fields if name not in _CONTROLS]
    if explain or len(names) > 1:  # what asks for explanations is no input, unless a prediction has no other
        names = [name for name in names if name not in explanations.CONTROLS]
    return names


def flag(fields: Fields, name: str) -> bool:
    """A yes-or-no field; `BadRequest` 400 for anything else."""
    if name not in fields:
        return False
    text = str(_text(fields[name])).strip().lower()
    if text not in _YES | _NO:
        raise BadRequest(400, f"{name} must be 1 or 0")
    return text in _YES


def _decoded(given: Any) -> Any:
    """JSON that the server left as bytes or text is decoded; no image and no base64 begins like it."""
    if not isinstance(given, bytes | bytearray | str) or given[:64].lstrip()[:1] not in ("{", "[", b"{", b"["):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        raise BadRequest(400, "the body begins like JSON and is not JSON") from None


def _inside(given: dict[str, Any], spec: ModelSpec) -> Mapping[str, Any]:
    """Where a JSON object may hold controls."""
    if _kserve(given, spec):
        parameters = given.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise BadRequest(400, "parameters must be an object")
        return parameters or {}
    return {name: given[name] for name in _EVERY_CONTROL - _features(spec) if name in given}


def _features(spec: ModelSpec) -> frozenset[str]:
    return frozenset(spec.input.features) if isinstance(spec.input, VectorInput) else frozenset()


def _kserve(given: dict[str, Any], spec: ModelSpec) -> bool:
    """A row whose features happen to be called like KServe's keys is a row."""
    features = _features(spec)
    named = bool(features) and given.keys() - (_EVERY_CONTROL - features) == features
    return not named and ("inputs" in given or "instances" in given)


def _document(given: dict[str, Any], wanted: Any, spec: ModelSpec) -> Payload:
    """A JSON object: KServe's, an envelope of ours, or a row by its features' names."""
    top_k = _top_k(wanted, spec)
    if _kserve(given, spec):
        if "inputs" in given:
            sent, identifier, outputs = kserve.read(given, spec)
            return Payload(_counted(sent, spec), "kserve-v2", top_k, identifier, outputs)
        if not isinstance(given["instances"], list):
            raise BadRequest(400, "instances must be a list")
        return Payload(_counted(given["instances"], spec), "kserve-v1", top_k)
    features = _features(spec)
    inside = {key: value for key, value in given.items() if key in features or key not in _EVERY_CONTROL}
    named = bool(features) and inside.keys() == features
    if features and not inside.keys() & set(instances.KEYS):
        return Payload([inside], "stock", top_k)
    if not named and len(inside) != 1:
        raise BadRequest(400, f"a JSON object holds exactly one of: {', '.join(instances.KEYS)}, instances, inputs")
    return _plain(inside if named else instances.held(inside), wanted, spec)


def _plain(given: Any, wanted: Any, spec: ModelSpec) -> Payload:
    """Outside of KServe's forms: one instance, or a list where several were sent."""
    top_k = _top_k(wanted, spec)
    given = instances.opened(given, spec)
    if instances.several(given, spec):
        return Payload(_counted(given, spec), "list", top_k)
    return Payload([given], "stock", top_k)


def _first(name: str, *places: Mapping[str, Any]) -> Any:
    """The first place that says it."""
    return next((place[name] for place in places if place.get(name) is not None), None)


def _require_twin(spec: ModelSpec) -> None:
    if not spec.twin:
        raise BadRequest(501, "this model offers no explanations")


def _top_k(value: Any, spec: ModelSpec) -> int:
    if value is None:
        return min(spec.top_k, len(spec.classes))
    number = _text(value)
    if isinstance(number, str) and number.strip().isascii() and number.strip().isdigit() and len(number) < 20:
        number = int(number)
    if type(number) is not int or number < 1:
        raise BadRequest(400, "top_k must be a whole number, 1 or more")
    return min(number, len(spec.classes))


def _counted(sent: Sequence[Any], spec: ModelSpec) -> Sequence[Any]:
    if len(sent) == 0:
        raise BadRequest(400, "the request holds no instance")
    if len(sent) > spec.limits.max_instances:
        raise BadRequest(413, f"the request holds {len(sent)} instances; at most {spec.limits.max_instances}")
    return sent


def _text(value: Any) -> Any:
    """A field of a form or of gRPC arrives as bytes."""
    return bytes(value).decode("ascii", "replace") if isinstance(value, bytes | bytearray) else value
