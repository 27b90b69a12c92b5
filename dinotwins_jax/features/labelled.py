"""Features and the labels that belong to them, from arrays, files and tables.

Letters: M images, D features.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dinotwins_jax.data.labels import read_labels
from dinotwins_jax.features.files import read_features


def arrays_of(features) -> Mapping[str, np.ndarray]:
    """The arrays of `embed`, from themselves, their file, Features of a model, or f32[M, D]."""
    if isinstance(features, str | os.PathLike):
        return read_features(Path(features).expanduser())
    if isinstance(features, Mapping):
        return features
    if hasattr(features, "_asdict"):  # Features of a model
        return features._asdict()
    return {"cls": np.asarray(features)}


def columns_of(arrays: Mapping[str, np.ndarray], tokens: tuple[str, ...]) -> np.ndarray:
    """f32[M, D] of the tokens, side by side."""
    for name in tokens:
        if name not in arrays or arrays[name].ndim != 2:
            there = ", ".join(k for k, v in arrays.items() if getattr(v, "ndim", 0) == 2)
            raise ValueError(
                f"the features have no '{name}' of one vector an image; they have {there}"
            )
    columns = np.concatenate([np.asarray(arrays[name], np.float32) for name in tokens], axis=1)
    bad = np.flatnonzero(~np.isfinite(columns).all(axis=1))
    if bad.size:
        raise ValueError(f"features of image {bad[0]}: not finite")
    return columns


def labels_of(arrays: Mapping[str, np.ndarray], labels) -> tuple[np.ndarray, tuple[str, ...]]:
    """(i32[M] with -1 for none, names of the classes)."""
    if labels is None:
        if "labels" not in arrays:
            raise ValueError("the features hold no labels: give some")
        return np.asarray(arrays["labels"], np.int32), tuple(arrays["class_names"].tolist())
    if isinstance(labels, str | os.PathLike):
        labels = _of_table(Path(labels).expanduser())
    if isinstance(labels, Mapping):
        labels = _matched(_names(arrays), labels)
    labels, images = np.asarray(labels), len(next(iter(arrays.values())))
    if labels.shape != (images,):
        raise ValueError(
            f"labels {list(labels.shape)} for {images} images: one each, -1 or '' for none"
        )
    if labels.dtype.kind in "iu":
        return labels.astype(np.int32), tuple(map(str, range(int(labels.max(initial=-1)) + 1)))
    if labels.dtype.kind not in "UO":
        raise ValueError(f"labels are {labels.dtype}: integers or strings")
    missing = [label is None or label != label for label in labels]  # None, and pandas' NaN
    texts = ["" if lacks else str(label) for lacks, label in zip(missing, labels, strict=True)]
    names = tuple(sorted(set(texts) - {""}))
    place = {name: k for k, name in enumerate(names)} | {"": -1}
    return np.array([place[text] for text in texts], np.int32), names


def _names(arrays: Mapping[str, np.ndarray]) -> list[str]:
    if "names" not in arrays:
        raise ValueError(
            "the features have no names, by which labels could be found: give them in order"
        )
    return arrays["names"].tolist()


def _of_table(path: Path) -> dict[str, str]:
    """{name: label} of a file of labels."""
    table = read_labels(path)
    several = next((row for row in table.rows if len(row.labels) > 1), None)
    if several:
        raise ValueError(
            f"{path}, line {several.line}: {len(several.labels)} labels: a probe takes one"
        )
    return {row.path.replace("\\", "/"): row.labels[0] for row in table.rows if row.labels}


def _matched(names: list[str], labels: Mapping[str | os.PathLike, str]) -> list[str]:
    """The label of each image: of its name, or of the longest end of its path that has one."""
    labels, found = {os.fspath(name): label for name, label in labels.items()}, []
    for name in names:
        parts = name.split("/")
        ends = ("/".join(parts[k:]) for k in range(len(parts)))
        found.append(next((labels[end] for end in ends if end in labels), ""))
    if not any(found):
        raise ValueError(f"none of {len(labels)} labels fits an image, such as {names[0]}")
    return found
