"""Fast decoding of common JPEGs."""

import contextlib
import io

import numpy as np
import simplejpeg
from PIL import ExifTags, Image


def plain_jpeg(
    data: bytes, max_side: int | None, canvas: np.ndarray | None, channels: int = 3
) -> np.ndarray | None:
    """u8[H, W, channels] at twice Pillow's speed; None for other files, and other channels than 1 and 3.

    Colours are Pillow's; grey is the luma that the file holds. Other formats, CMYK, EXIF rotations and
    flawed files are left to Pillow, which alone decides what is broken.
    """
    if data[:3] != b"\xff\xd8\xff" or channels not in (1, 3):
        return None
    exif = _exif_segment(data)
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        limit = Image.MAX_IMAGE_PIXELS
        too_large = limit is not None and height * width > limit
        if space not in ("YCbCr", "Gray") or (exif and _is_rotated(data, exif, too_large)):
            return None
        reduced = (
            f for f in (8, 4, 2) if max_side is not None and -(-max(height, width) // f) >= max_side
        )
        factor = next(reduced, 1)
        height, width = -(-height // factor), -(-width // factor)
        if too_large and height * width > limit:
            return None
        if canvas is not None and (width != canvas.shape[1] or height > canvas.shape[0]):
            canvas = None
        return simplejpeg.decode_jpeg(
            data,
            "RGB" if channels == 3 else "GRAY",
            min_factor=factor,
            min_height=height,
            min_width=width,
            buffer=None if canvas is None else canvas[:height].reshape(-1),
        )
    except ValueError:
        return None


def _exif_segment(data: bytes) -> bytes:
    """The EXIF segment before a JPEG's pixels, or b""; searching the bytes is ten times slower."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1] != 0xDA:
        if data[place + 1] == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            return data[place + 4 : place + 2 + int.from_bytes(data[place + 2 : place + 4])]
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return b""


def _is_rotated(data: bytes, exif: bytes, too_large: bool) -> bool:
    """Whether a JPEG has an EXIF rotation; one that Pillow will not open is judged by its segment."""
    with contextlib.suppress(Exception):
        if too_large:
            tags = Image.Exif()
            tags.load(exif)
            return tags.get(ExifTags.Base.Orientation, 1) != 1
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False  # a broken EXIF block is ignored
