"""A look at a few pictures of a source before a run: what they have, and whether the run's keys fit."""

import contextlib
from typing import NamedTuple

import numpy as np

from dinotwins_jax.data.bands import Samples, channel_samples
from dinotwins_jax.data.base import Source, gives_encoded, read_image, reading_of
from dinotwins_jax.data.images import read_samples
from dinotwins_jax.data.reading import BadImage, Reading, Unfit, UnfitImage
from dinotwins_jax.data.window import eight_bits, percentile_ranges, thinned, window_text

PICTURES = 8  # looked at, evenly spaced
SET_PICTURES = 64  # of which the window of a set is computed


class Look(NamedTuple):
    """What a few pictures have.

    lines: for the description of the data, unless they are plain 8-bit RGB; warnings: keys that lose
    something.
    """

    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def look_at(source: Source) -> Look:
    """Reads a few pictures of a source as the run will.

    Raises:
      UnfitImage: most of them have other bands than the run reads, or samples that need a window. A few
        such pictures are left out like unreadable ones.
      ValueError: arrays of a source without encoded() that the run cannot take.
    """
    reading, found, unfit = reading_of(source), [], []
    if not gives_encoded(source):
        if reading.channels == 3 and reading.window is None:
            return Look()
        with contextlib.suppress(BadImage):
            read_image(source, 0)
        return Look((f"read as {_channels(reading.channels)}",))
    indices = np.unique(np.linspace(0, len(source) - 1, PICTURES).round().astype(int))
    for i in indices.tolist() if len(source) else ():
        try:
            data = source.encoded(i)
            if data[:3] == b"\xff\xd8\xff" and reading.channels in (1, 3):  # JPEG: 8 bits
                found.append(Samples(np.zeros((1, 1, reading.channels), np.uint8)))
                continue
            read_image(source, i)
            found.append(read_samples(data, name=source.name(i)))
        except UnfitImage as error:
            unfit.append(error)
        except BadImage:  # left out and counted when it is read
            continue
    if len(unfit) > len(found):
        raise unfit[0]
    return _described(source, found)


def _described(source: Source, found: list[Samples]) -> Look:
    channels, window = reading_of(source)
    wide = [s.pixels for s in found if s.pixels.dtype not in (np.uint8, bool)]
    dropped = sum(s.alpha and s.pixels.shape[-1] != channels for s in found)
    parts = [f"read as {_channels(channels)}"] * (channels != 3 or bool(wide) or bool(dropped))
    warnings, prepared = [], getattr(source, "stored", None)
    if wide:
        ends = np.concatenate([_ends(p) for p in wide])
        low, high = ends.min(initial=np.inf), ends.max(initial=-np.inf)
        kinds = " and ".join(sorted({_kind(p.dtype) for p in wide}))
        text = f"{kinds} samples from {low:,.6g} to {high:,.6g}"
        parts.append(f"{text} in {len(wide)} of {len(found)} pictures looked at")
        if window is None:
            levels = max(len(np.unique(thinned(eight_bits(p, None)))) for p in wide)
            warnings.append(
                f"config.data.window.mode is '', and the pictures have {text} (of {len(wide)} looked at): "
                f"the full range of their type becomes 0 to 255, of which they use {levels} levels; set "
                "it to 'fixed', with config.data.window.range, to 'picture' or to 'set'"
            )
    elif window is not None and not prepared and found:
        warnings.append(
            "config.data.window has no effect: the pictures have 8-bit samples, which it leaves as they are"
        )
    if window is not None:
        parts.append(f"window {window_text(window)}" + " as prepared" * bool(prepared))
    if dropped:
        parts.append(
            f"the alpha channel of {dropped} of {len(found)} pictures looked at is left out"
        )
    return Look((", ".join(parts),) if parts else (), tuple(warnings))


def _channels(count: int) -> str:
    return f"{count} channel" + "s" * (count != 1)


def _ends(pixels: np.ndarray) -> np.ndarray:
    """Smallest and largest finite sample, f64[2]; f64[0] without one."""
    finite = pixels[np.isfinite(pixels)]
    return np.array([finite.min(), finite.max()] if finite.size else [], np.float64)


def _kind(dtype: np.dtype) -> str:
    kind = {"f": " floating-point", "i": " signed"}.get(dtype.kind, "")
    return f"{8 * dtype.itemsize}-bit{kind}"


def settle_window(source: Source, seed: int) -> Reading:
    """Gives the window of a set its numbers, where they are not known yet; returns the source's reading.

    Args:
      source: of the training pictures; its reading is replaced. seed: as in `set_ranges`.
    """
    reading = reading_of(source)
    if (window := reading.window) and window.of_set and not window.ranges:
        window = window._replace(ranges=set_ranges(source, seed))
        source.reading = reading = reading._replace(window=window)
    return reading


def set_ranges(source: Source, seed: int) -> tuple[tuple[float, float], ...]:
    """(low, high) of the window of a set: the percentiles of the wide samples of SET_PICTURES pictures.

    Args:
      source: its reading states the percentiles; seed: of the choice of pictures.
    Returns:
      one pair, or one for each channel; ((0.0, 255.0),) if all pictures have 8-bit samples, which need
      none.
    """
    channels, window = reading_of(source)
    count = min(SET_PICTURES, len(source))
    chosen = np.random.default_rng(seed).choice(len(source), count, replace=False)
    parts = []
    for i in sorted(chosen.tolist()):
        try:
            pixels = channel_samples(_samples(source, i), channels)
        except (BadImage, Unfit):
            continue
        if pixels.dtype not in (np.uint8, bool):
            parts.append(thinned(pixels))
    widest = max((p.shape[-1] for p in parts), default=0)
    parts = [p for p in parts if p.shape[-1] == widest]
    return percentile_ranges(np.concatenate(parts), window) if parts else ((0.0, 255.0),)


def _samples(source: Source, i: int) -> Samples:
    if gives_encoded(source):
        return read_samples(source.encoded(i), name=source.name(i))
    return Samples(source[i])
