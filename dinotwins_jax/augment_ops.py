"""Image operations of the augmentation: what Pillow does to one RGB image, in float32 under jit.

Pixel values lie in [0, 1]. Operations take and return `planes` f32[3, h, w]: channels lead, so
SIMD and TPU lanes run along a row of pixels. Every parameter may be traced, so `jax.vmap` gives
each image its own; there is no gather and no convolution, which XLA's CPU backend does slowly.
Differs (all operations): Pillow rounds and clips to 8 bits after every pass, even between the two
axes of a resize, these do not.
"""

import jax
import jax.numpy as jnp

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's convert("L")
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # entries of `order` in color_jitter

# Tensor cores and the MXU would round to 10 or 8 bits of mantissa: visible in an 8-bit image.
_EXACT = jax.lax.Precision.HIGHEST


def _keys_cubic(distance: jax.Array) -> jax.Array:
    """Keys' cubic convolution kernel with a = -0.5 at `distance` >= 0 (in samples)."""
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return jnp.where(distance < 1.0, near, jnp.where(distance < 2.0, far, 0.0))


def resize_weights(
    start, length, low, high, *, in_size: int, out_size: int, flip=False
) -> jax.Array:
    """Matrix that resamples one axis: output i = sum_j weights[i, j] * input j.

    Args:
      start, length: f32[] interval of the input that becomes the output (pixels; pixel j covers
        [j, j + 1)).
      low, high: f32[] only pixels whose centre lies between them contribute (pixels).
      in_size, out_size: static lengths of the axis.
      flip: bool[] reverses the output, at no further cost.
    Returns:
      f32[out_size, in_size], rows sum to 1.
    Source: Keys 1981 with a = -0.5, stretched when shrinking (antialias), as Pillow's BICUBIC.
    """
    scale = jnp.asarray(length, jnp.float32) / out_size
    row = jnp.arange(out_size, dtype=jnp.float32)
    row = jnp.where(flip, out_size - 1 - row, row)
    target = start + (row + 0.5) * scale
    pixel = jnp.arange(in_size, dtype=jnp.float32) + 0.5
    distance = jnp.abs(pixel - target[:, None]) / jnp.maximum(scale, 1.0)
    weights = jnp.where((pixel > low) & (pixel < high), _keys_cubic(distance), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def resize_rows(
    rows: jax.Array, box, out: tuple[int, int], *, bounds=None, flip=False
) -> jax.Array:
    """`resize_crop` on the layout the augmentation works in.

    Args:
      rows: f32[H, 3, W] image, values in [0, 1].
      box, out, bounds: as in `resize_crop`.
      flip: bool[] mirrors the result left to right.
    Returns:
      f32[3, h, w] planes in [0, 1].
    """
    top, left, height, width = box
    upper, lower, west, east = bounds or (top, top + height, left, left + width)
    in_height, _, in_width = rows.shape
    vertical = resize_weights(top, height, upper, lower, in_size=in_height, out_size=out[0])
    horizontal = resize_weights(
        left, width, west, east, in_size=in_width, out_size=out[1], flip=flip
    )
    if in_width * (in_height + out[1]) * out[0] <= in_height * (in_width + out[0]) * out[1]:
        part = jnp.einsum("yH,HcW->ycW", vertical, rows, precision=_EXACT)
        planes = jnp.einsum("ycW,xW->cyx", part, horizontal, precision=_EXACT)
    else:
        part = jnp.einsum("HcW,xW->Hcx", rows, horizontal, precision=_EXACT)
        planes = jnp.einsum("yH,Hcx->cyx", vertical, part, precision=_EXACT)
    return jnp.clip(planes, 0.0, 1.0)


def resize_crop(image: jax.Array, box, out: tuple[int, int], *, bounds=None) -> jax.Array:
    """Cuts `box` out of an image and resizes it: Pillow's crop(box) then resize(out, BICUBIC).

    Args:
      image: f32[H, W, 3] in [0, 1].
      box: (top, left, height, width), f32[] or i32[] each (pixels), may be traced and fractional.
      out: static (h, w).
      bounds: (top, bottom, left, right) of the pixels that may contribute; None: those of the box.
        Pixels outside get weight zero and the other weights are renormalised.
    Returns:
      f32[h, w, 3] in [0, 1].
    """
    planes = resize_rows(image.transpose(0, 2, 1), box, out, bounds=bounds)
    return planes.transpose(1, 2, 0)


def luma(planes: jax.Array) -> jax.Array:
    """Grey value f32[h, w] of planes f32[3, h, w] (ITU-R 601)."""
    return LUMA[0] * planes[0] + LUMA[1] * planes[1] + LUMA[2] * planes[2]


def grayscale(planes: jax.Array) -> jax.Array:
    """Three equal channels of grey, f32[3, h, w]."""
    return jnp.broadcast_to(luma(planes), planes.shape)


def solarize(planes: jax.Array) -> jax.Array:
    """Inverts values from 128/255 upwards, f32[3, h, w]; Pillow's solarize(threshold=128)."""
    return jnp.where(planes >= 128 / 255, 1.0 - planes, planes)


def blend(planes: jax.Array, operation, factor) -> jax.Array:
    """Brightness, contrast or saturation: clip(factor * image + (1 - factor) * base).

    Args:
      planes: f32[3, h, w] in [0, 1].
      operation: i32[] BRIGHTNESS (base black), CONTRAST (base the mean grey) or SATURATION (base
        the pixel's grey).
      factor: f32[] >= 0; 1 changes nothing.
    Source: Pillow's ImageEnhance. Differs: the mean grey is not rounded to an 8-bit level.
    """
    gray = luma(planes)
    base = jnp.where(operation == SATURATION, gray, 0.0)
    base = jnp.where(operation == CONTRAST, gray.mean(), base)
    return jnp.clip(factor * planes + (1.0 - factor) * base, 0.0, 1.0)


def shift_hue(planes: jax.Array, shift) -> jax.Array:
    """Turns the hue by `shift` f32[] (fraction of the circle), keeping HSV saturation and value.

    Args and returns: f32[3, h, w] in [0, 1].
    Source: Smith 1978, hexcone model; back to RGB with no branch a sextant.
    Differs: torchvision on Pillow turns an 8-bit hue by int(255 * shift) / 256; this is continuous.
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
    """torchvision's ColorJitter with drawn parameters.

    The plain form is `for op in order: planes = apply(op)`. With a traced order each of the four
    places would pay for all four operations. Hue, the dear one, is computed once here, with three
    blends before it and three after; those on the wrong side of hue get factor 1.

    Args:
      planes: f32[3, h, w] in [0, 1].
      factors: f32[3] of brightness, contrast and saturation; 1 changes nothing.
      shift: f32[] hue shift (fraction of the circle), or None to leave hue out of the program.
      order: i32[4] permutation of (BRIGHTNESS, CONTRAST, SATURATION, HUE), first applied first.
    Returns:
      f32[3, h, w] in [0, 1].
    """
    factors = jnp.append(factors, 1.0)  # HUE's place: a blend with factor 1
    if shift is None:
        for place in range(4):
            planes = blend(planes, order[place], factors[order[place]])
        return planes
    turn = jnp.argmax(order == HUE)
    for place in range(3):
        planes = blend(planes, order[place], jnp.where(place < turn, factors[order[place]], 1.0))
    planes = shift_hue(planes, shift)
    for place in range(1, 4):
        planes = blend(planes, order[place], jnp.where(place > turn, factors[order[place]], 1.0))
    return planes


def blur_matrix(radius, size: int) -> jax.Array:
    """Gaussian blur of one axis as a matrix f32[size, size] (rows sum to 1), edges replicated.

    Three passes of an extended box filter (fractional ends) with the Gaussian's variance in total.
    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
    filtering", as Pillow's GaussianBlur(radius).

    Args:
      radius: f32[] standard deviation (pixels); 0 gives the identity.
    """
    variance = radius * radius / 3.0
    whole = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    ends = (2 * whole + 1) * (whole * (whole + 1) - 3.0 * variance)
    reach = whole + ends / (6.0 * (variance - (whole + 1) ** 2)) + 0.5
    # Weight: overlap of pixel j with the box around pixel i; the outermost stand for all beyond.
    pixel = jnp.arange(size, dtype=jnp.float32)
    west = jnp.where(pixel == 0, -jnp.inf, pixel - 0.5)
    east = jnp.where(pixel == size - 1, jnp.inf, pixel + 0.5)
    low, high = pixel[:, None] - reach, pixel[:, None] + reach
    box = (jnp.clip(east, low, high) - jnp.clip(west, low, high)) / (2.0 * reach)
    twice = jnp.matmul(box, box, precision=_EXACT)
    return jnp.matmul(twice, box, precision=_EXACT)


def gaussian_blur(planes: jax.Array, radius) -> jax.Array:
    """Pillow's GaussianBlur of planes f32[3, h, w]; radius f32[] >= 0 (pixels), 0: identity."""
    _, height, width = planes.shape
    horizontal = blur_matrix(radius, width)
    vertical = horizontal if height == width else blur_matrix(radius, height)
    planes = jnp.einsum("cyX,xX->cyx", planes, horizontal, precision=_EXACT)
    return jnp.einsum("yY,cYx->cyx", vertical, planes, precision=_EXACT)
