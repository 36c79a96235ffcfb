"""The decoders give the same pixels, and refuse the same files for the same reason, whatever is sent."""

from __future__ import annotations

import functools
import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from handlers import images, instances, turbo
from handlers.errors import BadRequest, LoadError
from handlers.spec import ImageInput, Limits, ModelSpec
from tests import zoo

ROOT = Path(__file__).parent.parent.parent
LIMITS = Limits(max_pixels=400_000)
SHAPES = (
    (3, 20, 24, "stretch"),
    (1, 20, 24, "stretch"),
    (3, 13, 17, "crop"),
    (1, 4, 4, "crop"),
    (3, 48, 64, "stretch"),
)
RGB, GREY = b"\x08\x02\0\0\0", b"\x08\0\0\0\0"


@functools.cache
def photo(columns: int, rows: int, mode: str = "RGB", which: int = 0) -> Image.Image:
    """A real picture of that size."""
    whole = Image.fromarray(load_sample_images().images[which])
    return whole.resize((columns, rows), Image.Resampling.BICUBIC).convert(mode)


def outcome(encoded: Any, decoder: str, shape: Any = SHAPES[0], limits: Limits = LIMITS) -> Any:
    """The pixels' bytes, or status and reason of the refusal."""
    try:
        return images.decode(encoded, ImageInput(*shape, decoder=decoder), limits).tobytes()
    except BadRequest as refused:
        return refused.status, refused.reason


def quick(encoded: Any) -> NDArray[np.uint8] | None:
    """What the fast codecs alone say."""
    return turbo.decode(encoded, most=LIMITS.max_pixels, side=256)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    size: tuple[int, int], kind: bytes, stream: bytes, *, between: bytes = b"", after: bytes = b"", cut: int = 0
) -> bytes:
    """A PNG of these compressed rows, in IDATs of `cut` bytes, with chunks before and after them."""
    cut = cut or len(stream) or 1
    data = b"".join(chunk(b"IDAT", stream[at : at + cut]) for at in range(0, len(stream), cut))
    header = chunk(b"IHDR", struct.pack(">II", *size) + kind)
    return b"\x89PNG\r\n\x1a\n" + header + between + data + after + chunk(b"IEND", b"")


def rows(picture: Image.Image, filters: bytes) -> bytes:
    """The picture's rows as a PNG has them before compression, with these filters' numbers before them in turn."""
    values = np.asarray(picture).reshape(picture.height, -1)
    return b"".join(bytes([filters[n % len(filters)]]) + row.tobytes() for n, row in enumerate(values))


PNGS = {
    **{f"level-{level}": zoo.encoded(photo(32, 32), compress_level=level) for level in (0, 1, 6, 9)},
    **{
        f"{w}x{h}-{mode}": zoo.encoded(photo(w, h, mode))
        for w, h in ((1, 1), (24, 20), (33, 7))
        for mode in ("RGB", "L")
    },
    "of-many-blocks": zoo.encoded(photo(301, 203)),
    "of-many-blocks-grey": zoo.encoded(photo(301, 403, "L")),
    **{f"filter-{n}": png((24, 20), RGB, zlib.compress(rows(photo(24, 20), bytes([n])))) for n in range(5)},
    "every-filter-grey": png((24, 20), GREY, zlib.compress(rows(photo(24, 20, "L"), bytes((4, 3, 2, 1, 0))))),
    "many-parts": png((24, 20), RGB, zlib.compress(rows(photo(24, 20), b"\4\1")), cut=7),
    "small-window": png((24, 20), RGB, zlib.compress(rows(photo(24, 20), b"\2"), 9, 9)),
    "resolution": zoo.encoded(photo(24, 20), dpi=(72, 72)),
    "harmless-chunks": png(
        (24, 20),
        RGB,
        zlib.compress(rows(photo(24, 20), b"\1")),
        between=chunk(b"sRGB", b"\0") + chunk(b"gAMA", bytes(4)) + chunk(b"tIME", bytes(7)) + chunk(b"cHRM", bytes(32)),
    ),
    "bytes-after-the-end": zoo.encoded(photo(24, 20)) + b"more",
}
JPEGS = {
    **{
        f"quality-{quality}-{sampling}-{w}x{h}": zoo.encoded(photo(w, h), "JPEG", quality=quality, subsampling=sampling)
        for quality in (30, 75, 95, 100)
        for sampling in (0, 1, 2)
        for w, h in ((32, 32), (33, 17), (301, 203))
    },
    "grey": zoo.encoded(photo(33, 17, "L"), "JPEG"),
    "progressive": zoo.encoded(photo(301, 203), "JPEG", progressive=True),
    "progressive-grey": zoo.encoded(photo(33, 17, "L"), "JPEG", progressive=True),
    "optimised": zoo.encoded(photo(33, 17), "JPEG", optimize=True),
    "restarts": zoo.encoded(photo(65, 33), "JPEG", restart_marker_blocks=2),
    "restarts-in-rows": zoo.encoded(photo(65, 33), "JPEG", restart_marker_rows=1, progressive=True),
    "not-ycc": zoo.encoded(photo(33, 17), "JPEG", keep_rgb=True),
    "comment": zoo.encoded(photo(33, 17), "JPEG", comment=b"hello"),
    "bytes-after-the-end": zoo.encoded(photo(33, 17), "JPEG") + b"more",
}
PLAIN = {
    **{f"png-{name}": body for name, body in PNGS.items()},
    **{f"jpeg-{name}": body for name, body in JPEGS.items()},
}
_STREAM = zlib.compress(rows(photo(24, 20), b"\1"))
ODD = {
    "jpeg-exif": zoo.oriented(6),
    "jpeg-cmyk": zoo.encoded(photo(24, 20, "CMYK"), "JPEG"),
    "jpeg-profile": zoo.encoded(photo(24, 20), "JPEG", icc_profile=b"no profile"),
    "jpeg-no-end": zoo.encoded(photo(24, 20), "JPEG")[:-2],
    "jpeg-half": zoo.encoded(photo(24, 20), "JPEG")[:500],
    "jpeg-short-jfif": b"\xff\xd8\xff\xe0\0\x08JFIF\0\1" + zoo.encoded(photo(24, 20), "JPEG")[20:],
    "jpeg-short-adobe": b"\xff\xd8\xff\xee\0\x07Adobe" + zoo.encoded(photo(24, 20), "JPEG")[2:],
    "jpeg-no-start": b"\xff\0" + zoo.encoded(photo(24, 20), "JPEG")[2:],
    "png-alpha": zoo.encoded(photo(24, 20, "RGBA")),
    "png-palette": zoo.encoded(photo(24, 20).quantize(8)),
    "png-one-bit": zoo.encoded(photo(24, 20, "1")),
    "png-transparent-colour": zoo.encoded(photo(24, 20), transparency=(0, 0, 0)),
    "png-exif-at-the-end": png((24, 20), RGB, _STREAM, after=chunk(b"eXIf", zoo.oriented(6)[30:60])),
    "png-chunk-amid-the-rows": png(
        (24, 20), RGB, _STREAM[99:], between=chunk(b"IDAT", _STREAM[:99]) + chunk(b"sRGB", b"\0")
    ),
    "png-text": png((24, 20), RGB, _STREAM, between=chunk(b"tEXt", b"exif\0")),
    "png-interlaced": png((24, 20), RGB[:4] + b"\1", _STREAM),
    "png-odd-compression": png((24, 20), b"\x08\x02\1\0\0", _STREAM),
    "png-odd-filter-method": png((24, 20), b"\x08\x02\0\1\0", _STREAM),
    "png-filter-5": png((24, 20), RGB, zlib.compress(rows(photo(24, 20), b"\5"))),
    "png-a-row-too-many": png((24, 19), RGB, _STREAM),
    "png-a-row-too-few": png((24, 21), RGB, _STREAM),
    "png-wrong-adler": png((24, 20), RGB, _STREAM[:-4] + bytes(4)),
    "png-no-adler": png((24, 20), RGB, _STREAM[:-4]),
    "png-nothing-in-it": png((24, 20), RGB, b""),
    "png-no-columns": png((0, 20), RGB, _STREAM),
    "png-animated": zoo.encoded(photo(24, 20), save_all=True, append_images=[photo(24, 20, which=1)]),
    "png-no-end": zoo.encoded(photo(24, 20))[:-12],
    "png-wrong-header-checksum": zoo.encoded(photo(24, 20)).replace(b"\x08\x02\0\0\0", b"\x08\x02\0\0\0\0", 1),
    "png-wrong-chunk-checksum": png((24, 20), RGB, _STREAM, between=b"\0\0\0\1sRGB\0\0\0\0\0"),
    "png-chunk-too-short": png((24, 20), RGB, _STREAM, between=chunk(b"gAMA", b"")),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_pictures_are_read_quickly_and_to_the_bit_as_pillow_reads_them(name: str) -> None:
    body = PLAIN[name]
    pixels = quick(body)
    assert pixels is not None
    whole = Image.open(io.BytesIO(body))
    np.testing.assert_array_equal(pixels.squeeze(axis=2) if pixels.shape[2] == 1 else pixels, np.asarray(whole))
    for shape in (*SHAPES, (3, whole.height, whole.width), (1, whole.height, whole.width)):
        assert outcome(body, "turbo", shape) == outcome(body, "pillow", shape)


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_left_to_pillow(name: str) -> None:
    assert quick(ODD[name]) is None
    for shape in SHAPES:
        assert outcome(ODD[name], "turbo", shape) == outcome(ODD[name], "pillow", shape)


def test_the_whole_zoo_is_read_alike() -> None:
    bodies = [oddity.body for oddity in zoo.ZOO.values() if oddity.body]
    assert len(bodies) > 20
    for body in bodies:
        for shape in SHAPES[:3]:
            assert outcome(body, "turbo", shape) == outcome(body, "pillow", shape)


def test_a_jpeg_that_can_be_decoded_smaller_is_left_to_pillow() -> None:
    body = zoo.encoded(photo(301, 203), "JPEG")
    assert turbo.decode(body, most=10**6, side=101) is None
    assert turbo.decode(body, most=10**6, side=102) is not None
    for shape in ((3, 25, 25), (3, 26, 26), (1, 8, 8)):
        assert outcome(body, "turbo", shape) == outcome(body, "pillow", shape)


@pytest.mark.parametrize("name", ["png-24x20-RGB", "png-many-parts", "png-resolution", "jpeg-grey"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("decoder", images.PACKAGES)
def test_bytes_may_come_in_any_kind_of_buffer(decoder: str, kind: type, name: str) -> None:
    assert outcome(kind(PLAIN[name]), decoder) == outcome(PLAIN[name], "pillow")
    assert outcome(kind(ODD["png-alpha"]), decoder) == outcome(ODD["png-alpha"], "pillow")
    assert outcome(kind(b"nonsense"), decoder) == outcome(b"nonsense", "pillow")
    assert outcome(kind(b""), decoder)[0] == 400


@pytest.mark.parametrize("decoder", images.PACKAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_a_batch_gets_what_decode_returns_and_keeps_what_it_had_after_a_refusal(
    decoder: str, shape: Any
) -> None:
    spec = ModelSpec("classification", "lenet", {}, ImageInput(*shape, decoder=decoder), ("a", "b"))
    for body in (PLAIN["png-24x20-RGB"], PLAIN["jpeg-grey"], ODD["png-alpha"]):
        batch = np.full((3, *spec.input.shape), 7, np.uint8)
        instances.write(batch[1], bytearray(body), spec)
        np.testing.assert_array_equal(batch[1], instances.array(body, spec))
        assert (batch[::2] == 7).all()
    for body in (ODD["jpeg-half"], b"nonsense", b""):
        with pytest.raises(BadRequest):
            instances.write(batch[0], body, spec)
        assert (batch[0] == 7).all()


MUTABLE = [
    PLAIN[name] for name in ("png-24x20-RGB", "png-33x7-L", "png-resolution", "png-many-parts", "png-level-0")
] + [PLAIN[name] for name in ("jpeg-quality-75-2-33x17", "jpeg-progressive-grey", "jpeg-restarts", "jpeg-not-ycc")]
SEGMENTS = [
    *(
        b"\xff\xe1\0\x0aExif\0\0xx",
        b"\xff\xe0\0\x07JFIF\0",
        b"\xff\xee\0\x04xx",
        b"\xff\xdb\0\x02",
        b"\xff\xdd\0\x04\0\1",
    ),
    *(chunk(kind, bytes(size)) for kind in (b"tRNS", b"gAMA", b"eXIf", b"IDAT", b"PLTE") for size in (0, 4, 6)),
]


@settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(MUTABLE),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), max_size=3),
    st.one_of(st.just(0), st.integers(0, 60)),
    st.one_of(st.none(), st.tuples(st.integers(0, 40), st.sampled_from(SEGMENTS))),
    st.sampled_from(SHAPES),
)
def test_damage_is_judged_alike(
    seed: bytes, damage: list[tuple[int, int]], cut: int, more: tuple[int, bytes] | None, shape: Any
) -> None:
    damaged = bytearray(seed)
    for place, change in damage:
        damaged[place % len(damaged)] ^= change
    if more is not None:
        ends = [2, 8, 20, 33, len(seed) - 12, *range(33, 68)]
        place = ends[more[0] % len(ends)]
        damaged[place:place] = more[1]
    damaged = damaged[: len(damaged) - cut]
    assert outcome(damaged, "turbo", shape) == outcome(damaged, "pillow", shape)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from([RGB, GREY]),
    st.binary(min_size=1, max_size=30),
    st.tuples(st.integers(0, 9), st.integers(9, 15), st.integers(1, 9), st.integers(0, 4)),
    st.integers(1, 300),
    st.integers(-2, 40),
)
def test_every_kind_of_compression_and_every_filter_is_undone_alike(
    columns: int, lines: int, kind: bytes, filters: bytes, how: tuple[int, int, int, int], cut: int, more: int
) -> None:
    picture = photo(columns, lines, "RGB" if kind == RGB else "L", 1)
    raw = rows(picture, bytes(number % 5 for number in filters))
    packer = zlib.compressobj(how[0], zlib.DEFLATED, *how[1:])
    raw = raw[:more] if more < 0 else raw + bytes(more // 10)
    body = png((columns, lines), kind, packer.compress(raw) + packer.flush(), cut=cut)
    assert (quick(body) is None) == (more < 0 or more >= 10)
    assert outcome(body, "turbo") == outcome(body, "pillow")


def test_the_one_known_difference_is_a_stream_that_no_encoder_writes() -> None:
    """zlib refuses more than 30 codes for distances (RFC 1951 has 30); libdeflate does not look at unused ones."""

    def black(distances: int) -> bytes:
        bits: list[int] = []

        def put(value: int, count: int) -> None:
            bits.extend(value >> place & 1 for place in range(count))

        for value, count in ((1, 1), (2, 2), (0, 5), (distances - 1, 5), (14, 4)):  # last block, its own codes, sizes
            put(value, count)
        for place in range(18):  # of the codes of the codes' lengths: "one" and "11 to 138 zeros", a bit each
            put(int(place in (2, 17)), 3)
        for value, count in ((0, 1), (1, 1), (127, 7), (1, 1), (106, 7), (0, 1), (1, 1), (distances - 11, 7)):
            put(value, count)  # lengths: 1 for the byte 0, 255 zeros, 1 for the end, no distances
        bits += [0] * (20 * (24 * 3 + 1)) + [1]
        packed = np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()
        return png((24, 20), RGB, b"\x78\x01" + packed + struct.pack(">I", zlib.adler32(bytes(20 * (24 * 3 + 1)))))

    assert outcome(black(30), "turbo") == outcome(black(30), "pillow") == bytes(3 * 20 * 24)
    assert outcome(black(31), "pillow")[0] == 400
    assert outcome(black(31), "turbo") == outcome(black(30), "turbo")


def test_limits_hold_before_a_codec_sees_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("a codec was asked")

    large = {name: body for name, body in PLAIN.items() if "301" in name or "blocks" in name}
    limits, shape = Limits(max_pixels=61_102), (3, 48, 64)
    expected = {name: outcome(body, "pillow", shape, limits) for name, body in large.items()}
    for module, function in ((turbo.deflate, "zlib_decompress"), (turbo.simplejpeg, "decode_jpeg")):
        monkeypatch.setattr(module, function, never)
    assert large
    for name, body in large.items():
        assert expected[name][0] == 413
        assert outcome(body, "turbo", shape, limits) == expected[name]
        assert outcome(body, "turbo", shape, Limits(max_bytes=len(body) - 1))[0] == 413


HOSTILE = """
import resource, struct, sys, zlib
from handlers import images
from handlers.errors import BadRequest, LoadError
from handlers.spec import ImageInput, Limits
from tests import zoo

wanted, jpeg = ImageInput(3, 32, 32), zoo.JPEG
at = jpeg.index(b"\\xff\\xc0") + 5
bodies = [zoo.png_claiming(2048, 2048), zoo.png_claiming(5000, 6000), zoo.png_claiming(1, 4_000_000)]
bodies += [jpeg[:at] + struct.pack(">HH", 6, 65500) + jpeg[at + 4 :], zoo.png_claiming(2**31, 2**31)]
images.decode(zoo.PNG, wanted, Limits())
images.decode(jpeg, wanted, Limits())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for body in bodies * 3:
    try:
        images.decode(body, wanted, Limits())
    except BadRequest as refused:
        assert refused.status in (400, 413), refused
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_hostile_headers_take_no_memory_to_speak_of() -> None:
    """Kilobytes by which the peak grew. 5000×6000 pixels, which the limits allow, are 90 MB when they are there."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60_000


def test_threads_do_not_disturb_each_other() -> None:
    bodies = list(PLAIN.values()) * 4
    expected = [outcome(body, "turbo") for body in bodies]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda body: outcome(body, "turbo"), bodies)) == expected


@pytest.mark.parametrize("package", ["deflate", "pyspng", "simplejpeg"])
def test_a_missing_codec_is_a_load_error_and_pillow_alone_still_serves(package: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
from handlers import images
from handlers.errors import LoadError
from handlers.spec import ImageInput, Limits
images.require("pillow")
images.decode({zoo.PNG!r}, ImageInput(3, 20, 24, decoder="pillow"), Limits())
try:
    images.require("turbo")
except LoadError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "decoder 'turbo'" in done.stdout
    assert "pip install pillow deflate pyspng simplejpeg" in done.stdout


@pytest.mark.parametrize("wrong", [None, np.zeros((17, 13, 3), np.uint8)], ids=["refuses", "computes-otherwise"])
def test_codecs_that_disagree_with_pillow_are_a_load_error(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    images.require("turbo")
    monkeypatch.setattr(images, "_quick", lambda decoder: lambda encoded, **limits: wrong)
    with pytest.raises(LoadError, match="PNG is not read here as Pillow reads it"):
        images.require("turbo")


def test_a_jpeg_codec_that_computes_otherwise_is_a_load_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from handlers import turbo

    def otherwise(encoded: Any, **limits: int) -> Any:
        found = turbo.decode(encoded, **limits)
        return found if found is None or bytes(encoded[:2]) != b"\xff\xd8" else found ^ 1

    monkeypatch.setattr(images, "_quick", lambda decoder: otherwise)
    with pytest.raises(LoadError, match="JPEG is not read here as Pillow reads it"):
        images.require("turbo")


def test_a_spec_keeps_its_decoder_and_one_of_old_says_pillow() -> None:
    old = ModelSpec("classification", "lenet", {}, ImageInput(3, 20, 24, decoder="pillow"), ("a", "b"))
    assert ModelSpec.from_json(old.to_json()).input == old.input
    assert ImageInput(3, 20, 24).decoder == "turbo"
