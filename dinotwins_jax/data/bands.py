"""Bands of a picture: from those that a file has to the channels that a run reads."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from dinotwins_jax.data.reading import Reading, Unfit
from dinotwins_jax.data.window import eight_bits

LUMA = (19595, 38470, 7471)  # of 65,536: ITU-R 601, Pillow's convert("L")

_UPRIGHT = {  # by the tag Orientation of EXIF and TIFF
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


class Samples(NamedTuple):
    """A picture as its file has it.

    pixels: [H, W, C] of any type; alpha: whether the last band is one; pages: C grey pages of a TIFF.
    """

    pixels: np.ndarray
    alpha: bool = False
    pages: int = 1


def bands_kept(
    bands: int, channels: int, *, alpha: bool = False, pages: int = 1, more: str = ""
) -> int:
    """The number of a picture's first bands that a run of `channels` takes.

    All, or all but an alpha channel. Of these, 3 become 1 (luma) and 1 becomes 3 (repeated).

    Args:
      more: what else there is to say about the bands, such as their width.
    Raises:
      Unfit: it has another number of bands.
    """
    for count in (bands, bands - alpha):
        if count == channels or (pages == 1 and {count, channels} == {1, 3}):
            return count
    has = f"{bands} {'band' if bands == 1 else 'bands'}"
    if pages > 1:
        has = f"{pages} pages" + (f" of {bands // pages} bands" if bands > pages else "")
    raise Unfit(
        f"has {has}{more}{' with alpha' if alpha else ''}, this run reads {channels}; set "
        f"config.model.in_channels={bands - alpha} to read it whole"
    )


def channel_samples(samples: Samples, channels: int) -> np.ndarray:
    """The samples [H, W, C] that a run of `channels` reads of a picture, in their own type; C is 1 for grey
    that is to be repeated. Raises Unfit as `bands_kept`."""
    pixels = samples.pixels
    bands = bands_kept(pixels.shape[-1], channels, alpha=samples.alpha, pages=samples.pages)
    pixels = pixels[..., :bands]
    return luma(pixels) if bands == 3 and channels == 1 else pixels


def eight_bit_channels(samples: Samples, reading: Reading) -> np.ndarray:
    """u8[H, W, reading.channels] of a picture; raises Unfit if the reading does not fit it."""
    pixels = eight_bits(channel_samples(samples, reading.channels), reading.window)
    if pixels.shape[-1] != reading.channels:
        return np.repeat(pixels, reading.channels, axis=-1)
    return np.ascontiguousarray(pixels)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A picture [H, W, C] turned as its orientation states, 1 to 8."""
    return _UPRIGHT.get(orientation, lambda a: a)(pixels)


def luma(pixels: np.ndarray) -> np.ndarray:
    """Grey values [H, W, 1] of colours [H, W, 3] of any type, in that type."""
    if pixels.dtype.kind == "f":
        return (pixels @ (np.array(LUMA, pixels.dtype) / 65536))[..., None]
    grey = (pixels.astype(np.int64) @ np.array(LUMA) + 32768) >> 16
    return grey.astype(pixels.dtype)[..., None]


def as_colours(pixels: np.ndarray) -> np.ndarray:
    """Pictures [..., C] as [..., 3] to look at: grey, two bands as red and green, or the first three."""
    channels = pixels.shape[-1]
    if channels == 1:
        return np.repeat(pixels, 3, axis=-1)
    if channels == 2:
        return np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=-1)
    return pixels[..., :3]


def resized(pixels: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """u8[H, W, C] resized to size (width, height), band by band."""
    if pixels.shape[-1] == 3:
        return np.asarray(Image.fromarray(pixels).resize(size, resample))
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(pixels, -1, 0)]
    return np.stack([np.asarray(band.resize(size, resample)) for band in bands], axis=-1)
