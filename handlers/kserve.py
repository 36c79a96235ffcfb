"""KServe's second protocol (the Open Inference Protocol): one tensor in, named tensors out.

    sent, identifier, outputs = kserve.read(document, spec)

A request is `{"id"?, "inputs": [{"name", "shape", "datatype", "data"}], "parameters"?, "outputs"?: [{"name"}]}`, its
`data` flat or nested. N×F numbers, or four dimensions of pixels, are N instances; F numbers, or two or three
dimensions, are one. BYTES holds base64 strings, one for each instance. `handlers.answers` says what comes back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers import instances
from handlers.errors import BadRequest
from handlers.spec import ModelSpec

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits}") for kind in ("UINT", "INT") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
}


def read(document: dict[str, Any], spec: ModelSpec) -> tuple[list[Any], str | None, tuple[str, ...]]:
    """Instances, the request's id, and the outputs that it asks for (none means the usual ones)."""
    identifier = document.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise BadRequest(400, "id must be a string")
    inputs = document["inputs"]
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise BadRequest(400, "inputs must be a list of exactly one tensor: this model has one input")
    return _instances(inputs[0], spec), identifier, _requested(document.get("outputs"), offered(spec))


def offered(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the outputs that may be asked for."""
    if spec.task == "regression":
        return (spec.target, *spec.outputs[1:])
    return ("labels", *spec.outputs)


def tensor(name: str, datatype: str, shape: Sequence[int], data: list[Any]) -> dict[str, Any]:
    """One output; `data` is flat."""
    return {"name": name, "shape": list(shape), "datatype": datatype, "data": data}


def _instances(entry: dict[str, Any], spec: ModelSpec) -> list[Any]:
    shape, datatype, data = entry.get("shape"), entry.get("datatype"), entry.get("data")
    if not (isinstance(shape, list) and shape and all(type(side) is int and side >= 0 for side in shape)):
        raise BadRequest(400, "inputs[0].shape must be a list of whole numbers, none of them negative")
    if not isinstance(data, list):
        raise BadRequest(400, "inputs[0].data must be a list; the binary extension is not read")
    if datatype == "BYTES":
        if len(data) != math.prod(shape) or not all(isinstance(value, str) for value in data):
            raise BadRequest(422, f"inputs[0].data must hold {_count(shape)} base64 strings, as its shape says")
        return data
    if not isinstance(datatype, str) or datatype not in _DTYPES:
        raise BadRequest(400, f"inputs[0].datatype must be BYTES or one of: {', '.join(_DTYPES)}")
    values = _typed(instances.numbers(data), datatype)
    if values.size != math.prod(shape):
        raise BadRequest(422, f"inputs[0].data holds {values.size} values; its shape says {_count(shape)}")
    if len(shape) > 4:
        raise BadRequest(422, f"inputs[0].shape has {len(shape)} dimensions; at most 4 are read")
    values = values.reshape(shape)
    return list(values) if instances.several(values, spec) else [values]


def _typed(values: NDArray[Any], datatype: str) -> NDArray[Any]:
    dtype = _DTYPES[datatype]
    if dtype.kind != "f":
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if values.dtype.kind == "f" or int(values.min()) < low or int(values.max()) > high:
            raise BadRequest(422, f"inputs[0].data holds a value that {datatype} cannot")
    with np.errstate(all="ignore"):  # too large for a float becomes infinity, which is refused with its instance
        return values.astype(dtype)


def _requested(outputs: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    if outputs is None:
        return ()
    wanted = [entry.get("name") for entry in outputs if isinstance(entry, dict)] if isinstance(outputs, list) else []
    if not wanted or len(wanted) != len(outputs) or not all(name in names for name in wanted):
        raise BadRequest(400, f"outputs must be a list of objects whose names are among: {', '.join(names)}")
    return tuple(dict.fromkeys(str(name) for name in wanted))


def _count(shape: list[int]) -> str:
    total = math.prod(shape)
    return str(total) if total < 10**12 else "far more"
