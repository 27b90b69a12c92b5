"""Class-token attention: maps, kept mass, rollout, and pictures of them.

Letters: B images, T tokens, h x w patches, H x W pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.evals.pictures import panel_grid, show, show_map, show_mask

MAX_HEADS = 6  # columns of the picture; ViT-S has six heads


def mass_mask(attention: jax.Array | np.ndarray, keep: float = 0.6) -> np.ndarray:
    """The smallest set of patches of each head that holds at least `keep` of its attention.

    sort ascending, divide by the sum, keep where the running sum > 1 - keep

    Args:
      attention: f32[heads, h, w], not negative; each head is normalised here.
      keep: share of the mass, in (0, 1].
    Returns:
      bool[heads, h, w], on the host. A head with zero attention keeps nothing.
    Raises:
      ValueError: keep outside (0, 1], or attention not [heads, h, w].
    Source: DINO, arXiv:2104.14294, visualize_attention.py (keeps 0.6).
    """
    attention = np.asarray(attention, np.float32)
    if attention.ndim != 3:
        raise ValueError(f"attention {attention.shape} must be [heads, h, w]")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep={keep} of the attention must be in (0, 1]")
    flat = attention.reshape(len(attention), -1)
    order = np.argsort(flat, axis=1, kind="stable")
    ascending = np.take_along_axis(flat, order, axis=1)
    ascending = ascending / np.maximum(ascending.sum(axis=1, keepdims=True), 1e-30)
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, order, np.cumsum(ascending, axis=1) > 1.0 - keep, axis=1)
    return mask.reshape(attention.shape)


def cls_attention(
    attention: jax.Array, grid: tuple[int, int], num_prefix_tokens: int = 1
) -> jax.Array:
    """Attention of the class token to every patch.

    Args:
      attention: f32[B, heads, T, T] of one block, row = query, as ViTOutput.attention.
      grid: (h, w) patches, h * w = T - num_prefix_tokens.
      num_prefix_tokens: tokens before the patches: the class token and the registers.
    Returns:
      f32[B, heads, h, w]; sums to 1 minus the attention to the prefix tokens.
    Raises:
      ValueError: grid and T do not fit.
    """
    (h, w), (B, heads, _, T) = grid, attention.shape
    expected = num_prefix_tokens + h * w
    if expected != T:
        raise ValueError(
            f"attention has {T} tokens; grid {h} x {w} and {num_prefix_tokens} prefix tokens: {expected}"
        )
    return attention[:, :, 0, num_prefix_tokens:].reshape(B, heads, h, w)


def rollout(
    attentions: Sequence[jax.Array], grid: tuple[int, int], num_prefix_tokens: int = 1
) -> jax.Array:
    """Attention rollout: share of each patch in the class token, through all blocks and residual paths.

    A_l = rows of (mean over heads of attention_l + identity), each divided by its sum
    class-token row of A_L ... A_2 A_1

    Args:
      attentions: f32[B, heads, T, T] of every block, the first block's first, row = query.
      grid: (h, w) patches, h * w = T - num_prefix_tokens.
      num_prefix_tokens: tokens before the patches: the class token and the registers.
    Returns:
      f32[B, h, w]; sums to 1 minus the share of the prefix tokens.
    Raises:
      ValueError: no blocks, or grid and T do not fit.
    Source: Abnar and Zuidema, arXiv:2005.00928, section 3 (attention rollout).
    Differs: starts at the class token and the last block, so it multiplies a vector by L matrices instead
      of multiplying matrices: the same result.
    """
    if not len(attentions):
        raise ValueError("rollout needs the attention of at least one block, got none")
    B, _, T, _ = attentions[0].shape
    reach = jnp.broadcast_to(jnp.eye(T)[0], (B, T))  # share of each token in the class token
    for attention in reversed(attentions):
        mixing = attention.mean(axis=1) + jnp.eye(T)
        mixing /= mixing.sum(axis=-1, keepdims=True)
        reach = jnp.einsum("bt,bts->bs", reach, mixing, precision="highest")
    return cls_attention(reach[:, None, None], grid, num_prefix_tokens)[:, 0]


def _check_pictures(images: np.ndarray, attention: np.ndarray) -> None:
    n = len(images)
    if images.ndim != 4 or attention.ndim != 4 or len(attention) != n or n == 0:
        raise ValueError(
            f"images {images.shape} must be [n, H, W, 3], attention {attention.shape} [n, heads, h, w]"
        )


def attention_grid(
    path: str | Path,
    images: np.ndarray,
    attention: np.ndarray,
    keep: float = 0.6,
    titles: list[str] | None = None,
) -> None:
    """Writes one PNG with a row per image: image, mean of the heads, each head, the mean's kept mass.

    Maps are shown patch by patch (nearest), each from 0 to its own maximum. At most six heads are
    shown; the mean is over all of them.

    Args:
      path: file to write.
      images: u8[n, H, W, 3].
      attention: f32[n, heads, h, w], from `cls_attention`.
      keep: share of the mean's attention that the last column keeps, in (0, 1].
      titles: one line above each row, or None.
    Raises:
      ValueError: numbers of images, maps and titles differ, or a shape does not fit.
    """
    images, attention = np.asarray(images), np.asarray(attention, np.float32)
    _check_pictures(images, attention)
    mean = attention.mean(axis=1)
    heads = attention[:, :MAX_HEADS]
    columns = ["image", "mean of heads", *(f"head {i + 1}" for i in range(heads.shape[1]))]
    columns.append(f"{keep:.0%} of the mean")
    rows = [
        [show(image), show_map(m), *(show_map(head) for head in each), show_mask(image, kept)]
        for image, m, each, kept in zip(images, mean, heads, mass_mask(mean, keep), strict=True)
    ]
    panel_grid(path, rows, columns, aspect=images.shape[1] / images.shape[2], titles=titles)


def attention_comparison(
    path: str | Path,
    images: np.ndarray,
    attentions: Mapping[str, np.ndarray],
    titles: list[str] | None = None,
    *,
    keep: float = 0.6,
) -> None:
    """Writes one PNG with a row per image: image, then mean of the heads and its kept mass for each run.

    Args:
      path: file to write.
      images: u8[n, H, W, 3].
      attentions: name of a run -> f32[n, heads, h, w]; runs may differ in heads and in grid.
      titles: one line above each row, or None.
      keep: share of the mean's attention that the masks keep, in (0, 1].
    Raises:
      ValueError: numbers of images, maps and titles differ, or a shape does not fit.
    """
    images = np.asarray(images)
    columns, rows = ["image"], [[show(image)] for image in images]
    for name, attention in attentions.items():
        attention = np.asarray(attention, np.float32)
        _check_pictures(images, attention)
        mean = attention.mean(axis=1)
        columns += [name, f"{keep:.0%} of it"]
        for row, image, m, kept in zip(rows, images, mean, mass_mask(mean, keep), strict=True):
            row += [show_map(m), show_mask(image, kept)]
    panel_grid(path, rows, columns, aspect=images.shape[1] / images.shape[2], titles=titles)
