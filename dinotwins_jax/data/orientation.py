"""EXIF orientation of a JPEG: found in its bytes, and applied to its pixels."""

import contextlib
import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image

_UPRIGHT = {  # orientation -> what makes the stored pixels upright, as ImageOps.exif_transpose
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


def orientation(data: bytes, too_large: bool) -> Any:
    """The EXIF orientation of a JPEG, 1 for upright; a broken EXIF block is ignored.

    too_large: Pillow will not open it, and its EXIF segment is read alone.
    """
    segment = _exif_segment(data)
    if not segment:
        return 1
    with contextlib.suppress(Exception):
        if too_large:
            tags = Image.Exif()
            tags.load(segment)
            return tags.get(ExifTags.Base.Orientation, 1)
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def upright(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    """Stored pixels [H, W, C] turned upright; unchanged for a number that is no orientation."""
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _exif_segment(data: bytes) -> bytes:
    """The EXIF segment before a JPEG's pixels, or b""; searching the bytes is ten times slower."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1] != 0xDA:
        if data[place + 1] == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            return data[place + 4 : place + 2 + int.from_bytes(data[place + 2 : place + 4])]
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return b""
