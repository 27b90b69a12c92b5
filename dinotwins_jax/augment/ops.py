"""Image operations of the augmentation: Pillow's operations on one image, in float32 under jit.

Pixel values lie in [0, 1]. Operations take and return `planes` f32[C, h, w]: channels lead, so
SIMD and TPU lanes run along a row of pixels. Every parameter may be traced and, under `jax.vmap`,
differ between images; there is no gather and no convolution, which are slow on XLA's CPU backend.
Differs: Pillow rounds and clips to 8 bits after every pass, even between the two axes of a resize.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's convert("L")
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # entries of `order` in color_jitter

BAND_ROWS = 16  # output rows that share one window of the input in a banded product


def product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum in float32. HIGH is what 8-bit pictures need: factors of 11 bits on a GPU (TF32), three
    products of bfloat16 parts on a TPU. HIGHEST avoids tensor cores; the default of a TPU is 8 bits."""
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGH)


def _keys_cubic(distance: jax.Array) -> jax.Array:
    """Keys' cubic convolution kernel with a = -0.5 at `distance` >= 0 (in samples)."""
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return jnp.where(distance < 1.0, near, jnp.where(distance < 2.0, far, 0.0))


def _cubic_weights(targets, pixels, scale, low, high) -> jax.Array:
    """f32[targets, pixels], rows sum to 1: weight of each pixel (index) for each target (position)."""
    distance = jnp.abs(pixels + 0.5 - targets[:, None]) / jnp.maximum(scale, 1.0)
    inside = (pixels + 0.5 > low) & (pixels + 0.5 < high)
    weights = jnp.where(inside, _keys_cubic(distance), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _targets(start, length, out_size: int, flip) -> tuple[jax.Array, jax.Array]:
    """Output pixel centres on the input axis, f32[out_size], and their spacing."""
    scale = jnp.asarray(length, jnp.float32) / out_size
    row = jnp.arange(out_size, dtype=jnp.float32)
    row = jnp.where(flip, out_size - 1 - row, row)
    return start + (row + 0.5) * scale, scale


def resize_weights(
    start, length, low, high, *, in_size: int, out_size: int, flip=False
) -> jax.Array:
    """Matrix that resamples one axis: output i = sum_j weights[i, j] * input j.

    Args:
      start, length: f32[] interval of the input that is resampled (pixels; pixel j covers
        [j, j + 1)).
      low, high: f32[] only pixels whose centre lies between them contribute (pixels).
      in_size, out_size: static lengths of the axis.
      flip: bool[] reverses the output, at no extra cost.
    Returns:
      f32[out_size, in_size], rows sum to 1.
    Source: Keys 1981 with a = -0.5, stretched when shrinking (antialias), as Pillow's BICUBIC.
    """
    targets, scale = _targets(start, length, out_size, flip)
    return _cubic_weights(targets, jnp.arange(in_size, dtype=jnp.float32), scale, low, high)


def _bands(start, length, low, high, *, in_size: int, out_size: int, max_length: int, flip):
    """`resize_weights` in blocks of rows, each restricted to the window of the input that it needs.

    Yields (first pixel i32[], f32[rows, window]) per block, with static sizes. A single block, the
    whole matrix, if windows would save little.
    """
    targets, scale = _targets(start, length, out_size, flip)
    largest = max(max_length / out_size, 1.0)
    window = -(-math.ceil((BAND_ROWS + 3) * largest + 1) // 8) * 8
    rows = BAND_ROWS
    if window > 0.75 * in_size:
        rows, window = out_size, in_size
    for row in range(0, out_size, rows):
        block = targets[row : row + rows]
        reach = jnp.floor(block.min() - 2.0 * jnp.maximum(scale, 1.0))
        first = jnp.clip(reach, 0, in_size - window).astype(jnp.int32)
        pixels = first + jnp.arange(window, dtype=jnp.float32)
        yield first, _cubic_weights(block, pixels, scale, low, high)


def resize_rows(
    rows, box, out: tuple[int, int], *, bounds=None, flip=False, upend=False, max_box=None
) -> jax.Array:
    """`resize_crop` in the row layout of the augmentation.

    Args:
      rows: u8[H, C, W] or f32[H, C, W] image.
      box, out, bounds: as in `resize_crop`.
      flip, upend: bool[] mirror the result left to right, and top to bottom.
      max_box: static (height, width) that no box exceeds; the weights are then applied in narrow bands,
        several times cheaper with real branches and slices (one view at a time, on a CPU).
        None: two dense products, best on accelerators and under `jax.vmap`.
    Returns:
      f32[C, h, w] planes in [0, 1]; u8 is divided by 255.
    """
    top, left, height, width = box
    upper, lower, west, east = bounds or (top, top + height, left, left + width)
    in_height, _, in_width = rows.shape
    vertical, horizontal = (top, height, upper, lower), (left, width, west, east)
    sizes = ((in_height, out[0]), (in_width, out[1]))
    if max_box is None:
        planes = _resize_dense(rows, vertical, horizontal, sizes, (upend, flip))
    else:
        planes = _resize_banded(rows, vertical, horizontal, sizes, (upend, flip), max_box)
    return jnp.clip(planes, 0.0, 1.0)


def _unit(values: jax.Array) -> jax.Array:
    """Converts to f32; u8 is scaled to [0, 1]."""
    return values.astype(jnp.float32) / 255.0 if values.dtype == jnp.uint8 else values


def _resize_dense(rows, vertical, horizontal, sizes, flips) -> jax.Array:
    (in_height, height), (in_width, width) = sizes
    rows = _unit(rows)
    vertical = resize_weights(*vertical, in_size=in_height, out_size=height, flip=flips[0])
    horizontal = resize_weights(*horizontal, in_size=in_width, out_size=width, flip=flips[1])
    if in_width * (in_height + width) * height <= in_height * (in_width + height) * width:
        part = product("yH,HcW->ycW", vertical, rows)
        return product("ycW,xW->cyx", part, horizontal)
    part = product("HcW,xW->Hcx", rows, horizontal)
    return product("yH,Hcx->cyx", vertical, part)


def _resize_banded(rows, vertical, horizontal, sizes, flips, max_box) -> jax.Array:
    (in_height, height), (in_width, width) = sizes
    rows = _resize_height(
        rows.reshape(in_height, -1), *vertical, height, max_box[0], flips[0]
    ).reshape(-1, in_width)
    parts = []
    for first, weights in _bands(
        *horizontal, in_size=in_width, out_size=width, max_length=max_box[1], flip=flips[1]
    ):
        window = jax.lax.dynamic_slice_in_dim(rows, first, weights.shape[1], axis=1)
        parts.append(product("rh,hw->rw", window, weights.T))
    return jnp.concatenate(parts, axis=1).reshape(height, -1, width).swapaxes(0, 1)


def _resize_height(rows, start, length, low, high, height: int, longest: int, flip) -> jax.Array:
    """rows [H, n] resampled to f32[height, n], where length <= longest."""
    in_height = len(rows)
    targets, scale = _targets(start, length, height, flip)
    taps = math.ceil(4 * max(longest / height, 1.0)) + 1
    if taps > min(24, in_height // 8):
        sizes = {"in_size": in_height, "out_size": height, "max_length": longest}
        bands = _bands(start, length, low, high, **sizes, flip=flip)
        windows = (
            (jax.lax.dynamic_slice_in_dim(rows, first, weights.shape[1]), weights)
            for first, weights in bands
        )
        return jnp.concatenate([product("rh,hw->rw", w, _unit(window)) for window, w in windows])
    # A sum of rows takes a third to three quarters of the time of products on a CPU.
    first = jnp.floor(targets - 2.0 * jnp.maximum(scale, 1.0)).astype(jnp.int32)
    first = jnp.clip(first, 0, in_height - taps)
    pixels = first[:, None] + jnp.arange(taps)
    weights = _cubic_weights(targets, pixels.astype(jnp.float32), scale, low, high)
    return sum(weights[:, k, None] * _unit(rows[pixels[:, k]]) for k in range(taps))


def resize_crop(image: jax.Array, box, out: tuple[int, int], *, bounds=None) -> jax.Array:
    """Cuts `box` out of an image and resizes it: Pillow's crop(box) then resize(out, BICUBIC).

    Args:
      image: f32[H, W, C] in [0, 1].
      box: (top, left, height, width), f32[] or i32[] each (pixels), may be traced and fractional.
      out: static (h, w).
      bounds: (top, bottom, left, right) of the pixels that may contribute; None: the box.
        Pixels outside get weight zero and the other weights are renormalised.
    Returns:
      f32[h, w, C] in [0, 1].
    """
    planes = resize_rows(image.transpose(0, 2, 1), box, out, bounds=bounds)
    return planes.transpose(1, 2, 0)


def luma(planes: jax.Array) -> jax.Array:
    """Grey value f32[h, w] of planes f32[C, h, w]: ITU-R 601 of 3 colours, else their mean."""
    if len(planes) != 3:
        return planes.mean(axis=0)
    return LUMA[0] * planes[0] + LUMA[1] * planes[1] + LUMA[2] * planes[2]


def grayscale(planes: jax.Array) -> jax.Array:
    """Grey image with three equal channels, f32[3, h, w]."""
    return jnp.broadcast_to(luma(planes), planes.shape)


def solarize(planes: jax.Array) -> jax.Array:
    """Inverts values from 128/255 upwards, f32[C, h, w]; Pillow's solarize(threshold=128)."""
    return jnp.where(planes >= 128 / 255, 1.0 - planes, planes)


def blend(planes: jax.Array, operation: int, factor) -> jax.Array:
    """Brightness, contrast or saturation: clip(factor * image + (1 - factor) * base).

    Args:
      planes: f32[C, h, w] in [0, 1].
      operation: BRIGHTNESS (base black), CONTRAST (base the mean grey) or SATURATION (base the
        pixel's grey).
      factor: f32[] >= 0; 1 is the identity.
    Source: Pillow's ImageEnhance. Differs: the mean grey is not rounded to an 8-bit level.
    """
    if operation == BRIGHTNESS:
        return jnp.clip(factor * planes, 0.0, 1.0)
    base = luma(planes).mean() if operation == CONTRAST else luma(planes)
    return jnp.clip(factor * planes + (1.0 - factor) * base, 0.0, 1.0)


def shift_hue(planes: jax.Array, shift) -> jax.Array:
    """Rotates the hue by `shift` f32[] (fraction of the circle), keeping HSV saturation and value.

    Args and returns: f32[3, h, w] in [0, 1].
    Source: Smith 1978, hexcone model; the conversion to RGB has no branch per sextant.
    Differs: torchvision on Pillow rotates an 8-bit hue by int(255 * shift) / 256; this is continuous.
    """
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    per_chroma = 1.0 / jnp.where(chroma > 0.0, chroma, 1.0)
    sextant = jnp.where(
        value == red,
        (green - blue) * per_chroma,
        jnp.where(
            value == green, (blue - red) * per_chroma + 2.0, (red - green) * per_chroma + 4.0
        ),
    )
    sextant = sextant + 6.0 * shift

    def channel(offset):
        angle = sextant + offset
        angle = angle - 6.0 * jnp.floor(angle * (1 / 6))
        return value - chroma * jnp.clip(jnp.minimum(angle, 4.0 - angle), 0.0, 1.0)

    return jnp.stack([channel(5.0), channel(3.0), channel(1.0)])


def color_jitter(planes: jax.Array, factors, shift, order) -> jax.Array:
    """torchvision's ColorJitter with drawn parameters: four operations, one after the other.

    Args:
      planes: f32[C, h, w] in [0, 1], and so is what is returned.
      factors: f32[3] of brightness, contrast and saturation (of 3 channels only); 1 is the identity.
      shift: f32[] hue shift (fraction of the circle), or None to leave hue out of the program.
      order: i32[4] permutation of (BRIGHTNESS, CONTRAST, SATURATION, HUE), first applied first.
    """
    operations = [partial(blend, operation=k, factor=factors[k]) for k in range(3)]
    operations.append(partial(shift_hue, shift=shift) if shift is not None else lambda same: same)
    if len(planes) != 3:
        operations[SATURATION] = lambda same: same
    for place in range(4):
        planes = jax.lax.switch(order[place], operations, planes)
    return planes
