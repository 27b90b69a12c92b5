"""What the class token looks at: attention maps, their kept mass, and a picture of both.

Letters: B images, T tokens, h x w patches, H x W pixels.
"""

from pathlib import Path

import jax
import numpy as np

MAX_HEADS = 6  # columns of the picture; ViT-S has six heads
CELL, GAP, MARGIN, HEADER, ROW_TITLE = 1.5, 0.06, 0.12, 0.26, 0.24  # inches
OUTLINE = "#ffd400"


def mass_mask(attention: jax.Array | np.ndarray, keep: float = 0.6) -> np.ndarray:
    """The smallest set of patches of each head that holds at least `keep` of its attention.

    sort ascending, divide by the sum, keep where the running sum > 1 - keep

    Args:
      attention: f32[heads, h, w], not negative; each head is normalised here.
      keep: share of the mass, in (0, 1].
    Returns:
      bool[heads, h, w], on the host. A head without any attention keeps nothing.
    Raises:
      ValueError: keep outside (0, 1], or attention not [heads, h, w].
    Source: DINO, arXiv:2104.14294, visualize_attention.py (keeps 0.6).
    """
    attention = np.asarray(attention, np.float32)
    if attention.ndim != 3:
        raise ValueError(f"attention {attention.shape} must be [heads, h, w]")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep={keep} of the attention must be in (0, 1]")
    flat = attention.reshape(len(attention), -1)
    order = np.argsort(flat, axis=1, kind="stable")
    ascending = np.take_along_axis(flat, order, axis=1)
    ascending = ascending / np.maximum(ascending.sum(axis=1, keepdims=True), 1e-30)
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, order, np.cumsum(ascending, axis=1) > 1.0 - keep, axis=1)
    return mask.reshape(attention.shape)


def cls_attention(
    attention: jax.Array, grid: tuple[int, int], num_prefix_tokens: int = 1
) -> jax.Array:
    """Attention of the class token to every patch.

    Args:
      attention: f32[B, heads, T, T] of one block, row = query, as ViTOutput.attention.
      grid: (h, w) patches, h * w = T - num_prefix_tokens.
      num_prefix_tokens: tokens before the patches: the class token and the registers.
    Returns:
      f32[B, heads, h, w]; sums to 1 less what the prefix tokens received.
    Raises:
      ValueError: grid and T do not fit.
    """
    (h, w), (B, heads, T, _) = grid, attention.shape
    expected = num_prefix_tokens + h * w
    if expected != T:
        raise ValueError(
            f"attention has {T} tokens; grid {h} x {w} and {num_prefix_tokens} prefix tokens: {expected}"
        )
    return attention[:, :, 0, num_prefix_tokens:].reshape(B, heads, h, w)


def _edges(mask: np.ndarray) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Sides of the kept cells of bool[h, w] that face a cell not kept, as (x, y) pairs in cells."""
    padded = np.pad(mask, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # between rows y - 1 and y
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])  # between columns x - 1 and x
    return [((x, y), (x + 1, y)) for y, x in across] + [((x, y), (x, y + 1)) for y, x in down]


def _overlay(axes, image: np.ndarray, mask: np.ndarray) -> None:
    """The image, dimmed where bool[h, w] `mask` is not set, its kept patches outlined."""
    from matplotlib.collections import LineCollection

    h, w = mask.shape
    extent = (0, w, h, 0)
    axes.imshow(image, extent=extent, aspect="auto")
    shade = np.zeros((h, w, 4), np.float32)
    shade[..., 3] = np.where(mask, 0.0, 0.62)
    axes.imshow(shade, extent=extent, aspect="auto", interpolation="nearest")
    axes.add_collection(
        LineCollection(_edges(mask), colors=OUTLINE, linewidths=1.1, capstyle="round")
    )


def attention_grid(
    path: str | Path,
    images: np.ndarray,
    attention: np.ndarray,
    keep: float = 0.6,
    titles: list[str] | None = None,
) -> None:
    """Writes one PNG with a row per image: image, mean of the heads, each head, the mean's kept mass.

    Maps are shown patch by patch (nearest), each from 0 to its own maximum; with more than six
    heads the first six are shown, and the mean is still over all of them.

    Args:
      path: file to write.
      images: u8[n, H, W, 3].
      attention: f32[n, heads, h, w], as `cls_attention` gives.
      keep: share of the mean's attention that the last column keeps, in (0, 1].
      titles: one line above each row, or None.
    Raises:
      ValueError: numbers of images, maps and titles differ, or a shape does not fit.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images, attention = np.asarray(images), np.asarray(attention, np.float32)
    n = len(images)
    if images.ndim != 4 or attention.ndim != 4 or len(attention) != n or n == 0:
        raise ValueError(
            f"images {images.shape} must be [n, H, W, 3], attention {attention.shape} [n, heads, h, w]"
        )
    if titles is not None and len(titles) != n:
        raise ValueError(f"{len(titles)} titles for {n} images")
    mean = attention.mean(axis=1)
    masks = mass_mask(mean, keep)
    heads = min(attention.shape[1], MAX_HEADS)
    columns = ["image", "mean of heads", *(f"head {i + 1}" for i in range(heads))]
    columns.append(f"{keep:.0%} of the mean")

    cell_height = CELL * images.shape[1] / images.shape[2]
    row_title = ROW_TITLE if titles else 0.0
    row_height = cell_height + GAP + row_title
    width = 2 * MARGIN + len(columns) * (CELL + GAP) - GAP
    height = 2 * MARGIN + HEADER + n * row_height - GAP
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    for row in range(n):
        bottom = height - MARGIN - HEADER - (row + 1) * row_height + GAP
        maps = [mean[row], *attention[row, :heads]]
        for column, name in enumerate(columns):
            left = MARGIN + column * (CELL + GAP)
            box = (left / width, bottom / height, CELL / width, cell_height / height)
            axes = figure.add_axes(box)
            axes.set_axis_off()
            if column == 0:
                axes.imshow(images[row], aspect="auto")
            elif column <= len(maps):
                cells = maps[column - 1]
                axes.imshow(cells, "magma", aspect="auto", interpolation="nearest", vmin=0)
            else:
                _overlay(axes, images[row], masks[row])
            if row == 0:
                middle = ((left + CELL / 2) / width, 1 - (MARGIN + HEADER / 2) / height)
                figure.text(*middle, name, ha="center", va="center", fontsize=10, color="#222222")
        if titles:
            at = (MARGIN / width, (bottom + cell_height + row_title / 2) / height)
            figure.text(*at, titles[row], ha="left", va="center", fontsize=8, color="#555555")
    figure.savefig(path, dpi=150, format="png")
