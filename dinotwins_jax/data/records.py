"""Records of prepared data: one encoded image, or the masks of one image."""

import contextlib
import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinotwins_jax.data.bands import resized
from dinotwins_jax.data.base import Source, gives_encoded, read_image, reading_of
from dinotwins_jax.data.images import is_wide

Size = tuple[int, int]  # (height, width) in pixels, upright

_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_MASKS = struct.Struct("<3i")  # count, height, width


class ImageRecord(NamedTuple):
    """A stored image and its source."""

    data: bytes  # a JPEG, PNG or TIFF
    source: bytes  # the source's encoded bytes, or its pixels
    size: Size  # stored
    original_size: Size
    verbatim: bool  # data equals source


def image_record(source: Source, i: int, *, short_side: int, quality: int) -> ImageRecord:
    """Encodes image i of a source, its short side reduced to `short_side`.

    Never enlarged. A JPEG that is small enough, RGB or grey, and without EXIF rotation keeps its bytes;
    all others are encoded upright: 8-bit grey and RGB as JPEG, 4:2:0; wider samples, by the window of the
    source's reading, and other numbers of channels without loss.

    Args:
      short_side: pixels; 0 keeps every size.
      quality: of the JPEG, 1 to 95.
    Raises:
      BadImage: unreadable, even if the bytes could have been kept.
    """
    if not gives_encoded(source):
        pixels = read_image(source, i)
        original, raw, plain = pixels.shape[:2], pixels.tobytes(), False
        eight = reading_of(source).window is None
    else:
        raw = source.encoded(i)
        plain, original = _jpeg_header(raw)
        # A large JPEG may be reduced while decoding, to no less than twice the target size.
        wanted = target_size(original, short_side) if original else None
        pixels = read_image(source, i, max_side=2 * max(wanted) if wanted else None)
        original = original or pixels.shape[:2]
        eight = bool(wanted) or not is_wide(raw)
    size = target_size(original, short_side)
    if plain and size == original:
        return ImageRecord(raw, raw, size, original, True)
    if pixels.shape[:2] != size:
        pixels = resized(pixels, size[::-1], Image.Resampling.LANCZOS)
    return ImageRecord(_encoded(pixels, quality, lossless=not eight), raw, size, original, False)


def _encoded(pixels: np.ndarray, quality: int, lossless: bool) -> bytes:
    """The file of a picture u8[H, W, C]: a JPEG of 1 or 3 channels, or without loss a PNG, else a TIFF."""
    file = io.BytesIO()
    if pixels.shape[2] not in (1, 3):
        import tifffile  # takes 50 ms

        kind = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}
        tifffile.imwrite(file, pixels, **kind, metadata=None, software="")
        return file.getvalue()
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    if lossless:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def target_size(size: Size, short_side: int) -> Size:
    """`size` with its short side reduced to short_side (0: unchanged), keeping the aspect."""
    short = min(size)
    if not short_side or short <= short_side:
        return tuple(size)
    height, width = (max(1, round(side * short_side / short)) for side in size)
    return height, width


def _jpeg_header(data: bytes) -> tuple[bool, Size | None]:
    """(whether its bytes can be kept, upright size) of a JPEG; (False, None) for other files."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format != "JPEG":
                return False, None
            orientation = 1
            with contextlib.suppress(Exception):  # a broken EXIF block: decode_image ignores it too
                orientation = image.getexif().get(0x0112, 1)
            width, height = image.size
            size = (width, height) if orientation in _ROTATED else (height, width)
            return image.mode in ("RGB", "L") and orientation not in range(2, 9), size
    except Exception:  # decode_image reports the error
        return False, None


def mask_record(masks: np.ndarray, categories: np.ndarray, size: Size) -> bytes:
    """Compresses masks bool[n, H, W], resized to `size` (nearest), and categories i32[n]."""
    height, width = size
    if masks.shape[1:] != size:
        images = (Image.fromarray(mask.astype(np.uint8)) for mask in masks)
        resized = [im.resize((width, height), Image.Resampling.NEAREST) for im in images]
        masks = np.array([np.asarray(im) for im in resized], bool).reshape(-1, height, width)
    header = _MASKS.pack(len(masks), height, width)
    content = np.ascontiguousarray(categories, "<i4").tobytes() + np.packbits(masks).tobytes()
    return zlib.compress(header + content)


def read_mask_record(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `mask_record`: masks bool[n, h, w] and categories i32[n]."""
    content = zlib.decompress(record)
    count, height, width = _MASKS.unpack_from(content)
    categories = np.frombuffer(content, "<i4", count, _MASKS.size).astype(np.int32)
    bits = np.frombuffer(content, np.uint8, offset=_MASKS.size + categories.nbytes)
    masks = np.unpackbits(bits, count=count * height * width).astype(bool)
    return masks.reshape(count, height, width), categories
