"""Random parameters of the views of an image: key -> ViewDraw. Separate from the pixels, so that their
distributions can be tested.

Source: torchvision's RandomResizedCrop.get_params and ColorJitter.get_params.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dinotwins_jax.augment.views import ViewSpec

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop
PLACE_ATTEMPTS = 10  # positions tried for a local box until it overlaps a global one enough


class ViewDraw(NamedTuple):
    """All random parameters of one view."""

    box: tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # i32[] top, left, height, width
    flip: jax.Array  # bool[]
    factors: jax.Array  # f32[3] brightness, contrast, saturation; 1 = unchanged
    hue: jax.Array  # f32[] fraction of the circle
    order: jax.Array  # i32[4], see ops.color_jitter
    grayscale: jax.Array  # bool[]
    radius: jax.Array  # f32[] blur, pixels; 0 = unchanged
    solarize: jax.Array  # bool[]
    vertical_flip: jax.Array | None = None  # bool[]; None: the probability is 0
    turns: jax.Array | None = None  # i32[] quarter turns, 0 to 3, as of np.rot90; None: the same


def random_box(key: jax.Array, size, scale: Sequence[float], ratio: Sequence[float]):
    """Draws a box as torchvision's RandomResizedCrop, inside an image of `size`.

    Args:
      key: PRNG key.
      size: (height, width), i32[] each, may be traced.
      scale: (low, high) of the uniform box area / image area.
      ratio: (low, high) of the log-uniform box width / height.
    Returns:
      (top, left, height, width), i32[] each, inside the image. The first of 10 draws that fits;
      if none does, the largest central box whose ratio lies in `ratio`.
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


def common_area(box, others) -> jax.Array:
    """Largest intersection of `box` with one of `others`, i32[] pixels.

    Args:
      box: (top, left, height, width), i32[] each (pixels).
      others: the same of V boxes, i32[V] each.
    """
    top, left, height, width = box
    tops, lefts, heights, widths = others
    rows = jnp.minimum(top + height, tops + heights) - jnp.maximum(top, tops)
    columns = jnp.minimum(left + width, lefts + widths) - jnp.maximum(left, lefts)
    return jnp.max(jnp.maximum(rows, 0) * jnp.maximum(columns, 0))


def overlapping_box(key: jax.Array, box, size, others, overlap: float):
    """Moves `box` if less than `overlap` of its area lies inside one of `others`.

    The size is kept and the position redrawn, so area and ratio keep their distributions and the
    position is uniform over those that satisfy the constraint. After 10 failed positions (the first is
    that of `box`) it is placed fully inside one of `others`, uniformly over all such positions. It is
    cut only if it is too long for all of them.

    Args:
      key: PRNG key.
      box: (top, left, height, width), i32[] each (pixels), inside the image.
      size: (height, width) of the image, i32[] each.
      others: i32[V] each of (tops, lefts, heights, widths).
      overlap: static, in (0, 1].
    Returns:
      (top, left, height, width), i32[] each, inside the image; at least `overlap` of its area lies
      inside one of `others`.
    """
    top, left, height, width = box
    pick, inside, anywhere = jnp.split(jax.random.uniform(key, (1 + 2 * PLACE_ATTEMPTS,)), (1, 3))

    def place(draw, room):
        """Uniform integer from 0 to room."""
        return jnp.minimum(jnp.floor(draw * (room + 1)), room).astype(jnp.int32)

    rows, columns = jnp.split(anywhere, 2)
    rows = jnp.append(top, place(rows, size[0] - height))
    columns = jnp.append(left, place(columns, size[1] - width))
    common = jax.vmap(common_area, ((0, 0, None, None), None))
    enough = common((rows, columns, height, width), others) >= overlap * (height * width)
    first = jnp.argmax(enough)

    tops, lefts, heights, widths = others
    fits = (heights >= height) & (widths >= width)
    room = (jnp.maximum(heights - height, 0) + 1) * (jnp.maximum(widths - width, 0) + 1)
    room = jnp.cumsum(jnp.where(fits | ~fits.any(), room, 0))
    other = jnp.argmax(pick * room[-1] < room)
    cut_height, cut_width = jnp.minimum(height, heights[other]), jnp.minimum(width, widths[other])
    last = (
        tops[other] + place(inside[0], heights[other] - cut_height),
        lefts[other] + place(inside[1], widths[other] - cut_width),
        cut_height,
        cut_width,
    )
    found = (rows[first], columns[first], height, width)
    return tuple(jnp.where(enough.any(), a, b) for a, b in zip(found, last, strict=True))


def draw_view(
    key: jax.Array, size, blur_prob, solarize_prob, *, spec: ViewSpec, others=None
) -> ViewDraw:
    """Draws the random parameters of one view.

    Args:
      key: PRNG key of the view; split for each operation.
      size: (height, width) of the image, i32[2] (pixels).
      blur_prob, solarize_prob: f32[] probabilities of this view.
      spec: of all views of the group.
      others: boxes to overlap, (tops, lefts, heights, widths), i32[V] each; unused unless
        spec.overlap > 0.
    """
    crop_key, flip_key, jitter_key, gray_key, blur_key, solar_key = jax.random.split(key, 6)
    draws = jax.random.uniform(jitter_key, (9,))
    blur = jax.random.uniform(blur_key, (2,))
    jitter = draws[0] < spec.jitter_prob
    strengths = jnp.array(spec.strengths, jnp.float32)
    low = jnp.maximum(1.0 - strengths[:3], 0.0)
    factors = low + (1.0 + strengths[:3] - low) * draws[1:4]
    radius = spec.blur_radius[0] + (spec.blur_radius[1] - spec.blur_radius[0]) * blur[1]
    box = random_box(crop_key, size, spec.scale, spec.ratio)
    if spec.overlap:
        box = overlapping_box(jax.random.fold_in(crop_key, 0), box, size, others, spec.overlap)
    upended, turns = _draw_orientation(key, spec)
    return ViewDraw(
        box=box,
        flip=jax.random.uniform(flip_key) < spec.flip,
        factors=jnp.where(jitter, factors, 1.0),
        hue=jnp.where(jitter, strengths[3] * (2.0 * draws[4] - 1.0), 0.0),
        order=jnp.argsort(draws[5:]),
        grayscale=jax.random.uniform(gray_key) < spec.grayscale_prob,
        radius=jnp.where(blur[0] < blur_prob, radius, 0.0),
        solarize=jax.random.uniform(solar_key) < solarize_prob,
        vertical_flip=upended,
        turns=turns,
    )


def _draw_orientation(key: jax.Array, spec: ViewSpec) -> tuple[jax.Array | None, jax.Array | None]:
    """(vertical_flip, turns) of a ViewDraw, from keys that `draw_view` leaves: split(key, 6) gives
    fold_in(key, 0) to fold_in(key, 5)."""
    upended = turns = None
    if spec.vertical_flip:
        upended = jax.random.uniform(jax.random.fold_in(key, 6)) < spec.vertical_flip
    if spec.rotate90:
        draws = jax.random.uniform(jax.random.fold_in(key, 7), (2,))
        turns = 1 + jnp.minimum(jnp.floor(3 * draws[1]), 2).astype(jnp.int32)
        turns = jnp.where(draws[0] < spec.rotate90, turns, 0)
    return upended, turns


def draw_image_views(
    key: jax.Array, size, *, global_spec: ViewSpec, local_spec: ViewSpec
) -> tuple[ViewDraw, ViewDraw]:
    """Draws all views of one image: (global ones, local ones), with a leading axis of views.

    View v, globals first, is drawn from fold_in(key, v). Local boxes depend on the global boxes only if
    local_spec.overlap > 0.

    Args:
      key: PRNG key of the image.
      size: (height, width) of the image, i32[2] (pixels).
    """

    def draw_group(spec, first, others=None):
        views = len(spec.blur_probs)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(views))

        def one_view(view_key, blur_prob, solarize_prob):
            return draw_view(view_key, size, blur_prob, solarize_prob, spec=spec, others=others)

        probabilities = (spec.blur_probs, spec.solarize_probs)
        return jax.vmap(one_view)(keys, *(jnp.array(p, jnp.float32) for p in probabilities))

    global_draws = draw_group(global_spec, 0)
    first_local = len(global_spec.blur_probs)
    return global_draws, draw_group(local_spec, first_local, others=global_draws.box)
