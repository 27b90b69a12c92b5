"""Position embeddings: learned, interpolated between grids, and rotary for any grid.

Letters: N patches, T tokens (prefix + patches), H heads, D width of a head, E embed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROPE_BASE = 100.0  # official; all released DINOv3 models have it


def bicubic_matrix(source: int, target: int, scale: float) -> np.ndarray:
    """Rows of PyTorch's bicubic weights (a = -0.75, no antialias, edges repeated): f64[target, source]."""

    def kernel(distance):
        d, a = np.abs(distance), -0.75
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

    centers = (np.arange(target) + 0.5) / scale - 0.5
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        position = np.floor(centers) + tap
        column = np.clip(position, 0, source - 1).astype(int)
        np.add.at(matrix, (np.arange(target), column), kernel(centers - position))
    return matrix


def interpolate_pos_embed(
    pos_embed: jax.Array, grid: tuple[int, int], target: tuple[int, int]
) -> jax.Array:
    """Interpolates a position embedding to another patch grid.

    Args:
      pos_embed: f32[1, 1 + h * w, E], class position first.
      grid: (h, w) of pos_embed; target: (h', w').
    Returns:
      f32[1, 1 + h' * w', E]; the input itself when the grids agree.
    Source: dino vision_transformer.py, interpolate_pos_encoding: the scale factor is (h' + 0.1) / h.
    """
    if grid == target:
        return pos_embed
    rows = jnp.asarray(bicubic_matrix(grid[0], target[0], (target[0] + 0.1) / grid[0]), jnp.float32)
    columns = jnp.asarray(
        bicubic_matrix(grid[1], target[1], (target[1] + 0.1) / grid[1]), jnp.float32
    )
    patches = pos_embed[0, 1:].reshape(*grid, -1)  # [h, w, E]
    patches = jnp.einsum("ih,hwd->iwd", rows, patches, precision="highest")
    patches = jnp.einsum("jw,iwd->ijd", columns, patches, precision="highest")
    return jnp.concatenate(
        [pos_embed[:, :1], patches.reshape(1, target[0] * target[1], -1)], axis=1
    )


class Rope(NamedTuple):
    """Rotation tables f32[T, D / 2]; a token without a position has cos 1 and sin 0."""

    cos: jax.Array
    sin: jax.Array


class RopeMoves(NamedTuple):
    """Augmentation of patch coordinates in training, against overfitting to positions and scales.

    shift: each axis by U(-shift, shift), in halves of the image. jitter: each axis is stretched by
    exp(U(-log jitter, log jitter)); rescale: both axes by one such factor. None: off.
    """

    shift: float | None = None
    jitter: float | None = None
    rescale: float | None = None


def rope_periods(head_dim: int) -> np.ndarray:
    """Periods f64[D / 4] of an axis, in halves of the image: base ** (4 i / D)."""
    return ROPE_BASE ** (np.arange(head_dim // 4) / (head_dim / 4))


def patch_places(grid: tuple[int, int]) -> np.ndarray:
    """Patch centres f64[N, 2] (row, column), row-major; each axis of the image is [-1, 1]."""
    axes = [2.0 * (np.arange(n) + 0.5) / n - 1.0 for n in grid]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def move_places(places: jax.Array, moves: RopeMoves, key: jax.Array) -> jax.Array:
    """Coordinates [N, 2] after one draw of `moves`, the same for all patches, in the official order."""
    keys = jax.random.split(key, 3)

    def factor(key, largest, shape):
        bound = np.log(largest)
        return jnp.exp(jax.random.uniform(key, shape, minval=-bound, maxval=bound))

    if moves.shift is not None:
        places += jax.random.uniform(keys[0], (1, 2), minval=-moves.shift, maxval=moves.shift)
    if moves.jitter is not None:
        places *= factor(keys[1], moves.jitter, (1, 2))
    if moves.rescale is not None:
        places *= factor(keys[2], moves.rescale, (1, 1))
    return places


def rope_of(
    grid: tuple[int, int],
    head_dim: int,
    num_prefix_tokens: int,
    moves: RopeMoves | None = None,
    key: jax.Array | None = None,
) -> Rope:
    """The rotation of each token of an image with grid = (h, w) patches.

    The angle is 2 pi * coordinate / period: the first D / 4 components of a half by the row, the others
    by the column. Class token and registers have no position.
    Source: DINOv3, arXiv:2508.10104, section 3.2, and dinov3 layers/rope_position_encoding.py, with
    coordinates "separate" and float32 tables.
    Differs: all devices and micro-batches use the same draw.
    """
    places, xp = patch_places(grid), np
    if moves is not None:
        places, xp = move_places(jnp.asarray(places, jnp.float32), moves, key), jnp
    angles = 2 * np.pi * places[:, :, None] / rope_periods(head_dim)  # [N, 2, D / 4]
    angles = angles.reshape(len(places), -1)
    angles = xp.concatenate([np.zeros((num_prefix_tokens, head_dim // 2)), angles])
    return Rope(*(jnp.asarray(f(angles), jnp.float32) for f in (xp.cos, xp.sin)))


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates x [B, H, T, D] in the planes of component i of its first half and i of its second half."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
