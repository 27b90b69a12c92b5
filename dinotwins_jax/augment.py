"""Multi-crop on the device: images u8[B, S, S, 3] and keys become global and local crops under jit.

    augment_draws  key -> the random numbers of one view
    augment_ops    the pixel operations
    here           their order, the views of an image, and the unaugmented view of evaluation

Source: DINO's DataAugmentationDINO (arXiv:2104.14294) with torchvision's semantics: crop, flip,
colour jitter, grayscale, blur, solarize, normalise. A view depends on its image, its size and its
key only, so neither on the batch nor on the number of devices.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dinotwins_jax import augment_ops as ops
from dinotwins_jax.augment_draws import ViewDraw, ViewRecipe, check_recipe, draw_view

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def render_view(rows: jax.Array, draw: ViewDraw, *, recipe: ViewRecipe) -> jax.Array:
    """Pixels f32[3, h, w] in [0, 1] of a drawn view of rows f32[S, 3, S] in [0, 1].

    An operation whose probability is 0 in every view of the group is left out of the program.
    """
    planes = ops.resize_rows(rows, draw.box, recipe.out, flip=draw.flip)
    if recipe.jitter_prob and any(recipe.strengths):
        hue = draw.hue if recipe.strengths[3] else None
        planes = ops.color_jitter(planes, draw.factors, hue, draw.order)
    if recipe.grayscale_prob:
        planes = jnp.where(draw.grayscale, ops.grayscale(planes), planes)
    if any(recipe.blur_probs):
        planes = ops.gaussian_blur(planes, draw.radius)
    if any(recipe.solarize_probs):
        planes = jnp.where(draw.solarize, ops.solarize(planes), planes)
    return planes


def _check_moments(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0.0:
        raise ValueError(f"mean and std need 3 numbers, std positive, got {mean} and {std}")


def _normalize(planes: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """f32[..., 3, h, w] in [0, 1] -> f32[..., h, w, 3] with (x - mean) / std a channel."""
    images = jnp.moveaxis(planes, -3, -1)
    return (images - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def _to_rows(images: jax.Array) -> jax.Array:
    """u8[B, S, S, 3] in [0, 255] -> f32[B, S, 3, S] in [0, 1]."""
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 [B, S, S, 3], got {images.dtype} {images.shape}")
    return images.swapaxes(2, 3).astype(jnp.float32) / 255.0


def _render_group(rows: jax.Array, size, key: jax.Array, first: int, recipe: ViewRecipe):
    """Views first, first + 1, ... of one image, sharing one trace: f32[V, 3, h, w]."""
    views = len(recipe.blur_probs)
    if views == 0:
        return jnp.zeros((0, 3, *recipe.out))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(first, first + views))

    def one_view(view_key, blur_prob, solarize_prob):
        draw = draw_view(view_key, size, blur_prob, solarize_prob, recipe=recipe)
        return render_view(rows, draw, recipe=recipe)

    probabilities = (recipe.blur_probs, recipe.solarize_probs)
    return jax.vmap(one_view)(keys, *(jnp.array(probs, jnp.float32) for probs in probabilities))


def _compose(global_recipe: ViewRecipe, local_recipe: ViewRecipe, mean, std):
    """The function that `make_multi_crop` returns."""

    def views_of_image(rows, size, key):
        return (
            _render_group(rows, size, key, 0, global_recipe),
            _render_group(rows, size, key, len(global_recipe.blur_probs), local_recipe),
        )

    def multi_crop(images, sizes, keys):
        crops = jax.vmap(views_of_image)(_to_rows(images), sizes, keys)
        global_crops, local_crops = (_normalize(planes, mean, std) for planes in crops)
        return {"global_crops": global_crops, "local_crops": local_crops}

    return multi_crop


def make_multi_crop(
    *,
    global_size: int | tuple[int, int] = 224,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_size: int | tuple[int, int] = 96,
    local_scale: tuple[float, float] = (0.05, 0.4),
    num_local: int = 8,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    jitter_prob: float = 0.8,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.2,
    hue: float = 0.1,
    grayscale_prob: float = 0.2,
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5),
    blur_radius: tuple[float, float] = (0.1, 2.0),
    solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0),
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Callable[[jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]:
    """Builds multi_crop(images, sizes, keys), to be called under jit; the defaults are DINO's.

    Args:
      global_size, local_size: pixels, a number or (h, w).
      global_scale, local_scale: box area / image area, 0 < low <= high <= 1.
      num_local: local views an image, may be 0.
      ratio: box width / height, (low, high).
      flip, jitter_prob, grayscale_prob: probabilities, the same for every view.
      brightness, contrast, saturation: x gives factors uniform in [max(0, 1 - x), 1 + x].
      hue: x <= 0.5 gives shifts uniform in [-x, x] (fraction of the circle).
      blur_prob, solarize_prob: probabilities of (global 0, global 1, each local).
      blur_radius: (low, high), standard deviation of the Gaussian (pixels of the crop).
      mean, std: of each channel, for values in [0, 1].
    Returns:
      multi_crop(images u8[B, S, S, 3], sizes i32[B, 2], keys [B] typed PRNG keys) -> dict of
      "global_crops" f32[B, 2, h, w, 3] and "local_crops" f32[B, num_local, h, w, 3], normalised.
      `sizes` holds the valid (height, width) from the top left; pixels beyond never contribute.
      View v (globals first) of image b is drawn from fold_in(keys[b], v).
    Raises:
      ValueError: an argument out of range; at call, images that are not u8[B, S, S, 3].
    Source: facebookresearch/dino main_dino.py, DataAugmentationDINO.
    Differs: values are never rounded to 8 bits in between; see augment_ops.
    """
    if num_local < 0:
        raise ValueError(f"num_local must be at least 0, got {num_local}")
    for name, value in (("blur_prob", blur_prob), ("solarize_prob", solarize_prob)):
        if len(value) != 3:
            raise ValueError(f"{name} must be (global 0, global 1, locals), got {value}")
    _check_moments(mean, std)

    def recipe(size, scale, views):
        return ViewRecipe(
            out=(size, size) if isinstance(size, int) else tuple(size),
            scale=tuple(scale),
            ratio=tuple(ratio),
            flip=flip,
            jitter_prob=jitter_prob,
            strengths=(brightness, contrast, saturation, hue),
            grayscale_prob=grayscale_prob,
            blur_radius=tuple(blur_radius),
            blur_probs=tuple(blur_prob[view] for view in views),
            solarize_probs=tuple(solarize_prob[view] for view in views),
        )

    global_recipe = recipe(global_size, global_scale, (0, 1))
    check_recipe("global", global_recipe)
    # One local view at least, so that a wrong probability is reported with num_local = 0 too.
    check_recipe("local", recipe(local_size, local_scale, (2,)))
    return _compose(global_recipe, recipe(local_size, local_scale, (2,) * num_local), mean, std)


def center_view(
    images: jax.Array,
    sizes: jax.Array,
    *,
    resize: int,
    crop: int | tuple[int, int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> jax.Array:
    """The view of evaluation: short side to `resize` pixels (bicubic), then the central `crop`.

    Both are one box in the source's coordinates. As torchvision's Resize and CenterCrop, with their
    rounding: pixels next to the box still contribute, since the resize comes first.

    Args:
      images: u8[B, S, S, 3], the image in the top left corner.
      sizes: i32[B, 2] valid (height, width) of each image (pixels); may be traced.
      resize: length of the short side before the crop (pixels).
      crop: static side or (h, w), at most `resize`.
      mean, std: of each channel, for values in [0, 1].
    Returns:
      f32[B, h, w, 3], normalised.
    Raises:
      ValueError: crop not in 1..resize, std not positive, images not u8[B, S, S, 3].
    """
    out = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if not 0 < min(out) <= max(out) <= resize:
        raise ValueError(f"crop must be from 1 to resize = {resize} pixels, got {crop}")
    _check_moments(mean, std)

    def view(rows, size):
        resized = resize * size // size.min()
        step = size / resized  # source pixels a resized pixel
        start = jnp.round((resized - jnp.array(out)) / 2) * step
        length = jnp.array(out) * step
        box = (start[0], start[1], length[0], length[1])
        return ops.resize_rows(rows, box, out, bounds=(0, size[0], 0, size[1]))

    return _normalize(jax.vmap(view)(_to_rows(images), sizes), mean, std)
