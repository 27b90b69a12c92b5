"""The fast JPEG decoder gives Pillow's pixels, and leaves unsupported files to Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from dinotwins_jax.data.base import BadImage, decode_image
from dinotwins_jax.data.jpeg import plain_jpeg


def photo(size=(150, 101), mode="RGB"):
    width, height = size
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(height), np.arange(width))[:, :, None]
    noisy = ramp + rng.integers(0, 60, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def pillow(data, side=None):
    image = Image.open(io.BytesIO(data))
    if side:
        image.draft(None, side)
    return np.asarray(image.convert("RGB"))


KINDS = {
    "4:4:4": lambda: jpeg(photo(), subsampling=0),
    "4:2:2": lambda: jpeg(photo(), subsampling=1),
    "4:2:0": lambda: jpeg(photo(), subsampling=2),
    "progressive": lambda: jpeg(photo(), progressive=True),
    "low quality": lambda: jpeg(photo(), quality=20),
    "grey": lambda: jpeg(photo(mode="L")),
    "one pixel wide": lambda: jpeg(photo((1, 77))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_jpegs_are_pillows_to_the_bit(kind):
    data = KINDS[kind]()
    assert plain_jpeg(data, None, None) is not None
    np.testing.assert_array_equal(decode_image(data), pillow(data))


@pytest.mark.parametrize(("max_side", "factor"), [(64, 2), (50, 2), (32, 4), (16, 8), (65, 1)])
def test_reduced_decoding_is_pillows_too(max_side, factor):
    data = jpeg(photo((128, 96)))
    expected = pillow(data, (128 // factor, 96 // factor))
    assert expected.shape == (96 // factor, 128 // factor, 3)
    np.testing.assert_array_equal(decode_image(data, max_side=max_side), expected)


def test_what_is_left_to_pillow():
    rotated = Image.Exif()
    rotated[0x0112] = 3
    upright = Image.Exif()
    upright[0x0112] = 1
    assert plain_jpeg(jpeg(photo(), exif=upright), None, None) is not None
    for data in (
        jpeg(photo(), exif=rotated),
        jpeg(photo(mode="CMYK")),
        jpeg(photo(), keep_rgb=True),
        jpeg(photo())[:-500],
        b"\x89PNG",
    ):
        assert plain_jpeg(data, None, None) is None
    np.testing.assert_array_equal(
        decode_image(jpeg(photo(), exif=rotated)), pillow(jpeg(photo()))[::-1, ::-1]
    )


@pytest.mark.parametrize("orientation", [0, *range(1, 10)])
def test_a_rotated_jpeg_too_large_for_pillow_has_the_pixels_of_a_small_one(
    monkeypatch, orientation
):
    """Reduced, then turned; into a canvas of its own width too."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(photo((160, 96)), exif=exif)
    expected = decode_image(data, max_side=20)
    assert expected.shape[:2] == ((20, 12) if 5 <= orientation <= 8 else (12, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    canvas = np.full((20, 20, 3), 7, np.uint8)
    for given in (None, canvas):
        found = decode_image(data, max_side=20, canvas=given)
        np.testing.assert_array_equal(found, expected)
    assert orientation in (0, 1, 9) or (canvas == 7).all()
    with pytest.raises(BadImage, match=r"15360 pixels.*config\.data\.max_pixels"):
        decode_image(data)


def test_a_file_that_ends_early_is_refused_as_by_pillow():
    with pytest.raises(BadImage, match="truncated"):
        decode_image(jpeg(photo())[:-500], name="cut.jpg")


def test_a_comment_that_says_exif_is_no_rotation():
    data = jpeg(photo(), comment=b"Exif\0\0 is only a word here")
    np.testing.assert_array_equal(decode_image(data), pillow(data))


def test_a_jpeg_as_wide_as_the_canvas_is_decoded_in_place():
    data, canvas = jpeg(photo((128, 96))), np.full((128, 128, 3), 7, np.uint8)
    pixels = decode_image(data, canvas=canvas)
    assert np.may_share_memory(pixels, canvas)
    np.testing.assert_array_equal(canvas[:96], pillow(data))
    assert (canvas[96:] == 7).all()
    for size in (127, 95):
        small = np.zeros((size, size, 3), np.uint8)
        assert not np.may_share_memory(decode_image(data, canvas=small), small)


def test_exif_behind_other_segments_is_found():
    rotated = Image.Exif()
    rotated[0x0112] = 3
    data = jpeg(photo(), exif=rotated)
    large = b"\xff\xed" + (60_000).to_bytes(2) + bytes(59_998)
    padded = data[:2] + large + large + data[2:]
    np.testing.assert_array_equal(decode_image(padded), pillow(jpeg(photo()))[::-1, ::-1])


@pytest.mark.parametrize("cut", [2, 3, 4, 5, 11, 20])
def test_a_header_that_ends_anywhere_is_refused(cut):
    with pytest.raises(BadImage, match=r"^cut\.jpg: "):
        decode_image(jpeg(photo())[:cut], name="cut.jpg")
