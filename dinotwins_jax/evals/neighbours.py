"""Nearest neighbours of a few images in feature space, and a picture of them.

Letters: M images, D features, q queries, k neighbours.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dinotwins_jax.files import replacing

ROWS = 8192  # features normalised and compared at once
CELL, GAP, QUERY_GAP, MARGIN, HEADER, ROW_TITLE = 1.1, 0.1, 0.28, 0.12, 0.26, 0.22  # inches
FRAMES = {True: "#2da44e", False: "#d1383d", None: "#b5bcc4"}  # class agrees, differs, unknown


def nearest_neighbours(features: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The k images most similar to each query by cosine, without the query itself.

    Images are processed in blocks with a running top k; ties are ordered by index.

    Args:
      features: f32[M, D], normalised here.
      queries: i64[q], in [0, M).
      k: from 1 to M - 1.
    Returns:
      i64[q, k] indices of images, the most similar first.
    Raises:
      ValueError: features not [M, D] or not finite, a query outside [0, M), k outside [1, M - 1].
    """
    features, queries = np.asarray(features), np.asarray(queries, np.int64)
    if features.ndim != 2:
        raise ValueError(f"features {features.shape} must be [M, D]")
    M = len(features)
    if not 1 <= k < M:
        raise ValueError(f"k={k} must be from 1 to {M - 1}, the number of other images")
    outside = queries[(queries < 0) | (queries >= M)]
    if outside.size:
        raise ValueError(f"query {outside[0]} must be an index of {M} images")
    wanted = _unit(features[queries])
    nearest = np.full((len(queries), k), -np.inf, np.float32)
    indices = np.full((len(queries), k), -1, np.int64)
    for start in range(0, M, ROWS):
        block = _unit(features[start : start + ROWS])
        if not np.isfinite(block).all():
            raise ValueError(f"features of images {start} to {start + len(block) - 1}: not finite")
        here = np.arange(start, start + len(block))
        similarity = np.where(here == queries[:, None], -np.inf, wanted @ block.T)
        pool = np.concatenate([nearest, similarity], axis=1)
        pool_indices = np.concatenate([indices, np.broadcast_to(here, similarity.shape)], axis=1)
        order = np.argsort(-pool, axis=1, kind="stable")[:, :k]
        nearest = np.take_along_axis(pool, order, axis=1)
        indices = np.take_along_axis(pool_indices, order, axis=1)
    return indices


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def neighbours_grid(
    path: str | Path,
    images_of: Callable[[int], np.ndarray],
    queries: np.ndarray,
    neighbours: np.ndarray,
    titles: list[str] | None = None,
    same: np.ndarray | None = None,
) -> None:
    """Writes one PNG with a row per query: the query, then its neighbours from left to right.

    Args:
      path: file to write.
      images_of: index -> u8[h, w, 3]; shapes may differ and are kept.
      queries: i64[q], neighbours: i64[q, k], from `nearest_neighbours`.
      titles: one line above each row, or None.
      same: bool[q, k], whether a neighbour has its query's class: framed green, else red.
    Raises:
      ValueError: no queries, or numbers of queries, neighbours, titles and `same` that differ.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    queries, neighbours = np.asarray(queries), np.asarray(neighbours)
    q = len(queries)
    if q == 0 or neighbours.ndim != 2 or len(neighbours) != q:
        raise ValueError(f"{q} queries need neighbours [{q}, k], not {neighbours.shape}")
    if titles is not None and len(titles) != q:
        raise ValueError(f"{len(titles)} titles for {q} queries")
    if same is not None and np.shape(same) != neighbours.shape:
        raise ValueError(f"same {np.shape(same)} and neighbours {neighbours.shape} differ")

    k = neighbours.shape[1]
    row_title = ROW_TITLE if titles else 0.0
    row_height = CELL + GAP + row_title
    width = 2 * MARGIN + (k + 1) * CELL + QUERY_GAP + (k - 1) * GAP
    height = 2 * MARGIN + HEADER + q * row_height - GAP
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    style = {"va": "center", "parse_math": False}
    for row in range(q):
        bottom = height - MARGIN - HEADER - (row + 1) * row_height + GAP
        for column, index in enumerate([queries[row], *neighbours[row]]):
            left = MARGIN + column * (CELL + GAP) + (QUERY_GAP - GAP if column else 0.0)
            axes = figure.add_axes((left / width, bottom / height, CELL / width, CELL / height))
            agrees = None if column == 0 or same is None else bool(same[row][column - 1])
            _framed(axes, images_of(int(index)), FRAMES[agrees], 0.8 if agrees is None else 2.5)
            if row == 0:
                middle = ((left + CELL / 2) / width, 1 - (MARGIN + HEADER / 2) / height)
                name = str(column) if column else "query"
                figure.text(*middle, name, ha="center", fontsize=9, color="#222222", **style)
        if titles:
            at = (MARGIN / width, (bottom + CELL + row_title / 2) / height)
            figure.text(*at, titles[row], ha="left", fontsize=8, color="#555555", **style)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")


def _framed(axes, image: np.ndarray, colour: str, width: float) -> None:
    """Draws an image in its own proportions, with a frame of `width` points."""
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=colour, linewidth=width)
