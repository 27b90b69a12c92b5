"""Listing of an image folder: which files are images, and what is passed over and why."""

import contextlib
import glob
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dinotwins_jax.data.base import EXTENSIONS, SPLITS, printable
from dinotwins_jax.data.store import ARRAYS, MANIFEST, UNFINISHED

# What a run leaves in its workdir, which may be the image folder itself.
RUN_PICTURES = ("attention.png", "segmentation.png", "pca.png", "neighbours.png")
RUN_FOLDERS = ("checkpoints", "damaged", "tensorboard")
_PATIENCE, _EVERY = 1.0, 10.0  # seconds before the first line of progress, and between two of them


class Listing(NamedTuple):
    """What lies under a folder; all names are relative to it, with "/". Hidden files do not count."""

    names: list[str]  # images, sorted
    folders: list[str]  # of the first level, sorted, also those without images
    passed_over: dict[str, int]  # extension in lower case -> files that are no images
    outputs: dict[str, str]  # folder passed over -> what it holds, such as "a run"
    unreadable: list[str]  # folders that cannot be listed


class _Kept(NamedTuple):
    key: tuple[Path, str]
    listing: Listing
    times: dict[str, int]  # folder -> time of its last change, in nanoseconds
    splits: set[str]  # those that have not asked yet


_kept: list[_Kept] = []  # none or one
_lock = threading.Lock()


def list_images(root: Path, pattern: str, split: str) -> Listing:
    """Lists a folder, or the files in it that match a glob pattern.

    The three splits of a source share one listing: it is kept until each of them had it once, and
    made again if a folder has changed since. A line on stderr reports a listing that takes long.

    Args:
      pattern: relative to root; "" for all files.
      split: that asks, one of SPLITS.
    """
    with _lock:
        kept = _kept.pop() if _kept else None
        fresh = kept is not None and kept.key == (root, pattern) and split in kept.splits
        if not fresh or any(_time(folder) != then for folder, then in kept.times.items()):
            times: dict[str, int] = {}
            listing = (_matches if pattern else _tree)(root, pattern, times)
            kept = _Kept((root, pattern), listing, times, set(SPLITS))
        kept.splits.discard(split)
        if kept.splits:
            _kept.append(kept)
        return kept.listing


def _tree(root: Path, pattern: str, times: dict[str, int]) -> Listing:
    del pattern
    found = Listing([], [], Counter(), {}, [])
    progress, visited, todo = _Progress(root), set(), [""]
    while todo:
        name = todo.pop()
        folder = os.path.join(root, name)
        real = os.path.realpath(folder)
        if real in visited:  # a symbolic link to a parent folder
            continue
        visited.add(real)
        then = _time(folder)
        try:
            folders, files = _entries(folder, progress)
        except OSError:
            if not name:
                raise
            found.unreadable.append(name)
            continue
        held = _output(folders, files)
        if held and name:
            found.outputs[name] = held
            continue
        if held == "a run":
            found.outputs["."] = "a run; only its own files"
            folders = [f for f in folders if f not in RUN_FOLDERS]
            files = [f for f in files if f not in RUN_PICTURES]
        times[folder] = then
        if not name:
            found.folders.extend(sorted(folders))
        todo += [os.path.join(name, child) for child in sorted(folders, reverse=True)]
        for file in files:
            if file.lower().endswith(EXTENSIONS):
                found.names.append(f"{name}/{file}" if name else file)
            else:
                found.passed_over[os.path.splitext(file)[1].lower()] += 1
    return found._replace(names=sorted(found.names))


def _matches(root: Path, pattern: str, times: dict[str, int]) -> Listing:
    found: dict[tuple[str, str], str] = {}
    listing, progress, held = Listing([], [], Counter(), {}, []), _Progress(root), {}
    for name in glob.iglob(pattern, root_dir=root, recursive=True):
        path = root / name
        if not path.is_file():
            continue
        progress.count()
        if name in RUN_PICTURES and _held_by(root, "", held) == "a run":
            continue
        inside = next((f for f in _parents(name) if _held_by(root, f, held)), None)
        if inside is not None:
            listing.outputs[inside] = held[inside]
        elif not name.lower().endswith(EXTENSIONS):
            listing.passed_over[path.suffix.lower()] += 1
        else:
            # As in a tree, each folder once, under its shortest name: links may point to a parent.
            key = (os.path.realpath(path.parent), path.name)
            found[key] = min(found.get(key, name), name, key=lambda n: (n.count(os.sep), n))
    names = sorted(Path(name).as_posix() for name in found.values())
    times |= {f: _time(f) for f in {str(root), *(str((root / n).parent) for n in names)}}
    return listing._replace(
        names=names, folders=sorted({n.split("/")[0] for n in names if "/" in n})
    )


def _parents(name: str) -> Iterator[str]:
    parts = Path(name).parts
    return ("/".join(parts[:k]) for k in range(1, len(parts)))


def _held_by(root: Path, folder: str, held: dict[str, str]) -> str:
    if folder not in held:
        held[folder] = ""
        with contextlib.suppress(OSError):
            held[folder] = _output(*_entries(str(root / folder)))
    return held[folder]


def _entries(folder: str, progress: "_Progress | None" = None) -> tuple[list[str], list[str]]:
    """(folders, files) in a folder that are not hidden; links to folders are folders."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself
                is_folder = False
            (folders if is_folder else files).append(entry.name)
            if progress is not None and not is_folder:
                progress.count()
    return folders, files


def _output(folders: list[str], files: list[str]) -> str:
    """What this package wrote into a folder, or ""."""
    weights = {"model.safetensors", "model.onnx", "model.stablehlo"}
    there = {"metrics.jsonl", "config.json", *weights, MANIFEST, ARRAYS, UNFINISHED}
    there &= set(files)
    if "metrics.jsonl" in there or ("config.json" in there and "checkpoints" in folders):
        return "a run"
    if {MANIFEST, ARRAYS} <= there or UNFINISHED in there:
        return "prepared data"
    return "exported weights" if "config.json" in there and weights & there else ""


def _time(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1


class _Progress:
    """Counts files; prints a line on stderr after a second, then every ten."""

    def __init__(self, root: Path):
        self._root, self._files = root, 0
        self._next = time.monotonic() + _PATIENCE

    def count(self) -> None:
        self._files += 1
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY
            line = f"listing {printable(self._root)}: {self._files:,} files"
            print(line, file=sys.stderr, flush=True)
