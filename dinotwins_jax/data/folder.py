"""Source of image files in any directory tree."""

import glob
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinotwins_jax.data.base import EXTENSIONS, ImageFiles, check_dir, check_split, printable
from dinotwins_jax.data.listing import Listing, list_images

# Names of split folders in any case of letters; of several test folders the first here is used.
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation")


class Folder(ImageFiles):
    """All images under `dir`, sorted by path; labelled if they lie in class folders.

    Splits: if dir holds a folder of TRAIN_FOLDERS and one of TEST_FOLDERS, such as train/ and Valid/,
      these are "train" and "test", and "pretrain" is "train". Otherwise test_fraction of the labelled
      files, chosen by a hash of (seed, path), is "test", and the rest is "pretrain" and "train"; an
      unlabelled tree is the same in every split. A split folder alone counts as the root.
    Labels: the first-level folder's name, if there are at least two folders. Images beside the
      folders have label -1 and are never in "test"; if they are half of all or more, or the folders
      hold less than two images on average, nothing is labelled.
    Passed over: hidden files and folders, other extensions, and folders that hold a run, prepared data
      or exported weights; `notes` counts them.

    Args:
      split: "pretrain", "train" or "test".
      dir: the root, or a glob pattern with *, ? or [, such as "/data/**/*.jpg" (** is any number
        of folders). The root is then the part before the first wildcard, here /data.
      test_fraction: in (0, 1), of the labelled files.
      seed: of the hold-out; the same for every split of a run.
    Raises:
      FileNotFoundError: no such directory, or no matching images in it or in a split's folder.
      ValueError: invalid test_fraction, a class in the test folder that train/ lacks, two training
        folders, or several test folders and nothing else.
    """

    def __init__(self, split: str, *, dir: str = "", test_fraction: float = 0.2, seed: int = 0):
        check_split(split)
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction is {test_fraction}: it must lie between 0 and 1")
        root, pattern = split_pattern(dir)
        root = root if pattern else check_dir("folder", dir)
        listing = list_images(root, pattern, split)
        if not listing.names:
            where = f"match {root / pattern}" if pattern else f"under {root}"
            raise FileNotFoundError(f"no images {where}; looked for {' '.join(EXTENSIONS)}")
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
    train, test = _split_folders(root, listing)
    if train and test:
        return _given_splits(root, listing, train, test)
    names = _inside(listing.names, train)
    files, notes = _Files(train, names, _classes(names)), []
    if train:
        notes.append(f"images: {printable(train)}/{_not_used(listing, train)}")
    if not files.classes:
        return files, files, [*notes, f"no classes: {_why_unlabelled(names)}"]
    labelled = [n for n in names if "/" in n]
    # By hash of the name, not by position: an added file moves few others to another split.
    ranked = sorted(labelled, key=lambda n: _digest(f"{seed}/{n}"))
    count = min(max(1, round(test_fraction * len(labelled))), len(labelled) - 1)
    test_names = set(ranked[:count])
    kept = [n for n in names if n not in test_names]
    notes.append(f"test: {100 * test_fraction:.3g}% of the labelled images, drawn with seed {seed}")
    strays = [n for n in names if "/" not in n]
    return (
        files._replace(names=kept),
        files._replace(names=sorted(test_names)),
        [*notes, *_stray(strays, "without a label in pretrain and train")],
    )


def _given_splits(root: Path, listing: Listing, train_folder: str, test_folder: str):
    names, test_names = (_inside(listing.names, f) for f in (train_folder, test_folder))
    train = _Files(train_folder, names, _classes(names))
    test = _Files(test_folder, test_names, ())
    folders = f"{printable(train_folder)}/ and {printable(test_folder)}/ (test)"
    notes = [f"splits: {folders}{_not_used(listing, train_folder, test_folder)}"]
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


def _split_folders(root: Path, listing: Listing) -> tuple[str, str]:
    """The folders of the splits; ("", "") if there are none, (folder, "") if one holds all images."""
    full = {n.split("/")[0] for n in listing.names if "/" in n}
    trains = [f for f in listing.folders if f.lower() in TRAIN_FOLDERS]
    tests = [f for f in listing.folders if f.lower() in TEST_FOLDERS]
    trains = [f for f in trains if f in full] or trains
    tests = sorted(tests, key=lambda f: (f not in full, TEST_FOLDERS.index(f.lower()), f))
    if trains and tests:
        if len(trains) > 1:
            both = " and ".join(f"{f}/" for f in trains)
            raise ValueError(f"{root} has two training folders, {both}: rename or merge one")
        for folder in (trains[0], tests[0]):
            if folder not in full:
                kinds = " ".join(EXTENSIONS)
                raise FileNotFoundError(f"no images under {root / folder}; looked for {kinds}")
        return trains[0], tests[0]
    if len(full) > 1 and full <= set(tests):
        both = " and ".join(f"{f}/" for f in sorted(full))
        raise ValueError(f"{root} has {both} but no train/: rename one, or give one of them as dir")
    (alone,) = full if len(full) == 1 else ("",)
    beside = sum("/" not in n for n in listing.names)
    if alone.lower() in (*TRAIN_FOLDERS, *TEST_FOLDERS) and 2 * beside < len(listing.names):
        return alone, ""
    return "", ""


def split_pattern(dir: str | os.PathLike) -> tuple[Path, str]:
    """Splits a pattern before its first part with a wildcard; the rest is "" without wildcards.

    An existing folder with a wildcard character in its name is not a wildcard.
    """
    parts = Path(dir).expanduser().parts
    for k, part in enumerate(parts):
        if glob.has_magic(part) and not Path(*parts[: k + 1]).is_dir():
            return Path(*parts[:k]), os.path.join(*parts[k:])
    return Path(*parts), ""


def _inside(names: list[str], folder: str) -> list[str]:
    """Names in a folder, relative to it; all names for ""."""
    start = f"{folder}/" if folder else ""
    return [n[len(start) :] for n in names if n.startswith(start)]


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


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _why_unlabelled(names: list[str]) -> str:
    folders = sorted({n.split("/")[0] for n in names if "/" in n})
    beside = sum("/" not in n for n in names)
    if not folders:
        return "the images lie in no folders"
    if beside:
        return f"{beside:,} of {len(names):,} images lie beside the folders"
    return f"all images lie in one folder, {printable(folders[0])}/"


def _not_used(listing: Listing, *used: str) -> str:
    """How many images lie outside the folders used; "" if none."""
    counts = Counter(f"{n.split('/')[0]}/" if "/" in n else "beside them" for n in listing.names)
    parts = [f"{count:,} {printable(f)}" for f, count in counts.most_common() if f[:-1] not in used]
    more = [f"{len(parts) - 3} more folders"] * (len(parts) > 3)
    return f"; images not used: {', '.join([*parts[:3], *more])}" if parts else ""


def _stray(names: list[str], what: str) -> list[str]:
    if not names:
        return []
    images = "1 image" if len(names) == 1 else f"{len(names):,} images"
    return [f"{images} beside the class folders, such as {printable(names[0])}: {what}"]


def _passed_over(listing: Listing) -> list[str]:
    counts = sorted(listing.passed_over.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {kind or 'without extension'}" for kind, count in counts[:6]]
    parts += [f"{sum(count for _, count in counts[6:]):,} of other kinds"] * (len(counts) > 6)
    held = [f"{printable(folder)}/ ({what})" for folder, what in listing.outputs.items()]
    held += [f"{printable(folder)}/ (not readable)" for folder in listing.unreadable]
    parts += [*held[:3], *([f"{len(held) - 3} more such folders"] * (len(held) > 3))]
    return [f"passed over: {', '.join(map(printable, parts))}"] if parts else []
