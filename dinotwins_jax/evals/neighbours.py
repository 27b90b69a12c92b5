"""Nearest neighbours of a few images in feature space, and a picture of them.

Letters: M images, D features, q queries, k neighbours.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dinotwins_jax.evals.sheets import Tile, tile_grid

ROWS = 8192  # features normalised and compared at once


def nearest_neighbours(features: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The k images most similar to each query by cosine, without the query itself.

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
    return most_similar(features, features[queries], k, without=queries)[0]


def most_similar(
    features: np.ndarray, wanted: np.ndarray, k: int, *, without: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k images most similar to each of some features, by cosine.

    Images are processed in blocks with a running top k; ties are ordered by index.

    Args:
      features: f32[M, D] and wanted: f32[q, D], normalised here.
      k: from 1 to M, to M - 1 with `without`.
      without: i64[q], one image that each query leaves out, -1: none.
    Returns:
      (i64[q, k] indices of images, f32[q, k] their cosines), the most similar first.
    Raises:
      ValueError: features that are not finite or of another width, or k that does not fit.
    """
    if features.ndim != 2 or wanted.ndim != 2 or features.shape[1] != wanted.shape[1]:
        raise ValueError(f"features {features.shape} and {wanted.shape} must be [M, D] and [q, D]")
    M, q = len(features), len(wanted)
    skipped = np.full(q, -1) if without is None else without
    if not 1 <= k <= M - (skipped >= 0).any():
        raise ValueError(f"k={k} must be from 1 to the number of other images, {M} in all")
    wanted = unit(wanted)
    nearest = np.full((q, k), -np.inf, np.float32)
    indices = np.full((q, k), -1, np.int64)
    for start in range(0, M, ROWS):
        block = unit(features[start : start + ROWS])
        if not np.isfinite(block).all():
            raise ValueError(f"features of images {start} to {start + len(block) - 1}: not finite")
        here = np.arange(start, start + len(block))
        similarity = np.where(here == skipped[:, None], -np.inf, wanted @ block.T)
        pool = np.concatenate([nearest, similarity], axis=1)
        pool_indices = np.concatenate([indices, np.broadcast_to(here, similarity.shape)], axis=1)
        order = np.argsort(-pool, axis=1, kind="stable")[:, :k]
        nearest = np.take_along_axis(pool, order, axis=1)
        indices = np.take_along_axis(pool_indices, order, axis=1)
    if not np.isfinite(wanted).all():
        raise ValueError("features of the queries: not finite")
    return indices, nearest


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of f32[M, D] divided by their norm."""
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
    queries, neighbours = np.asarray(queries), np.asarray(neighbours)
    q = len(queries)
    if q == 0 or neighbours.ndim != 2 or len(neighbours) != q:
        raise ValueError(f"{q} queries need neighbours [{q}, k], not {neighbours.shape}")
    if titles is not None and len(titles) != q:
        raise ValueError(f"{len(titles)} titles for {q} queries")
    if same is not None and np.shape(same) != neighbours.shape:
        raise ValueError(f"same {np.shape(same)} and neighbours {neighbours.shape} differ")

    rows = []
    for row, (query, near) in enumerate(zip(queries, neighbours, strict=True)):
        agrees = [None] * len(near) if same is None else [bool(x) for x in same[row]]
        rows.append([_tile(images_of, query, None), *map(partial(_tile, images_of), near, agrees)])
    columns = ["query", *(str(k + 1) for k in range(neighbours.shape[1]))]
    tile_grid(path, rows, columns=columns, titles=titles, first_apart=True)


def _tile(images_of: Callable[[int], np.ndarray], index: int, agrees: bool | None) -> Tile:
    return Tile(partial(images_of, int(index)), agrees=agrees)
