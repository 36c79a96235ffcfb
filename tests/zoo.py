"""Odd requests, all made here: every picture and body that a worker has to cope with, and the status each deserves.

    for oddity in ZOO:
        oddity.sent          # as TorchServe hands it to a handler when it came over HTTP
        oddity.http          # (body, headers) to POST to /predictions/<oddity.model>
        oddity.grpc          # {field: bytes} for a gRPC call, or None where it makes no sense there
        oddity.status        # what that request alone must get; over gRPC it is the body's "code"

`digits` takes images of 1×16×16 and knows ten labels; `diabetes` takes the ten features in `FEATURES`.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from tests.handlers.context import Sent

FEATURES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
ROW = [0.03, 0.05, 0.06, 0.02, -0.04, -0.03, -0.04, 0.0, 0.02, -0.02]
BOUNDARY = "zoo-boundary-7d1"


@dataclass(frozen=True)
class Part:
    """One part of a multipart body; a file where it has a `filename`."""

    name: str
    content: bytes
    filename: str | None = None
    content_type: str | None = None


@dataclass(frozen=True)
class Oddity:
    """One request and the status that it deserves."""

    name: str
    status: int
    body: bytes = b""
    content_type: str | None = None
    parts: tuple[Part, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str = "digits"
    over_grpc: bool = True

    @cached_property
    def http(self) -> tuple[bytes, dict[str, str]]:
        """Body and headers of the POST."""
        headers = dict(self.headers)
        if self.parts:
            headers["Content-Type"] = f"multipart/form-data; boundary={BOUNDARY}"
            return _multipart(self.parts), headers
        if self.content_type:
            headers["Content-Type"] = self.content_type
        return self.body, headers

    @cached_property
    def sent(self) -> Sent:
        """What TorchServe makes of it (`ts.protocol.otf_message_handler`, `ts.service`): JSON and text come decoded."""
        body, headers = self.http
        if self.parts:
            given = [(part.name, part.content, part.content_type or "") for part in self.parts]
        elif headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded"):
            name, _, value = body.decode("utf-8", "replace").partition("=")
            given = [(name, value.encode(), "")]
        else:
            given = [("body", body, headers.get("Content-Type", "").split(";")[0])]
        fields = {name: _as_decoded(content, kind) for name, content, kind in given}
        kinds = {name: {"content-type": kind} for name, _, kind in given}
        return Sent(fields, {**kinds, "Host": "localhost:8080", "Content-Length": str(len(body)), **headers})

    @cached_property
    def grpc(self) -> dict[str, bytes] | None:
        """Fields of the gRPC call."""
        if not self.over_grpc:
            return None
        return {part.name: part.content for part in self.parts} if self.parts else {"data": self.body}


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A gradient with a block in it, in any of Pillow's modes."""
    columns, rows = size
    x, y = np.meshgrid(np.linspace(0, 255, columns), np.linspace(0, 255, rows))
    rgb = np.stack([x, y, 255 - x], axis=2).astype(np.uint8)
    rgb[rows // 4 : rows // 2, columns // 4 : columns // 2] = (250, 20, 20)
    image = Image.fromarray(rgb)
    if mode == "I;16":
        return Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16)) * 257)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.asarray(image.convert("L"))))
        return image.convert(mode)
    return image.convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The image as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def npy(values: Any, dtype: Any = None) -> bytes:
    """The array as the bytes of a `.npy` file."""
    stream = io.BytesIO()
    np.save(stream, np.asarray(values, dtype))
    return stream.getvalue()


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def png_claiming(columns: int, rows: int) -> bytes:
    """A few bytes that say they are a picture of that size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def oriented(orientation: int) -> bytes:
    """A JPEG with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), "JPEG", exif=exif.tobytes(), quality=95)


def _as_decoded(content: bytes, content_type: str) -> Any:
    try:
        if content_type == "application/json":
            return json.loads(content.decode())
        if content_type.startswith("text"):
            return content.decode()
    except Exception:
        return bytearray(content)
    return bytearray(content)


def _multipart(parts: tuple[Part, ...]) -> bytes:
    lines = []
    for part in parts:
        name = f'; filename="{part.filename}"' if part.filename else ""
        lines += [f"--{BOUNDARY}", f'Content-Disposition: form-data; name="{part.name}"{name}']
        lines += [f"Content-Type: {part.content_type}"] if part.content_type else []
        lines += ["", part.content.decode("latin-1")]
    return "\r\n".join([*lines, f"--{BOUNDARY}--", ""]).encode("latin-1")


PNG = encoded(picture())
JPEG = encoded(picture(), "JPEG")
_TRANSPARENT_PALETTE = picture().quantize(8)
_BIG = encoded(Image.new("L", (2000, 1500), 200))


def _raw(
    name: str, status: int, body: bytes, content_type: str | None = "application/octet-stream", **more: Any
) -> Oddity:
    return Oddity(name, status, body, content_type, **more)


def _json(name: str, status: int, document: Any, **more: Any) -> Oddity:
    return Oddity(name, status, json.dumps(document).encode(), "application/json", **more)


def _form(name: str, status: int, *parts: Part, **more: Any) -> Oddity:
    return Oddity(name, status, parts=parts, **more)


def _v2(shape: list[int], datatype: str, data: Any, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "input", "shape": shape, "datatype": datatype, "data": data}], **more}


_FILE = Part("data", PNG, "a.png", "image/png")
_PIXELS = np.arange(256).reshape(16, 16)
_PIXEL_LIST = _PIXELS.tolist()

PICTURES = [
    *(
        _raw(f"png-{mode.replace(';', '')}", 200, encoded(picture(mode)))
        for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")
    ),
    _raw("png-palette-transparent", 200, encoded(_TRANSPARENT_PALETTE, transparency=0)),
    _raw("png-palette-half-transparent", 200, encoded(_TRANSPARENT_PALETTE, transparency=bytes(range(0, 256, 32)))),
    _raw("png-rgb-with-transparent-colour", 200, encoded(picture(), transparency=(250, 20, 20))),
    _raw("png-grey-with-transparent-shade", 200, encoded(picture("L"), transparency=99)),
    _raw("png-interlaced-by-none-and-one-pixel", 200, encoded(Image.new("RGB", (1, 1), "red"))),
    _raw("png-very-wide", 200, encoded(Image.new("L", (3000, 1), 9))),
    _raw("png-large", 200, _BIG),
    _raw("png-exact-size", 200, encoded(picture("L", (16, 16)))),
    _raw("png-trailing-garbage", 200, PNG + b"\0" * 100),
    _raw("jpeg-RGB", 200, JPEG, "image/jpeg"),
    _raw("jpeg-L", 200, encoded(picture("L"), "JPEG")),
    _raw("jpeg-CMYK", 200, encoded(picture("CMYK"), "JPEG")),
    _raw("jpeg-progressive", 200, encoded(picture(), "JPEG", progressive=True)),
    *(_raw(f"jpeg-exif-{turn}", 200, oriented(turn)) for turn in (3, 6, 8)),
    _raw("jpeg-broken-exif", 200, encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk")),
    _raw("webp", 200, encoded(picture(), "WEBP")),
    _raw("webp-alpha-lossless", 200, encoded(picture("RGBA"), "WEBP", lossless=True)),
    _raw("webp-animated", 200, encoded(picture(), "WEBP", save_all=True, append_images=[Image.new("RGB", (24, 20))])),
    _raw("bmp", 200, encoded(picture(), "BMP")),
    _raw("bmp-1-bit", 200, encoded(picture("1"), "BMP")),
    _raw("gif", 200, encoded(picture("P"), "GIF")),
    _raw("gif-animated", 200, encoded(picture("P"), "GIF", save_all=True, append_images=[Image.new("P", (24, 20), 3)])),
    _raw("png-sent-as-json", 200, PNG, "application/json"),
    _raw("png-sent-as-text", 200, PNG, "text/plain"),
    _raw("png-without-content-type", 200, PNG, None),
]

BROKEN = [
    _raw("empty", 400, b""),
    _raw("png-truncated", 400, PNG[: len(PNG) // 2]),
    _raw("png-header-only", 400, PNG[:33]),
    _raw("jpeg-truncated", 400, JPEG[: len(JPEG) // 2]),
    _raw("webp-truncated", 400, encoded(picture(), "WEBP")[:60]),
    _raw("gif-truncated", 400, encoded(picture("P"), "GIF")[:-200]),
    _raw("bmp-truncated", 400, encoded(picture(), "BMP")[:-300]),
    _raw("png-flipped-bits", 400, PNG[:60] + bytes(255 - byte for byte in PNG[60:120]) + PNG[120:]),
    _raw("png-signature-only", 400, PNG[:8]),
    _raw("png-claims-billions-of-pixels", 413, png_claiming(100_000, 100_000)),
    _raw("png-claims-just-too-many-pixels", 413, png_claiming(8001, 4000)),
    _raw("too-many-bytes", 413, PNG + b"\0" * (8 * 2**20)),
    _raw("noise", 415, bytes(range(256)) * 4),
    _raw("one-zero-byte", 415, b"\0"),
    _raw("html", 415, b"<!doctype html><p>404 not found", "application/octet-stream"),
    _raw("svg", 415, b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml"),
    _raw("tiff", 415, encoded(picture(), "TIFF")),
    _raw("pdf", 415, b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "application/pdf"),
    _raw("eps", 415, encoded(picture(), "EPS"), "application/postscript"),
    _raw("form-encoded-image", 415, PNG, "application/x-www-form-urlencoded", over_grpc=False),
    _raw(
        "form-encoded-with-charset", 415, b"data=1", "application/x-www-form-urlencoded; charset=UTF-8", over_grpc=False
    ),
]

BODIES = [
    _raw("base64-as-text", 200, b64(PNG).encode(), "text/plain"),
    _raw("base64-with-line-breaks", 200, base64.encodebytes(PNG), "text/plain", over_grpc=False),
    _raw("data-uri-as-text", 200, f"data:image/png;base64,{b64(PNG)}".encode(), "text/plain", over_grpc=False),
    _json("json-data", 200, {"data": b64(PNG)}),
    _json("json-image-top-k", 200, {"image": b64(PNG), "top_k": 3}),
    _json("json-b64", 200, {"b64": b64(PNG)}),
    _json("json-pixels", 200, _PIXEL_LIST),
    _json("json-pixels-floats", 200, (_PIXELS / 255).tolist()),
    _json("json-list-of-objects", 200, [{"b64": b64(PNG)}, {"data": _PIXEL_LIST}]),
    _raw("json-as-octets", 200, json.dumps({"data": b64(PNG)}).encode()),
    _raw("npy-h-w", 200, npy(_PIXELS, np.uint8)),
    _raw("npy-h-w-c", 200, npy(np.zeros((20, 30, 3), np.uint8))),
    _raw("npy-c-h-w", 200, npy(np.zeros((3, 20, 30), np.uint8))),
    _raw("npy-own-shape", 200, npy(_PIXELS.reshape(1, 16, 16), np.uint8)),
    _raw("npy-batch", 200, npy(np.zeros((3, 1, 16, 16), np.uint8))),
    _raw("npy-floats", 200, npy(_PIXELS / 255)),
    _raw("npy-16-bit-big-endian", 200, npy(_PIXELS * 257, ">u2")),
    _raw("npy-fortran-order", 200, npy(np.asfortranarray(_PIXELS.astype(np.uint8)))),
    _form("multipart-data", 200, _FILE),
    _form("multipart-other-name", 200, Part("picture", PNG, "a.png", "image/png")),
    _form("multipart-top-k", 200, Part("top_k", b"2"), _FILE),
    _raw("header-top-k", 200, PNG, headers={"x-tOp-K": "1"}),
    _raw("top-k-beyond-the-classes", 200, PNG, headers={"X-Top-K": "99"}),
    _json("kserve-v1", 200, {"instances": [{"b64": b64(PNG)}, {"data": b64(JPEG)}, _PIXEL_LIST]}),
    _json("kserve-v1-top-k", 200, {"instances": [{"b64": b64(PNG)}], "parameters": {"top_k": 2}}),
    _json("kserve-v2-tensor", 200, _v2([2, 1, 16, 16], "UINT8", [*range(256), *range(256)], id="x")),
    _json("kserve-v2-odd-id", 200, _v2([1], "BYTES", [b64(PNG)], id="\ud83d \r\n")),
    _json("kserve-v2-nested", 200, _v2([1, 1, 16, 16], "UINT8", [[_PIXEL_LIST]])),
    _json("kserve-v2-floats", 200, _v2([1, 1, 16, 16], "FP32", (_PIXELS / 255).ravel().tolist())),
    _json("kserve-v2-bytes", 200, _v2([2], "BYTES", [b64(PNG), b64(JPEG)])),
    _json("kserve-v2-embedding", 200, _v2([1], "BYTES", [b64(PNG)], outputs=[{"name": "embedding"}])),
]

WRONG = [
    _json("json-empty-object", 400, {}),
    _json("json-unknown-key", 400, {"data": b64(PNG), "topk": 3}),
    _json("json-half-a-surrogate-pair", 400, {"data": b64(PNG), "\ud800": 3}),
    _json("json-two-inputs", 400, {"data": b64(PNG), "image": b64(PNG)}),
    _raw("json-cut-short", 400, b'{"data": "iVBOR', "application/json"),
    _json("json-not-base64", 400, {"data": "%%%"}),
    _json("json-base64-with-a-stray-character", 400, {"data": f"{b64(PNG)[:40]}!{b64(PNG)[40:]}"}),
    _json("json-base64-of-text", 415, {"data": b64(b"hello there")}),
    _json("json-null", 422, {"data": None}),
    _json("json-number", 422, {"data": 5}),
    _json("json-ragged", 422, {"data": [[1, 2], [3]]}),
    _json("json-pixels-out-of-range", 422, {"data": [[0, 256], [0, 0]]}),
    _json("json-floats-out-of-range", 422, {"data": [[0.0, 254.0], [0.0, 0.0]]}),
    _raw("json-pixels-nan", 422, b"[[NaN, 0.5], [0.5, 0.5]]", "application/json"),
    _json("json-empty-list", 422, []),
    _json("json-flat-pixels", 422, list(range(256))),
    _raw("json-too-deep", 400, b"[" * 100_000, "application/json"),
    _raw("npy-objects", 400, npy([{"a": 1}, None], object)),
    _raw("npy-truncated", 400, npy(_PIXELS, np.uint8)[:-10]),
    _raw("npy-claims-terabytes", 400, npy(_PIXELS, np.uint8).replace(b"(16, 16), }        ", b"(9999999, 9999999)}")),
    _raw("npy-text", 422, npy(["a", "b"])),
    _raw("npy-ambiguous", 422, npy(np.zeros((3, 20, 3), np.uint8))),
    _raw("npy-flat", 422, npy(np.zeros(256, np.uint8))),
    _raw("npy-too-many", 413, npy(np.zeros((300, 1, 16, 16), np.uint8))),
    _form("multipart-two-files", 400, _FILE, Part("image", PNG, "b.png", "image/png")),
    _form("multipart-only-top-k", 400, Part("top_k", b"2")),
    _form("multipart-bad-top-k", 400, _FILE, Part("top_k", b"many")),
    _form("multipart-empty-file", 400, Part("data", b"", "a.png", "image/png")),
    _raw("top-k-zero", 400, PNG, headers={"X-Top-K": "0"}, over_grpc=False),
    _raw("top-k-negative", 400, PNG, headers={"X-Top-K": "-1"}, over_grpc=False),
    _json("top-k-fraction", 400, {"data": b64(PNG), "top_k": 1.5}),
    _form("explain-field", 501, _FILE, Part("explain", b"1")),
    _json("kserve-v1-empty", 400, {"instances": []}),
    _json("kserve-v1-not-a-list", 400, {"instances": {"b64": b64(PNG)}}),
    _json("kserve-v1-second-is-bad", 415, {"instances": [{"b64": b64(PNG)}, {"b64": b64(b"no")}]}),
    _json("kserve-v1-too-many", 413, {"instances": [[[0]]] * 300}),
    _json("kserve-v2-two-inputs", 400, {"inputs": _v2([1], "BYTES", [b64(PNG)])["inputs"] * 2}),
    _json("kserve-v2-wrong-length", 422, _v2([1, 1, 16, 16], "UINT8", list(range(255)))),
    _json("kserve-v2-overflow", 422, _v2([1, 1, 16, 16], "UINT8", [300] * 256)),
    _json("kserve-v2-unknown-type", 400, _v2([1], "STRING", ["a"])),
    _json("kserve-v2-negative-shape", 400, _v2([-1, 16], "UINT8", [1])),
    _json("kserve-v2-unknown-output", 400, _v2([1], "BYTES", [b64(PNG)], outputs=[{"name": "logits"}])),
]

ROWS = [
    _json("row", 200, ROW, model="diabetes"),
    _json("row-in-data", 200, {"data": ROW}, model="diabetes"),
    _json("rows", 200, [ROW, ROW], model="diabetes"),
    _json("row-by-name", 200, dict(zip(FEATURES, ROW, strict=True)), model="diabetes"),
    _json("rows-by-name", 200, [dict(zip(FEATURES, ROW, strict=True))] * 2, model="diabetes"),
    _json("row-of-whole-numbers", 200, list(range(10)), model="diabetes"),
    _raw("row-json-as-octets", 200, json.dumps(ROW).encode(), model="diabetes"),
    _raw("row-npy", 200, npy(ROW), model="diabetes"),
    _raw("rows-npy", 200, npy([ROW, ROW], np.float32), model="diabetes"),
    _json("row-kserve-v1", 200, {"instances": [ROW, dict(zip(FEATURES, ROW, strict=True))]}, model="diabetes"),
    _json("row-kserve-v2", 200, _v2([2, 10], "FP64", ROW + ROW), model="diabetes"),
    _form("row-multipart", 200, Part("data", json.dumps(ROW).encode(), "r.json", "application/json"), model="diabetes"),
    _raw("row-empty", 400, b"", model="diabetes"),
    _raw("row-image", 415, PNG, model="diabetes"),
    _raw("row-csv", 415, b"1,2,3,4", "text/csv", model="diabetes"),
    _json("row-by-odd-names", 422, {"\udfff": 1, "\r\n": 2, "": 3}, model="diabetes"),
    _json("row-too-short", 422, ROW[:9], model="diabetes"),
    _json("row-too-long", 422, [*ROW, 1.0], model="diabetes"),
    _raw("row-nan", 422, json.dumps([*ROW[:9], float("nan")]).encode(), "application/json", model="diabetes"),
    _json("row-null", 422, [*ROW[:9], None], model="diabetes"),
    _json("row-text", 422, [*ROW[:9], "1.0"], model="diabetes"),
    _json("row-too-large-for-float32", 422, [*ROW[:9], 1e300], model="diabetes"),
    _json("row-too-large-for-anything", 422, [*ROW[:9], 10**400], model="diabetes"),
    _json("row-by-name-lacks-one", 422, dict(zip(FEATURES[:9], ROW[:9], strict=True)), model="diabetes"),
    _json("row-by-name-one-too-many", 422, {**dict(zip(FEATURES, ROW, strict=True)), "s7": 1}, model="diabetes"),
    _json("rows-second-is-short", 422, [ROW, ROW[:9]], model="diabetes"),
    _raw("row-npy-lone-number", 422, npy(5.0), model="diabetes"),
    _raw("row-npy-nan", 422, npy([float("nan")] * 10), model="diabetes"),
    _json("row-kserve-v2-too-large-for-fp16", 422, _v2([10], "FP16", [1e10] * 10), model="diabetes"),
    _json("row-kserve-v2-images", 422, _v2([1, 9], "FP32", ROW[:9]), model="diabetes"),
]  # fmt: skip

ZOO: dict[str, Oddity] = {oddity.name: oddity for oddity in [*PICTURES, *BROKEN, *BODIES, *WRONG, *ROWS]}
"""Every oddity by its name."""
