"""An image folder whose labels, and possibly splits, come from a table."""

import os
import posixpath
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinotwins_jax.data.base import printable
from dinotwins_jax.data.folder_splits import (
    TEST_NAMES,
    TRAIN_NAMES,
    held_out,
    held_out_note,
    not_used,
    split_folders,
)
from dinotwins_jax.data.labels import Row, Table, read_labels
from dinotwins_jax.data.listing import Listing


class LabelledFiles(NamedTuple):
    """A split: images by name relative to the root, sorted, and their labels.

    labels: i32[images], the first label of each as an index into class_names, -1 for none.
    multi_hot: bool[images, classes], all labels; None for a table with one label an image, and for
      "pretrain", where it is not known which labels an image lacks.
    notes: lines for the description of the data.
    """

    names: list[str]
    labels: np.ndarray
    multi_hot: np.ndarray | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def labelled_files(
    root: Path, listing: Listing, path: Path, split: str, test_fraction: float, seed: int
) -> LabelledFiles:
    """The images of a split with the labels of a table; see `Folder` for the rules.

    Args:
      root, listing: the folder and its images.
      path: of the table.
      split: "pretrain", "train" or "test".
      test_fraction, seed: of the images with labels, held out where there are no splits.
    Raises:
      FileNotFoundError: no such table, or none of its images exists.
      ValueError: an invalid table, an image with two different rows, an unknown split, a table with
        splits but no training images, fewer than two images with labels, or fewer than two classes.
    """
    table = read_labels(path)
    rows, notes = _matched(root, listing, path, table)
    known = {n for n, row in rows.items() if table.several or row.labels}
    train, test, splits = _parted(root, listing, path, table, rows, known, test_fraction, seed)
    classes = _class_names(path, table, *([rows[n] for n in known & s] for s in (train, test)))
    names = {"pretrain": train, "train": train & known, "test": test & known}[split]
    names, first = sorted(names), f"labels: {printable(path.name)}, {_rows(len(table.rows))}"
    found = [rows[n].labels if n in rows else () for n in names]
    index = {label: k for k, label in enumerate(classes.names)}
    multi_hot = None
    if table.several and split != "pretrain":
        multi_hot = np.zeros((len(names), len(index)), bool)
        for hot, labels in zip(multi_hot, found, strict=True):
            hot[[index[label] for label in labels]] = True
    return LabelledFiles(
        names,
        np.array([index[labels[0]] if labels else -1 for labels in found], np.int32),
        multi_hot,
        tuple(map(printable, classes.names)),
        (first, *splits, *notes, *_without(train - known), *classes.notes),
    )


def _matched(
    root: Path, listing: Listing, path: Path, table: Table
) -> tuple[dict[str, Row], list[str]]:
    """(image -> its row, notes): a path is relative to the root, else to the folder of the table."""
    there = set(listing.names)
    beside = os.path.relpath(os.path.realpath(path.parent), os.path.realpath(root))
    rows: dict[str, Row] = {}
    missing, again = [], 0
    for row in table.rows:
        places = (*_places(row.path, root, beside), *_places(_slashes(row.path), root, beside))
        name = next((place for place in places if place in there), None)
        if name is None:
            missing.append(row)
            continue
        before = rows.setdefault(name, row)
        again += before is not row
        if (before.labels, before.split) != (row.labels, row.split):
            raise ValueError(
                f"{path}, line {row.line}: {printable(row.path)} has another label or split in line "
                f"{before.line}"
            )
    notes = [*table.notes]
    if missing:
        one = f"line {missing[0].line}: {printable(missing[0].path)}"
        if not rows:
            raise FileNotFoundError(
                f"{path}: none of its {len(table.rows):,} rows is an image under {root}, such as {one}"
            )
        notes.append(f"{_rows(len(missing))} without an image, such as {one}")
    if again:
        notes.append(f"{_rows(again)} written twice")
    return rows, notes


def _slashes(path: str) -> str:
    return path.replace("\\", "/")


def _places(path: str, root: Path, beside: str) -> list[str]:
    """Names relative to the root that a path of the table may stand for."""
    if os.path.isabs(path):
        return [os.path.relpath(path, root)]
    return [posixpath.normpath(path), posixpath.normpath(posixpath.join(beside, path))]


def _parted(root, listing, path, table, rows, known, test_fraction, seed):
    """(training images, test images, notes), by the table's splits, else by folders, else held out."""
    if table.has_splits:
        train, test, note = _by_column(path, table, rows, listing)
    else:
        folders = split_folders(root, listing)
        parts = [{n for n in listing.names if n.startswith(f"{f}/")} for f in folders]
        train, test = (parts[0] if folders[0] else set(listing.names)), parts[1]
        left = not_used(listing, *folders)
        note = printable(f"splits: {folders[0]}/ and {folders[1]}/ (test){left}") if test else ""
    notes = [note] * bool(note)
    if not test:
        labelled = known & train
        if len(labelled) < 2:
            raise ValueError(f"{path}: labels of {_images(len(labelled))}, at least two are needed")
        test = held_out(sorted(labelled), test_fraction, seed)
        train -= test
        notes.append(held_out_note(test_fraction, seed))
    for part, what in ((train, "training"), (test, "test")):
        if part.isdisjoint(known):
            raise ValueError(f"{path}: no {what} image has a label")
    return train, test, notes


def _by_column(path: Path, table: Table, rows: dict[str, Row], listing: Listing):
    """(training images, test images, note); images without a row are trained on."""
    for row in table.rows:
        if row.split not in (*TRAIN_NAMES, *TEST_NAMES):
            raise ValueError(
                f"{path}, line {row.line}: split {row.split!r}: it must be train, val or test, or "
                f"another of {', '.join((*TRAIN_NAMES, *TEST_NAMES))}"
            )
    of = {n: rows[n].split if n in rows else TRAIN_NAMES[0] for n in listing.names}
    tests = sorted({s for s in of.values() if s in TEST_NAMES}, key=TEST_NAMES.index)
    train = {n for n, s in of.items() if s in TRAIN_NAMES}
    test = {n for n, s in of.items() if s in tests[:1]}
    if not any(row.split in TRAIN_NAMES for row in rows.values()):
        raise ValueError(f"{path}: rows of {' and '.join(tests)} but none of train")
    note = f"splits: of the table, train and {tests[0]} (test)" if tests else ""
    left = [f"{sum(s == split for s in of.values()):,} {split}" for split in tests[1:]]
    return train, test, note + (f"; images not used: {', '.join(left)}" if left else "")


class _Classes(NamedTuple):
    names: list[str]
    notes: list[str]


def _class_names(path: Path, table: Table, train: list[Row], test: list[Row]) -> _Classes:
    trained, tested = ({c for row in part for c in row.labels} for part in (train, test))
    names = sorted(trained | tested)
    if len(names) < (1 if table.several else 2):
        found = f"only {names[0]!r}" if names else "none"
        raise ValueError(f"{path}: at least two classes are needed, it has {found}")
    alone = sorted(tested - trained)
    such = "1 class" if len(alone) == 1 else f"{len(alone):,} classes"
    note = (
        f"{such} of test without a training image, such as {printable(alone[0])}" if alone else ""
    )
    return _Classes(names, [note] * bool(alone))


def _without(names: set[str]) -> list[str]:
    if not names:
        return []
    return [
        f"{_images(len(names))} without a label, such as {printable(min(names))}: in pretrain only"
    ]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"
