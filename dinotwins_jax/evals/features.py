"""Frozen features of a labelled source, as the official linear evaluation takes them."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.augment import center_view
from dinotwins_jax.models.vit import VisionTransformer

PIXELS = 32  # side of the raw-pixel baseline: 118,287 pictures of COCO take 1.5 GB


class Embed(NamedTuple):
    """Frozen features of images.

    apply: views f32[B, h, w, 3], as `center_view` gives them, -> f32[B, D], what the linear probe sees.
    knn: the columns of D that k-NN sees.
    """

    apply: Callable[[jax.Array], jax.Array]
    knn: slice = slice(None)


def check_last_blocks(backbone: VisionTransformer, n_last_blocks: int) -> None:
    """Raises ValueError unless the backbone has that many blocks."""
    if not 1 <= n_last_blocks <= backbone.depth:
        raise ValueError(
            f"config.evals.n_last_blocks is {n_last_blocks}: the backbone has {backbone.depth} blocks"
        )


def make_backbone_embed(
    backbone: VisionTransformer, params, *, n_last_blocks: int, mean_patch: bool
) -> Embed:
    """Class tokens of the last blocks; k-NN sees the last one's alone.

    Args:
      params: of the backbone; used as they are, never trained.
      n_last_blocks: class tokens, each after the final LayerNorm, that are concatenated.
      mean_patch: append the mean patch token of the last block.
    Raises:
      ValueError: more blocks than the backbone has.
    Source: dino eval_linear.py and eval_knn.py.
    """
    check_last_blocks(backbone, n_last_blocks)

    @jax.jit
    def embed(params, views):
        layers = backbone.apply(
            {"params": params}, views, n=n_last_blocks, method="intermediate_layers"
        )
        parts = [cls for cls, _ in layers]
        if mean_patch:
            parts.append(jnp.mean(layers[-1][1], axis=1))
        return jnp.concatenate(parts, axis=-1)

    last = slice((n_last_blocks - 1) * backbone.embed_dim, n_last_blocks * backbone.embed_dim)
    return Embed(partial(embed, params), last)


def pixel_embed() -> Embed:
    """The view's raw pixels, at most 32 x 32 of them: what no learning gives."""

    @jax.jit
    def embed(views):
        height, width = (min(side, PIXELS) for side in views.shape[1:3])
        small = jax.image.resize(views, (len(views), height, width, 3), "linear")
        return small.reshape(len(views), -1)

    return Embed(embed)


def extract(
    embeds: dict[str, Embed], batches: Iterable[dict], *, resize: int, crop: int | tuple[int, int]
) -> tuple[dict, np.ndarray]:
    """Features of every readable record, all embeds on the same view of it, in one pass over the data.

    Args:
      embeds: name -> embed; batches: as eval_batches gives them.
      resize, crop: of `center_view` (pixels).
    Returns:
      ({name: f32[n, D]}, record indices i64[n]); unreadable records are left out.
    """
    view = jax.jit(partial(center_view, resize=resize, crop=crop))
    rows: dict[str, list] = {name: [] for name in embeds}
    indices = []
    for batch in batches:
        valid, views = batch["valid"], view(batch["image"], batch["size"])
        for name, embed in embeds.items():
            rows[name].append(np.asarray(embed.apply(views))[valid])
        indices.append(batch["index"][valid])
    return {name: np.concatenate(r) for name, r in rows.items()}, np.concatenate(indices)
