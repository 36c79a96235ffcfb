"""One instance, as it was sent → the array that the model takes.

    instances.array({"b64": "iVBORw0…"}, spec)       # uint8 C×H×W
    instances.array([0.03, 0.05, …], spec)           # float32 F
    instances.write(batch[row], instance, spec)      # the same, into a row of a batch

For a model of images an instance is encoded bytes, base64 text (a data URI too), `.npy` bytes, or numbers of the shape
H×W, H×W×C or C×H×W; an array that has the model's own C×H×W is read so, another that could mean both is refused.
For a model of rows it is a list of numbers or an object with one number for each feature's name.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers import images
from handlers.errors import BadRequest
from handlers.spec import ImageInput, Limits, ModelSpec, VectorInput

Array = NDArray[Any]

Encoded = bytes | bytearray | memoryview

KEYS = ("data", "image", "b64", "body")
"""In an object, one of these holds the input."""

_NPY = b"\x93NUMPY"
_JSON_NAMES = {str: "text", dict: "an object", type(None): "null", bool: "true or false", int: "one number",
               float: "one number", bytes: "bytes", bytearray: "bytes", memoryview: "bytes"}  # fmt: skip


def array(instance: Any, spec: ModelSpec) -> Array:
    """uint8 C×H×W or float32 F; `BadRequest` where that cannot be."""
    out = np.empty(spec.input.shape, np.uint8 if isinstance(spec.input, ImageInput) else np.float32)
    write(out, instance, spec)
    return out


def write(out: Array, instance: Any, spec: ModelSpec) -> None:
    """`array` into `out`, which has its shape and dtype. After a `BadRequest` it holds what it held."""
    wanted = spec.input
    if isinstance(wanted, VectorInput):
        out[...] = _row(instance, wanted)
        return
    if isinstance(instance, dict):
        instance = held(instance)
    given = opened(instance, spec)
    if isinstance(given, Encoded):
        images.decode_into(out, given, wanted, spec.limits)
    else:
        out[...] = _image(numbers(given), wanted, spec.limits)


def opened(given: Any, spec: ModelSpec) -> Any:
    """Text → the bytes in it, `.npy` bytes → their array; the rest as it is."""
    if isinstance(spec.input, VectorInput):
        if isinstance(given, Encoded | str):
            if not given:
                raise BadRequest(400, "the body is empty")
            if isinstance(given, str) or given[:6] != _NPY:
                raise BadRequest(415, "expected a row of numbers: JSON or a .npy file")
            return _npy(given)
        return given
    if isinstance(given, str):
        given = _base64(given, spec.limits)
    if isinstance(given, Encoded) and given[:6] == _NPY:
        return _npy(given)
    return given


def several(given: Any, spec: ModelSpec) -> bool:
    """Is this (opened, and not an object) a list of instances, and not one instance?"""
    if isinstance(given, list) and given and isinstance(given[0], dict | str):
        return True
    if isinstance(spec.input, VectorInput):
        return given.ndim > 1 if isinstance(given, np.ndarray) else isinstance(given, list) and _depth(given) > 1
    return given.ndim > 3 if isinstance(given, np.ndarray) else isinstance(given, list) and _depth(given) > 3


def held(given: dict[str, Any]) -> Any:
    """The input in an object."""
    keys = [key for key in KEYS if key in given]
    if len(keys) != 1:
        raise BadRequest(400, f"an object holds its input under exactly one of: {', '.join(KEYS)}")
    return given[keys[0]]


def numbers(given: Any) -> Array:
    """Nested lists of one length → an array of bools, integers or floats; never empty."""
    if isinstance(given, np.ndarray):
        values = given
    elif isinstance(given, list):
        try:
            values = np.asarray(given)
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise BadRequest(422, "the rows of numbers are not all of one length") from None
    else:
        raise BadRequest(422, f"expected numbers, not {_JSON_NAMES.get(type(given), 'this')}")
    if values.size == 0:
        raise BadRequest(422, "the list of numbers is empty")
    if values.dtype.kind not in "iufb":
        raise BadRequest(422, "expected nothing but numbers, none of them null or text or too large")
    return values


def shape_text(shape: tuple[int, ...]) -> str:
    """`3×32×32`."""
    return "×".join(map(str, shape)) or "a single value"


def _row(instance: Any, wanted: VectorInput) -> NDArray[np.float32]:
    if isinstance(instance, dict):
        instance = _by_name(instance, wanted)
    values = numbers(instance)
    if values.shape != wanted.shape:
        found = f"{values.size} numbers" if values.ndim == 1 else f"the shape {shape_text(values.shape)}"
        raise BadRequest(422, f"a row has {len(wanted.features)} numbers ({_names(wanted.features)}), not {found}")
    with np.errstate(all="ignore"):  # too large for float32 becomes infinity
        row = values.astype(np.float32)
    if not np.isfinite(row).all():
        raise BadRequest(422, "the row holds NaN, infinity, or a number too large for float32")
    return row


def _by_name(instance: dict[str, Any], wanted: VectorInput) -> Any:
    missing = [name for name in wanted.features if name not in instance]
    extra = [name for name in instance if name not in wanted.features]
    if len(extra) == 1 and extra[0] in KEYS and isinstance(instance[extra[0]], list) and len(instance) == 1:
        return instance[extra[0]]
    if missing or extra:
        parts = [f"{verb} {_names(names)}" for verb, names in (("lacks", missing), ("has unknown", extra)) if names]
        raise BadRequest(422, f"the row {' and '.join(parts)}")
    return [instance[name] for name in wanted.features]


def _image(values: Array, wanted: ImageInput, limits: Limits) -> images.Pixels:
    if values.shape == wanted.shape:
        return images.eight_bits(values)
    if values.size > limits.max_pixels * 4:
        raise BadRequest(413, f"{values.size} values; at most {limits.max_pixels} pixels are read")
    if values.ndim == 3 and values.shape[0] in (1, 3):
        if values.shape[2] in (1, 3, 4):
            either = f"{shape_text(values.shape)} may mean H×W×C or C×H×W"
            raise BadRequest(422, f"{either}; send {shape_text(wanted.shape)}")
        values = values.transpose(1, 2, 0)
    return images.fit(values, wanted)


def _npy(given: Encoded) -> Array:
    try:
        return numbers(_read_npy(given))
    except (BadRequest, MemoryError):
        raise
    except Exception:  # numpy parses the header with ast
        raise BadRequest(400, "the .npy file is damaged, or holds objects") from None


def _read_npy(given: Encoded) -> Array:
    """Like `np.load`, which trusts the header and would reserve whatever size it claims."""
    stream = io.BytesIO(given)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read_header(stream)
    start = stream.tell()
    if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(given) - start:
        raise ValueError("the header does not describe the data")
    return np.frombuffer(given, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


def _base64(text: str, limits: Limits) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) > limits.max_bytes * 4 // 3 + 1024:
        raise BadRequest(413, f"the image has more than {limits.max_bytes} bytes")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(400, "the text is not base64") from None


def _depth(given: Any) -> int:
    """Dimensions, looking at first elements alone."""
    depth = 0
    while isinstance(given, list):
        depth += 1
        given = given[0] if given else None
    return depth


def _names(names: Any) -> str:
    text = ", ".join(map(str, names))
    return text if len(text) <= 200 else f"{text[:200]}…"
