"""Multi-crop on the device: images u8[B, S, S, C] and keys -> global and local crops, under jit.

    views specification of the views, from checked arguments; augment.presets has published ones
    draws  key -> the random parameters of the views of an image
    ops    the pixel operations, blur that one of them
    here   their order, the views of an image, and the unaugmented view of evaluation

Source: DINO's DataAugmentationDINO (arXiv:2104.14294) with torchvision's semantics: crop, flips,
turn, colour jitter, grayscale, blur, solarize, normalise. A view depends only on its image, size and key,
not on the batch or the number of devices.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from dinotwins_jax.augment import ops
from dinotwins_jax.augment.blur import gaussian_blur
from dinotwins_jax.augment.draws import ViewDraw, draw_image_views
from dinotwins_jax.augment.views import ViewSpec, largest_box, make_view_specs
from dinotwins_jax.streams import AUGMENT, stream

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OF_COLOURS = ("saturation", "hue", "grayscale_prob")  # views.* that need three channels


def render_view(rows: jax.Array, draw: ViewDraw, *, spec: ViewSpec, max_box=None) -> jax.Array:
    """Renders a drawn view of rows u8[S, C, S] as pixels f32[C, h, w] in [0, 1].

    An operation with probability 0 in every view of the group is left out of the program; others are
    conditional branches, which `jax.vmap` turns into selections.
    max_box: as in augment.ops.resize_rows.
    """
    planes = _oriented_crop(rows, draw, spec.out, max_box)
    if spec.jitter_prob and any(spec.strengths):
        hue = draw.hue if spec.strengths[3] else None
        jittered = partial(ops.color_jitter, factors=draw.factors, shift=hue, order=draw.order)
        drawn = jnp.any(draw.factors != 1.0) | (draw.hue != 0.0)
        planes = jax.lax.cond(drawn, jittered, _unchanged, planes)
    if spec.grayscale_prob:
        planes = jax.lax.cond(draw.grayscale, ops.grayscale, _unchanged, planes)
    if any(spec.blur_probs):
        widest = None if max_box is None else spec.blur_radius[1]
        blurred = partial(
            gaussian_blur, radius=draw.radius, taps=spec.blur_kernel, max_radius=widest
        )
        planes = jax.lax.cond(draw.radius > 0.0, blurred, _unchanged, planes)
    if any(spec.solarize_probs):
        planes = jax.lax.cond(draw.solarize, ops.solarize, _unchanged, planes)
    return planes


def _oriented_crop(rows: jax.Array, draw: ViewDraw, out: tuple[int, int], max_box) -> jax.Array:
    """The box of a view, resized, mirrored, then turned: f32[3, h, w]."""
    flip, upend = draw.flip, False if draw.vertical_flip is None else draw.vertical_flip
    resize = partial(ops.resize_rows, rows, draw.box, out, max_box=max_box)
    if draw.turns is None:
        return resize(flip=flip, upend=upend)
    # A half turn mirrors both axes; a quarter turn mirrors one, then swaps them.
    flip ^= (draw.turns == 1) | (draw.turns == 2)
    planes = resize(flip=flip, upend=upend ^ (draw.turns >= 2))
    return jax.lax.cond(draw.turns % 2 == 1, lambda p: p.swapaxes(1, 2), _unchanged, planes)


def _unchanged(planes: jax.Array) -> jax.Array:
    return planes


def channel_moments(
    channels: int, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel, for values in [0, 1]: those given, or where () ImageNet's for 3 channels
    and their mean for any other number.

    Raises ValueError if one is given with another number of values.
    """
    imagenet = (IMAGENET_MEAN, IMAGENET_STD)
    if channels != 3:
        imagenet = tuple((round(sum(of) / 3, 3),) * channels for of in imagenet)
    found = []
    for name, given, usual in (("mean", mean, imagenet[0]), ("std", std, imagenet[1])):
        if len(given) not in (0, channels):
            raise ValueError(
                f"config.data.{name} is {tuple(given)}: it must have a number for each of the {channels} "
                "of config.model.in_channels, or be ()"
            )
        found.append(tuple(map(float, given)) if len(given) else usual)
    return found[0], found[1]


def _check_moments(mean: Sequence[float], std: Sequence[float]) -> None:
    if not 0 < len(mean) == len(std) or min(std) <= 0.0:
        raise ValueError(
            f"mean and std need a number for each channel, std positive, got {mean} and {std}"
        )


def _normalize(planes: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """f32[..., C, h, w] in [0, 1] -> f32[..., h, w, C], (x - mean) / std per channel."""
    images = jnp.moveaxis(planes, -3, -1)
    return (images - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def _to_rows(images: jax.Array, channels: int) -> jax.Array:
    """u8[B, S, S, C] -> u8[B, S, C, S]: channels moved before columns."""
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(
            f"images must be uint8 [B, S, S, {channels}], got {images.dtype} {images.shape}"
        )
    return images.swapaxes(2, 3)


def _rendered(one_by_one: bool | None, render: Callable, *args):
    """render(each, *args), where each(function, xs) is jax.lax.map if one_by_one, else jax.vmap. None: by
    the platform that the program is lowered for, which need not be that of this machine."""
    loop, at_once = partial(render, jax.lax.map), partial(render, _batched)
    if one_by_one is None:
        return jax.lax.platform_dependent(*args, cpu=loop, default=at_once)
    return (loop if one_by_one else at_once)(*args)


def _compose(global_spec: ViewSpec, local_spec: ViewSpec, mean, std, one_by_one):
    """Builds the function that `make_multi_crop` returns."""
    specs = (global_spec, local_spec)
    draw_views = partial(draw_image_views, global_spec=global_spec, local_spec=local_spec)

    def multi_crop(images, sizes, keys):
        rows = _to_rows(images, len(mean))
        draws = jax.vmap(draw_views)(keys, sizes)
        return _rendered(one_by_one, render, rows, draws)

    def render(each, rows, draws):
        def group(spec, draws):
            if not spec.blur_probs:  # no local views
                return jnp.zeros((len(rows), 0, *spec.out, len(mean)))
            max_box = largest_box(spec, rows.shape[1]) if each is jax.lax.map else None

            def view(image_rows, draw):
                planes = render_view(image_rows, draw, spec=spec, max_box=max_box)
                return _normalize(planes, mean, std)

            return each(
                lambda image: each(lambda draw: view(image[0], draw), image[1]), (rows, draws)
            )

        global_crops, local_crops = map(group, specs, draws)
        return {"global_crops": global_crops, "local_crops": local_crops}

    return multi_crop


def _batched(function: Callable, xs):
    """jax.vmap with the arguments of jax.lax.map."""
    return jax.vmap(function)(xs)


def make_multi_crop(
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    one_by_one: bool | None = None,
    **views,
) -> Callable[[jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]:
    """Builds multi_crop(images, sizes, keys), to be called under jit; the defaults are DINO's.

    Args:
      mean, std: of each of the C channels, for values in [0, 1]. For C other than 3 saturation, hue and
        grayscale_prob are 0: they are defined for colours.
      one_by_one: True renders one view after the other, with real branches and narrow resize bands,
        best on a CPU; False all at once with dense products, best on accelerators and for arrays
        sharded over devices. None: True where the program is compiled for a CPU; both are traced.
      views: arguments of augment.views.make_view_specs, such as num_local=4; augment.presets has
        complete sets.
    Returns:
      multi_crop(images u8[B, S, S, C], sizes i32[B, 2], keys [B] typed PRNG keys) -> dict of
      "global_crops" f32[B, 2, h, w, C] and "local_crops" f32[B, num_local, h, w, C], normalised.
      `sizes` holds the valid (height, width) from the top left; pixels outside never contribute.
      View v (globals first) of image b is drawn from fold_in(keys[b], v).
    Raises:
      ValueError: an argument out of range; at call, images that are not u8[B, S, S, C].
    Source: facebookresearch/dino main_dino.py, DataAugmentationDINO.
    Differs: no rounding to 8 bits between operations; see augment.ops.
    """
    return _compose(*_specs(mean, std, views), mean, std, one_by_one)


def _specs(mean: Sequence[float], std: Sequence[float], views: dict) -> tuple[ViewSpec, ViewSpec]:
    """Views of images with a channel for each of the moments; only three channels are colours."""
    _check_moments(mean, std)
    return make_view_specs(**views | ({} if len(mean) == 3 else dict.fromkeys(OF_COLOURS, 0.0)))


def make_random_crop(
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    one_by_one: bool | None = None,
    **views,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Builds random_crop(images, sizes, keys) -> f32[B, h, w, C], one view an image: `make_multi_crop`'s
    first global one, of the same arguments and keys."""
    first, none = _specs(mean, std, views | {"num_local": 0})
    first = first._replace(blur_probs=first.blur_probs[:1], solarize_probs=first.solarize_probs[:1])
    multi_crop = _compose(first, none, mean, std, one_by_one)

    def random_crop(images, sizes, keys):
        return multi_crop(images, sizes, keys)["global_crops"][:, 0]

    return random_crop


def seeded_multi_crop(seed: int, **options) -> Callable[[dict], dict[str, jax.Array]]:
    """Builds the crops of a training run: batch -> crops, drawn from (seed, epoch, position) per image.

    Args:
      options: of `make_multi_crop`.
    Returns:
      a function of {"image": u8[B, S, S, C], "size": i32[B, 2], "place": i32[B, 2]}.
    """
    multi_crop = make_multi_crop(**options)

    def make_crops(batch):
        keys = image_keys(stream(seed, AUGMENT), batch["place"])
        return multi_crop(batch["image"], batch["size"], keys)

    return make_crops


def image_keys(key: jax.Array, place: jax.Array) -> jax.Array:
    """Keys [B] of images from i32[B, 2] (epoch, position) only, not from step, batch or device."""
    fold = jax.vmap(jax.random.fold_in)
    return fold(fold(jnp.broadcast_to(key, len(place)), place[:, 0]), place[:, 1])


def center_view(
    images: jax.Array,
    sizes: jax.Array,
    *,
    resize: int,
    crop: int | tuple[int, int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    one_by_one: bool | None = None,
) -> jax.Array:
    """Evaluation view: resizes the short side to `resize` pixels (bicubic), then crops the centre.

    Both are applied as one box in source coordinates. As torchvision's Resize and CenterCrop, with their
    rounding: pixels next to the box contribute too, since the resize comes first.

    Args:
      images: u8[B, S, S, C], the image in the top left corner.
      sizes: i32[B, 2] valid (height, width) of each image (pixels); may be traced.
      resize: length of the short side before the crop (pixels).
      crop: static side or (h, w), at most `resize`.
      mean, std: of each channel, for values in [0, 1].
      one_by_one: as in make_multi_crop.
    Returns:
      f32[B, h, w, C], normalised.
    Raises:
      ValueError: crop not in 1..resize, std not positive, images not u8[B, S, S, C].
    """
    out = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if not 0 < min(out) <= max(out) <= resize:
        raise ValueError(f"crop must be from 1 to resize = {resize} pixels, got {crop}")
    _check_moments(mean, std)

    rows = _to_rows(images, len(mean))

    def render(each, rows, sizes):
        max_box = (rows.shape[1],) * 2 if each is jax.lax.map else None
        return each(partial(view, max_box=max_box), (rows, sizes))

    def view(image, max_box):
        image_rows, size = image
        resized = resize * size // size.min()
        step = size / resized  # source pixels per resized pixel
        start = jnp.round((resized - jnp.array(out)) / 2) * step
        length = jnp.array(out) * step
        box, bounds = (start[0], start[1], length[0], length[1]), (0, size[0], 0, size[1])
        planes = ops.resize_rows(image_rows, box, out, bounds=bounds, max_box=max_box)
        return _normalize(planes, mean, std)

    return _rendered(one_by_one, render, rows, sizes)
