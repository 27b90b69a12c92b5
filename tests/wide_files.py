"""Image files of many bands, wide samples and pages, for tests."""

import io
import struct
import zlib

import numpy as np
import tifffile

from dinotwins_jax.data.base import ImageFiles
from dinotwins_jax.data.reading import Reading
from dinotwins_jax.data.window import window_of


def random_pixels(shape, dtype=np.uint8, seed=0):
    """Values over the whole range of an integer type."""
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(seed)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def tiff(pixels, **options):
    """The bytes of a TIFF; [H, W, C] with 4 bands or more as measurements, unless options say otherwise."""
    if pixels.shape[2:] == (1,):
        pixels = pixels[..., 0]
    if pixels.ndim == 3 and "photometric" not in options:
        options |= {"photometric": "minisblack", "planarconfig": "contig"}
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def wide_png(pixels):
    """The bytes of a PNG of u16[H, W, C]: grey, grey and alpha, RGB or RGBA."""
    height, width, bands = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">2I5B", width, height, 16, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def reading(channels=3, **window):
    """What a run of these keys reads: reading(1, mode="fixed", range=(0, 4095))."""
    return Reading(channels, window_of(window, channels))


def files(folder, contents, of=None, name="{:03}.tif"):
    """A source of files with these bytes, in two classes."""
    paths = []
    for k, data in enumerate(contents):
        path = folder / ("ant", "bee")[k % 2] / name.format(k)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(data)
        paths.append(str(path))
    source = ImageFiles(paths)
    if of is not None:
        source.reading = of
    return source
