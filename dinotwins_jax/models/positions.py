"""Position embeddings: learned, interpolated between grids, and rotary for any grid.

Letters: N patches, T tokens (prefix + patches), H heads, D width of a head, E embed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROPE_BASE = 100.0  # official; all released DINOv3 models have it


# How a learned embedding is resampled to another grid, by `interpolation_matrix`, and who does so:
#   dino        scale factor (h' + 0.1) / h, no antialias   DINO; DINOv2 without registers
#   antialias   to h' x w', antialias                       DINOv2 with registers; timm; transformers'
#                                                           Dinov2WithRegistersModel
#   size        to h' x w', no antialias                    transformers' ViTModel and Dinov2Model
INTERPOLATIONS = ("dino", "antialias", "size")


def interpolation_matrix(source: int, target: int, rule: str = "dino") -> np.ndarray:
    """Weights f64[target, source] of PyTorch's bicubic interpolation of one axis.

    Without antialias: a = -0.75, edges repeated; with it: a = -0.5, the kernel as wide as the step, weights
    outside of the axis left out and the others scaled to a sum of 1.

    Raises:
      ValueError: unknown rule.
    """
    if rule not in INTERPOLATIONS:
        raise ValueError(
            f"position_interpolation is '{rule}': choose {', '.join(INTERPOLATIONS[:-1])} or "
            f"{INTERPOLATIONS[-1]}"
        )
    if rule == "antialias":
        return _antialiased(source, target)
    scale = (target + 0.1 if rule == "dino" else target) / source
    centers = (np.arange(target) + 0.5) / scale - 0.5
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        position = np.floor(centers) + tap
        column = np.clip(position, 0, source - 1).astype(int)
        np.add.at(matrix, (np.arange(target), column), _cubic(centers - position, -0.75))
    return matrix


def _antialiased(source: int, target: int) -> np.ndarray:
    step = source / target
    width = max(step, 1.0)
    centers = (np.arange(target) + 0.5)[:, None] * step
    columns = np.arange(source)
    first = np.maximum(np.floor(centers - 2.0 * width + 0.5), 0)
    end = np.minimum(np.floor(centers + 2.0 * width + 0.5), source)
    weights = _cubic((columns - centers + 0.5) / width, -0.5)
    weights = np.where((columns >= first) & (columns < end), weights, 0.0)
    return weights / weights.sum(1, keepdims=True)


def _cubic(distance, a: float):
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def interpolate_pos_embed(
    pos_embed: jax.Array, grid: tuple[int, int], target: tuple[int, int], rule: str = "dino"
) -> jax.Array:
    """Interpolates a position embedding to another patch grid.

    Args:
      pos_embed: f32[1, 1 + h * w, E], class position first.
      grid: (h, w) of pos_embed; target: (h', w').
      rule: of INTERPOLATIONS.
    Returns:
      f32[1, 1 + h' * w', E]; the input itself when the grids agree.
    Source: dino vision_transformer.py and dinov2 models/vision_transformer.py, interpolate_pos_encoding;
      timm layers/pos_embed.py, resample_abs_pos_embed.
    """
    if grid == target:
        return pos_embed
    rows, columns = (
        jnp.asarray(interpolation_matrix(h, to, rule), jnp.float32)
        for h, to in zip(grid, target, strict=True)
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


def check_positions(positions: str, embed_dim: int, num_heads: int, moves: RopeMoves | None):
    """Raises ValueError if rotary positions do not suit the heads, or learned ones would have to move."""
    if positions == "rope" and embed_dim % (4 * num_heads):
        raise ValueError(
            f"positions='rope' needs heads whose width is a multiple of 4: embed_dim {embed_dim} / "
            f"num_heads {num_heads}"
        )
    if positions != "rope" and moves is not None:
        raise ValueError("rope_shift, rope_jitter and rope_rescale need positions='rope'")


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
