"""Source of image files in any directory tree."""

import glob
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinotwins_jax.data.base import EXTENSIONS, ImageFiles, check_dir, check_split, printable
from dinotwins_jax.data.folder_labels import labelled_files
from dinotwins_jax.data.folder_splits import (
    held_out,
    held_out_note,
    inside,
    not_used,
    split_folders,
)
from dinotwins_jax.data.listing import Listing, list_images


class Folder(ImageFiles):
    """All images under `dir`, sorted by path; labelled if they lie in class folders.

    Splits: if dir holds a folder of TRAIN_NAMES and one of TEST_NAMES, such as train/ and Valid/,
      these are "train" and "test", and "pretrain" is "train". Otherwise test_fraction of the labelled
      files, chosen by a hash of (seed, path), is "test", and the rest is "pretrain" and "train"; an
      unlabelled tree is the same in every split. A split folder alone counts as the root.
    Labels: those of the table `labels` (data/labels.py), if given. Else the first-level folder's name, if
      there are at least two folders. Images beside the folders have label -1 and are never in "test"; if
      they are half of all or more, or the folders hold less than two images on average, nothing is
      labelled.
    With a table, folders are no labels. A path in it is relative to dir, else to the table's folder. Its
      column "split", with the names above, comes before folders. Images without a label are in "pretrain"
      only; rows without an image and repeated rows are counted in `notes`.
    Passed over: hidden files and folders, other extensions, and folders that hold a run, prepared data
      or exported weights; `notes` counts them.

    Args:
      split: "pretrain", "train" or "test".
      dir: the root, or a glob pattern with *, ? or [, such as "/data/**/*.jpg" (** is any number
        of folders). The root is then the part before the first wildcard, here /data.
      test_fraction: in (0, 1), of the labelled files.
      seed: of the hold-out; the same for every split of a run.
      labels: file of a table, absolute or relative to dir; "": none.
    Raises:
      FileNotFoundError: no such directory or table, or no matching images in it or in a split's folder.
      ValueError: invalid test_fraction or table, a class in the test folder that train/ lacks, two training
        folders, or several test folders and nothing else.
    """

    def __init__(
        self,
        split: str,
        *,
        dir: str = "",
        test_fraction: float = 0.2,
        seed: int = 0,
        labels: str = "",
    ):
        check_split(split)
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction is {test_fraction}: it must lie between 0 and 1")
        root, pattern = split_pattern(dir)
        root = root if pattern else check_dir("folder", dir)
        listing = list_images(root, pattern, split)
        if not listing.names:
            where = f"match {root / pattern}" if pattern else f"under {root}"
            raise FileNotFoundError(f"no images {where}; looked for {' '.join(EXTENSIONS)}")
        if labels:
            path = root / Path(labels).expanduser()
            found = labelled_files(root, listing, path, split, test_fraction, seed)
            paths = [str(root / n) for n in found.names]
            super().__init__(
                paths,
                labels=found.labels,
                multi_hot=found.multi_hot,
                class_names=found.class_names,
            )
            self.notes = (*found.notes, *_passed_over(listing, path))
            return
        train, test, notes = _arranged(root, listing, test_fraction, seed)
        files = test if split == "test" else train
        super().__init__(
            [str(root / files.folder / n) for n in files.names],
            labels=_labels(files),
            class_names=tuple(printable(c) for c in files.classes),
        )
        self.notes = (*notes, *_passed_over(listing))


class _Files(NamedTuple):
    """A split: its images by name relative to root/folder, and the folders that are classes."""

    folder: str
    names: list[str]
    classes: tuple[str, ...]


def _arranged(root: Path, listing: Listing, test_fraction: float, seed: int):
    """(train, test, lines that say how they came about)."""
    train, test = split_folders(root, listing)
    if train and test:
        return _given_splits(root, listing, train, test)
    names = inside(listing.names, train)
    files, notes = _Files(train, names, _classes(names)), []
    if train:
        notes.append(f"images: {printable(train)}/{not_used(listing, train)}")
    if not files.classes:
        return files, files, [*notes, f"no classes: {_why_unlabelled(names)}"]
    labelled = [n for n in names if "/" in n]
    test_names = held_out(labelled, test_fraction, seed)
    kept = [n for n in names if n not in test_names]
    notes.append(held_out_note(test_fraction, seed))
    strays = [n for n in names if "/" not in n]
    return (
        files._replace(names=kept),
        files._replace(names=sorted(test_names)),
        [*notes, *_stray(strays, "without a label in pretrain and train")],
    )


def _given_splits(root: Path, listing: Listing, train_folder: str, test_folder: str):
    names, test_names = (inside(listing.names, f) for f in (train_folder, test_folder))
    train = _Files(train_folder, names, _classes(names))
    test = _Files(test_folder, test_names, ())
    folders = f"{printable(train_folder)}/ and {printable(test_folder)}/ (test)"
    notes = [f"splits: {folders}{not_used(listing, train_folder, test_folder)}"]
    labelled = [n for n in test_names if "/" in n]
    if not train.classes:
        return train, test, [*notes, f"no classes: {_why_unlabelled(names)}"]
    notes += _stray([n for n in names if "/" not in n], "without a label in pretrain and train")
    if 2 * len(labelled) <= len(test_names):
        return train, test, [*notes, "test has no labels: its images lie in no class folders"]
    unknown = sorted({n.split("/")[0] for n in labelled} - set(train.classes))
    if unknown:
        folders = root / test_folder, root / train_folder
        raise ValueError(f"class folder {unknown[0]!r} is in {folders[0]} but not in {folders[1]}")
    notes += _stray(
        [n for n in test_names if "/" not in n], f"of {printable(test_folder)}/ left out"
    )
    return train, test._replace(names=labelled, classes=train.classes), notes


def split_pattern(dir: str | os.PathLike) -> tuple[Path, str]:
    """Splits a pattern before its first part with a wildcard; the rest is "" without wildcards.

    An existing folder with a wildcard character in its name is not a wildcard.
    """
    parts = Path(dir).expanduser().parts
    for k, part in enumerate(parts):
        if glob.has_magic(part) and not Path(*parts[: k + 1]).is_dir():
            return Path(*parts[:k]), os.path.join(*parts[k:])
    return Path(*parts), ""


def _classes(names: list[str]) -> tuple[str, ...]:
    folders = {n.split("/")[0] for n in names if "/" in n}
    labelled = sum("/" in n for n in names)
    if len(folders) < 2:
        return ()
    if labelled < len(names) and (2 * labelled <= len(names) or labelled < 2 * len(folders)):
        return ()
    return tuple(sorted(folders))


def _labels(files: _Files) -> np.ndarray | None:
    if not files.classes:
        return None
    index = {c: k for k, c in enumerate(files.classes)}
    return np.array([index[n.split("/")[0]] if "/" in n else -1 for n in files.names], np.int32)


def _why_unlabelled(names: list[str]) -> str:
    folders = sorted({n.split("/")[0] for n in names if "/" in n})
    beside = sum("/" not in n for n in names)
    if not folders:
        return "the images lie in no folders"
    if beside:
        return f"{beside:,} of {len(names):,} images lie beside the folders"
    return f"all images lie in one folder, {printable(folders[0])}/"


def _stray(names: list[str], what: str) -> list[str]:
    if not names:
        return []
    images = "1 image" if len(names) == 1 else f"{len(names):,} images"
    return [f"{images} beside the class folders, such as {printable(names[0])}: {what}"]


def _passed_over(listing: Listing, table: Path | None = None) -> list[str]:
    left = Counter(listing.passed_over)
    if table is not None:
        left[table.suffix.lower()] -= 1
    counts = sorted((+left).items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {kind or 'without extension'}" for kind, count in counts[:6]]
    parts += [f"{sum(count for _, count in counts[6:]):,} of other kinds"] * (len(counts) > 6)
    held = [f"{printable(folder)}/ ({what})" for folder, what in listing.outputs.items()]
    held += [f"{printable(folder)}/ (not readable)" for folder in listing.unreadable]
    parts += [*held[:3], *([f"{len(held) - 3} more such folders"] * (len(held) > 3))]
    return [f"passed over: {', '.join(map(printable, parts))}"] if parts else []
