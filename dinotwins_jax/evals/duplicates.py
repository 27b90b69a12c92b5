"""Pairs of images whose features are nearly the same, and groups of them.

Letters: M and N images, D features, P pairs.
"""

from typing import NamedTuple

import numpy as np

from dinotwins_jax.evals.neighbours import unit

BLOCK = 4096  # images of each set compared at once: 64 MiB of cosines
MOST_PAIRS = 5_000_000  # more is no list of duplicates
ROUNDING = 1e-6  # of a cosine


class Pairs(NamedTuple):
    """Pairs of images, the most similar first: a: i64[P], b: i64[P], cosine: f32[P] at most 1."""

    a: np.ndarray
    b: np.ndarray
    cosine: np.ndarray


def near_pairs(features: np.ndarray, threshold: float, against: np.ndarray | None = None) -> Pairs:
    """All pairs of images with a cosine of at least `threshold`, each once.

    Blocks of 4,096 x 4,096 cosines are computed one by one, so memory grows with the pairs found.

    Args:
      features: f32[M, D], normalised here.
      threshold: in (0, 1]; what is smaller by rounding counts too.
      against: f32[N, D], the images of b; None: those of `features`, with a < b.
    Returns:
      Pairs, in descending order of the cosine, then by a and b.
    Raises:
      ValueError: a threshold outside (0, 1], features that are not finite or of another width, or more
        than 5,000,000 pairs.
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1")
    if against is not None and against.shape[1:] != features.shape[1:]:
        raise ValueError(f"features {features.shape} and {against.shape} must have the same width")
    others = features if against is None else against
    found, count = [], 0
    for start in range(0, len(features), BLOCK):
        rows = _finite_unit(features, start)
        for first in range(start if against is None else 0, len(others), BLOCK):
            inside = against is None and first == start
            columns = rows if inside else _finite_unit(others, first)
            cosine = rows @ columns.T
            a, b = np.nonzero(cosine >= threshold - ROUNDING)
            if inside:
                a, b = a[a < b], b[a < b]
            found.append((a + start, b + first, cosine[a, b]))
            count += len(a)
            if count > MOST_PAIRS:
                raise ValueError(
                    f"more than {MOST_PAIRS:,} pairs have a cosine of {threshold} or more: raise it"
                )
    a, b, cosine = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((b, a, -cosine))
    return Pairs(a[order], b[order], np.minimum(cosine[order], 1.0))


def _finite_unit(features: np.ndarray, start: int) -> np.ndarray:
    rows = features[start : start + BLOCK]
    if not np.isfinite(rows).all():
        raise ValueError(f"features of images {start} to {start + len(rows) - 1}: not finite")
    return unit(rows)


def groups(pairs: Pairs, second: int = 0) -> list[np.ndarray]:
    """Images that are connected by pairs, the group of the most similar pair first.

    Args:
      pairs: of `near_pairs`.
      second: added to b: with the M images of the first set, those of another set are M, M + 1, …
    Returns:
      i64[n] images a group, n >= 2: the most similar pair first, then as they come in the pairs.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs.a):
        return []
    ends = np.stack([pairs.a, pairs.b + second], axis=1).reshape(-1)
    _, first, node = np.unique(ends, return_index=True, return_inverse=True)
    edges = node.reshape(-1, 2)
    graph = coo_array((np.ones(len(edges), bool), edges.T), shape=(len(first), len(first)))
    _, component = connected_components(graph, directed=False)
    order = np.argsort(first)  # of the nodes, as they come in the pairs
    appears = ends[first[order]]
    _, begins, which = np.unique(component[order], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(begins))  # of the groups, by their most similar pair
    return _parts(appears, rank[which])


def _parts(values: np.ndarray, group: np.ndarray) -> list[np.ndarray]:
    """Parts of `values` by their group 0, 1, …, in their order."""
    order = np.argsort(group, kind="stable")
    return np.split(values[order], np.cumsum(np.bincount(group))[:-1])
