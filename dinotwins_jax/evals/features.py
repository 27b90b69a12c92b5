"""Frozen features of a labelled source, as the official linear evaluation takes them."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.augment import center_view
from dinotwins_jax.models.vit import VisionTransformer

Embed = Callable[[jax.Array, jax.Array], jax.Array]


def make_backbone_embed(
    backbone: VisionTransformer, params, *, resize: int, crop, n_last_blocks: int, mean_patch: bool
) -> Embed:
    """embed(images u8[B, S, S, 3], sizes i32[B, 2]) -> f32[B, D].

    Args:
      params: of the backbone; used as they are, never trained.
      resize, crop: pixels, the view of evaluation (short side, then central crop).
      n_last_blocks: class tokens, each after the final LayerNorm, that are concatenated.
      mean_patch: append the mean patch token of the last block.
    Raises:
      ValueError: more blocks than the backbone has.
    Source: dino eval_linear.py.
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

    return lambda images, sizes: embed(params, images, sizes)


def make_pixel_embed(*, resize: int, crop) -> Embed:
    """The same view's raw pixels as features f32[B, h * w * 3]: what no learning gives."""

    @jax.jit
    def embed(images, sizes):
        views = center_view(images, sizes, resize=resize, crop=crop)
        return views.reshape(views.shape[0], -1)

    return embed


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
            rows[name].append(np.asarray(embed(batch["image"], batch["size"]))[valid])
        indices.append(batch["index"][valid])
    return {name: np.concatenate(r) for name, r in rows.items()}, np.concatenate(indices)
