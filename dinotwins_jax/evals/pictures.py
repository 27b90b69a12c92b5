"""PNG grids of panels that show images, and maps and masks over their patches.

Letters: h x w cells (patches or pixels), H x W pixels. A panel is a function that draws on axes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dinotwins_jax.data.bands import as_colours
from dinotwins_jax.data.base import read_image
from dinotwins_jax.files import replacing

CELL, GAP, MARGIN, HEADER, ROW_TITLE = 1.5, 0.06, 0.12, 0.26, 0.24  # inches
FONT, LONGEST = 10, 18  # points; characters of a column's title that fit a panel at that size
OUTLINE = "#ffd400"
SHADE = 0.62  # of black over what a mask leaves out

Panel = Callable


def picture_of(source, i: int) -> np.ndarray:
    """u8[H, W, 3] of image i of a source, to look at."""
    return as_colours(read_image(source, i))


def mask_edges(mask: np.ndarray) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Sides of the kept cells of bool[h, w] that face a cell not kept, as (x, y) pairs in cells."""
    padded = np.pad(mask, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # between rows y - 1 and y
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])  # between columns x - 1 and x
    return [((x, y), (x + 1, y)) for y, x in across] + [((x, y), (x, y + 1)) for y, x in down]


def show(pixels: np.ndarray) -> Panel:
    """Panel of a picture: u8[h, w, 3], or f32[h, w, 3] in [0, 1], pixel by pixel."""
    return lambda axes: axes.imshow(pixels, aspect="auto", interpolation="nearest")


def show_map(cells: np.ndarray) -> Panel:
    """Panel of f32[h, w] >= 0, cell by cell, from 0 to its own maximum."""
    return lambda axes: axes.imshow(cells, "magma", aspect="auto", interpolation="nearest", vmin=0)


def show_mask(
    image: np.ndarray, mask: np.ndarray, outlined: Sequence[np.ndarray] | None = None
) -> Panel:
    """Panel of a picture, dimmed outside a mask, with outlines.

    Args:
      image: u8[H, W, 3].
      mask: bool[h, w] of any grid, stretched over the picture.
      outlined: masks of that grid to outline, each by itself; None: the mask.
    """

    def draw(axes):
        from matplotlib.collections import LineCollection

        h, w = mask.shape
        extent = (0, w, h, 0)
        axes.imshow(image, extent=extent, aspect="auto")
        shade = np.zeros((h, w, 4), np.float32)
        shade[..., 3] = np.where(mask, 0.0, SHADE)
        axes.imshow(shade, extent=extent, aspect="auto", interpolation="nearest")
        edges = [
            edge for part in ([mask] if outlined is None else outlined) for edge in mask_edges(part)
        ]
        lines = LineCollection(edges, colors=OUTLINE, linewidths=1.1, capstyle="round")
        axes.add_collection(lines)

    return draw


def panel_grid(
    path: str | Path,
    rows: Sequence[Sequence[Panel]],
    columns: Sequence[str],
    *,
    aspect: float,
    titles: Sequence[str] | None = None,
) -> None:
    """Writes a PNG of panels, 1.5 inches wide at 150 dots an inch.

    Args:
      path: file to write.
      rows: panels, each row as long as `columns`.
      columns: title of each column.
      aspect: height / width of every panel.
      titles: one line above each row, or None.
    Raises:
      ValueError: no rows, or the numbers of titles and rows differ.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("no images to draw")
    if titles is not None and len(titles) != len(rows):
        raise ValueError(f"{len(titles)} titles for {len(rows)} images")
    cell_height = CELL * aspect
    row_title = ROW_TITLE if titles else 0.0
    row_height = cell_height + GAP + row_title
    width = 2 * MARGIN + len(columns) * (CELL + GAP) - GAP
    height = 2 * MARGIN + HEADER + len(rows) * row_height - GAP
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    lefts = [MARGIN + column * (CELL + GAP) for column in range(len(columns))]
    for left, name in zip(lefts, columns, strict=True):
        middle = ((left + CELL / 2) / width, 1 - (MARGIN + HEADER / 2) / height)
        size = FONT * min(1.0, LONGEST / max(len(name), 1))
        figure.text(*middle, name, ha="center", va="center", fontsize=size, color="#222222")
    for row, panels in enumerate(rows):
        bottom = height - MARGIN - HEADER - (row + 1) * row_height + GAP
        for left, draw in zip(lefts, panels, strict=True):
            box = (left / width, bottom / height, CELL / width, cell_height / height)
            axes = figure.add_axes(box)
            axes.set_axis_off()
            draw(axes)
        if titles:
            at = (MARGIN / width, (bottom + cell_height + row_title / 2) / height)
            figure.text(*at, titles[row], ha="left", va="center", fontsize=8, color="#555555")
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")


def segmentation_grid(
    path: str | Path,
    images: np.ndarray,
    foregrounds: np.ndarray,
    masks: Sequence[np.ndarray] | None,
    titles: Sequence[str] | None = None,
) -> None:
    """Writes one PNG with a row per image: image, foreground, objects.

    Args:
      path: file to write.
      images: u8[n, H, W, 3].
      foregrounds: bool[n, h, w].
      masks: n times bool[k, H, W], the k objects of each image, in the same view; None: not drawn.
      titles: one line above each row, or None.
    Raises:
      ValueError: numbers of images, foregrounds, masks and titles differ.
    """
    if not len(images) == len(foregrounds) == len(images if masks is None else masks):
        counts = f"{len(foregrounds)} foregrounds and masks of {len(masks or ())}"
        raise ValueError(f"{len(images)} images, {counts}")
    columns = ["image", "normalised cut"]
    rows = [
        [show(image), show_mask(image, kept)]
        for image, kept in zip(images, foregrounds, strict=True)
    ]
    if masks is not None:
        columns.append("objects")
        for row, image, objects in zip(rows, images, masks, strict=True):
            row.append(show_mask(image, objects.any(axis=0), objects))
    aspect = images.shape[1] / images.shape[2]
    panel_grid(path, rows, columns, aspect=aspect, titles=titles)


def component_colours(
    projections: np.ndarray, grid: tuple[int, int], foreground: np.ndarray | None = None
) -> np.ndarray:
    """The first three components of `patch_pca` as f32[n, h, w, 3], red, green and blue in [0, 1].

    Each runs from its 1st to its 99th percentile over the foreground of all images; what is not
    foreground is black. Arguments as in `pca_grid`.
    """
    kept = np.ones(projections.shape[:2], bool) if foreground is None else foreground
    low, high = np.percentile(projections[kept][:, :3], [1, 99], axis=0)
    colours = np.clip((projections[..., :3] - low) / np.maximum(high - low, 1e-30), 0.0, 1.0)
    colours = np.where(kept[..., None], colours, 0.0)
    return np.float32(colours.reshape(len(projections), *grid, 3))


def pca_grid(
    path: str | Path,
    images: np.ndarray,
    projections: np.ndarray,
    grid: tuple[int, int],
    foreground: np.ndarray | None = None,
    titles: Sequence[str] | None = None,
) -> None:
    """Writes one PNG with a row per image: image, and three components as red, green and blue.

    Each component runs from its 1st to its 99th percentile over the foreground of all images;
    what is not foreground is black.

    Args:
      path: file to write.
      images: u8[n, H, W, 3].
      projections: f32[n, N, components >= 3] of `patch_pca`; the first three are shown.
      grid: (h, w), h * w = N.
      foreground: bool[n, N] of `patch_pca`; None: all patches.
      titles: one line above each row, or None.
    Raises:
      ValueError: numbers of images, projections and titles differ, or a shape does not fit.
    """
    n, N = len(images), grid[0] * grid[1]
    if projections.ndim != 3 or projections.shape[:2] != (n, N) or projections.shape[2] < 3:
        raise ValueError(f"projections {projections.shape} must be [{n}, {N}, 3 or more]")
    colours = component_colours(projections, grid, foreground)
    rows = [[show(image), show(colour)] for image, colour in zip(images, colours, strict=True)]
    aspect = images.shape[1] / images.shape[2]
    panel_grid(path, rows, ["image", "components 1-3"], aspect=aspect, titles=titles)
