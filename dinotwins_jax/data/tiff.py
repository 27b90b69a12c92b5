"""TIFF files that Pillow does not read whole: many bands, planes, pages, wide colour. By tifffile."""

import importlib.util
import io
import logging
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinotwins_jax.data.bands import Samples, bands_kept, upright
from dinotwins_jax.data.reading import Unfit

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GREY, _COLOUR, _CMYK, _ALPHA = (0, 1), 2, 5, (1, 2)  # values of TIFF's tags
_UNPACKED = (1, 8, 32773, 32946, 34925)  # none, Deflate, PackBits, Deflate, LZMA: by tifffile alone
_ANY_COLOUR = (3, 6, 8)  # palette, YCbCr, Lab: one picture in colour whatever its samples


class TiffHeader(NamedTuple):
    """What a TIFF holds.

    bands: of one page; dtype: of a sample; alpha: whether the last band is one. Only of 8-bit pictures is
    the file's word taken for it: writers mark a fourth band of measurements as alpha by default.
    pages: of full size. by_pillow: whether Pillow reads all of it. size: (height, width), upright.
    """

    bands: int
    dtype: np.dtype
    alpha: bool
    pages: int
    by_pillow: bool
    size: tuple[int, int]


def tiff_header(data: bytes, wide: bool = False) -> TiffHeader | None:
    """The header of a TIFF; None for other files and for those that are left to Pillow to judge.

    wide: whether colour of 16 bits is wanted whole; Pillow reads its upper 8 bits.
    """
    if data[:4] not in _MAGIC:
        return None
    try:
        with _opened(data) as file:
            pages = _pages(file)
            first = pages[0]
            bands, height, width = first.samplesperpixel, first.imagelength, first.imagewidth
            turned = first.tags.valueof(274, 1) in (5, 6, 7, 8)
            return TiffHeader(
                bands=bands,
                dtype=first.dtype,
                alpha=first.dtype == np.uint8 and _has_alpha(first),
                pages=len(pages),
                by_pillow=len(pages) == 1 and _by_pillow(first, wide),
                size=(width, height) if turned else (height, width),
            )
    except Exception:  # damaged, or unknown: Pillow reports it
        return None


def read_tiff(data: bytes, header: TiffHeader, channels: int | None) -> Samples:
    """Reads all bands of all pages of a TIFF.

    Raises Unfit if a run of `channels` cannot take them, before they are decoded; None: any can.
    """
    pages, bits = header.pages, 8 * header.dtype.itemsize
    more = f" of {bits} bits" if bits > 8 else ""
    if channels is not None:
        bands_kept(pages * header.bands, channels, alpha=header.alpha, pages=pages, more=more)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and header.size[0] * header.size[1] > limit:
        raise Image.DecompressionBombError(
            f"{header.size[1]} x {header.size[0]} pixels, more than the limit of {limit}."
        )
    with _opened(data) as file:
        pages_of = _pages(file)
        _check_compression(pages_of[0])
        found = [_upright(page) for page in pages_of]
    if len({pixels.shape for pixels in found}) > 1:
        raise Unfit(f"has {pages} pages of different sizes; convert it to one page")
    return Samples(np.concatenate(found, axis=-1), header.alpha, pages)


def _opened(data: bytes):
    import tifffile  # takes 50 ms

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it raises is reported
    return tifffile.TiffFile(io.BytesIO(data))


def _pages(file) -> list:
    """The pages that are no thumbnails, reduced copies or masks."""
    return [page.aspage() for page in file.pages if not page.is_reduced and not page.is_mask]


def _check_compression(page) -> None:
    if page.compression not in _UNPACKED and importlib.util.find_spec("imagecodecs") is None:
        raise Unfit(
            f"is compressed by {page.compression.name}; to read it, pip install imagecodecs"
        )


def _has_alpha(page) -> bool:
    return bool(page.extrasamples) and page.extrasamples[-1] in _ALPHA


def _by_pillow(page, wide: bool) -> bool:
    bands, kind, colour = page.samplesperpixel, page.dtype, page.photometric
    if kind is None or page.imagedepth > 1:
        return False
    if kind in (np.uint8, np.bool_):
        plain = {1: colour in _GREY, 3: colour == _COLOUR, 4: colour == _CMYK}.get(bands, False)
        with_alpha = {2: colour in _GREY, 4: colour == _COLOUR}.get(bands, False)
        return plain or (with_alpha and _has_alpha(page)) or colour in _ANY_COLOUR
    if bands == 1:
        return kind.kind in "iuf" and kind.itemsize in (2, 4) and kind != np.float16
    return kind == np.uint16 and bands == 3 and colour == _COLOUR and not wide


def _upright(page) -> np.ndarray:
    """[H, W, C] of a page."""
    pixels = page.asarray(maxworkers=1)
    shape = (page.imagelength, page.imagewidth)
    if page.imagedepth > 1:
        raise Unfit(f"is a volume of {page.imagedepth} planes; convert it to pages")
    pixels = np.moveaxis(pixels.reshape(-1, *shape), 0, -1) if page.planarconfig == 2 else pixels
    pixels = pixels.reshape(*shape, page.samplesperpixel)
    if page.photometric == 0 and pixels.dtype.kind == "u":  # white is 0
        pixels = np.iinfo(pixels.dtype).max - pixels
    return upright(pixels, page.tags.valueof(274, 1))
