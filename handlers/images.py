"""Encoded bytes or an array → one uint8 image of the size the model wants.

The only place where an image is decoded or resized, in training as in serving: what a model learned from and what it is
asked about went through the same lines.

    image = images.decode(path.read_bytes(), spec.input, spec.limits)     # C×H×W uint8
    image = images.fit(digits[0], spec.input)                             # the same, from an H×W or H×W×C array
    images.decode_into(batch[row], path.read_bytes(), spec.input, spec.limits)      # the same, into that row

`spec.input.decoder` is "turbo" (plain PNGs and JPEGs by faster codecs, see `handlers.turbo`; the rest by Pillow) or
"pillow" (all of it by Pillow). They give the same pixels. Whichever is named must be here: see `require`.

Transparent pixels are laid on white, EXIF orientation is obeyed, the first frame of an animation is taken, CMYK becomes
RGB, 1 and 16 bits become 8, and colour becomes grey (ITU-R 601) where the model has one channel.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError, features

from handlers.errors import BadRequest, LoadError
from handlers.spec import ImageInput, Limits

Pixels = NDArray[np.uint8]
Encoded = bytes | bytearray | memoryview

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What may be sent. Pillow reads some forty formats; the others stay closed."""

PACKAGES = {"turbo": ("pillow", "deflate", "pyspng", "simplejpeg"), "pillow": ("pillow",)}
"""What `spec.input.decoder` may name, and what each needs."""

_NOT_AN_IMAGE = "not an image: PNG, JPEG, WebP, BMP and GIF are read"
_SIGNATURES = re.compile(rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP|BM|GIF8", re.DOTALL)
_OVERSAMPLE = 4
"""A JPEG may be decoded at a half, a quarter or an eighth, as long as this many source pixels remain for each side."""

# `Limits.max_pixels` is checked from the header, so Pillow's own guess (and its warning) is not wanted. Half a picture
# must never pass for a whole one.
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False

# A caller's odd metadata is no news for our log. A filter and not `catch_warnings`, which threads cannot share.
_QUIET = ("ignore", None, UserWarning, re.compile(r"PIL\."), 0)


def require(decoder: str) -> None:
    """`LoadError` unless the decoder that training used is here, with every format it must read, and its faster codecs
    agree with Pillow on a small picture. Never a fallback.
    """
    quick = _quick(decoder)
    missing = [codec for codec in ("zlib", "jpg", "webp") if not features.check(codec)]
    if missing:
        raise LoadError(f"this Pillow was built without {', '.join(missing)}; install the wheel from PyPI")
    if quick is not None:
        _agreeing(quick, decoder)


def decode(encoded: Encoded, wanted: ImageInput, limits: Limits) -> Pixels:
    """C×H×W and writable. `BadRequest`: 400 empty or damaged, 413 over `limits`, 415 not one of `FORMATS`."""
    out = np.empty(wanted.shape, np.uint8)
    decode_into(out, encoded, wanted, limits)
    return out


def decode_into(out: Pixels, encoded: Encoded, wanted: ImageInput, limits: Limits) -> None:
    """`decode` into `out`, C×H×W: a row of a batch. After a `BadRequest` it holds what it held."""
    if not len(encoded):
        raise BadRequest(400, "the image is empty: no bytes arrived")
    if len(encoded) > limits.max_bytes:
        raise BadRequest(413, f"the image has {len(encoded)} bytes; at most {limits.max_bytes} are read")
    quick = _quick(wanted.decoder)
    pixels = quick(encoded, most=limits.max_pixels, side=_whole(wanted)) if quick else None
    if pixels is None:
        _write(out, _by_pillow(encoded, wanted, limits), wanted)
    elif pixels.shape == (wanted.height, wanted.width, wanted.channels):
        out[...] = pixels.transpose(2, 0, 1)
    else:
        _write(out, _picture(pixels), wanted)


@functools.cache
def _quick(decoder: str) -> Callable[..., Pixels | None] | None:
    """What this decoder asks before Pillow: None for "pillow"."""
    if decoder not in PACKAGES:
        known = ", ".join(PACKAGES)
        raise LoadError(f"spec.json names the decoder {decoder!r}, which this bundle does not have; it has: {known}")
    if decoder == "pillow":
        return None
    try:
        from handlers import turbo
    except ImportError as error:
        raise LoadError(
            f"spec.json names the decoder 'turbo', and it cannot be imported here ({error}); "
            f"pip install {' '.join(PACKAGES[decoder])} where the server runs"
        ) from None
    return turbo.decode


def _agreeing(quick: Callable[..., Pixels | None], decoder: str) -> None:
    """Other versions of the codecs could refuse everything (all would be slow) or compute otherwise."""
    sample = (np.arange(17 * 13 * 3) ** 2 // 64 % 256).astype(np.uint8).reshape(17, 13, 3)
    for format in ("PNG", "JPEG"):
        stream = io.BytesIO()
        Image.fromarray(sample).save(stream, format)
        pixels = quick(stream.getvalue(), most=sample.size, side=sample.size)
        if pixels is None or not np.array_equal(pixels, np.asarray(Image.open(stream))):
            packages = " ".join(PACKAGES[decoder])
            raise LoadError(f"a {format} is not read here as Pillow reads it: other versions of {packages} are needed")


def _whole(wanted: ImageInput) -> int:
    """The side to which a JPEG may be decoded smaller. Either way up: its orientation is not known yet."""
    return _OVERSAMPLE * max(wanted.width, wanted.height)


def _by_pillow(encoded: Encoded, wanted: ImageInput, limits: Limits) -> Image.Image:
    """Decoded and upright, not yet of the size or the mode."""
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        if _SIGNATURES.match(encoded):
            raise BadRequest(400, "the image's header is damaged or cut short") from None
        raise BadRequest(415, _NOT_AN_IMAGE) from None
    except MemoryError:
        raise
    except Exception:  # a hostile header makes Pillow raise nearly anything
        raise BadRequest(400, "the image's header is damaged or cut short") from None
    with image:
        columns, rows = image.size
        if columns * rows > limits.max_pixels:
            raise BadRequest(413, f"the image has {columns}×{rows} pixels; at most {limits.max_pixels} are read")
        try:
            if image.format in ("JPEG", "MPO"):
                image.draft(None, (_whole(wanted), _whole(wanted)))
            image.load()
            return _opaque(_upright(image))
        except (BadRequest, MemoryError):
            raise
        except Exception:
            raise BadRequest(400, "the image is damaged or cut short") from None


def fit(image: NDArray[Any], wanted: ImageInput) -> Pixels:
    """C×H×W and writable, from an H×W or H×W×C array (see `eight_bits`).

    `BadRequest` 422 for an array of another shape or with values out of range.
    """
    out = np.empty(wanted.shape, np.uint8)
    _write(out, _opaque(_picture(image)), wanted)
    return out


def eight_bits(values: NDArray[Any]) -> Pixels:
    """The kind of number says the scale, never the values: whole numbers are 0 to 255, floats 0 to 1, bools black or
    white. uint16 is 0 to 65535, as in a 16-bit PNG. `BadRequest` 422 for anything outside.
    """
    if values.dtype == np.uint8:
        return values
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if kind in "iu":
        if values.size and not (values.min() >= 0 and values.max() <= 255):
            raise BadRequest(422, "whole-number pixels must lie in 0 to 255")
        return values.astype(np.uint8)
    if kind == "f":
        if values.size and not (values.min() >= 0 and values.max() <= 1):  # false for NaN as well
            raise BadRequest(422, "floating-point pixels must lie in 0 to 1; send whole numbers for 0 to 255")
        return np.rint(values.astype(np.float32) * 255).astype(np.uint8)
    raise BadRequest(422, f"pixels must be numbers, not {values.dtype}")


def _picture(image: NDArray[Any]) -> Image.Image:
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)) or 0 in image.shape:
        raise BadRequest(422, f"an image has H×W, H×W×1, H×W×3 or H×W×4 values, not {_by(image.shape)}")
    return Image.fromarray(np.ascontiguousarray(eight_bits(image)))


def _write(out: Pixels, image: Image.Image, wanted: ImageInput) -> None:
    """An opaque picture, brought to mode and size."""
    mode = "L" if wanted.channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    pixels = np.asarray(_resized(image, wanted))
    out[...] = pixels if wanted.channels == 1 else pixels.transpose(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """Obey the EXIF (or XMP) orientation; damaged metadata is no reason to refuse a good picture."""
    if not image.info.keys() & {"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"}:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _opaque(image: Image.Image) -> Image.Image:
    """Any mode → L or RGB without alpha, 8 bits."""
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        # Pillow's own conversion would cut at 255. Mode I holds a 16-bit picture wherever a decoder here makes one.
        values = np.asarray(image.convert("I") if mode != "I" else image).clip(0, 65535).astype(np.uint16)
        return Image.fromarray(eight_bits(values))
    if mode == "F":
        return Image.fromarray(eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        layer = image if mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    if mode in ("L", "RGB"):
        return image
    return image.convert("L" if mode == "1" else "RGB")


def _resized(image: Image.Image, wanted: ImageInput) -> Image.Image:
    """Bilinear, antialiased. An image that has the size already is left alone, to the bit."""
    size = (wanted.width, wanted.height)
    if image.size == size:
        return image
    box = None
    if wanted.resize == "crop":
        scale = min(image.width / wanted.width, image.height / wanted.height)
        left, top = (image.width - wanted.width * scale) / 2, (image.height - wanted.height * scale) / 2
        box = (left, top, image.width - left, image.height - top)
    return image.resize(size, Image.Resampling.BILINEAR, box=box)


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single value"
