"""Gaussian blur of one image as products with narrow matrices, as in ops.py in float32 under jit."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from dinotwins_jax.augment.ops import BAND_ROWS, product


def blur_matrix(radius, size: int) -> jax.Array:
    """Gaussian blur of one axis as a matrix f32[size, size] (rows sum to 1), edges replicated.

    Three passes of an extended box filter (fractional ends) with the Gaussian's variance in total.
    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
    filtering", as Pillow's GaussianBlur(radius).

    Args:
      radius: f32[] standard deviation (pixels); 0 gives the identity.
    """
    variance = radius * radius / 3.0
    whole = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    ends = (2 * whole + 1) * (whole * (whole + 1) - 3.0 * variance)
    reach = whole + ends / (6.0 * (variance - (whole + 1) ** 2)) + 0.5
    # Weight: overlap of pixel j with the box around i; edge pixels stand for all outside.
    pixel = jnp.arange(size, dtype=jnp.float32)
    west = jnp.where(pixel == 0, -jnp.inf, pixel - 0.5)
    east = jnp.where(pixel == size - 1, jnp.inf, pixel + 0.5)
    low, high = pixel[:, None] - reach, pixel[:, None] + reach
    box = (jnp.clip(east, low, high) - jnp.clip(west, low, high)) / (2.0 * reach)
    return product("ij,jk->ik", product("ij,jk->ik", box, box), box)


def truncated_blur_matrix(radius, size: int, taps: int) -> jax.Array:
    """Gaussian blur of one axis with a kernel of `taps`, as f32[size, size]; edges are reflected.

    Source: torchvision's GaussianBlur(kernel_size=taps, sigma=radius).

    Args:
      radius: f32[] standard deviation (pixels), above 0.
      taps: odd; taps // 2 < size.
    """
    reach = taps // 2
    offset = jnp.arange(-reach, reach + 1, dtype=jnp.float32)
    kernel = jnp.exp(-0.5 * (offset / jnp.maximum(radius, 1e-3)) ** 2)
    kernel = kernel / kernel.sum()
    row = jnp.arange(size)[:, None]
    source = jnp.abs(row + jnp.arange(-reach, reach + 1))
    source = jnp.where(source >= size, 2 * (size - 1) - source, source)
    return jnp.zeros((size, size)).at[row, source].add(jnp.broadcast_to(kernel, source.shape))


def blur_reach(radius: float, taps: int = 0) -> int:
    """Pixels on each side that a blur of this standard deviation, or of a smaller one, reads."""
    if taps:
        return taps // 2
    return 3 * math.ceil((math.sqrt(4.0 * radius * radius + 1.0) - 1.0) / 2.0)


def gaussian_blur(planes: jax.Array, radius, taps: int = 0, max_radius=None) -> jax.Array:
    """Gaussian blur of planes f32[C, h, w] with standard deviation radius f32[] >= 0 (pixels).

    Args:
      taps: 0 blurs as Pillow's GaussianBlur, where radius 0 is the identity; an odd number as
        torchvision's, with so many taps.
      max_radius: static bound of radius. Large planes are then blurred band by band, a third of the time
        of 224 pixels on a CPU. None: two dense products, best on accelerators and under `jax.vmap`.
    """
    matrix = partial(truncated_blur_matrix if taps else blur_matrix, radius)
    matrix = partial(matrix, taps=taps) if taps else matrix
    reach = None if max_radius is None else blur_reach(max_radius, taps)
    channels, height, width = planes.shape
    if bands := _bands(matrix, width, reach):
        rows = planes.reshape(-1, width)
        parts = [product("rX,xX->rx", rows[:, window], weights) for window, weights in bands]
        planes = jnp.concatenate(parts, axis=1).reshape(planes.shape)
    else:
        planes = product("cyX,xX->cyx", planes, matrix(size=width))
    if bands := _bands(matrix, height, reach):
        each = [jnp.broadcast_to(weights, (channels, *weights.shape)) for _, weights in bands]
        parts = [
            product("cyY,cYx->cyx", weights, planes[:, window])
            for (window, _), weights in zip(bands, each, strict=True)
        ]
        return jnp.concatenate(parts, axis=1)
    return product("yY,cYx->cyx", matrix(size=height), planes)


def _bands(matrix, size: int, reach: int | None) -> list[tuple[slice, jax.Array]]:
    """matrix(size=size), whose entries farther than `reach` from the diagonal are 0, as bands of rows:
    the columns that a band reads, and f32[rows, columns]. []: if bands would save little."""
    rows = BAND_ROWS
    if reach is None or reach > rows or size < 3 * rows:
        return []
    window = rows + 2 * reach
    small = matrix(size=3 * rows)  # of the first band, an inner one (all are alike) and the last
    inner = small[rows : 2 * rows, rows - reach : 2 * rows + reach]
    bands = [(slice(0, window), small[:rows, :window])]
    for row in range(rows, size - rows, rows):
        start = min(row, size - 2 * rows)  # the last inner band overlaps the one before
        window_of_band = slice(start - reach, start - reach + window)
        bands.append((window_of_band, inner[row - start :]))
    return [*bands, (slice(size - window, size), small[-rows:, -window:])]
