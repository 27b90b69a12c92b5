"""Object overlap of crops: how often two views of one image show the same object.

On ImageNet almost always, in scenes of many objects not: there the loss matches views without common
content. Boxes are drawn as in training. Letters: H x W pixels of the image, n objects, D draws of the
views of an image, V views of a group.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.augment.draws import draw_image_views
from dinotwins_jax.augment.views import ViewSpec

# A quarter of an object is usually enough to recognise it, a corner is not. A close-up of a large
# object shows less of it, but fills the view: a tenth of 96 x 96 pixels is 30 x 30, four patches.
MIN_VISIBLE, MIN_FILL = 0.25, 0.1


def area_table(masks: np.ndarray) -> np.ndarray:
    """Integral images i32[n, H + 1, W + 1] of masks bool[n, H, W]."""
    table = np.zeros((masks.shape[0], masks.shape[1] + 1, masks.shape[2] + 1), np.int32)
    np.cumsum(masks, axis=1, dtype=np.int32, out=table[:, 1:, 1:])
    np.cumsum(table[:, 1:, 1:], axis=2, out=table[:, 1:, 1:])
    return table


def objects_in_view(
    table: np.ndarray, boxes, *, min_visible: float = MIN_VISIBLE, min_fill: float = MIN_FILL
) -> np.ndarray:
    """Which objects each view shows: enough of the object, or an object that fills enough of the view.

    Args:
      table: i32[n, H + 1, W + 1] of `area_table`.
      boxes: (top, left, height, width), i32[...] each, inside the image (pixels).
      min_visible: share of the object's area inside the box, in (0, 1].
      min_fill: share of the box covered by the object, in (0, 1].
    Returns:
      bool[..., n].
    Raises:
      ValueError: min_visible or min_fill outside (0, 1].
    """
    for name, value in (("min_visible", min_visible), ("min_fill", min_fill)):
        if not 0.0 < value <= 1.0:
            raise ValueError(f"{name} must lie in (0, 1], got {value}")
    top, left, height, width = (np.asarray(side) for side in boxes)
    bottom, right = top + height, left + width
    inside = table[:, bottom, right] - table[:, top, right]
    inside = np.moveaxis(inside - table[:, bottom, left] + table[:, top, left], 0, -1)
    enough = inside >= min_visible * table[:, -1, -1]
    fills = inside >= min_fill * (height * width)[..., None]
    return (inside > 0) & (enough | fills)


def pair_rates(in_global: np.ndarray, in_local: np.ndarray, dominant: int) -> dict[str, float]:
    """Shares of an image's pairs of views with a common object, averaged over its draws.

    Args:
      in_global, in_local: bool[D, V, n] of `objects_in_view`; V may be 0 for the local ones.
      dominant: index of one object.
    Returns:
      "globals": share of pairs (global 0, global 1) with a common object; "global-local": share of
      pairs of a global and a local view; each also with ", dominant": that object in common; "local
      empty": share of local views without any object. Without local views only the pairs of globals.
    """
    globals_both = in_global[:, 0] & in_global[:, 1]  # [D, n]
    rates = {
        "globals": globals_both.any(axis=-1).mean(),
        "globals, dominant": globals_both[:, dominant].mean(),
    }
    if in_local.shape[1]:
        both = in_global[:, :, None] & in_local[:, None]  # [D, 2, V, n]
        rates["global-local"] = both.any(axis=-1).mean()
        rates["global-local, dominant"] = both[..., dominant].mean()
        rates["local empty"] = 1.0 - in_local.any(axis=-1).mean()
    return {name: float(rate) for name, rate in rates.items()}


def shared_object_rates(
    masks: Callable[[int], tuple[np.ndarray, np.ndarray]],
    indices: Iterable[int],
    recipes: Mapping[str, tuple[ViewSpec, ViewSpec]],
    *,
    draws: int = 20,
    seed: int = 0,
    min_visible: float = MIN_VISIBLE,
    min_fill: float = MIN_FILL,
) -> dict[str, dict[str, np.ndarray]]:
    """`pair_rates` of images for the views of each recipe; the dominant object is the largest.

    Boxes are drawn on the image at its own size; training draws them on the canvas, which is the same
    up to rounding to whole pixels. All recipes use the same keys.

    Args:
      masks: the method of a source: i -> (bool[n, H, W], i32[n]).
      indices: images to use; images without objects are left out.
      recipes: name -> (global recipe, local recipe), as make_view_specs returns them.
      draws: number of draws of each image's views.
      seed: of the views.
      min_visible, min_fill: see `objects_in_view`.
    Returns:
      recipe -> column -> f64[images]. With local views also "local area", box / image.
    """
    draw_boxes = {name: _box_drawer(*pair) for name, pair in recipes.items()}
    rows: dict[str, list] = {name: [] for name in recipes}
    for i in indices:
        objects, _ = masks(i)
        objects = objects[objects.any(axis=(1, 2))]
        if not len(objects):
            continue
        table, size = area_table(objects), objects.shape[1:]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), draws)
        for name, draw in draw_boxes.items():
            boxes = jax.device_get(draw(keys, jnp.array(size)))
            seen = [
                objects_in_view(table, b, min_visible=min_visible, min_fill=min_fill) for b in boxes
            ]
            rates = pair_rates(*seen, dominant=int(table[:, -1, -1].argmax()))
            if seen[1].shape[1]:
                _, _, height, width = boxes[1]
                rates["local area"] = float((height * width).mean() / np.prod(size))
            rows[name].append(rates)
    return {
        name: {column: np.array([r[column] for r in rates]) for column in (rates or [{}])[0]}
        for name, rates in rows.items()
    }


def _box_drawer(global_spec: ViewSpec, local_spec: ViewSpec):
    """Builds (keys [D], size i32[2]) -> global and local boxes, (top, left, ...) i32[D, V] each."""

    def boxes(key, size):
        views = draw_image_views(key, size, global_spec=global_spec, local_spec=local_spec)
        return tuple(view.box for view in views)

    return jax.jit(jax.vmap(boxes, (0, None)))


def rate_table(rates: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Markdown table in percent: mean over images, and its standard error."""
    columns = list(dict.fromkeys(column for row in rates.values() for column in row))
    lines = ["| recipe | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rates.items():
        cells = [_cell(row[column]) if column in row else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: np.ndarray) -> str:
    error = 100 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{100 * values.mean():.1f} ± {error:.1f}"
