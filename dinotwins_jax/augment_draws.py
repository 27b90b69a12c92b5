"""Random numbers of a view: key -> ViewDraw. No pixels: tests and plots can look at what is drawn.

Source: torchvision's RandomResizedCrop.get_params and ColorJitter.get_params.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop


class ViewRecipe(NamedTuple):
    """Static description of the views of one shape; the tuples of probabilities have one a view."""

    out: tuple[int, int]  # (h, w) pixels
    scale: tuple[float, float]  # box area / image area
    ratio: tuple[float, float]  # box width / height
    flip: float
    jitter_prob: float
    strengths: tuple[float, float, float, float]  # brightness, contrast, saturation, hue
    grayscale_prob: float
    blur_radius: tuple[float, float]  # pixels of the crop
    blur_probs: tuple[float, ...]
    solarize_probs: tuple[float, ...]


class ViewDraw(NamedTuple):
    """Everything random about one view."""

    box: tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # i32[] top, left, height, width
    flip: jax.Array  # bool[]
    factors: jax.Array  # f32[3] brightness, contrast, saturation; 1 = unchanged
    hue: jax.Array  # f32[] fraction of the circle
    order: jax.Array  # i32[4], see ops.color_jitter
    grayscale: jax.Array  # bool[]
    radius: jax.Array  # f32[] blur, pixels; 0 = unchanged
    solarize: jax.Array  # bool[]


def random_box(key: jax.Array, size, scale: Sequence[float], ratio: Sequence[float]):
    """Box of torchvision's RandomResizedCrop inside an image of `size`.

    Args:
      key: PRNG key.
      size: (height, width), i32[] each, may be traced.
      scale: (low, high) of the uniform box area / image area.
      ratio: (low, high) of the log-uniform box width / height.
    Returns:
      (top, left, height, width), i32[] each, inside the image. The first of 10 draws that fits;
      when none does, the largest central box whose ratio lies in `ratio`.
    """
    image_height, image_width = (jnp.asarray(side, jnp.float32) for side in size)
    draws = jax.random.uniform(key, (2 * CROP_ATTEMPTS + 2,))
    area_draws, ratio_draws = draws[:CROP_ATTEMPTS], draws[CROP_ATTEMPTS : 2 * CROP_ATTEMPTS]
    area = image_height * image_width * (scale[0] + (scale[1] - scale[0]) * area_draws)
    log_low, log_high = jnp.log(ratio[0]), jnp.log(ratio[1])
    aspect = jnp.exp(log_low + (log_high - log_low) * ratio_draws)
    widths, heights = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    first = fits & (jnp.cumsum(fits) == 1)

    clamped = jnp.clip(image_width / image_height, ratio[0], ratio[1])
    central_width = jnp.minimum(image_width, jnp.round(image_height * clamped))
    central_height = jnp.minimum(image_height, jnp.round(image_width / clamped))
    width = jnp.where(fits.any(), jnp.sum(first * widths), central_width)
    height = jnp.where(fits.any(), jnp.sum(first * heights), central_height)

    free = jnp.stack([image_height - height, image_width - width])
    anywhere = jnp.minimum(jnp.floor(draws[-2:] * (free + 1)), free)
    top, left = jnp.where(fits.any(), anywhere, jnp.floor(free / 2))
    return tuple(side.astype(jnp.int32) for side in (top, left, height, width))


def draw_view(key: jax.Array, size, blur_prob, solarize_prob, *, recipe: ViewRecipe) -> ViewDraw:
    """Random numbers of one view.

    Args:
      key: PRNG key of the view; every operation splits its own from it.
      size: (height, width) of the image, i32[2] (pixels).
      blur_prob, solarize_prob: f32[] probabilities of this view.
      recipe: what the views of the group share.
    """
    crop_key, flip_key, jitter_key, gray_key, blur_key, solar_key = jax.random.split(key, 6)
    draws = jax.random.uniform(jitter_key, (9,))
    blur = jax.random.uniform(blur_key, (2,))
    jitter = draws[0] < recipe.jitter_prob
    strengths = jnp.array(recipe.strengths, jnp.float32)
    low = jnp.maximum(1.0 - strengths[:3], 0.0)
    factors = low + (1.0 + strengths[:3] - low) * draws[1:4]
    radius = recipe.blur_radius[0] + (recipe.blur_radius[1] - recipe.blur_radius[0]) * blur[1]
    return ViewDraw(
        box=random_box(crop_key, size, recipe.scale, recipe.ratio),
        flip=jax.random.uniform(flip_key) < recipe.flip,
        factors=jnp.where(jitter, factors, 1.0),
        hue=jnp.where(jitter, strengths[3] * (2.0 * draws[4] - 1.0), 0.0),
        order=jnp.argsort(draws[5:]),
        grayscale=jax.random.uniform(gray_key) < recipe.grayscale_prob,
        radius=jnp.where(blur[0] < blur_prob, radius, 0.0),
        solarize=jax.random.uniform(solar_key) < solarize_prob,
    )


def check_recipe(name: str, recipe: ViewRecipe) -> None:
    """Raises ValueError for a recipe that cannot be drawn; `name` is "global" or "local"."""
    if len(recipe.out) != 2 or min(recipe.out) <= 0:
        raise ValueError(f"{name}_size must be positive, one number or (h, w), got {recipe.out}")
    low, high = recipe.scale
    if not 0.0 < low <= high <= 1.0:
        raise ValueError(f"{name}_scale must be 0 < low <= high <= 1, got {recipe.scale}")
    low, high = recipe.ratio
    if not 0.0 < low <= high:
        raise ValueError(f"ratio must be 0 < low <= high, got {recipe.ratio}")
    low, high = recipe.blur_radius
    if not 0.0 <= low <= high:
        raise ValueError(f"blur_radius must be 0 <= low <= high, got {recipe.blur_radius}")
    probabilities = {
        "flip": (recipe.flip,),
        "jitter_prob": (recipe.jitter_prob,),
        "grayscale_prob": (recipe.grayscale_prob,),
        "blur_prob": recipe.blur_probs,
        "solarize_prob": recipe.solarize_probs,
    }
    for argument, values in probabilities.items():
        if not all(0.0 <= value <= 1.0 for value in values):
            raise ValueError(f"{argument} must lie in [0, 1], got {values}")
    arguments = ("brightness", "contrast", "saturation", "hue")
    for argument, value in zip(arguments, recipe.strengths, strict=True):
        if value < 0.0:
            raise ValueError(f"{argument} must not be negative, got {value}")
    if recipe.strengths[3] > 0.5:
        raise ValueError(f"hue must be at most 0.5 of the circle, got {recipe.strengths[3]}")
