"""PNG sheets of pictures: rows of tiles with frames and captions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

CELL, GAP, FIRST_GAP, MARGIN, HEADER = 1.1, 0.1, 0.28, 0.12, 0.26  # inches
CAPTION, ROW_TITLE = 0.17, 0.22
LINE = 19  # characters of a caption that fit under a tile
FRAMES = {True: "#2da44e", False: "#d1383d", None: "#b5bcc4"}  # class agrees, differs, unknown
MISSING = "#e3e6ea"  # a picture that is not there


class Tile(NamedTuple):
    """image: returns u8[h, w, 3] of any shape, or None where the picture is not there; name: what is
    written on such a tile; caption: a line under it; agrees: colour of its frame, see FRAMES."""

    image: Callable[[], np.ndarray | None]
    name: str = ""
    caption: str = ""
    agrees: bool | None = None


def tile_grid(
    path: str | Path,
    rows: Sequence[Sequence[Tile]],
    *,
    columns: Sequence[str] = (),
    titles: Sequence[str] | None = None,
    first_apart: bool = False,
) -> None:
    """Writes one PNG with a row of tiles each; rows may differ in length.

    Args:
      path: file to write.
      columns: title of each column, or none.
      titles: one line above each row, or None.
      first_apart: leaves a gap after the first column.
    Raises:
      ValueError: no tiles, or numbers of titles and rows that differ.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows or not all(rows):
        raise ValueError("no images to draw")
    if titles is not None and len(titles) != len(rows):
        raise ValueError(f"{len(titles)} titles for {len(rows)} rows of images")
    widest = max(map(len, rows))
    header = HEADER if columns else 0.0
    row_title = ROW_TITLE if titles else 0.0
    caption = CAPTION if any(tile.caption for row in rows for tile in row) else 0.0
    extra = FIRST_GAP - GAP if first_apart else 0.0
    row_height = CELL + GAP + row_title + caption
    width = 2 * MARGIN + widest * CELL + (widest - 1) * GAP + extra
    height = 2 * MARGIN + header + len(rows) * row_height - GAP
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    style = {"va": "center", "parse_math": False}
    lefts = [MARGIN + i * (CELL + GAP) + (extra if i else 0.0) for i in range(widest)]
    for left, name in zip(lefts, columns, strict=False):
        middle = ((left + CELL / 2) / width, 1 - (MARGIN + HEADER / 2) / height)
        figure.text(*middle, name, ha="center", fontsize=9, color="#222222", **style)
    for number, row in enumerate(rows):
        bottom = height - MARGIN - header - (number + 1) * row_height + GAP + caption
        for left, tile in zip(lefts, row, strict=False):
            box = (left / width, bottom / height, CELL / width, CELL / height)
            _draw(figure.add_axes(box), tile)
            if tile.caption:
                middle = ((left + CELL / 2) / width, (bottom - caption / 2) / height)
                text = shortened(tile.caption)
                figure.text(*middle, text, ha="center", fontsize=6.5, color="#555555", **style)
        if titles:
            at = (MARGIN / width, (bottom + CELL + row_title / 2) / height)
            figure.text(*at, titles[number], ha="left", fontsize=8, color="#555555", **style)
    figure.savefig(path, dpi=150, format="png")


def shortened(text: str, length: int = LINE) -> str:
    """The text, or its two ends with … between them."""
    if len(text) <= length:
        return text
    end = (length - 1) * 2 // 3
    return f"{text[: length - 1 - end]}…{text[-end:]}"


def _draw(axes, tile: Tile) -> None:
    """Draws a picture in its own proportions, with its frame."""
    image = tile.image()
    if image is None:
        axes.imshow(np.zeros((1, 1)), cmap="gray", alpha=0.0)
        axes.set_facecolor(MISSING)
        name = shortened(tile.name, 3 * LINE)
        lines = [name[i : i + LINE] for i in range(0, len(name), LINE)]
        axes.text(
            0.5, 0.5, "\n".join(lines), transform=axes.transAxes, ha="center", va="center",
            fontsize=6.5, color="#555555", parse_math=False,
        )  # fmt: skip
    else:
        axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=FRAMES[tile.agrees], linewidth=0.8 if tile.agrees is None else 2.5)
