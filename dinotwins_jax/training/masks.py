"""Block masks of the student's patches, with the official spread of mask ratios over a batch.

Letters: B images, N patches of a global crop on an h x w grid, M rows of masked patches.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.losses.base import Masked, Masks

_ASPECT = 0.3  # narrowest block, height / width; the widest is its inverse
_TRIES = 10  # attempts to add one block before its crop's mask is final


def draw_masks(
    spec: Masks, grid: tuple[int, int], key: jax.Array, ids: jax.Array, num_images: int
) -> Masked:
    """Draws masks for a batch's global crops.

    Of the 2 * num_images crops of the global batch, int(image_fraction * …) get a mask. The range
    `ratio` is divided into one interval per masked crop; each crop draws its ratio from its own
    interval, so that every batch masks about the same number of patches.

    Args:
      grid: (h, w) of a global crop.
      key: of this step; ids: i32[B], position of each local image in the global batch.
      num_images: of the global batch.
    Source: BEiT's blocks, arXiv:2106.08254, algorithm 1; dinov2 data/masking.py and data/collate.py.
    """
    N, crops = grid[0] * grid[1], 2 * num_images
    ladder = _ladder(spec, crops)
    slots = ids[:, None] * 2 + jnp.arange(2)  # [B, 2]
    rank = jax.random.permutation(jax.random.fold_in(key, crops), crops)[slots]

    def one(slot, rank):
        draw = jax.random.fold_in(key, slot)
        step = jnp.minimum(rank, len(ladder) - 2)
        low, high = jnp.asarray(ladder)[step], jnp.asarray(ladder)[step + 1]
        share = low + jax.random.uniform(jax.random.fold_in(draw, 0)) * (high - low)
        target = jnp.where(rank < len(ladder) - 1, jnp.floor(N * share), 0).astype(jnp.int32)
        return blocks(jax.random.fold_in(draw, 1), target, grid, spec.min_patches)

    where = jax.vmap(jax.vmap(one))(slots, rank).reshape(*slots.shape, N)
    rows = num_rows(spec, N, num_images, len(ids))
    (row,) = jnp.nonzero(where.reshape(-1), size=rows, fill_value=0)
    hidden = jnp.sum(where, axis=-1).reshape(-1)  # [B * 2]
    real = jnp.arange(rows) < jnp.sum(hidden)
    weight = jnp.where(real, 1.0 / jnp.maximum(hidden[row // N], 1), 0.0)
    return Masked(where, row, weight)


def blocks(key: jax.Array, target: jax.Array, grid: tuple[int, int], min_patches: int) -> jax.Array:
    """Draws one crop's mask bool[h, w]: rectangles are added until `target` patches are masked, or ten
    in a row did not fit."""
    h, w = grid
    rows, columns = jnp.arange(h)[:, None], jnp.arange(w)[None, :]

    def body(state):
        mask, count, tries, draw = state
        area, aspect, top, left = jax.random.uniform(jax.random.fold_in(key, draw), (4,))
        room = jnp.minimum(target - count, 0.5 * h * w)
        area = min_patches + area * (room - min_patches)
        aspect = jnp.exp(math.log(_ASPECT) * (1 - 2 * aspect))
        height = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
        width = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
        top = jnp.floor(top * (h - height + 1)).astype(jnp.int32)
        left = jnp.floor(left * (w - width + 1)).astype(jnp.int32)
        block = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        new = height * width - jnp.sum(mask & block)
        fits = (height < h) & (width < w) & (new > 0) & (new <= room)
        mask = jnp.where(fits, mask | block, mask)
        return mask, count + jnp.where(fits, new, 0), jnp.where(fits, 0, tries + 1), draw + 1

    start = (jnp.zeros(grid, bool), jnp.int32(0), jnp.int32(0), jnp.int32(0))
    return jax.lax.while_loop(lambda s: (s[1] < target) & (s[2] < _TRIES), body, start)[0]


def num_rows(spec: Masks, N: int, num_images: int, here: int) -> int:
    """Largest number of masked patches in `here` images of the global batch; at least 1."""
    ladder = _ladder(spec, 2 * num_images)
    most = np.sort(np.floor(N * ladder[1:].astype(np.float64) + 1e-3))[::-1]
    return max(int(most[: 2 * here].sum()), 1)


def _ladder(spec: Masks, crops: int) -> np.ndarray:
    """Boundaries f32[n + 1] of the n intervals of mask ratios."""
    return np.linspace(*spec.ratio, int(spec.image_fraction * crops) + 1).astype(np.float32)
