"""Localisation scores: attention maps as segmentations, against the masks of objects in the view.

Letters: M images, n objects of an image, K candidate maps (heads), h x w patches, H x W pixels.
The objects are those of a source's masks(): COCO's "things", crowds left out. The foreground is the
union of the objects, so "stuff" such as sky and grass is background. Images without an object in the
view are left out of all scores.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from dinotwins_jax.evals.attention import cls_attention, mass_mask, rollout
from dinotwins_jax.evals.object_masks import (
    Box,
    box_found,
    component_found,
    grid_jaccards,
    mean_sem,
    scored_images,
)
from dinotwins_jax.models.vit import VisionTransformer

# COCO's 32^2 and 96^2 pixels as fractions of an image of 640 x 480.
SMALL, LARGE = 32**2 / (640 * 480), 96**2 / (640 * 480)
KEEPS = (
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.85,
    0.9,
    0.95,
)  # candidate shares of the attention that a mask keeps
SIDES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of a centre box, as fractions of the image's


def view_masks(
    source, i: int, *, resize: int, crop: int | tuple[int, int], objects: str = "masks"
) -> tuple[np.ndarray, np.ndarray]:
    """Object masks of image i in `center_view`, sampled at the centre of each pixel of the view.

    Args:
      source: with masks(i); resize, crop: as in `center_view` (pixels).
      objects: method of the source, masks or boxes.
    Returns:
      bool[n, h, w] of objects with at least one pixel in the view, and their categories i32[n].
    Raises:
      ValueError: crop not in 1..resize.
    Differs: works at the image's own size; for an image shrunk to its canvas first, the rounding of its
      sides gives an offset of less than a pixel of the view.
    """
    out = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if not 0 < min(out) <= max(out) <= resize:
        raise ValueError(f"crop must be from 1 to resize = {resize} pixels, got {crop}")
    masks, categories = getattr(source, objects)(i)
    size = np.array(masks.shape[1:])
    resized = resize * size // size.min()
    start = np.round((resized - np.array(out)) / 2)
    rows, columns = (
        ((start[a] + np.arange(out[a]) + 0.5) * size[a] / resized[a]).astype(int) for a in (0, 1)
    )
    seen = masks[:, rows][:, :, columns]
    there = seen.any(axis=(1, 2))
    return seen[there], categories[there]


@partial(jax.jit, static_argnames="backbone")
def attention_maps(
    backbone: VisionTransformer, params, views: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The last block's class-token attention and the rollout, compiled once per shape of views.

    Args:
      backbone: of the parameters; views: f32[B, H, W, C], from `center_view`.
    Returns:
      f32[B, heads, h, w] and f32[B, h, w].
    """
    attentions = backbone.apply({"params": params}, views, method="attentions")
    grid, prefix = backbone.grid(views.shape[1:3]), 1 + backbone.num_register_tokens
    return cls_attention(attentions[-1], grid, prefix), rollout(attentions, grid, prefix)


def attention_scores(
    maps: np.ndarray, rollouts: np.ndarray, masks: Sequence[np.ndarray], *, keep: float = 0.6
) -> dict:
    """Scores of attention maps against object masks, each a mean over the images in %.

    Jaccard: IoU of the patches with `keep` of a map's mass, nearest upsampled, with the foreground
    pointing: the pixel at the middle of the mean map's highest patch belongs to an object
    CorLoc: the box of the largest component of the mean map's kept patches has IoU >= 0.5 with an
      object's box

    Args:
      maps: f32[M, heads, h, w] not negative, such as class-token attention; the mean map is their mean.
      rollouts: f32[M, h, w], of `rollout`.
      masks: M times bool[n, H, W], objects in the same view as the maps (`view_masks`); n may be 0.
      keep: share of the mass, in (0, 1].
    Returns:
      "protocol", "keep", "images" (with an object); "jaccard_heads": one per head, "jaccard_best_head":
      the best head of the other half of the images (the scored images at even positions select for the
      odd ones and vice versa), "best_head_of_halves": head used on the even and on the odd ones;
      "jaccard_best_head_oracle": each image's best head, selected on its own masks, an upper bound of
      the others; "jaccard_mean_map", "jaccard_rollout"; "jaccard_fitted": the mean map with the share of
      KEEPS that is best on the other half of the images ("keep_of_halves"), since a fixed share cuts off
      parts of an object that is attended to as a whole; "pointing", "corloc"; each with
      "<metric>_sem", standard error over images.
      "sizes": small | medium | large -> {"objects": count, "jaccard_best_head_oracle": mean over
      objects of the best head's Jaccard with that object only, "pointing": % of objects that contain
      the pixel}; the two are missing if the count is 0.
    Raises:
      ValueError: shapes that do not fit, or fewer than two images with an object.
    Source: mass and Jaccard: DINO, arXiv:2104.14294, section 4.2.2; pointing game: arXiv:1608.00507;
      CorLoc: LOST, arXiv:2109.14279; sizes: COCO's areas 32^2 and 96^2.
    Differs: DINO reports the best head of each image (our oracle); no tolerance around the pointed
      pixel (there 15 pixels); sizes are of the visible part, relative to a view of 640 x 480 pixels.
    """
    maps, rollouts = np.asarray(maps, np.float32), np.asarray(rollouts, np.float32)
    if maps.ndim != 4 or rollouts.shape != (len(maps), *maps.shape[2:]):
        raise ValueError(
            f"maps {maps.shape} must be [M, heads, h, w], rollouts {rollouts.shape} [M, h, w]"
        )
    images, by_keep = [], []
    extra = {"jaccard_mean_map": [], "jaccard_rollout": [], "corloc": []}
    for i, objects in scored_images(masks, len(maps)).items():
        mean = maps[i].mean(axis=0)
        kept = mass_mask(np.stack([*maps[i], mean, rollouts[i]]), keep)
        jaccard = grid_jaccards(kept, objects.any(axis=0, keepdims=True))[0]
        pixel = _peak_pixel(mean, objects.shape[1:])
        images.append(_image(jaccard[:-2], grid_jaccards(kept[:-2], objects), objects, pixel))
        shares = np.concatenate([mass_mask(mean[None], share) for share in KEEPS])
        by_keep.append(grid_jaccards(shares, objects.any(axis=0, keepdims=True))[0])
        extra["jaccard_mean_map"].append(jaccard[-2])
        extra["jaccard_rollout"].append(jaccard[-1])
        extra["corloc"].append(component_found(kept[-2], objects))
    choice = _cross_fit(np.stack([image.jaccard for image in images]))
    scores = {"protocol": "attention-mask-v1", "keep": keep} | _scores(images, choice)
    by_keep = np.stack(by_keep)
    fitted = _cross_fit(by_keep)
    extra["jaccard_fitted"] = by_keep[np.arange(len(fitted)), fitted]
    scores["keep_of_halves"] = [KEEPS[fitted[0]], KEEPS[fitted[1]]]
    return scores | _means(extra)


def centre_box_scores(masks: Sequence[np.ndarray], *, sides: Sequence[float] = SIDES) -> dict:
    """`attention_scores` of a box in the middle of the image: the baseline of the centre bias.

    The box has one side for all images, selected by Jaccard on the other half of them, as for the best
    head; pointing uses the middle of the image. Here a "head" is one of the sides.

    Args:
      masks: as in `attention_scores`.
      sides: of the box, as fractions of the image's, in (0, 1].
    Returns:
      The keys of `attention_scores` except those of shares, the mean map and rollout; and "sides".
    Raises:
      ValueError: a side outside (0, 1], or fewer than two images with an object.
    """
    if not sides or not 0.0 < min(sides) <= max(sides) <= 1.0:
        raise ValueError(f"sides {tuple(sides)} must be fractions of the image's sides, in (0, 1]")
    images, found = [], []
    for objects in scored_images(masks, len(masks)).values():
        height, width = objects.shape[1:]
        boxes = [_centre_box(height, width, side) for side in sides]
        jaccard = _box_jaccards(boxes, objects.any(axis=0, keepdims=True))[0]
        middle = (height // 2, width // 2)
        images.append(_image(jaccard, _box_jaccards(boxes, objects), objects, middle))
        found.append([box_found(box, objects) for box in boxes])
    choice = _cross_fit(np.stack([image.jaccard for image in images]))
    scores = {"protocol": "attention-mask-v1", "sides": list(sides)} | _scores(images, choice)
    return scores | _means({"corloc": np.array(found)[np.arange(len(found)), choice]})


def _peak_pixel(cells: np.ndarray, size: tuple[int, int]) -> tuple[int, int]:
    """Pixel at the middle of the highest cell of f32[h, w], the first in a tie."""
    row, column = np.unravel_index(cells.argmax(), cells.shape)
    height, width = (pixels / count for pixels, count in zip(size, cells.shape, strict=True))
    return int((row + 0.5) * height), int((column + 0.5) * width)


def _centre_box(height: int, width: int, side: float) -> Box:
    top, left = (round((1.0 - side) / 2 * length) for length in (height, width))
    return top, left, height - top, width - left


def _box_jaccards(boxes: list[Box], masks: np.ndarray) -> np.ndarray:
    """Intersection over union of K boxes with bool[n, H, W]: f64[n, K]."""
    columns = []
    for top, left, bottom, right in boxes:
        inside = masks[:, top:bottom, left:right].sum(axis=(1, 2))
        area = (bottom - top) * (right - left)
        columns.append(inside / (area + masks.sum(axis=(1, 2)) - inside))
    return np.stack(columns, axis=1)


class _Image(NamedTuple):
    """Values of one image: K candidates against the foreground and against each object."""

    jaccard: np.ndarray  # f64[K] with the foreground
    objects: np.ndarray  # f64[n, K] with each object
    pointed: np.ndarray  # bool[n] whether the object contains the pointed pixel
    area: np.ndarray  # f64[n] fraction of the view


def _image(jaccard, each_jaccard, objects: np.ndarray, pixel) -> _Image:
    area = objects.mean(axis=(1, 2))
    return _Image(jaccard, each_jaccard, objects[:, pixel[0], pixel[1]], area)


def _means(columns: dict) -> dict[str, float]:
    """Mean and standard error of each column over the images, in %."""
    scores = {}
    for name, values in columns.items():
        scores[name], scores[f"{name}_sem"] = mean_sem(np.asarray(values, np.float64))
    return scores


def _cross_fit(jaccards: np.ndarray) -> np.ndarray:
    """Candidate i64[M] for each image of f64[M, K]: odd images select for even ones and vice versa."""
    choice = np.zeros(len(jaccards), np.int64)
    for half in (0, 1):
        choice[half::2] = jaccards[1 - half :: 2].mean(axis=0).argmax()
    return choice


def _scores(images: list[_Image], choice: np.ndarray) -> dict:
    jaccards = np.stack([image.jaccard for image in images])  # [M, K]
    heads = [mean_sem(column) for column in jaccards.T]
    scores = {
        "images": len(images),
        "jaccard_heads": [mean for mean, _ in heads],
        "jaccard_heads_sem": [sem for _, sem in heads],
        "best_head_of_halves": [int(choice[0]), int(choice[1])],
    }
    columns = {
        "jaccard_best_head": jaccards[np.arange(len(images)), choice],
        "jaccard_best_head_oracle": jaccards.max(axis=1),
        "pointing": [image.pointed.any() for image in images],
    }
    return scores | _means(columns) | {"sizes": _sizes(images)}


def _sizes(images: list[_Image]) -> dict[str, dict]:
    area = np.concatenate([image.area for image in images])
    best = np.concatenate([image.objects.max(axis=1) for image in images])
    pointed = np.concatenate([image.pointed for image in images])
    sizes = {}
    for name, low, high in (("small", 0, SMALL), ("medium", SMALL, LARGE), ("large", LARGE, 2)):
        inside = (low <= area) & (area < high)
        sizes[name] = {"objects": int(inside.sum())}
        if inside.any():
            sizes[name]["jaccard_best_head_oracle"] = 100 * float(best[inside].mean())
            sizes[name]["pointing"] = 100 * float(pointed[inside].mean())
    return sizes
