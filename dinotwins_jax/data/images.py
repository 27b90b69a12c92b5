"""Decoding of an image file of any format to the channels that a run reads."""

import contextlib
import io
import os
import re
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dinotwins_jax.data.bands import Samples, eight_bit_channels, upright
from dinotwins_jax.data.jpeg import plain_jpeg
from dinotwins_jax.data.reading import RGB, BadImage, Reading, Unfit, UnfitImage
from dinotwins_jax.data.tiff import TiffHeader, read_tiff, tiff_header

_LARGER = "To read it, set config.data.max_pixels to its pixels, or make it smaller."
_PNM = re.compile(rb"P6(?:(?:\s|#[^\n]*\n)+\d+){2}(?:\s|#[^\n]*\n)+(\d+)")
_PNG = b"\x89PNG\r\n\x1a\n"
# PNG's colour types of 16 bits a sample that Pillow halves -> (its raw modes of the upper and lower bytes)
_WIDE_PNG = {2: ("RGB;16B", "RGB;16L"), 6: ("RGBA;16B", "RGBA;16L")}


def decode_image(
    file: str | os.PathLike | bytes,
    *,
    name: str = "",
    max_side: int | None = None,
    canvas: np.ndarray | None = None,
    reading: Reading = RGB,
) -> np.ndarray:
    """Decodes an image of any format and mode that Pillow or tifffile reads.

    EXIF rotation is applied, and only the first frame of an animation read. To 3 channels: colours; grey
    is repeated and an alpha channel dropped. To 1: grey, luma of colours. To any other number: as many
    bands, an alpha channel among them, or grey pages of a TIFF.

    Args:
      file: a path, or the encoded bytes themselves.
      name: its name in errors, by default its path.
      max_side: pixels. A JPEG at least twice as large is decoded at 1/2, 1/4 or 1/8 of its size, which
        is cheaper; its longer side stays >= max_side.
      canvas: u8[S, S, C], to be overwritten. A JPEG exactly S wide and no higher may be decoded
        directly into its first rows, which saves a copy.
      reading: channels, and how samples wider than 8 bits become 8 bits.
    Returns:
      u8[H, W, C], possibly a view of the canvas.
    Raises:
      UnfitImage: it has other bands than the run reads, or samples that need a window.
      BadImage: missing, empty, truncated, not an image, or above PIL.Image.MAX_IMAGE_PIXELS pixels, which
        count after the reduction of a JPEG.
    """
    name = name or (repr(file[:8]) if isinstance(file, bytes) else os.fspath(file))
    with _named(name):
        data = _bytes_of(file)
        pixels = plain_jpeg(data, max_side, canvas, reading.channels)
        if pixels is None:
            wide = reading.window is not None or reading.channels not in (1, 3)
            samples = _samples(data, max_side, reading.channels, wide)
            if reading.window is not None and samples.pixels.dtype == np.uint8:
                _check_not_halved(data)
            pixels = eight_bit_channels(samples, reading)
        return pixels


def opened_image(image: Image.Image, *, name: str, reading: Reading = RGB) -> np.ndarray:
    """u8[H, W, C] of an image that a caller opened with Pillow, as `decode_image` of its file."""
    with _named(name):
        samples = _of_type(_pillow_samples(image, None, reading.channels), None)
        return eight_bit_channels(samples, reading)


def read_samples(file: str | os.PathLike | bytes, *, name: str = "") -> Samples:
    """All samples of a file as they are, those of 16-bit colour too. Raises BadImage."""
    with _named(name or "image"):
        return _samples(_bytes_of(file))


def is_wide(data: bytes) -> bool:
    """Whether the samples of an image file are not unsigned 8-bit ones."""
    if header := tiff_header(data):
        return header.dtype not in (np.uint8, bool)
    if data[:8] == _PNG:
        return data[24] == 16
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        return image.mode.startswith(("I", "F"))
    return False


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of the image that `decode_image` gives, upright, from the file's header alone.

    Raises BadImage if the file is missing or its header cannot be read.
    """
    with _named(os.fspath(path)):
        try:
            with Image.open(path) as image:
                width, height = image.size
                turned = _orientation(image)
        except Image.UnidentifiedImageError:
            if header := tiff_header(Path(path).read_bytes()):
                return header.size
            raise Image.UnidentifiedImageError("not an image that PIL can read") from None
    return (width, height) if turned in (5, 6, 7, 8) else (height, width)


@contextlib.contextmanager
def _named(name: str):
    """Context manager that turns every error but a lack of memory into a BadImage of that name."""
    try:
        yield
    except (MemoryError, BadImage):
        raise
    except Unfit as err:
        raise UnfitImage(name, str(err)) from None
    except Image.DecompressionBombError as err:
        raise BadImage(name, f"{err} {_LARGER}") from None
    except Image.UnidentifiedImageError as err:
        raise BadImage(name, str(err)) from None
    except Exception as err:  # PIL's decoders raise nearly every built-in exception on broken files
        reason = getattr(err, "strerror", None) or " ".join(str(err).split())
        raise BadImage(name, reason or type(err).__name__) from err


def _bytes_of(file: str | os.PathLike | bytes) -> bytes:
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    if not data:
        raise ValueError("empty, 0 bytes")
    return data


def _samples(
    data: bytes, max_side: int | None = None, channels: int | None = None, wide: bool = True
) -> Samples:
    """The samples of a file, refused if a run of `channels` cannot take them; 8-bit ones may be converted
    to 1 or 3 channels already. wide: 16-bit colour whole; otherwise its upper bytes, which are faster."""
    header = tiff_header(data, wide)
    if header is not None and not header.by_pillow:
        return read_tiff(data, header, channels)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if wide and data[:8] == _PNG and data[24] == 16 and data[25] in (2, 4, 6):
                return _wide_png(data, image)
            pixels = _pillow_samples(image, max_side, channels)
    except Image.UnidentifiedImageError:
        raise Image.UnidentifiedImageError(
            f"not an image that PIL can read ({len(data)} bytes)"
        ) from None
    return _of_type(pixels, header)


def _check_not_halved(data: bytes) -> None:
    """Raises Unfit for colours of 16 bits that Pillow has read as 8, to which no window applies."""
    at = data.find(b"\xff\x51")  # of JPEG 2000: the marker SIZ
    pnm = _PNM.match(data)
    if (pnm and int(pnm[1]) > 255) or (data[4:8] == b"jP  " and at > 0 and data[at + 40] & 127 > 7):
        raise Unfit("has colours of 16 bits, of which Pillow reads 8; convert it to PNG or TIFF")


def _pillow_samples(image: Image.Image, max_side: int | None, channels: int | None) -> Samples:
    width, height = image.size
    longer = max(width, height)
    if max_side is not None and longer >= 2 * max_side:
        # draft() keeps both sides at or above the requested size, so request the image's own
        # aspect.
        image.draft(None, (-(-width * max_side // longer), -(-height * max_side // longer)))
    _check_size(image)
    image.load()
    with contextlib.suppress(Exception):  # the pixels are valid even if the EXIF block is broken
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # "I;16" and its byte orders; "I" in older PIL
        return Samples(np.asarray(image)[:, :, None])
    if channels in (1, 3):
        pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
        return Samples(pixels.reshape(*pixels.shape[:2], channels))
    grey = image.mode in ("1", "L", "LA", "La")
    alpha = image.mode.lower() in ("la", "rgba", "pa") or "transparency" in image.info
    mode = ("LA" if alpha else "L") if grey else ("RGBA" if alpha else "RGB")
    pixels = np.asarray(image.convert(mode))
    return Samples(pixels.reshape(*pixels.shape[:2], len(mode)), alpha)


def _check_size(image: Image.Image) -> None:
    limit, (width, height) = Image.MAX_IMAGE_PIXELS, image.size
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} x {height} pixels, more than PIL's limit of {limit}. {_LARGER}")


def _of_type(samples: Samples, header: TiffHeader | None) -> Samples:
    """Samples of Pillow's 32-bit modes in the type of the file: 16 bits, if it is no TIFF."""
    pixels = samples.pixels
    if pixels.dtype != np.int32:
        return samples
    if header is not None:
        return samples._replace(pixels=pixels.astype(header.dtype))
    return samples._replace(pixels=np.clip(pixels, 0, 65535).astype(np.uint16))


def _orientation(image: Image.Image) -> int:
    """The orientation that its EXIF block states; 1, upright, without a readable one."""
    with contextlib.suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _wide_png(data: bytes, image: Image.Image) -> Samples:
    """A PNG of 16-bit colours or grey with alpha, whole.

    Pillow keeps the upper byte of a sample, or the lower one if it is told that this comes first; the four
    bytes of grey with alpha are those of an 8-bit RGBA pixel.
    """
    _check_size(image)

    def loaded(rawmode: str) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as part:
            part.tile = [tile._replace(args=rawmode) for tile in part.tile]
            part.load()
            return np.asarray(part)

    if data[25] == 4:
        both = loaded("RGBA")
        upper, lower = both[..., ::2], both[..., 1::2]
    else:
        upper, lower = (loaded(rawmode) for rawmode in _WIDE_PNG[data[25]])
    turned = upright(upper.astype(np.uint16) << 8 | lower, _orientation(image))
    return Samples(turned, alpha=data[25] != 2)
