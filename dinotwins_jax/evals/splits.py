"""Which images keep their label: stratified, deterministic subsets. Letters: M images, C classes."""

from collections.abc import Callable

import numpy as np


def check_labels(features, labels: np.ndarray, num_classes: int, *, name: str) -> None:
    """Raises ValueError unless features is [M, D] and labels is [M] with every label < num_classes,
    or bool[M, num_classes]."""
    multi = labels.ndim == 2
    if (
        len(features.shape) != 2
        or labels.shape[:1] != features.shape[:1]
        or labels.ndim not in (1, 2)
    ):
        raise ValueError(
            f"{name}: features {tuple(features.shape)} and labels {labels.shape} must be [M, D] and [M]"
        )
    if multi and (labels.dtype != bool or labels.shape[1] != num_classes):
        raise ValueError(
            f"{name}: several labels an image are bool[M, num_classes={num_classes}], "
            f"not {labels.dtype}{list(labels.shape)}"
        )
    if not multi and labels.size and labels.max() >= num_classes:
        raise ValueError(
            f"{name}: label {labels.max()} does not fit num_classes={num_classes}; "
            "labels run from 0 to num_classes - 1, -1 means none"
        )


def strata(labels: np.ndarray) -> np.ndarray:
    """i32[M], the group of each image that a stratified draw keeps the share of.

    Args:
      labels: i32[M], which are the groups themselves; or bool[M, C]: the rarest class that an image
        shows, so that rare classes keep their share first; C for images without any class, which
        are negatives like others.
    Differs: iterative stratification (Sechidis et al., ECML 2011) balances all classes of an image;
      this draw is nested over fractions, and balances the rarest.
    """
    labels = np.asarray(labels)
    if labels.ndim == 1:
        return labels
    counts = np.append(labels.sum(axis=0), len(labels) + 1)  # the last one: no class at all
    shown = np.concatenate([labels, np.ones((len(labels), 1), bool)], axis=1)
    order = np.argsort(counts, kind="stable")
    return order[np.argmax(shown[:, order], axis=1)].astype(np.int32)


def _draw(labels: np.ndarray, indices: np.ndarray, seed: int, count: Callable) -> np.ndarray:
    """Sorted i64 union over the classes of `count(n)` of the n entries of `indices` in that class."""
    drawn = []
    for category in np.unique(labels[indices]):
        members = indices[labels[indices] == category]
        # RandomState, not default_rng: NumPy froze its stream (NEP 19), so a published split stays
        # what it was. One stream a class, so that no class depends on the others.
        order = np.random.RandomState([seed, int(category)]).permutation(len(members))
        drawn.append(members[order[: count(len(members))]])
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def _labelled(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    indices = np.sort(np.asarray(indices, np.int64))
    indices = indices[labels[indices] >= 0]
    if not indices.size:
        raise ValueError(f"no labelled images: all {len(labels)} labels given are -1 or left out")
    return indices


def stratified_indices(
    labels: np.ndarray, fraction: float, seed: int, minimum: int = 1
) -> np.ndarray:
    """Images that keep their label when only `fraction` of every class does.

    Each class gives round(fraction * its count) images, at least `minimum`, at most all it has.
    The same (labels, fraction, seed) always gives the same images, and with the same seed a smaller
    fraction is a subset of a larger one, so that a label-efficiency curve adds labels only.

    Args:
      labels: i32[M] class of each image, -1 = none (never chosen); or bool[M, C], see `strata`.
      fraction: of each class, in (0, 1].
      seed: 0 <= seed < 2**32.
      minimum: images per class, whatever the fraction.
    Returns:
      i64[m] indices into `labels`, ascending.
    Raises:
      ValueError: fraction outside (0, 1], or no labelled images.
    """
    labels = strata(labels)
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction={fraction} of the labels must be in (0, 1]")
    indices = _labelled(labels, np.arange(len(labels)))
    return _draw(labels, indices, seed, lambda n: min(n, max(minimum, round(fraction * n))))


def holdout(
    labels: np.ndarray, indices: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Parts chosen images into (fit, held out), class by class, to select a setting without the test set.

    Each class gives round(fraction * its count) images to the held-out part, at least one and at
    most all but one; a class with a single example stays in fit, so held out may be empty.

    Args:
      labels: i32[M] class of each image of the whole set, -1 = none (in neither part); or
        bool[M, C], see `strata`.
      indices: i64[m] the images to part.
      fraction: held out of each class, in (0, 1).
      seed: 0 <= seed < 2**32.
    Returns:
      (i64[f], i64[h]) indices into `labels`, each ascending, disjoint.
    Raises:
      ValueError: fraction outside (0, 1), or no labelled images among `indices`.
    """
    labels = strata(labels)
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction={fraction} held out must be in (0, 1)")
    indices = _labelled(labels, indices)
    held = _draw(labels, indices, seed, lambda n: min(n - 1, max(1, round(fraction * n))))
    return np.setdiff1d(indices, held), held
