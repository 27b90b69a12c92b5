"""Bands, pages and alpha channels: read whole, or refused in one line that names the key."""

import importlib.util
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features
from wide_files import files, random_pixels, reading, tiff, wide_png

from dinotwins_jax.data import make_source, open_source
from dinotwins_jax.data.bands import as_colours, luma, resized
from dinotwins_jax.data.base import BadImage, UnfitImage, decode_image, read_image
from dinotwins_jax.data.decode import BatchLoader, read_or_next
from dinotwins_jax.data.describe import describe
from dinotwins_jax.data.look import look_at
from dinotwins_jax.data.pipeline import eval_batches

RGB8, RGBA8 = random_pixels((20, 30, 3)), random_pixels((20, 30, 4))
FOUR = random_pixels((20, 30, 4), np.uint16)


def encoded(pixels, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


# Never cut silently


CUT = {  # file -> (its number of bands or pages, what the message says of it)
    "4 bands of 16 bits": (tiff(FOUR, photometric="rgb"), 4, "4 bands of 16 bits"),
    "4 bands of 8 bits": (tiff(RGBA8), 4, "4 bands"),
    "4th band not alpha": (
        tiff(RGBA8, photometric="rgb", extrasamples=["unspecified"]),
        4,
        "4 bands",
    ),
    "5 bands": (tiff(random_pixels((9, 8, 5)), photometric="rgb"), 5, "5 bands"),
    "2 bands": (tiff(random_pixels((9, 8, 2))), 2, "2 bands"),
    "13 bands": (tiff(random_pixels((9, 8, 13), np.uint16)), 13, "13 bands"),
    "planes": (
        tiff(random_pixels((4, 9, 8)), photometric="minisblack", planarconfig="separate"),
        4,
        "4 bands",
    ),
    "2 pages": (
        tiff(random_pixels((2, 9, 8), np.uint16), photometric="minisblack"),
        2,
        "2 pages of 16 bits",
    ),
    "ImageJ stack": (tiff(random_pixels((5, 9, 8), np.uint16), imagej=True), 5, "5 pages"),
    "pages of colours": (
        tiff(random_pixels((2, 9, 8, 3)), photometric="rgb"),
        6,
        "2 pages of 3 bands",
    ),
}


@pytest.mark.parametrize("kind", CUT)
def test_more_bands_or_pages_than_are_read_are_refused(kind):
    """The line names the file, what it has, and the key."""
    data, bands, has = CUT[kind]
    for channels in {1, 3, 7} - {bands}:
        with pytest.raises(UnfitImage) as caught:
            decode_image(data, name="a.tif", reading=reading(channels))
        line = str(caught.value)
        assert line.startswith(f"a.tif: has {has}") and "\n" not in line
        assert f"reads {channels}; set config.model.in_channels={bands} " in line
        again = pickle.loads(pickle.dumps(caught.value))
        assert isinstance(again, UnfitImage) and str(again) == line


@pytest.mark.parametrize("kind", CUT)
def test_as_many_bands_or_pages_as_are_read_are_read_whole(kind):
    data, bands, _ = CUT[kind]
    pixels = decode_image(data, reading=reading(bands))
    assert pixels.shape[2] == bands and pixels.dtype == np.uint8
    assert len({band.tobytes() for band in np.moveaxis(pixels, -1, 0)}) == bands


def test_bands_and_pages_keep_their_values_and_order():
    pages = random_pixels((3, 9, 8))
    stacked = decode_image(tiff(pages, photometric="minisblack"), reading=reading(3))
    np.testing.assert_array_equal(stacked, np.moveaxis(pages, 0, -1))
    np.testing.assert_array_equal(decode_image(tiff(RGBA8), reading=reading(4)), RGBA8)
    planes = tiff(pages, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(decode_image(planes), np.moveaxis(pages, 0, -1))


@pytest.mark.parametrize("options", [{"compression": "zlib"}, {"tile": (16, 16)}, {"bigtiff": True},
                                     {"byteorder": ">"}], ids=str)  # fmt: skip
def test_tiffs_of_any_layout(options):
    wide = random_pixels((20, 30, 4), np.uint16)
    pixels = decode_image(tiff(wide, **options), reading=reading(4, mode="fixed", range=(0, 65535)))
    np.testing.assert_array_equal(pixels, np.round(wide / 257).astype(np.uint8))


def test_orientation_and_white_is_zero():
    turned = tiff(RGBA8, extratags=[(274, "H", 1, 6, True)])
    np.testing.assert_array_equal(decode_image(turned, reading=reading(4)), np.rot90(RGBA8, -1))
    white = tiff(random_pixels((2, 9, 8)), photometric="miniswhite")
    black = tiff(255 - random_pixels((2, 9, 8)), photometric="minisblack")
    one, other = (decode_image(data, reading=reading(2)) for data in (white, black))
    np.testing.assert_array_equal(one, other)


def test_thumbnails_and_frames_are_no_pages(tmp_path):
    """A reduced page of a TIFF does not count; of an animation the first frame is read."""
    import tifffile

    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(RGB8, photometric="rgb")
        file.write(RGB8[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(decode_image(tmp_path / "a.tif"), RGB8)
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    for format in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, format, save_all=True, append_images=frames[1:])
        for channels in (1, 3):
            pixels = decode_image(file.getvalue(), reading=reading(channels))
            assert pixels.shape == (8, 8, channels) and abs(int(pixels.mean()) - 10) < 4


def test_pages_of_different_sizes_are_refused(tmp_path):
    import tifffile

    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(RGB8[..., 0])
        file.write(RGB8[:10, :, 0])
    with pytest.raises(UnfitImage, match="2 pages of different sizes"):
        decode_image(tmp_path / "a.tif", reading=reading(2))


def test_a_tiff_above_the_limit_of_pixels_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match=r"30 x 20 pixels.*config\.data\.max_pixels"):
        decode_image(tiff(RGBA8), reading=reading(4))


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="it reads LZW")
def test_a_compression_that_needs_another_package_is_named():
    pages, file = [Image.fromarray(RGB8[..., k]) for k in range(2)], io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    with pytest.raises(
        UnfitImage, match=r"a\.tif: is compressed by LZW; .*pip install imagecodecs"
    ):
        decode_image(file.getvalue(), name="a.tif", reading=reading(2))
    one = io.BytesIO()
    pages[0].save(one, "TIFF", compression="tiff_lzw")  # Pillow reads it
    np.testing.assert_array_equal(decode_image(one.getvalue(), reading=reading(1)), RGB8[..., :1])


def test_a_truncated_tiff_of_bands_is_a_bad_image():
    with pytest.raises(BadImage) as caught:
        decode_image(tiff(FOUR)[:-900], name="cut.tif", reading=reading(4))
    assert str(caught.value).startswith("cut.tif: ")


# Alpha, grey and colours


@pytest.mark.parametrize("data", [encoded(RGBA8), encoded(RGBA8, "WEBP", lossless=True, exact=True),
                                  tiff(RGBA8, photometric="rgb", extrasamples=["unassalpha"])],
                         ids=["PNG", "WEBP", "TIFF"])  # fmt: skip
def test_alpha_is_dropped_or_kept(data):
    np.testing.assert_array_equal(decode_image(data), RGBA8[..., :3])
    np.testing.assert_array_equal(decode_image(data, reading=reading(4)), RGBA8)
    grey = decode_image(data, reading=reading(1))
    np.testing.assert_array_equal(grey, luma(RGBA8[..., :3]))


def test_luma_is_pillows():
    np.testing.assert_array_equal(
        luma(RGB8)[..., 0], np.asarray(Image.fromarray(RGB8).convert("L"))
    )
    wide = random_pixels((20, 30, 3), np.uint16)
    exact = wide @ np.array([0.299, 0.587, 0.114])
    assert luma(wide).dtype == np.uint16 and np.abs(luma(wide)[..., 0] - exact).max() <= 1
    assert luma(wide.astype(np.float32)).dtype == np.float32


def test_one_channel_of_grey_and_colour_files():
    grey = random_pixels((20, 30))
    for data in (encoded(grey), tiff(grey)):
        np.testing.assert_array_equal(decode_image(data, reading=reading(1))[..., 0], grey)
    np.testing.assert_array_equal(decode_image(encoded(RGB8), reading=reading(1)), luma(RGB8))
    jpeg = encoded(np.repeat(grey[..., None], 3, axis=2) // 2 + 60, "JPEG", quality=95)
    canvas = np.zeros((30, 30, 1), np.uint8)
    pixels = decode_image(jpeg, canvas=canvas, reading=reading(1))
    pillow = np.asarray(Image.open(io.BytesIO(jpeg)).convert("L"))
    assert (
        np.may_share_memory(pixels, canvas)
        and np.abs(pixels[..., 0] - pillow.astype(int)).max() <= 1
    )


def test_grey_becomes_three_equal_channels_and_no_other_number():
    data = encoded(random_pixels((20, 30)))
    pixels = decode_image(data)
    assert pixels.shape == (20, 30, 3) and (pixels == pixels[..., :1]).all()
    for channels in (2, 4):
        with pytest.raises(UnfitImage, match=f"has 1 band, this run reads {channels}"):
            decode_image(data, reading=reading(channels))
    with pytest.raises(UnfitImage, match="has 3 bands, this run reads 4"):
        decode_image(encoded(RGB8, "JPEG"), reading=reading(4))


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_16_bit_pngs_are_read_whole(bands):
    """Pillow halves the samples of all but grey ones."""
    wide = random_pixels((20, 30, bands), np.uint16)
    window = {"mode": "fixed", "range": (0, 255)}  # shows the lower byte
    pixels = decode_image(wide_png(wide), reading=reading(bands, **window))
    np.testing.assert_array_equal(pixels, wide.clip(0, 255))
    halved = decode_image(wide_png(wide), reading=reading(bands)).astype(int)
    assert np.abs(halved - wide / 257).max() <= 1


def test_16_bit_colours_that_pillow_halves_are_refused_with_a_window():
    window = reading(3, mode="fixed", range=(0, 4095))
    ppm = b"P6 # made by hand\n3 2\n4095\n" + bytes(36)
    with pytest.raises(UnfitImage, match=r"a\.ppm: has colours of 16 bits"):
        decode_image(ppm, name="a.ppm", reading=window)
    assert decode_image(ppm).shape == (2, 3, 3)
    eight = encoded(RGB8, "PPM")
    np.testing.assert_array_equal(decode_image(eight, reading=window), RGB8)
    if features.check("jpg_2000"):
        eight = encoded(RGB8, "JPEG2000")
        np.testing.assert_array_equal(decode_image(eight, reading=window), decode_image(eight))


def test_a_rotated_16_bit_png_is_upright():
    exif = Image.Exif()
    exif[274] = 6
    plain = wide_png(random_pixels((20, 30, 3), np.uint16))
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    turned = plain[:33] + chunk + plain[33:]
    for window in ({}, {"mode": "fixed", "range": (0, 65535)}):
        upright = decode_image(plain, reading=reading(3, **window))
        np.testing.assert_array_equal(
            decode_image(turned, reading=reading(3, **window)), np.rot90(upright, -1)
        )


# Downstream


def test_shrinking_mixes_no_bands():
    """Pillow's RGBA is scaled by its alpha: bands are not."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0], pixels[:4, :, 3] = 100, 200
    small = resized(pixels, (4, 4), Image.Resampling.BICUBIC)
    assert (small[..., 0] == 100).all() and small.shape == (4, 4, 4)
    three = resized(RGB8, (10, 7), Image.Resampling.BICUBIC)
    bands = [resized(RGB8[..., k : k + 1], (10, 7), Image.Resampling.BICUBIC) for k in range(3)]
    np.testing.assert_array_equal(three, np.concatenate(bands, axis=-1))


def test_as_colours():
    one, two, four = (random_pixels((5, 4, bands)) for bands in (1, 2, 4))
    np.testing.assert_array_equal(as_colours(one), np.repeat(one, 3, axis=2))
    np.testing.assert_array_equal(as_colours(two)[..., :2], two)
    assert not as_colours(two)[..., 2].any()
    np.testing.assert_array_equal(as_colours(four), four[..., :3])


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_batches_have_the_channels_of_the_run(tmp_path, channels):
    pixels = [random_pixels((20, 30, channels), seed=k) for k in range(3)]
    source = files(tmp_path, map(tiff, pixels), reading(channels))
    (batch,) = eval_batches(source, batch_size=3, canvas_size=32)
    assert batch["image"].shape == (3, 32, 32, channels)
    for image, expected in zip(batch["image"], pixels, strict=True):
        np.testing.assert_array_equal(image[:20, :30], expected)
        assert not image[20:].any() and not image[:, 30:].any()
    travelled = pickle.loads(pickle.dumps(BatchLoader(source, 32, 1, read_or_next)))
    np.testing.assert_array_equal(travelled(np.arange(3))["image"], batch["image"])


def test_scenes_are_read_by_the_same_rule():
    """Drawn pictures become grey by their luma, and no four bands."""
    data = {"source": "scenes", "dir": "", "scenes": {"num_train": 3, "num_test": 1, "size": 24}}
    grey, colours = (open_source(data | {"in_channels": channels}, "train") for channels in (1, 3))
    np.testing.assert_array_equal(read_image(grey, 0), luma(read_image(colours, 0)))
    (batch,) = eval_batches(grey, batch_size=3, canvas_size=24)
    assert batch["image"].shape == (3, 24, 24, 1)
    four = open_source(data | {"in_channels": 4}, "train")
    with pytest.raises(ValueError, match=r"scenes/train/0: .*\[24, 24, 3\], not uint8\[H, W, 4\]"):
        look_at(four)
    with pytest.raises(ValueError, match=r"config\.model\.in_channels is 0"):
        open_source(data | {"in_channels": 0}, "train")


def test_arrays_of_other_types_are_read_with_a_window():
    class Wide:
        labels, class_names = None, ()

        def __len__(self):
            return 1

        def __getitem__(self, i):
            return np.full((4, 4, 2), 300, np.int16)

        def name(self, i):
            return "wide/0"

    source = Wide()
    source.reading = reading(2)
    with pytest.raises(ValueError, match=r"wide/0: the source returned int16\[4, 4, 2\]"):
        read_image(source, 0)
    source.reading = reading(2, mode="fixed", range=(200, 400))
    assert (read_image(source, 0) == 128).all()


# At the start


def test_most_pictures_that_do_not_fit_stop_the_start(tmp_path):
    source = files(tmp_path, [tiff(FOUR)] * 5 + [encoded(RGB8)])
    with pytest.raises(UnfitImage, match=r"000\.tif: has 4 bands of 16 bits"):
        look_at(source)


def test_a_few_pictures_that_do_not_fit_are_left_out(tmp_path):
    source = files(tmp_path, [encoded(RGB8)] * 5 + [tiff(FOUR)])
    assert look_at(source).lines == () and look_at(source).warnings == ()
    (batch,) = eval_batches(source, batch_size=6, canvas_size=32)
    assert batch["bad"].tolist() == [-1] * 5 + [5]


def test_the_description_says_what_is_not_plain_rgb(tmp_path):
    plain = make_source("scenes", "train", num_train=2, num_test=2, size=24)
    assert describe({"train": plain}, look_at(plain)) == describe({"train": plain})
    alpha = look_at(files(tmp_path / "a", [encoded(RGBA8)] * 4))
    assert "the alpha channel of 4 of 4 pictures looked at is left out" in alpha.lines[0]
    bands = files(tmp_path / "b", [tiff(FOUR)] * 4, reading(4, mode="picture"))
    (line,) = look_at(bands).lines
    assert line.startswith("read as 4 channels, 16-bit samples from ")
    assert "window percentiles 0.5 to 99.5 of each picture" in line
    assert f"  {line}" in describe({"train": bands}, look_at(bands))
