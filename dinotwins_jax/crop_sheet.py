"""Crop sheet: a PNG of images and their views as the first training step draws them."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from dinotwins_jax.augment.multi_crop import channel_moments, seeded_multi_crop
from dinotwins_jax.data.bands import as_colours
from dinotwins_jax.data.base import Source, reading_of
from dinotwins_jax.data.pipeline import train_batches
from dinotwins_jax.files import replacing

_GAP = 4  # pixels between pictures


def draw_crop_sheet(
    path: Path,
    source: Source,
    views: dict,
    *,
    canvas_size: int,
    seed: int,
    count: int = 8,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> None:
    """Writes a PNG with one row per image: the image, its global views, its local views.

    These are the first images of a run with that seed, and exactly the views that it draws from them.

    Args:
      views: arguments of `make_multi_crop`.
      canvas_size: side in pixels of the images on the device; 0: the source's choice.
      count: number of images.
      mean, std: of each channel, as in `channel_moments`.
    Raises:
      ValueError: an empty source or invalid views. BadImage: no readable image.
    """
    mean, std = channel_moments(reading_of(source).channels, mean, std)
    make_crops = jax.jit(seeded_multi_crop(seed, **views, mean=mean, std=std))
    height, width = np.broadcast_to(views["global_size"], 2)
    canvas_size = canvas_size or source.default_canvas(int(max(height, width)))
    batches = train_batches(source, batch_size=count, canvas_size=canvas_size, seed=seed)
    batch = next(batches)
    batches.close()
    crops = make_crops({name: batch[name] for name in ("image", "size", "place")})
    rows = []
    for k, (h, w) in enumerate(batch["size"]):
        picture = Image.fromarray(as_colours(batch["image"][k, :h, :w]))
        picture.thumbnail((2 * width, height))
        global_views, local_views = (
            _pictures(crops[f"{g}_crops"][k], mean, std) for g in ("global", "local")
        )
        rows.append(_row(picture, global_views, local_views, (2 * int(width), int(height))))
    sheet = np.concatenate(rows)[:-_GAP]
    with replacing(path) as file:
        Image.fromarray(sheet).save(file, "PNG")


def _pictures(views: jax.Array, mean, std) -> list[Image.Image]:
    """Converts normalised f32[V, h, w, C] back to images."""
    pixels = (np.asarray(views, np.float32) * std + mean) * 255
    pixels = as_colours(np.clip(pixels.round(), 0, 255).astype(np.uint8))
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels]


def _row(image, global_views, local_views, room: tuple[int, int]) -> np.ndarray:
    """Draws u8[height, width, 3]: the image within `room` (width, height), then the views."""
    height = max([room[1]] + [view.height for view in local_views[:1]])
    places, x = [(image, 0, 0)], room[0] + _GAP
    for view in global_views:
        places.append((view, x, 0))
        x += view.width + _GAP
    if local_views:
        local = local_views[0]
        a_column = (height + _GAP) // (local.height + _GAP)
        for k, view in enumerate(local_views):
            column, place = divmod(k, a_column)
            position = (x + column * (local.width + _GAP), place * (local.height + _GAP))
            places.append((view, *position))
        x += -(-len(local_views) // a_column) * (local.width + _GAP)
    sheet = Image.new("RGB", (x - _GAP, height + _GAP), "white")
    for picture, left, top in places:
        sheet.paste(picture, (left, top))
    return np.asarray(sheet)
