"""Source of image files in any directory tree."""

import glob
import hashlib
import os
from pathlib import Path

import numpy as np

from dinotwins_jax.data.base import EXTENSIONS, ImageFiles, check_dir, check_split


class Folder(ImageFiles):
    """All images under `dir`, sorted by path; labelled if they lie in class folders.

    Splits: if dir holds train/ and val/ (or test/), these are "train" and "test", and "pretrain" is
      train/. Otherwise test_fraction of a labelled tree's files, chosen by a hash of (seed, path), is
      "test", and the rest is "pretrain" and "train"; an unlabelled tree is the same in every split.
    Labels: the first-level folder's name, if every image lies in a folder and there are at least two
      folders.
    Hidden files and folders are ignored.

    Args:
      split: "pretrain", "train" or "test".
      dir: the root, or a glob pattern with *, ? or [, such as "/data/**/*.jpg" (** is any number
        of folders). The root is then the part before the first wildcard, here /data, and the
        matching images are an unsplit tree.
      test_fraction: in (0, 1), of the files.
      seed: of the hold-out; the same for every split of a run.
    Raises:
      FileNotFoundError: no such directory, or no matching images.
      ValueError: invalid test_fraction, or a class in the test folder that train/ lacks.
    """

    def __init__(self, split: str, *, dir: str = "", test_fraction: float = 0.2, seed: int = 0):
        check_split(split)
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction is {test_fraction}: it must lie between 0 and 1")
        root, pattern = _split_pattern(dir)
        if pattern:
            names = _matching_names(root, pattern)
            files = _held_out_split(root, names, split, test_fraction, seed)
        else:
            files = _split_of_tree(check_dir("folder", dir), split, test_fraction, seed)
        root, names, labels, class_names = files
        super().__init__([str(root / n) for n in names], labels=labels, class_names=class_names)


# A split: root, file names relative to it, labels, class names.
_Files = tuple[Path, list[str], np.ndarray | None, tuple[str, ...]]


def _split_of_tree(root: Path, split: str, test_fraction: float, seed: int) -> _Files:
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if test is not None and (root / "train").is_dir():
        return _given_split(root / "train", test, split)
    return _held_out_split(root, _image_names(root), split, test_fraction, seed)


def _given_split(train: Path, test: Path, split: str) -> _Files:
    train_names = _image_names(train)
    class_names = _class_names(train_names)
    if split != "test":
        return train, train_names, _labels(train_names, class_names), class_names
    names = _image_names(test)
    if not class_names or not all("/" in n for n in names):
        return test, names, None, ()
    unknown = sorted({n.split("/")[0] for n in names} - set(class_names))
    if unknown:
        raise ValueError(f"class folder {unknown[0]!r} is in {test} but not in {train}")
    return test, names, _labels(names, class_names), class_names


def _held_out_split(
    root: Path, names: list[str], split: str, test_fraction: float, seed: int
) -> _Files:
    class_names = _class_names(names)
    if not class_names:
        return root, names, None, ()
    # By hash of the name, not by position: an added file moves few others to another split.
    ranked = sorted(names, key=lambda n: hashlib.sha256(f"{seed}/{n}".encode()).digest())
    num_test = min(max(1, round(test_fraction * len(names))), len(names) - 1)
    kept = sorted(ranked[:num_test] if split == "test" else ranked[num_test:])
    return root, kept, _labels(kept, class_names), class_names


def _image_names(root: Path) -> list[str]:
    names, visited = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a symbolic link to a parent folder
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        found = [f for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
        names += [Path(folder, f).relative_to(root).as_posix() for f in found]
    if not names:
        raise FileNotFoundError(f"no images under {root}; looked for {' '.join(EXTENSIONS)}")
    return sorted(names)


def _split_pattern(dir: str | os.PathLike) -> tuple[Path, str]:
    """Splits a pattern before its first part with a wildcard; the rest is "" without wildcards.

    An existing folder with a wildcard character in its name is not a wildcard.
    """
    parts = Path(dir).expanduser().parts
    for k, part in enumerate(parts):
        if glob.has_magic(part) and not Path(*parts[: k + 1]).is_dir():
            return Path(*parts[:k]), os.path.join(*parts[k:])
    return Path(*parts), ""


def _matching_names(root: Path, pattern: str) -> list[str]:
    found: dict[tuple[str, str], str] = {}
    for name in glob.glob(pattern, root_dir=root, recursive=True):
        path = root / name
        if name.lower().endswith(EXTENSIONS) and path.is_file():
            # As in a tree, each folder once, under its shortest name: links may point to a parent.
            key = (os.path.realpath(path.parent), path.name)
            found[key] = min(found.get(key, name), name, key=lambda n: (n.count(os.sep), n))
    if not found:
        kinds = " ".join(EXTENSIONS)
        raise FileNotFoundError(f"no images match {root / pattern}; looked for {kinds}")
    return sorted(Path(name).as_posix() for name in found.values())


def _class_names(names: list[str]) -> tuple[str, ...]:
    folders = {n.split("/")[0] for n in names}
    return tuple(sorted(folders)) if all("/" in n for n in names) and len(folders) > 1 else ()


def _labels(names: list[str], class_names: tuple[str, ...]) -> np.ndarray | None:
    index = {c: k for k, c in enumerate(class_names)}
    return np.array([index[n.split("/")[0]] for n in names], np.int32) if class_names else None
