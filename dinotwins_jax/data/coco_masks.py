"""COCO segmentations, polygons and run lengths (RLE), checked and converted to masks."""

import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLE = 5  # odd, so that a subpixel lies at the centre
FAR = 1e6  # pixels; a coordinate beyond is an error of the file
MAX_GROUPS = 7  # groups of 5 bits in a number of a compressed RLE: up to 2 ** 34


class Runs(NamedTuple):
    """An RLE: the lengths of runs of 0s, 1s, 0s, … down the columns of a mask."""

    counts: np.ndarray  # i64[n], not negative; their sum is height * width
    size: tuple[int, int]  # (height, width)


Polygons = list[np.ndarray]  # each f32[points, 2] of (x, y) pixels; a mask is their union
Size = tuple[int, int]  # (height, width) in pixels


def has_mask(segmentation: Any, size: Size | None) -> bool:
    """Whether `parse_mask` would give a mask; the same errors, and cheaper for plain polygons."""
    return _is_plain(segmentation) or parse_mask(segmentation, size) is not None


def parse_mask(segmentation: Any, size: Size | None) -> Polygons | Runs | None:
    """Checks the value of a "segmentation" and converts it, not yet to pixels.

    Polygons of fewer than three points enclose nothing and are dropped. Besides a list of polygons, one
    polygon alone and one as a list of [x, y] pairs are accepted.

    Args:
      segmentation: of the JSON; None if it has none.
      size: of the picture, which an RLE must have; None if it is not known.
    Returns:
      Polygons or Runs; None if there is no mask: null, [], [[]] or {}.
    Raises:
      ValueError: neither polygons nor an RLE; a coordinate that is no number or far outside; an RLE
        that is malformed or of another size.
    """
    if segmentation is None or segmentation in ([], {}):
        return None
    if isinstance(segmentation, dict):
        return _parse_runs(segmentation, size)
    if not isinstance(segmentation, list):
        raise ValueError(
            f"segmentation is {shown(segmentation)}: it must be a list of polygons or an RLE"
        )
    parts = [part for part in segmentation if isinstance(part, list)]
    pairs = len(parts) >= 3 and all(len(p) == 2 and not isinstance(p[0], list) for p in parts)
    if not parts or (pairs and len(parts) == len(segmentation)):
        segmentation = [segmentation]  # one polygon: [x, y, x, y, …] or [[x, y], [x, y], …]
    polygons = [_parse_polygon(part) for part in segmentation]
    return [polygon for polygon in polygons if len(polygon) >= 3] or None


def decode_counts(text: str) -> np.ndarray:
    """Run lengths i64[n] of a compressed RLE, COCO's text form.

    Source: rleFrString in COCO's maskApi.c. A number has groups of 5 bits, the lowest first, one a
    character (code - 48), whose bit 32 is set in all but the last; it is signed by bit 16 of the last.
    From the fourth on it is the difference to the run before last.

    Raises:
      ValueError: a character outside "0" to "o", or a number that is too long or not finished.
    """
    codes = (
        np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64) - 48
    )
    strange = (codes < 0) | (codes > 63)
    if strange.any():
        at = int(strange.argmax())
        raise ValueError(
            f"its RLE has the character {text[at]!r} at position {at}: not COCO's form"
        )
    if not len(codes):
        return codes
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError(f"its RLE of {len(codes)} characters ends within a number: it is cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends + 1 - starts
    if lengths.max() > MAX_GROUPS:
        at = int(starts[lengths.argmax()])
        raise ValueError(f"its RLE has a number of {lengths.max()} characters at position {at}")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    counts = np.add.reduceat((codes & 31) << 5 * place, starts)
    counts -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])  # the third is not a difference
    return counts


def check_size(runs: Runs, size: Size) -> None:
    """Raises ValueError if an RLE has another size than its picture."""
    if runs.size != tuple(size):
        raise ValueError(
            f"its RLE has size {list(runs.size)}, its picture {list(map(int, size))} (height, width)"
        )


def mask_area(mask: Polygons | Runs) -> float:
    """Area in pixels, without rasterising; polygons that overlap count twice."""
    if isinstance(mask, Runs):
        return float(mask.counts[1::2].sum())
    total = 0.0
    for polygon in mask:
        x, y = polygon.astype(np.float64).T
        total += abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    return total


def rasterise(mask: Polygons | Runs, height: int, width: int) -> np.ndarray:
    """Pixels bool[height, width] of polygons (their union) or run lengths.

    Raises ValueError if an RLE has another size.
    """
    if isinstance(mask, Runs):
        check_size(mask, (height, width))
        runs = np.repeat(np.arange(len(mask.counts)) % 2 == 1, mask.counts)
        return runs.reshape(width, height).T
    # PIL also fills a polygon's outline, half a pixel too wide: draw it supersampled, then keep the
    # subpixel at each centre. COCO's coordinates start at a pixel's corner, PIL's at its centre.
    pixels = np.zeros((height, width), bool)
    corners = np.concatenate(mask)
    # Drawn within the object's box plus one pixel, not in the whole image.
    left, top = (max(int(low) - 1, 0) for low in corners.min(axis=0))
    right, bottom = (
        min(int(high) + 2, side)
        for high, side in zip(corners.max(axis=0), (width, height), strict=True)
    )
    if left >= right or top >= bottom:  # outside the image
        return pixels
    canvas = Image.new("1", ((right - left) * SUPERSAMPLE, (bottom - top) * SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    for polygon in mask:
        points = polygon * SUPERSAMPLE - 0.5 - np.array([left, top], np.float32) * SUPERSAMPLE
        draw.polygon([tuple(point) for point in points.tolist()], fill=1)
    middle = SUPERSAMPLE // 2
    pixels[top:bottom, left:right] = np.asarray(canvas)[middle::SUPERSAMPLE, middle::SUPERSAMPLE]
    return pixels


def shown(value: Any) -> str:
    """A value of the JSON for an error's line, at most about 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _is_plain(segmentation: Any) -> bool:
    """Whether it is a list of polygons as COCO has them, with valid coordinates."""
    if type(segmentation) is not list or not segmentation:
        return False
    for polygon in segmentation:
        if type(polygon) is not list or len(polygon) < 6 or len(polygon) % 2:
            return False
        try:
            if not (math.isfinite(sum(polygon)) and min(polygon) > -FAR and max(polygon) < FAR):
                return False
        except (TypeError, OverflowError):  # not numbers
            return False
    return True


def _parse_polygon(polygon: Any) -> np.ndarray:
    try:
        if not isinstance(polygon, list):
            raise TypeError
        corners = np.array(polygon, np.float64).ravel()
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"segmentation has {shown(polygon)}: a polygon must be a list of numbers x, y, x, y"
        ) from None
    valid = np.abs(corners) < FAR  # False for NaN
    if not valid.all():
        raise ValueError(f"segmentation has the coordinate {corners[valid.argmin()]}")
    if len(corners) % 2:
        raise ValueError(f"segmentation has a polygon of {len(corners)} numbers: x and y in turn")
    return corners.astype(np.float32).reshape(-1, 2)


def _parse_runs(rle: dict, size: Size | None) -> Runs:
    for key in ("counts", "size"):
        if rle.get(key) is None:
            raise ValueError(f"its RLE has no {key!r}")
    own = _whole(rle["size"], "size")
    if len(own) != 2 or not own.all():
        raise ValueError(f"its RLE has size {shown(rle['size'])}: it must be [height, width]")
    text = rle["counts"]
    counts = decode_counts(text) if isinstance(text, str) else _whole(text, "counts")
    runs = Runs(counts, (int(own[0]), int(own[1])))
    if size is not None:
        check_size(runs, size)
    if (counts < 0).any():
        raise ValueError(f"its RLE has a run of {counts.min()} pixels")
    height, width = runs.size
    if counts.sum() != height * width:
        raise ValueError(f"its RLE has {counts.sum()} pixels in all, not {height} x {width}")
    return runs


def _whole(values: Any, key: str) -> np.ndarray:
    """A list of whole numbers as i64[n]."""
    try:
        numbers = np.array(values if isinstance(values, list) else None, np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.array(np.nan)
    # False for NaN.
    if numbers.ndim != 1 or not ((numbers >= 0) & (numbers < 2**40) & (numbers % 1 == 0)).all():
        raise ValueError(f"its RLE has {key} {shown(values)}: it must be a list of whole numbers")
    return numbers.astype(np.int64)
