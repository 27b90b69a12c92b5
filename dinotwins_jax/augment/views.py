"""View specifications: arguments, checked and converted to static tuples."""

import math
from typing import NamedTuple

from dinotwins_jax.augment.presets import DINO


class ViewSpec(NamedTuple):
    """Static specification of the views of one shape; probabilities are tuples with one per view."""

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
    blur_kernel: int = 0  # taps of the blur; 0: Pillow's, not truncated
    overlap: float = 0.0  # least share of the box inside one global view of the image
    vertical_flip: float = 0.0
    rotate90: float = 0.0


def make_view_specs(
    *,
    global_size: int | tuple[int, int] = 224,
    global_scale: tuple[float, float] = DINO["global_scale"],
    local_size: int | tuple[int, int] = 96,
    local_scale: tuple[float, float] = DINO["local_scale"],
    num_local: int = DINO["num_local"],
    local_overlap: float = DINO["local_overlap"],
    ratio: tuple[float, float] = DINO["ratio"],
    flip: float = DINO["flip"],
    vertical_flip: float = DINO["vertical_flip"],
    rotate90: float = DINO["rotate90"],
    jitter_prob: float = DINO["jitter_prob"],
    brightness: float = DINO["brightness"],
    contrast: float = DINO["contrast"],
    saturation: float = DINO["saturation"],
    hue: float = DINO["hue"],
    grayscale_prob: float = DINO["grayscale_prob"],
    blur_prob: tuple[float, float, float] = DINO["blur_prob"],
    blur_radius: tuple[float, float] = DINO["blur_radius"],
    blur_kernel: int = DINO["blur_kernel"],
    solarize_prob: tuple[float, float, float] = DINO["solarize_prob"],
) -> tuple[ViewSpec, ViewSpec]:
    """Builds the ViewSpecs of the two global views and of the local ones; the defaults are DINO's.

    Args:
      global_size, local_size: pixels, a number or (h, w).
      global_scale, local_scale: box area / image area, 0 < low <= high <= 1.
      num_local: local views per image, may be 0.
      local_overlap: least share of a local box's area inside a single global box of the same image,
        in [0, 1]. 0: no constraint, as in all official recipes.
      ratio: box width / height, (low, high).
      flip, jitter_prob, grayscale_prob: probabilities, the same for every view.
      vertical_flip: probability of a mirror image top to bottom, for pictures without an upright side.
      rotate90: probability of a turn by 90, 180 or 270 degrees, each equally often; 0.75 gives all four
        orientations equally often. Square crops only.
      brightness, contrast, saturation: x gives factors uniform in [max(0, 1 - x), 1 + x].
      hue: x <= 0.5 gives shifts uniform in [-x, x] (fraction of the circle).
      blur_prob, solarize_prob: probabilities of (global 0, global 1, each local).
      blur_radius: (low, high), standard deviation of the Gaussian (pixels of the crop).
      blur_kernel: 0: Pillow's blur; an odd number from 3: torchvision's GaussianBlur with that
        many taps, truncated, edges reflected.
    Raises:
      ValueError: an argument out of range.
    Source: facebookresearch/dino main_dino.py, DataAugmentationDINO; others in augment.presets.
    """
    if num_local < 0:
        raise ValueError(f"num_local must be at least 0, got {num_local}")
    for name, value in (("blur_prob", blur_prob), ("solarize_prob", solarize_prob)):
        if len(value) != 3:
            raise ValueError(f"{name} must be (global 0, global 1, locals), got {value}")

    def spec(size, scale, views, overlap=0.0):
        return ViewSpec(
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
            blur_kernel=blur_kernel,
            overlap=overlap,
            vertical_flip=vertical_flip,
            rotate90=rotate90,
        )

    global_spec = spec(global_size, global_scale, (0, 1))
    check_view_spec("global", global_spec)
    # At least one local view, so that a wrong probability is reported even if num_local = 0.
    check_view_spec("local", spec(local_size, local_scale, (2,), local_overlap))
    if local_overlap * local_scale[0] > global_scale[1]:
        raise ValueError(
            f"local_overlap {local_overlap} of local_scale {tuple(local_scale)} does not fit into "
            f"global_scale {tuple(global_scale)}: lower local_overlap or local_scale"
        )
    return global_spec, spec(local_size, local_scale, (2,) * num_local, local_overlap)


def largest_box(spec: ViewSpec, side: int) -> tuple[int, int]:
    """Upper bound (height, width) in pixels on the boxes of the spec in an image within side x side.

    An area of scale * H * W and a ratio give sqrt(area * ratio) pixels of width. The central box
    is used if no draw fits; that requires an image narrower than side * scale / ratio, whose
    central box is at most ratio times as wide as it is high.
    """
    scale, (low, high) = spec.scale[1], spec.ratio
    parts = [
        max((scale / low) ** 0.5, scale * high / low),
        max((scale * high) ** 0.5, scale * high / low),
    ]
    return tuple(min(side, math.ceil(side * part) + 1) for part in parts)


def check_view_spec(name: str, spec: ViewSpec) -> None:
    """Raises ValueError for a spec that cannot be drawn; `name` is "global" or "local"."""
    if len(spec.out) != 2 or min(spec.out) <= 0:
        raise ValueError(f"{name}_size must be positive, one number or (h, w), got {spec.out}")
    low, high = spec.scale
    if not 0.0 < low <= high <= 1.0:
        raise ValueError(f"{name}_scale must be 0 < low <= high <= 1, got {spec.scale}")
    low, high = spec.ratio
    if not 0.0 < low <= high:
        raise ValueError(f"ratio must be 0 < low <= high, got {spec.ratio}")
    low, high = spec.blur_radius
    if not 0.0 <= low <= high:
        raise ValueError(f"blur_radius must be 0 <= low <= high, got {spec.blur_radius}")
    probabilities = {
        "flip": (spec.flip,),
        "vertical_flip": (spec.vertical_flip,),
        "rotate90": (spec.rotate90,),
        "jitter_prob": (spec.jitter_prob,),
        "grayscale_prob": (spec.grayscale_prob,),
        "blur_prob": spec.blur_probs,
        "solarize_prob": spec.solarize_probs,
        "local_overlap": (spec.overlap,),
    }
    for argument, values in probabilities.items():
        if not all(0.0 <= value <= 1.0 for value in values):
            raise ValueError(f"{argument} must lie in [0, 1], got {values}")
    arguments = ("brightness", "contrast", "saturation", "hue")
    for argument, value in zip(arguments, spec.strengths, strict=True):
        if value < 0.0:
            raise ValueError(f"{argument} must not be negative, got {value}")
    if spec.strengths[3] > 0.5:
        raise ValueError(f"hue must be at most 0.5 of the circle, got {spec.strengths[3]}")
    if spec.rotate90 and spec.out[0] != spec.out[1]:
        raise ValueError(f"rotate90 {spec.rotate90} needs square crops, {name}_size is {spec.out}")
    _check_blur_kernel(name, spec)


def _check_blur_kernel(name: str, spec: ViewSpec) -> None:
    taps = spec.blur_kernel
    if taps and (taps < 3 or taps % 2 == 0):
        raise ValueError(f"blur_kernel must be 0 or odd and at least 3, got {taps}")
    if taps // 2 >= min(spec.out):  # the edge is reflected only once
        raise ValueError(
            f"blur_kernel {taps} needs {name}_size above {taps // 2} pixels, got {spec.out}"
        )
