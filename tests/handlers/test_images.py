"""Pictures become what a person would expect to see."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from handlers import images
from handlers.errors import BadRequest, LoadError
from handlers.spec import ImageInput, Limits
from tests import zoo

LIMITS = Limits()
COLOUR = ImageInput(3, 20, 24)
GREY = ImageInput(1, 20, 24)


def rgb(encoded: bytes, wanted: ImageInput = COLOUR) -> np.ndarray:
    return images.decode(encoded, wanted, LIMITS).transpose(1, 2, 0)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


PLAIN = np.asarray(zoo.picture())


@pytest.mark.parametrize("format", ["PNG", "BMP"])
def test_lossless_formats_come_back_to_the_bit(format: str) -> None:
    np.testing.assert_array_equal(rgb(zoo.encoded(zoo.picture(), format)), PLAIN)


def test_webp_and_gif_are_close_to_what_was_drawn() -> None:
    np.testing.assert_array_equal(rgb(zoo.encoded(zoo.picture(), "WEBP", lossless=True)), PLAIN)
    assert difference(rgb(zoo.encoded(zoo.picture("P"), "GIF")), PLAIN) < 25


def test_cmyk_jpeg_is_not_inverted() -> None:
    assert difference(rgb(zoo.encoded(zoo.picture("CMYK"), "JPEG", quality=95)), PLAIN) < 12


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (24, 20), (10, 20, 30, 0))
    assert (rgb(zoo.encoded(clear)) == 255).all()
    half = Image.new("RGBA", (24, 20), (0, 0, 0, 128))
    assert np.abs(rgb(zoo.encoded(half)).astype(int) - 127).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "LA"])
def test_every_kind_of_transparency_is_seen(mode: str) -> None:
    image = Image.new(mode, (24, 20), 0)
    options = {"P": {"transparency": 0}, "L": {"transparency": 0}, "RGB": {"transparency": (0, 0, 0)}}.get(mode, {})
    assert (rgb(zoo.encoded(image, **options)) == 255).all()


def test_an_opaque_palette_keeps_its_colours() -> None:
    image = Image.new("P", (24, 20), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert (rgb(zoo.encoded(image)) == (200, 100, 50)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation: int) -> None:
    encoded = zoo.oriented(orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    wanted = ImageInput(3, upright.height, upright.width)
    np.testing.assert_array_equal(rgb(encoded, wanted), np.asarray(upright.convert("RGB")))


def test_16_bit_grey_keeps_its_shades() -> None:
    grey = np.asarray(zoo.picture("L"))
    np.testing.assert_array_equal(rgb(zoo.encoded(zoo.picture("I;16")), GREY)[:, :, 0], grey)


def test_1_bit_is_black_and_white() -> None:
    assert set(np.unique(rgb(zoo.encoded(zoo.picture("1")), GREY))) == {0, 255}


def test_colour_becomes_grey_by_its_luminance() -> None:
    np.testing.assert_array_equal(rgb(zoo.encoded(zoo.picture()), GREY)[:, :, 0], np.asarray(zoo.picture("L")))


def test_grey_becomes_three_equal_channels() -> None:
    pixels = rgb(zoo.encoded(zoo.picture("L")))
    assert (pixels == pixels[:, :, :1]).all()


def test_an_animation_is_its_first_frame() -> None:
    for format in ("GIF", "WEBP"):
        first, second = Image.new("RGB", (24, 20), "white"), Image.new("RGB", (24, 20), "black")
        assert (rgb(zoo.encoded(first, format, save_all=True, append_images=[second])) > 250).all()


def test_stretching_uses_the_whole_picture_and_cropping_its_middle() -> None:
    left_black = Image.new("L", (60, 20), 255)
    left_black.paste(0, (0, 0, 20, 20))
    encoded = zoo.encoded(left_black)
    stretched = images.decode(encoded, ImageInput(1, 20, 20, "stretch"), LIMITS)
    cropped = images.decode(encoded, ImageInput(1, 20, 20, "crop"), LIMITS)
    assert stretched[0, :, 0].max() == 0
    assert (cropped[0, :, 1:] == 255).all()


def test_shrinking_is_antialiased() -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    shrunk = images.fit(checks.astype(np.uint8), ImageInput(1, 8, 8))
    assert np.abs(shrunk.astype(int) - 127).max() < 20


def test_a_large_jpeg_decoded_at_a_fraction_looks_the_same() -> None:
    large = zoo.picture(size=(1600, 1200))
    wanted = ImageInput(3, 32, 32)
    for options in ({}, {"exif": b""}):
        quick = images.decode(zoo.encoded(large, "JPEG", quality=90, **options), wanted, LIMITS)
        assert difference(quick, images.fit(np.asarray(large), wanted)) < 2


def test_arrays_and_files_of_the_same_picture_agree() -> None:
    for size in ((24, 20), (50, 70)):
        picture = zoo.picture(size=size)
        one, other = rgb(zoo.encoded(picture)), images.fit(np.asarray(picture), COLOUR).transpose(1, 2, 0)
        np.testing.assert_array_equal(one, other)


def test_the_result_may_be_written_to() -> None:
    for wanted in (COLOUR, GREY):
        assert images.decode(zoo.PNG, wanted, LIMITS).flags.writeable


def test_the_kind_of_number_says_the_scale() -> None:
    assert images.eight_bits(np.array([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]
    assert images.eight_bits(np.array([0, 1, 255])).tolist() == [0, 1, 255]
    assert images.eight_bits(np.array([0, 257, 65535], np.uint16)).tolist() == [0, 1, 255]
    assert images.eight_bits(np.array([False, True])).tolist() == [0, 255]
    for wrong in ([0.0, 2.0], [-0.1], [float("nan")], [0, 256], [-1]):
        with pytest.raises(BadRequest) as refused:
            images.eight_bits(np.array(wrong))
        assert refused.value.status == 422


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2), (0, 4), (2, 2, 5), (1, 2, 2, 3), ()])
def test_arrays_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest):
        images.fit(np.zeros(shape, np.uint8), COLOUR)


def test_limits_hold_before_anything_is_decoded() -> None:
    for encoded, limits in ((zoo.PNG, Limits(max_bytes=100)), (zoo.PNG, Limits(max_pixels=479))):
        with pytest.raises(BadRequest) as refused:
            images.decode(encoded, COLOUR, limits)
        assert refused.value.status == 413
    images.decode(zoo.PNG, COLOUR, Limits(max_pixels=480))


def test_odd_metadata_raises_no_warning() -> None:
    for name in ("jpeg-broken-exif", "png-palette-half-transparent", "png-RGB"):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            images.decode(zoo.ZOO[name].body, COLOUR, LIMITS)
        assert seen == []


def test_a_missing_decoder_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    images.require("pillow")
    images.require("turbo")
    with pytest.raises(LoadError, match=r"'spng'.*turbo, pillow"):
        images.require("spng")
    monkeypatch.setattr(images.features, "check", lambda name: name != "webp")
    with pytest.raises(LoadError, match="without webp"):
        images.require("pillow")


SEEDS = [zoo.PNG, zoo.JPEG, *(zoo.ZOO[name].body for name in ("webp", "gif", "bmp", "jpeg-exif-6", "png-I16", "png-P"))]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6),
    st.integers(0, 60),
)
def test_a_damaged_file_is_an_image_or_a_bad_request_and_nothing_else(
    seed: bytes, damage: list[tuple[int, int]], cut: int
) -> None:
    damaged = bytearray(seed)
    for place, value in damage:
        damaged[place % len(damaged)] = value
    try:
        pixels = images.decode(bytes(damaged[: len(damaged) - cut]), COLOUR, LIMITS)
    except BadRequest as error:
        pixels, status = None, error.status
    if pixels is None:
        assert status in (400, 413, 415)
    else:
        assert (pixels.shape, pixels.dtype) == ((3, 20, 24), np.uint8)
