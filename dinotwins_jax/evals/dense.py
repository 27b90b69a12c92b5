"""Dense evaluation without labels: attention, normalised cut and PCA, scored against masks and drawn.

Letters: M images, N patches, D width of a token.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from dinotwins_jax.data.bands import as_colours
from dinotwins_jax.data.workers import num_cores
from dinotwins_jax.evals.attention import attention_grid
from dinotwins_jax.evals.localisation import (
    attention_maps,
    attention_scores,
    centre_box_scores,
    view_masks,
)
from dinotwins_jax.evals.pca import patch_pca
from dinotwins_jax.evals.pictures import pca_grid, segmentation_grid
from dinotwins_jax.evals.segmentation import normalised_cut, segmentation_scores
from dinotwins_jax.evals.view import View
from dinotwins_jax.models.vit import VisionTransformer, as_pair

_BOX_PROTOCOLS = {"attention": "attention-box-v1", "segmentation": "ncut-box-v1"}


class ImageSet(NamedTuple):
    """Images of a source in one view, with their masks."""

    source: object
    view: View  # a square of whole patches
    indices: np.ndarray  # i64[M], readable records
    pixels: np.ndarray  # u8[M, side, side, 3], to look at
    masks: list | None  # bool[n, side, side] of each image; None where the source has none
    boxes: bool = False  # whether these are boxes of the objects, filled

    def map(self, function):
        """Applies a function of views; returns a pytree of [M, …]."""
        return self.view.map(function, self.source, self.indices)[0]


def image_set(source, view: View, indices, objects: str = "masks") -> ImageSet:
    """Loads the readable records among `indices` of a source, and their "masks" or "boxes" if any."""
    pixels, indices = view.map(partial(_pixels, view.mean, view.std), source, indices)
    masks = None
    if hasattr(source, objects):
        options = {"resize": view.resize, "crop": view.crop, "objects": objects}
        masks = [view_masks(source, int(i), **options)[0] for i in indices]
    return ImageSet(source, view, indices, as_colours(pixels), masks, objects == "boxes")


@partial(jax.jit, static_argnums=(0, 1))
def _pixels(mean, std, views):
    """Converts normalised views to u8."""
    pixels = views * jnp.array(std) + jnp.array(mean)
    return jnp.clip(jnp.round(pixels * 255), 0, 255).astype(jnp.uint8)


@partial(jax.jit, static_argnames="backbone")
def patch_tokens(backbone: VisionTransformer, params, views: jax.Array) -> jax.Array:
    """Patch tokens f32[B, N, D] of views f32[B, H, W, C]."""
    return backbone.apply({"params": params}, views).patches


def score_attention(
    backbone: VisionTransformer, weights: dict, images: ImageSet, *, keep: float
) -> dict[str, dict]:
    """Scores the class-token attention of each set of weights, and the centre box, against masks.

    Args:
      weights: row -> parameters; keep: share of the attention that a mask keeps.
    Returns:
      {row: {"attention": scores}}, with an additional row "centre box"; {row: {"attention boxes":
      scores}} against boxes.
    """
    scores = {"centre box": centre_box_scores(images.masks)}

    def maps_of(views):
        return {row: attention_maps(backbone, params, views) for row, params in weights.items()}

    found = images.map(maps_of)
    for row in weights:
        scores[row] = attention_scores(*found[row], images.masks, keep=keep)
    return {row: _named("attention", of, images) for row, of in scores.items()}


def _named(task: str, scores: dict, images: ImageSet) -> dict[str, dict]:
    """{task: scores}; of boxes {"<task> boxes": what a box can tell}, with a protocol of its own.

    An overlap of patches with filled boxes would look like the Jaccard of masks.
    """
    if not images.boxes:
        return {task: scores}
    kept = {"protocol": _BOX_PROTOCOLS[task], "images": scores["images"]}
    names = ("pointing", "pointing_sem", "corloc", "corloc_sem")
    return {f"{task} boxes": kept | {name: scores[name] for name in names if name in scores}}


def score_segmentation(
    backbone: VisionTransformer, weights: dict, images: ImageSet
) -> dict[str, dict]:
    """Scores the normalised cut of each set of weights' patch features against the masks."""
    foregrounds = _cuts(backbone, weights, images)
    scores = {row: segmentation_scores(foregrounds[row], images.masks) for row in weights}
    return {row: _named("segmentation", of, images) for row, of in scores.items()}


def _cuts(backbone: VisionTransformer, weights: dict, images: ImageSet) -> dict[str, np.ndarray]:
    """{row: foreground bool[M, h, w] of each image by the normalised cut}, an image a thread.

    With all of its threads on one image BLAS took seven times as long (144 patches, two cores).
    """
    grid = backbone.grid(as_pair(images.view.crop))
    cut_image = partial(normalised_cut, grid=grid)
    # A cut takes some six matrices f64[N, N]: all threads together at most 2 GB.
    threads = max(1, min(num_cores(), int(2e9 / (48 * math.prod(grid) ** 2))))
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:

        def cut(params, views):
            patches = np.asarray(patch_tokens(backbone, params, views))
            return np.stack(list(pool.map(cut_image, patches)))

        # Batch by batch: the patches of all images would take gigabytes.
        return images.map(lambda views: {row: cut(weights[row], views) for row in weights})


def titles(images: ImageSet) -> list[str] | None:
    """Class names of the images; None if the source has no labels."""
    labels, names = images.source.labels, images.source.class_names
    if labels is None:
        return None
    return [names[labels[i]] if labels[i] >= 0 else "no object" for i in images.indices]


def draw_attention(path: Path, backbone: VisionTransformer, params, images: ImageSet) -> None:
    """Draws the attention_grid of the images."""
    maps, _ = images.map(partial(attention_maps, backbone, params))
    attention_grid(path, images.pixels, maps, titles=titles(images))


def draw_segmentation(path: Path, backbone: VisionTransformer, params, images: ImageSet) -> None:
    """Draws the cut, and beside it the masks of the images where the source has any."""
    foregrounds = _cuts(backbone, {"drawn": params}, images)["drawn"]
    segmentation_grid(path, images.pixels, foregrounds, images.masks)


def draw_pca(path: Path, backbone: VisionTransformer, params, images: ImageSet) -> None:
    """Draws the principal components of all images' patches, fitted together, as colours."""
    projections, _ = patch_pca(images.map(partial(patch_tokens, backbone, params)))
    pca_grid(path, images.pixels, projections, backbone.grid(as_pair(images.view.crop)))
