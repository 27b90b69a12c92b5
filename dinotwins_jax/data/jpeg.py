"""Fast decoding of common JPEGs."""

import numpy as np
import simplejpeg
from PIL import Image

from dinotwins_jax.data.orientation import orientation, upright


def plain_jpeg(
    data: bytes, max_side: int | None, canvas: np.ndarray | None, channels: int = 3
) -> np.ndarray | None:
    """u8[H, W, channels] at twice Pillow's speed; None for other files, and other channels than 1 and 3.

    Colours are Pillow's; grey is the luma that the file holds. Other formats, CMYK, flawed files, and EXIF
    rotations of what is not too large for it, are left to Pillow, which alone decides what is broken.
    """
    if data[:3] != b"\xff\xd8\xff" or channels not in (1, 3):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        limit = Image.MAX_IMAGE_PIXELS
        too_large = limit is not None and height * width > limit
        turned = orientation(data, too_large)
        if space not in ("YCbCr", "Gray") or (turned != 1 and not too_large):
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
        pixels = simplejpeg.decode_jpeg(
            data,
            "RGB" if channels == 3 else "GRAY",
            min_factor=factor,
            min_height=height,
            min_width=width,
            buffer=None if canvas is None or turned != 1 else canvas[:height].reshape(-1),
        )
        return upright(pixels, turned)
    except ValueError:
        return None
