"""One request, however it was sent → the instances in it, and the form that its answer must have.

    payload = payloads.parse(fields, headers, spec)
    arrays = [payloads.array(instance, spec) for instance in payload.instances]

Understood: raw image bytes or `.npy` (any single body, multipart or gRPC field), base64 text, JSON
`{"data": …}`, `{"image": …}`, `{"b64": …}`, JSON rows of numbers, KServe v1 `{"instances": […]}` and v2
`{"inputs": [{name, shape, datatype, data}]}`. JSON may arrive decoded or not. Beside the input there may be a field
`top_k`, `meta` or `explain` (KServe: `parameters.top_k`); the header `X-Top-K`, in any case, beats the field.

Arrays of pixels are images of H×W, H×W×C or C×H×W, batches of N×H×W×C or N×C×H×W; a shape that fits the model's own
C×H×W is read so. The kind of number says the scale (`images.eight_bits`).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from handlers import images
from handlers.errors import BadRequest
from handlers.spec import ImageInput, ModelSpec, VectorInput

Form = Literal["stock", "list", "kserve-v1", "kserve-v2"]
Fields = Mapping[str, Any]

_CONTROLS = frozenset({"top_k", "meta", "explain"})
_INPUTS = ("data", "image", "b64", "body")
_NPY = b"\x93NUMPY"
_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"", "0", "false", "no", "off"})
_TENSORS = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits}") for kind in ("UINT", "INT") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
}
"""KServe v2 datatypes."""


@dataclass(frozen=True)
class Headers:
    """What a handler needs of a request's headers, found in one pass; names come in the case that the client chose."""

    http: bool = False
    """False for gRPC: there only the content type of each field is given."""
    describe: bool = False
    explain: bool = False
    form_encoded: bool = False
    top_k: str | None = None

    @classmethod
    def read(cls, headers: Mapping[str, Any]) -> Headers:
        http = describe = explain = form_encoded = False
        top_k = None
        for key, value in headers.items():
            if not isinstance(value, str):
                continue
            name = key.lower()
            if name == "describe":
                describe = value == "True"
            elif name == "explain":
                explain = value == "True"
            elif not name.startswith("ts_"):  # the server's own names for sequences of gRPC requests
                http = True
                if name == "x-top-k":
                    top_k = value
                elif name == "content-type":
                    form_encoded = value.lower().startswith("application/x-www-form-urlencoded")
        return cls(http, describe, explain, form_encoded, top_k)


@dataclass(frozen=True)
class Payload:
    """One request that was understood."""

    instances: Sequence[Any]
    """Encoded bytes, or arrays and nested lists of numbers; not decoded yet."""
    form: Form
    top_k: int
    identifier: str | None = None
    """KServe v2's `id`."""
    outputs: tuple[str, ...] = ()
    """KServe v2's requested outputs; empty means the usual ones."""


def parse(fields: Fields, headers: Headers, spec: ModelSpec) -> Payload:
    """`BadRequest` says what is wrong with the request as a whole."""
    if headers.form_encoded:
        raise BadRequest(415, "form encoding damages a body: send it with `curl -T FILE`, or JSON with "
                              "`-H 'Content-Type: application/json'`")  # fmt: skip
    if flag(fields, "explain") or headers.explain:
        raise BadRequest(501, "this model offers no explanations")
    inputs = [name for name in fields if name not in _CONTROLS]
    if len(inputs) != 1:
        said = f"fields {', '.join(sorted(inputs))[:200]}; one is read" if inputs else "no input; the field is `data`"
        raise BadRequest(400, f"the request has {said}")
    given = _decoded(fields[inputs[0]])
    wanted = headers.top_k if headers.top_k is not None else fields.get("top_k")
    if isinstance(given, dict):
        return _from_document(given, wanted, spec)
    return _stock(given, wanted, spec)


def flag(fields: Fields, name: str) -> bool:
    """A yes-or-no field; `BadRequest` 400 for anything else."""
    value = fields.get(name, "")
    text = (_text(value, name) if isinstance(value, bytes | bytearray | str) else str(value)).strip().lower()
    if text not in _YES | _NO:
        raise BadRequest(400, f"{name} must be 1 or 0")
    return text in _YES


def array(instance: Any, spec: ModelSpec) -> NDArray[Any]:
    """One instance → uint8 C×H×W or float32 F, or a `BadRequest`."""
    if isinstance(spec.input, VectorInput):
        return _row(instance, spec.input)
    if isinstance(instance, dict):
        instance = _from_keys(instance)
    if isinstance(instance, str):
        instance = _base64(instance, spec)
    if isinstance(instance, bytes | bytearray):
        if not instance.startswith(_NPY):
            return images.decode(instance, spec.input, spec.limits)
        instance = _npy(instance, spec)
    return _image(_numbers(instance), spec.input)


def _decoded(given: Any) -> Any:
    """JSON that the server left as bytes (or text) is decoded; everything else stays."""
    if not isinstance(given, bytes | bytearray | str):
        return given
    start = given[:64].lstrip()[:1]
    if start not in ("{", "[", b"{", b"["):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        raise BadRequest(400, "the body begins like JSON and is not JSON") from None


def _from_document(given: dict[str, Any], wanted: Any, spec: ModelSpec) -> Payload:
    row = isinstance(spec.input, VectorInput) and set(given) - _CONTROLS == set(spec.input.features)
    if row:
        names = {name: value for name, value in given.items() if name in spec.input.features}  # type: ignore[union-attr]
        return Payload([names], "stock", _top_k(given.get("top_k") if wanted is None else wanted, spec))
    if "inputs" in given:
        return _kserve_v2(given, wanted, spec)
    if "instances" in given:
        instances = given["instances"]
        if not isinstance(instances, list):
            raise BadRequest(400, "instances must be a list")
        return Payload(_counted(instances, spec), "kserve-v1", _top_k(_parameter(given, wanted), spec))
    if flag(given, "explain"):
        raise BadRequest(501, "this model offers no explanations")
    value = _from_keys(given, whole=True, spec=spec)
    return _stock(value, given.get("top_k") if wanted is None else wanted, spec)


def _stock(given: Any, wanted: Any, spec: ModelSpec) -> Payload:
    """A request outside of KServe's forms: one instance, or a list where several were sent."""
    top_k = _top_k(wanted, spec)
    if isinstance(spec.input, VectorInput):
        if isinstance(given, str):
            given = given.encode()
        if isinstance(given, bytes | bytearray):
            given = _npy(given, spec)
        several = isinstance(given, list) and bool(given) and isinstance(given[0], list | dict)
        if isinstance(given, np.ndarray):
            several = given.ndim != 1
    else:
        if isinstance(given, str):
            given = _base64(given, spec)
        if isinstance(given, bytes | bytearray) and given.startswith(_NPY):
            given = _npy(given, spec)
        if isinstance(given, list) and given and isinstance(given[0], dict | str):
            several = True
        else:
            if isinstance(given, list):
                given = _numbers(given)
            several = isinstance(given, np.ndarray) and given.ndim == 4
    if several:
        return Payload(_counted(given, spec), "list", top_k)
    return Payload([given], "stock", top_k)


def _kserve_v2(given: dict[str, Any], wanted: Any, spec: ModelSpec) -> Payload:
    identifier = given.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise BadRequest(400, "id must be a string")
    inputs = given["inputs"]
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise BadRequest(400, "inputs must be a list of exactly one tensor: this model has one input")
    tensor: dict[str, Any] = inputs[0]
    shape, datatype, data = tensor.get("shape"), tensor.get("datatype"), tensor.get("data")
    if not (isinstance(shape, list) and shape and all(type(side) is int and side >= 0 for side in shape)):
        raise BadRequest(400, "inputs[0].shape must be a list of whole numbers, none of them negative")
    if not isinstance(data, list):
        raise BadRequest(400, "inputs[0].data must be a list; binary extensions are not read")
    instances: Sequence[Any]
    if datatype == "BYTES":
        if len(data) != math.prod(shape) or not all(isinstance(value, str) for value in data):
            raise BadRequest(422, f"inputs[0].data must hold {math.prod(shape)} base64 strings, as its shape says")
        instances = data
    elif isinstance(datatype, str) and datatype in _TENSORS:
        instances = _tensor(shape, datatype, data, spec)
    else:
        raise BadRequest(400, f"inputs[0].datatype must be BYTES or one of {', '.join(_TENSORS)}")
    return Payload(
        _counted(instances, spec),
        "kserve-v2",
        _top_k(_parameter(given, wanted), spec),
        identifier,
        _requested(given.get("outputs"), spec),
    )


def _tensor(shape: list[int], datatype: str, data: list[Any], spec: ModelSpec) -> Sequence[Any]:
    values = _numbers(data)
    if values.size != math.prod(shape):
        raise BadRequest(422, f"inputs[0].data holds {values.size} values; its shape {shape} says {math.prod(shape)}")
    dtype = _TENSORS[datatype]
    if dtype.kind in "iub":
        top = 1 if dtype.kind == "b" else np.iinfo(dtype).max
        bottom = 0 if dtype.kind == "b" else np.iinfo(dtype).min
        if values.dtype.kind not in "iub" or (values.size and (int(values.min()) < bottom or int(values.max()) > top)):
            raise BadRequest(422, f"inputs[0].data holds values that {datatype} cannot")
    tensor = values.astype(dtype).reshape(shape)
    several = tensor.ndim == (2 if isinstance(spec.input, VectorInput) else 4)
    return list(tensor) if several else [tensor]


def _requested(outputs: Any, spec: ModelSpec) -> tuple[str, ...]:
    if outputs is None:
        return ()
    offered = (*(("labels",) if spec.classes else ()), *spec.outputs)
    if not spec.classes:
        offered = tuple(spec.target if name == "value" else name for name in offered)
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in outputs] \
        if isinstance(outputs, list) else [None]  # fmt: skip
    if not all(isinstance(name, str) and name in offered for name in names):
        raise BadRequest(400, f"outputs must be a list of objects whose names are among: {', '.join(offered)}")
    return tuple(dict.fromkeys(str(name) for name in names))


def _parameter(given: dict[str, Any], wanted: Any) -> Any:
    parameters = given.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise BadRequest(400, "parameters must be an object")
    return (parameters or {}).get("top_k") if wanted is None else wanted


def _top_k(value: Any, spec: ModelSpec) -> int:
    """More than there are classes means all of them."""
    if value is None:
        return min(spec.top_k, len(spec.classes))
    text = _text(value, "top_k") if isinstance(value, bytes | bytearray) else value
    if isinstance(text, str) and text.strip().isascii() and text.strip().isdigit() and len(text) < 20:
        text = int(text)
    if type(text) is not int or text < 1:
        raise BadRequest(400, "top_k must be a whole number, 1 or more")
    return min(text, len(spec.classes))


def _counted(instances: Sequence[Any], spec: ModelSpec) -> Sequence[Any]:
    if len(instances) == 0:
        raise BadRequest(400, "the request holds no instance")
    if len(instances) > spec.limits.max_instances:
        raise BadRequest(413, f"the request holds {len(instances)} instances; at most {spec.limits.max_instances}")
    return instances


def _from_keys(given: dict[str, Any], *, whole: bool = False, spec: ModelSpec | None = None) -> Any:
    keys = [key for key in _INPUTS if key in given]
    if len(keys) != 1:
        if whole and spec is not None and isinstance(spec.input, VectorInput) and not keys:
            return _row(given, spec.input)
        raise BadRequest(400, "the JSON object needs exactly one of: data, image, b64, instances, inputs")
    return given[keys[0]]


def _row(instance: Any, wanted: VectorInput) -> NDArray[np.float32]:
    count = len(wanted.features)
    if isinstance(instance, dict):
        if set(instance) != set(wanted.features):
            if "data" in instance and "data" not in wanted.features:
                return _row(instance["data"], wanted)
            missing = ", ".join(name for name in wanted.features if name not in instance)
            extra = ", ".join(sorted(str(name) for name in instance if name not in wanted.features))
            parts = [f"{word} {names[:200]}" for word, names in (("lacks", missing), ("has unknown", extra)) if names]
            raise BadRequest(422, f"the row {' and '.join(parts)}")
        instance = [instance[name] for name in wanted.features]
    values = _numbers(instance)
    if values.shape != (count,):
        held = f"{values.size} values" if values.ndim == 1 else f"shape {'×'.join(map(str, values.shape))}"
        raise BadRequest(422, f"a row has {count} numbers ({', '.join(wanted.features)[:200]}), not {held}")
    with np.errstate(over="ignore"):
        row = values.astype(np.float32)
    if not np.isfinite(row).all():
        raise BadRequest(422, "the row holds NaN, infinity, or a number too large for float32")
    return row


def _image(values: NDArray[Any], wanted: ImageInput) -> images.Pixels:
    if values.shape == wanted.shape:
        return images.eight_bits(values)
    if values.ndim == 3:
        first, last = values.shape[0] in (1, 3), values.shape[2] in (1, 3, 4)
        if first and last:
            raise BadRequest(422, f"the shape {'×'.join(map(str, values.shape))} may mean H×W×C or C×H×W; "
                                  f"send {'×'.join(map(str, wanted.shape))}")  # fmt: skip
        if first:
            values = values.transpose(1, 2, 0)
    return images.fit(values, wanted)


def _numbers(given: Any) -> NDArray[Any]:
    if isinstance(given, np.ndarray):
        values = given
    elif isinstance(given, list):
        try:
            values = np.asarray(given)
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise BadRequest(422, "the rows of numbers are not all of one length") from None
    else:
        raise BadRequest(422, f"expected numbers, not {_KINDS.get(type(given), 'this')}")
    if values.size == 0:
        raise BadRequest(422, "the list of numbers is empty")
    if values.dtype.kind not in "iufb":
        raise BadRequest(422, "expected finite numbers only, in rows of one length")
    return values


def _npy(given: bytes | bytearray, spec: ModelSpec) -> NDArray[Any]:
    if not given:
        raise BadRequest(400, "the body is empty")
    if len(given) > spec.limits.max_bytes * spec.limits.max_instances:
        raise BadRequest(413, "the .npy file is too large")
    if not given.startswith(_NPY):
        raise BadRequest(415, "expected a row of numbers: JSON or a .npy file")
    try:
        values = np.load(io.BytesIO(given), allow_pickle=False)
    except MemoryError:
        raise BadRequest(413, "the .npy file is too large") from None
    except Exception:
        raise BadRequest(400, "the .npy file is damaged, or holds objects") from None
    return _numbers(values)


def _base64(text: str, spec: ModelSpec) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) > spec.limits.max_bytes * 4 // 3 + 1024:
        raise BadRequest(413, f"the image has more than {spec.limits.max_bytes} bytes")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(400, "the text is not base64") from None


def _text(value: bytes | bytearray | str, name: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode("ascii")
    except UnicodeDecodeError:
        raise BadRequest(400, f"{name} is not text") from None


_KINDS: dict[type, str] = {str: "text", dict: "an object", type(None): "null", bool: "true or false", int: "one number",
                           float: "one number", bytes: "bytes", bytearray: "bytes"}  # fmt: skip
