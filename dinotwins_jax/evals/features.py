"""Frozen features of a labelled source, as the official linear evaluation takes them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.augment import center_view
from dinotwins_jax.models.vit import VisionTransformer, as_pair

PIXELS = 32  # side of the raw-pixel baseline: 118,287 pictures of COCO take 1.5 GB


class Embed(NamedTuple):
    """Frozen features of images.

    apply: (images u8[B, S, S, 3], sizes i32[B, 2]) -> f32[B, D], what the linear probe sees.
    knn: the columns of D that k-NN sees.
    """

    apply: Callable[[jax.Array, jax.Array], jax.Array]
    knn: slice = slice(None)


def make_backbone_embed(
    backbone: VisionTransformer, params, *, resize: int, crop, n_last_blocks: int, mean_patch: bool
) -> Embed:
    """Class tokens of the last blocks; k-NN sees the last one's alone.

    Args:
      params: of the backbone; used as they are, never trained.
      resize, crop: pixels, the view of evaluation (short side, then central crop).
      n_last_blocks: class tokens, each after the final LayerNorm, that are concatenated.
      mean_patch: append the mean patch token of the last block.
    Raises:
      ValueError: more blocks than the backbone has.
    Source: dino eval_linear.py and eval_knn.py.
    """
    if not 1 <= n_last_blocks <= backbone.depth:
        raise ValueError(
            f"evals.n_last_blocks is {n_last_blocks}: the backbone has {backbone.depth}"
        )

    @jax.jit
    def embed(params, images, sizes):
        views = center_view(images, sizes, resize=resize, crop=crop)
        layers = backbone.apply(
            {"params": params}, views, n=n_last_blocks, method="intermediate_layers"
        )
        parts = [cls for cls, _ in layers]
        if mean_patch:
            parts.append(jnp.mean(layers[-1][1], axis=1))
        return jnp.concatenate(parts, axis=-1)

    last = slice((n_last_blocks - 1) * backbone.embed_dim, n_last_blocks * backbone.embed_dim)
    return Embed(lambda images, sizes: embed(params, images, sizes), last)


def make_pixel_embed(*, resize: int, crop) -> Embed:
    """The same view's raw pixels, at most 32 x 32 of them: what no learning gives."""
    height, width = (min(side, PIXELS) for side in as_pair(crop))

    @jax.jit
    def embed(images, sizes):
        views = center_view(images, sizes, resize=resize, crop=crop)
        small = jax.image.resize(views, (len(views), height, width, 3), "linear")
        return small.reshape(len(views), -1)

    return Embed(embed)


def extract(embeds: dict[str, Embed], batches: Iterable[dict]) -> tuple[dict, np.ndarray]:
    """Features of every readable record, all embeds in one pass over the data.

    Args:
      embeds: name -> embed; batches: as eval_batches gives them.
    Returns:
      ({name: f32[n, D]}, record indices i64[n]); unreadable records are left out.
    """
    rows: dict[str, list] = {name: [] for name in embeds}
    indices = []
    for batch in batches:
        valid = batch["valid"]
        for name, embed in embeds.items():
            rows[name].append(np.asarray(embed.apply(batch["image"], batch["size"]))[valid])
        indices.append(batch["index"][valid])
    return {name: np.concatenate(r) for name, r in rows.items()}, np.concatenate(indices)
