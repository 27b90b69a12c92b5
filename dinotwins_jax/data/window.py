"""Samples of any width to 8 bits: by the full range of their type, or by a window."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dinotwins_jax.data.reading import Reading, Unfit, Window

MODES = ("", "fixed", "picture", "set")
MOST = 1 << 18  # samples of a picture that its percentiles are computed from, evenly spaced


def reading_with(channels: int, section: Mapping[str, Any] | None) -> Reading:
    """The reading of `channels` with the window that a section `data.window` describes; see `window_of`."""
    return Reading(channels, window_of(section, channels))


def window_of(section: Mapping[str, Any] | None, channels: int = 3) -> Window | None:
    """The window that the section `data.window` of a config describes; None without one.

    Raises ValueError for values that do not fit each other, naming the key.
    """
    section = section or {}
    mode = section.get("mode") or ""
    if mode not in MODES:
        raise ValueError(f"config.data.window.mode is '{mode}': choose {' or '.join(MODES[1:])}")
    ranges = _ranges(section.get("range") or (), channels)
    if mode in ("", "picture") and ranges:
        raise ValueError(
            f"config.data.window.range is {ranges}, and its mode is '{mode}': use 'fixed'"
        )
    if mode == "fixed" and not ranges:
        raise ValueError("config.data.window.range is (): mode 'fixed' needs (low, high)")
    low, high = section.get("percentiles") or Window().percentiles
    if not 0 <= low < high <= 100:
        raise ValueError(
            f"config.data.window.percentiles is {(low, high)}: it must be 0 <= low < high <= 100"
        )
    per_band = bool(section.get("per_band"))
    return Window(ranges, (float(low), float(high)), per_band, mode == "set") if mode else None


def _ranges(given, channels: int) -> tuple[tuple[float, float], ...]:
    """((low, high), …) of one pair, or of a pair for each channel."""
    try:
        pairs = [given] if len(given) == 2 and not np.ndim(given[0]) else list(given)
        ranges = tuple((float(low), float(high)) for low, high in pairs)
    except (TypeError, ValueError):
        ranges = ((0.0, 0.0),)
    if any(not low < high for low, high in ranges) or len(ranges) not in (0, 1, channels):
        raise ValueError(
            f"config.data.window.range is {given}: it must be (low, high) with low < high, or "
            f"{channels} such pairs, one for each channel"
        )
    return ranges


def eight_bits(pixels: np.ndarray, window: Window | None) -> np.ndarray:
    """u8[H, W, C] of samples [H, W, C] of any type; unsigned 8-bit ones stay as they are.

    Without a window the full range of the type becomes 0 to 255, such as 0 to 65,535 or -32,768 to 32,767.

    Raises Unfit without a window for floating-point samples, and for integers of more than 16 bits
    that do not fit into 0 to 65,535.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if window is None:
        return _of_full_range(pixels)
    ranges = window.ranges or percentile_ranges(pixels, window)
    low, high = np.array(ranges, np.float32 if pixels.dtype.itemsize <= 2 else np.float64).T
    scaled = (pixels - low) * (255 / np.where(high > low, high - low, np.inf))
    return (np.clip(np.nan_to_num(scaled, nan=0.0), 0, 255) + 0.5).astype(np.uint8)


def _of_full_range(pixels: np.ndarray) -> np.ndarray:
    kind = pixels.dtype
    if kind.kind not in "biu":
        raise Unfit(
            "floating-point pixels have no fixed range; set config.data.window, or convert it to 8 or 16 "
            "bits"
        )
    if kind.kind == "b":
        return pixels.astype(np.uint8) * 255
    if kind == np.int8:
        return (pixels.astype(np.int16) + 128).astype(np.uint8)
    if kind.itemsize > 2 and not 0 <= pixels.min() <= pixels.max() <= 65535:
        raise Unfit(
            f"{8 * kind.itemsize}-bit samples from {pixels.min()} to {pixels.max()} have no usual range; "
            "set config.data.window"
        )
    wide = pixels.astype(np.int32) + (32768 if kind == np.int16 else 0)
    return ((wide.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def percentile_ranges(pixels: np.ndarray, window: Window) -> tuple[tuple[float, float], ...]:
    """(low, high) percentiles of samples [..., C], all bands together or each band.

    Raises Unfit if none of them is finite.
    """
    bands = thinned(pixels)
    found = []
    for values in bands.T if window.per_band else [bands.reshape(-1)]:
        values = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if not values.size:
            raise Unfit("has no finite samples")
        low, high = np.percentile(values, window.percentiles)
        found.append((float(low), float(high)))
    return tuple(found)


def thinned(pixels: np.ndarray, most: int = MOST) -> np.ndarray:
    """Evenly spaced pixels [n, C] of a picture [..., C], at most `most` samples."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    return flat[:: -(-flat.size // most) or 1]


def window_keys(window: Window) -> dict[str, Any]:
    """Inverse of `window_of`: the section `data.window` that describes a window."""
    ranges = window.ranges[0] if len(window.ranges) == 1 else window.ranges
    mode = "set" if window.of_set else "fixed" if ranges else "picture"
    return {
        "mode": mode,
        "range": ranges,
        "percentiles": window.percentiles,
        "per_band": window.per_band,
    }


def window_text(window: Window) -> str:
    """A window in words: "0 to 4,095", or what it is computed from."""
    if window.ranges:
        return " and ".join(f"{low:,.6g} to {high:,.6g}" for low, high in window.ranges)
    low, high = window.percentiles
    of = "the training pictures" if window.of_set else "each picture"
    return f"percentiles {low:g} to {high:g} of {of}" + (", band by band" * window.per_band)
