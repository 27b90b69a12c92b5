"""Checksum of labelled data by their content, wherever they lie."""

import hashlib
from collections.abc import Sequence

import numpy as np

from dinotwins_jax.data.base import BadImage, gives_encoded
from dinotwins_jax.data.store import files_checksum

SAMPLE = 16  # pictures of a split that are read, evenly spaced


def content_checksum(sources: Sequence, kind: str) -> str:
    """sha256 of the kind of source, the names, file sizes, labels, and a sample of the pictures.

    Args:
      sources: of the splits, in a fixed order.
      kind: config.data.source.
    """
    digest = hashlib.sha256(kind.encode())
    for source in sources:
        digest.update(files_checksum([source.name(i) for i in range(len(source))]).encode())
        update_with_labels(digest, source)
        for i in np.unique(np.linspace(0, max(len(source) - 1, 0), SAMPLE).round().astype(int)):
            digest.update(_picture(source, int(i)))
    return digest.hexdigest()


def _picture(source, i: int) -> bytes:
    try:
        return source.encoded(i) if gives_encoded(source) else source[i].tobytes()
    except (BadImage, IndexError):  # unreadable, or no pictures
        return b"-"


def update_with_labels(digest, source) -> None:
    """Adds the labels and the names of the classes to a hash."""
    for part in (source.labels, getattr(source, "multi_hot", None)):
        digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    digest.update(str(source.class_names).encode())
