"""Comparison of regions with object masks: pixel overlap of patches, boxes, means over images.

Letters: M images, n objects of an image, K regions, h x w patches, H x W pixels.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels; the last two are outside


def cell_sums(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Pixels of each mask in each cell of a grid over the image: bool[n, H, W] -> i64[n, h, w].

    A pixel belongs to the cell that its centre lies in (nearest upsampling of the grid).
    """
    if any(pixels < cells for pixels, cells in zip(masks.shape[1:], grid, strict=True)):
        raise ValueError(f"masks of {masks.shape[1:]} pixels are smaller than the grid {grid}")
    rows, columns = _first_pixels(masks.shape[1:], grid)
    sums = np.add.reduceat(masks.astype(np.int64), rows[:-1], axis=1)
    return np.add.reduceat(sums, columns[:-1], axis=2)


def _first_pixels(size: tuple[int, int], grid: tuple[int, int]) -> list[np.ndarray]:
    """First pixel of every cell, followed by the side, for rows and for columns."""
    return [
        np.searchsorted((np.arange(side) + 0.5) * cells / side, np.arange(cells + 1))
        for side, cells in zip(size, grid, strict=True)
    ]


def grid_jaccards(kept: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Intersection over union, in pixels, of kept cells with masks.

    Args:
      kept: bool[K, h, w]; masks: bool[n, H, W], H >= h and W >= w.
    Returns:
      f64[n, K] in [0, 1]; 0 where both are empty.
    """
    flat = kept.reshape(len(kept), -1).astype(np.int64)
    inside = cell_sums(masks, kept.shape[1:]).reshape(len(masks), -1) @ flat.T  # [n, K]
    cells = cell_sums(np.ones((1, *masks.shape[1:]), bool), kept.shape[1:]).reshape(1, -1)
    union = cells @ flat.T + masks.sum(axis=(1, 2))[:, None] - inside
    return inside / np.maximum(union, 1)


def bounding_box(mask: np.ndarray) -> Box:
    """Smallest box around a non-empty mask bool[H, W]."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def box_found(box: Box, masks: np.ndarray) -> bool:
    """Whether the box has an intersection over union of at least 0.5 with the box of any object."""
    top, left, bottom, right = np.array([bounding_box(mask) for mask in masks]).T
    height = np.minimum(bottom, box[2]) - np.maximum(top, box[0])
    width = np.minimum(right, box[3]) - np.maximum(left, box[1])
    inside = np.maximum(height, 0) * np.maximum(width, 0)
    union = (box[2] - box[0]) * (box[3] - box[1]) + (bottom - top) * (right - left) - inside
    return bool((2 * inside >= union).any())


def component_found(kept: np.ndarray, masks: np.ndarray) -> bool:
    """`box_found` of the largest 4-connected component of bool[h, w], in pixels; False if it is empty.

    Source: CorLoc as in LOST, arXiv:2109.14279, section 4.1.
    """
    parts, count = ndimage.label(kept)
    if not count:
        return False
    largest = 1 + int(np.bincount(parts.ravel())[1:].argmax())  # the first in a tie
    rows, columns = _first_pixels(masks.shape[1:], kept.shape)
    top, left, bottom, right = bounding_box(parts == largest)
    return box_found((rows[top], columns[left], rows[bottom], columns[right]), masks)


def scored_images(masks: Sequence[np.ndarray], count: int) -> dict[int, np.ndarray]:
    """Objects bool[n, H, W] of those of `count` images that have any; empty masks are dropped.

    Raises:
      ValueError: not `count` entries, or fewer than two images with an object (no standard error).
    """
    if len(masks) != count:
        raise ValueError(f"{count} maps and masks of {len(masks)} images")
    objects = {i: m[m.any(axis=(1, 2))] for i, m in enumerate(masks) if m.any()}
    if len(objects) < 2:
        raise ValueError(f"{len(objects)} of {count} images show an object: at least 2 are needed")
    return objects


def mean_sem(values: np.ndarray) -> tuple[float, float]:
    """Mean of f64[M] in [0, 1], M >= 2, and its standard error, both in %."""
    return 100 * float(values.mean()), 100 * float(values.std(ddof=1) / np.sqrt(len(values)))
