"""Plain PNGs and JPEGs, to the bit what Pillow makes of them, several times sooner.

    hwc = turbo.decode(encoded, most=limits.max_pixels, side=128)     # uint8 H×W×1 or H×W×3; None: ask Pillow

Only what is written the usual way is read here: 8-bit grey or RGB PNGs without transparency, interlacing, text or
EXIF, and baseline or progressive grey or colour JPEGs whose header has nothing but tables, JFIF, Adobe and comments.
All else, and all that a codec refuses or merely warns of, is None: Pillow has the last word on what is odd, damaged or
too large, and says why. What is given here, Pillow would have given
(but for one stream that no encoder writes: decision 15).

A PNG is unpacked by libdeflate, which is two to three times as fast as zlib, into as many bytes as its header promises;
spng then undoes the row filters, from a PNG written here around those bytes without compression. So no hostile chunk
and no hostile stream reaches spng. JPEGs are read by libjpeg-turbo, which is inside Pillow too.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache

import deflate
import numpy as np
import pyspng  # type: ignore[import-untyped]
import simplejpeg  # type: ignore[import-untyped]
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Encoded = bytes | bytearray | memoryview

LARGEST = 1 << 22
"""Pixels of a picture that is read here: up to four copies are in memory at a time, 12 MB each at this size."""

_PNG = struct.Struct(">16sII5sII4s")
"""Signature and IHDR up to its CRC, then length and name of the next chunk."""
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"
_CHANNELS = {b"\x08\x00\0\0\0": 1, b"\x08\x02\0\0\0": 3}
"""By bit depth, colour type, compression, filter and interlace: 8-bit grey and RGB."""
_FORMATS = {1: pyspng.c.SPNG_FMT_G8, 3: pyspng.c.SPNG_FMT_RGB8}
_CHUNK = struct.Struct(">I4s")
_HARMLESS = {b"sRGB": 1, b"gAMA": 4, b"pHYs": 9, b"cHRM": 32, b"tIME": 7}
"""Chunks that change no pixel, and their only length."""
_END = b"\0\0\0\0IEND"
_BLOCK = 65535
"""Bytes of one block that is not compressed (RFC 1951, 3.2.4)."""

_SEGMENT = struct.Struct(">HH")
_FRAME = struct.Struct(">BHHB")
"""Bits, rows, columns and layers of a JPEG."""
_TABLES = frozenset((0xFFDB, 0xFFC4, 0xFFDD, 0xFFFE))
"""Quantisation, Huffman codes, restart interval, comment."""
_FRAMES = frozenset((0xFFC0, 0xFFC1, 0xFFC2))
"""Baseline, extended, progressive; all with Huffman codes."""


def decode(encoded: Encoded, *, most: int, side: int) -> Pixels | None:
    """Uint8 H×W×1 or H×W×3, or None where Pillow must look.

    `most` pixels are decoded. A JPEG with both sides of 2 × `side` or more is left to Pillow, which decodes it smaller.
    """
    try:
        if encoded[0] == 0x89:
            return _png(encoded, min(most, LARGEST))
        if encoded[0] == 0xFF:
            return _jpeg(encoded, min(most, LARGEST), side)
    except (struct.error, deflate.DeflateError, RuntimeError, ValueError):  # cut short, or a codec's refusal
        pass
    return None


def _png(encoded: Encoded, most: int) -> Pixels | None:
    start, columns, rows, kind, checksum, length, name = _PNG.unpack_from(encoded)
    channels = _CHANNELS.get(kind)
    if start != _PNG_START or channels is None or not 0 < columns * rows <= most:
        return None
    if zlib.crc32(encoded[12:29]) != checksum:
        return None
    end = 41 + length
    if name == b"IDAT" and encoded[end + 4 : end + 12] == _END:
        stream: Encoded | None = encoded[41:end]
    else:
        stream = _stream(encoded)
    if stream is None:
        return None
    size = rows * (columns * channels + 1)
    filtered = deflate.zlib_decompress(stream, size)
    if len(filtered) != size:
        return None
    pixels: Pixels = pyspng.c.spng_decode_image_bytes(_stored(filtered, columns, rows, kind), _FORMATS[channels])
    return pixels


def _stream(encoded: Encoded) -> bytes | None:
    """The compressed rows of a PNG of several chunks; None where one of them may mean something."""
    parts = []
    at = 33
    while True:
        length, name = _CHUNK.unpack_from(encoded, at)
        end = at + 8 + length
        if name == b"IDAT":
            parts.append(encoded[at + 8 : end])
        elif name == b"IEND":
            return b"".join(parts) if parts else None
        elif parts or _HARMLESS.get(name) != length or not _intact(encoded, at, end):
            return None
        at = end + 4


def _intact(encoded: Encoded, at: int, end: int) -> bool:
    """Does the chunk have the CRC that stands after it?"""
    return zlib.crc32(encoded[at + 4 : end]) == int.from_bytes(encoded[end : end + 4], "big")


def _stored(filtered: bytearray, columns: int, rows: int, kind: bytes) -> bytes:
    """A PNG around the filtered rows, not compressed; spng is told by its binding not to look at checksums."""
    heads = _heads(len(filtered), columns, rows, kind)
    if len(heads) == 1:
        return b"".join((heads[0], filtered, _TAIL))
    parts: list[Encoded] = []
    view = memoryview(filtered)
    for number, head in enumerate(heads):
        parts += (head, view[number * _BLOCK : (number + 1) * _BLOCK])
    return b"".join((*parts, _TAIL))


_TAIL = bytes(8) + _END + bytes(4)
"""No Adler-32, no CRC, and the last chunk."""


@lru_cache(maxsize=256)
def _heads(size: int, columns: int, rows: int, kind: bytes) -> tuple[bytes, ...]:
    """What stands before each block of the rows: for the first one everything from the signature on."""
    sizes = [min(_BLOCK, size - at) for at in range(0, size, _BLOCK)]
    blocks = [struct.pack("<BHH", n == len(sizes), one, one ^ 0xFFFF) for n, one in enumerate(sizes, 1)]
    header = b"IHDR" + struct.pack(">II", columns, rows) + kind
    start = _PNG_START[:12] + header + struct.pack(">I", zlib.crc32(header))
    rest = struct.pack(">I", 2 + sum(map(len, blocks)) + size + 4) + b"IDAT" + b"\x78\x01"
    return start + rest + blocks[0], *blocks[1:]


def _jpeg(encoded: Encoded, most: int, side: int) -> Pixels | None:
    at, columns, rows, layers = 2, 0, 0, 0
    while True:  # what Pillow's own reader of headers takes, to the first scan
        marker, length = _SEGMENT.unpack_from(encoded, at)
        if marker == 0xFFDA:
            break
        if marker in _FRAMES and not layers:
            bits, rows, columns, layers = _FRAME.unpack_from(encoded, at + 4)
            if bits != 8 or layers not in (1, 3):
                return None
        elif marker not in _TABLES and not _known(encoded, at, marker, length):
            return None
        at += 2 + length
    if not 0 < columns * rows <= most or min(columns, rows) >= 2 * side:
        return None
    pixels: Pixels = simplejpeg.decode_jpeg(encoded, "GRAY" if layers == 1 else "RGB")
    return pixels


def _known(encoded: Encoded, at: int, marker: int, length: int) -> bool:
    """JFIF without a thumbnail, or Adobe's word on the colours; EXIF, profiles and the like are not."""
    if marker == 0xFFE0:
        return length == 16 and encoded[at + 4 : at + 9] == b"JFIF\0"
    return marker == 0xFFEE and length == 14 and encoded[at + 4 : at + 9] == b"Adobe"
