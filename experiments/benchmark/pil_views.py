"""Baseline of the input benchmark: multi-crop with Pillow, from file to batch.

The operations and their order are those of the official DINO recipe as torchvision performs them on
Pillow images, written out here so that the benchmark needs no PyTorch.
"""

import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinotwins_jax.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD

_MEAN, _STD = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)


def read(path: Path) -> Image.Image:
    """Reads an image file as RGB."""
    with path.open("rb") as file, Image.open(file) as image:
        return image.convert("RGB")


def collate(pictures: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Batches the views of several images: f32[B, h, w, 3] per view."""
    return [np.stack(view) for view in zip(*pictures, strict=True)]


def multi_crop(image: Image.Image, rng: random.Random, num_local: int = 8) -> list[np.ndarray]:
    """Two views of 224 and num_local of 96 pixels, each f32[h, w, 3], normalised."""
    views = [
        _view(image, rng, 224, (0.4, 1.0), blur=1.0, solarize=0.0),
        _view(image, rng, 224, (0.4, 1.0), blur=0.1, solarize=0.2),
    ]
    views += [_view(image, rng, 96, (0.05, 0.4), blur=0.5, solarize=0.0) for _ in range(num_local)]
    return views


def _view(image, rng, side, scale, *, blur, solarize) -> np.ndarray:
    left, top, width, height = _random_box(image.size, rng, scale)
    view = image.crop((left, top, left + width, top + height))
    view = view.resize((side, side), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.8:
        view = _color_jitter(view, rng)
    if rng.random() < 0.2:
        view = view.convert("L").convert("RGB")
    if rng.random() < blur:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    if rng.random() < solarize:
        view = ImageOps.solarize(view)
    return (np.asarray(view, np.float32) / 255 - _MEAN) / _STD


def _random_box(size, rng, scale) -> tuple[int, int, int, int]:
    image_width, image_height = size
    for _ in range(10):
        area = image_width * image_height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image_width and 0 < height <= image_height:
            left, top = rng.randint(0, image_width - width), rng.randint(0, image_height - height)
            return left, top, width, height
    side = min(size)
    return (image_width - side) // 2, (image_height - side) // 2, side, side


def _color_jitter(view: Image.Image, rng: random.Random) -> Image.Image:
    def enhance(enhancer, strength):
        return lambda image: enhancer(image).enhance(rng.uniform(1 - strength, 1 + strength))

    operations = [
        enhance(ImageEnhance.Brightness, 0.4),
        enhance(ImageEnhance.Contrast, 0.4),
        enhance(ImageEnhance.Color, 0.2),
        lambda image: shift_hue(image, rng.uniform(-0.1, 0.1)),
    ]
    rng.shuffle(operations)
    for operation in operations:
        view = operation(view)
    return view


def shift_hue(view: Image.Image, shift: float) -> Image.Image:
    """Rotates the hue by `shift` (fraction of the circle) in 8-bit HSV, as torchvision."""
    hue, saturation, value = view.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int16) + int(shift * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
