"""A part of a labelled source: fewer classes, fewer images, or a long tail, drawn once by a seed.

Letters: M images of the source, C classes that are kept.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dinotwins_jax.data.base import EncodedImages, Source, gives_encoded, reading_of


def subset(source: Source, split: str, options: Mapping[str, Any], name: str) -> Source:
    """The part of a source that the section data.subset of a config describes.

    The test split loses the classes that are left out, and nothing else: images without a label stay, as
    they count for the precision of several labels. Of "pretrain" and "train" images
    without a kept class are left out too. The same labels in the same order give the same images.

    Args:
      options: {"classes", "images", "long_tail", "seed"}, see `class_sizes`; what is not there changes
        nothing.
      name: of the source, for errors.
    Returns:
      the source itself where nothing is left out by the options.
    Raises:
      ValueError: the split has no labels, or fewer classes than are to be kept.
    """
    classes, images = int(options.get("classes") or 0), int(options.get("images") or 0)
    ratio = float(options.get("long_tail") or 1.0)
    if not classes and (split == "test" or (not images and ratio == 1.0)):
        return source
    if source.labels is None:
        raise ValueError(
            f"config.data.subset: data source {name!r} has no labels of split {split!r} to choose images "
            "by; coco and tfds never have them for 'pretrain': take a source that has, such as folder, or "
            "leave the section out"
        )
    labels, there = np.asarray(source.labels), len(source.class_names)
    if classes > there:
        raise ValueError(f"config.data.subset.classes is {classes}: the data has {there} classes")
    kept = classes or there
    if split == "test":
        chosen = np.flatnonzero(labels < kept)
        note = ""
    else:
        known = labels[(labels >= 0) & (labels < kept)]
        sizes = class_sizes(np.bincount(known, minlength=kept), images, ratio)
        chosen = _drawn(labels, sizes, int(options.get("seed") or 0))
        note = f"{len(chosen):,} of {len(source):,} images by data.subset"
    kind = _Encoded if gives_encoded(source) else _Arrays
    return kind(source, chosen, kept, note)


def class_sizes(there: np.ndarray, images: int, ratio: float) -> np.ndarray:
    """i64[C] images of each class, at least 1 of one that has any.

    Args:
      there: i64[C] images of each class.
      images: of the largest class; 0: as many as the largest has.
      ratio: the first class' images over the last one's, an exponential curve between them in the order
        of the classes; 1: all the same.
    Source: the long-tailed CIFAR of Cui et al., arXiv:1901.05555: sizes n_max * ratio^(-c / (C - 1)).
    """
    most = images or int(there.max(initial=0))
    curve = most * ratio ** (-np.arange(len(there)) / max(len(there) - 1, 1))
    return np.minimum(np.maximum(np.floor(curve + 1e-9), 1), there).astype(np.int64)


def _drawn(labels: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
    """i64[m], ascending: sizes[c] images of each class c."""
    chosen = []
    for c, size in enumerate(sizes.tolist()):
        # RandomState, not default_rng: NumPy froze its stream (NEP 19). A stream a class: none depends
        # on the others.
        order = np.random.RandomState([seed, c]).permutation(np.flatnonzero(labels == c))
        chosen.append(order[:size])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


class _Subset:
    """Some images of a source, and the first of its classes; a Source."""

    def __init__(self, source: Source, chosen: np.ndarray, classes: int, note: str):
        self._source, self._chosen, self._classes = source, chosen, classes
        self.class_names = tuple(source.class_names)[:classes]
        self.labels = np.asarray(source.labels)[chosen]
        several = getattr(source, "multi_hot", None)
        self.multi_hot = None if several is None else several[chosen, :classes]
        self.notes = (*getattr(source, "notes", ()), *((note,) if note else ()))
        self.reading = reading_of(source)
        if stored := getattr(source, "stored", None):
            self.stored = stored
        for name in ("masked", "boxed"):
            if (known := getattr(source, name, None)) is not None:
                setattr(self, name, known[chosen])

    def __len__(self) -> int:
        return len(self._chosen)

    def name(self, i: int) -> str:
        return self._source.name(self._row(i))

    def default_canvas(self, global_size: int) -> int:
        return self._source.default_canvas(global_size)

    @property
    def masks(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """As of the source, without objects of classes that are left out; AttributeError if it has none."""
        return self._objects(self._source.masks)

    @property
    def boxes(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """As `masks`."""
        return self._objects(self._source.boxes)

    def _objects(self, of: Callable) -> Callable:
        def objects(i: int):
            pixels, category = of(self._row(i))
            kept = category < self._classes
            return pixels[kept], category[kept]

        return objects

    def _row(self, i: int) -> int:
        return int(self._chosen[i])


class _Encoded(_Subset, EncodedImages):
    """Of a source whose images are files."""

    def encoded(self, i: int) -> bytes:
        return self._source.encoded(self._row(i))


class _Arrays(_Subset):
    """Of a source of arrays."""

    def __getitem__(self, i: int) -> np.ndarray:
        return self._source[self._row(i)]
