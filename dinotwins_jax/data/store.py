"""Format of prepared data: index of the images over all splits, and checks of an output directory.

    images-00000-of-00012.array_record      one image per record (data/records.py)
    masks-test-00000-of-00005.array_record  masks of split "test", one record per row of the split
    splits.npz                              sizes i32[n, 2], original_sizes i32[n, 2] and names of
                                            the n images; for each split its rows i32[m] among them,
                                            labels i32[m], multi_hot u8[m, ...] (packed bits)
    manifest.json                           everything else; written last

data/shards.py writes it, data/array_record.py reads it.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinotwins_jax.data.base import SPLITS, Source, printable
from dinotwins_jax.data.reading import Reading
from dinotwins_jax.data.window import reading_with, window_text

FORMAT, VERSION = "dinotwins_jax prepared images", 1
MANIFEST, ARRAYS = "manifest.json", "splits.npz"
UNFINISHED, LOCK = "unfinished.json", "lock"
_ADDED = {"channels": 3, "window": None}  # settings that a manifest of before does not state


class Settings(NamedTuple):
    """Settings that, with the source, determine the bytes written."""

    short_side: int = 256  # pixels; 0: every size kept
    quality: int = 92  # of re-encoded JPEGs
    masks: tuple[str, ...] = ("test",)  # splits whose masks are stored, if the source has any
    images_per_shard: int = 1024
    channels: int = 3  # of the stored pictures, config.model.in_channels
    window: dict[str, Any] | None = None  # section config.data.window that was applied; None: none


class Store(NamedTuple):
    """Index of the images: the union of the splits, each name once, in order of the splits."""

    sources: dict[str, Source]
    names: list[str]
    origin: list[tuple[str, int]]  # first split of each image, and its index there
    rows: dict[str, np.ndarray]  # split -> i32[len(source)], image of each index


def check_settings(settings: Settings) -> None:
    """Raises ValueError for a value out of range."""
    if settings.short_side < 0:
        raise ValueError(
            f"short_side is {settings.short_side}: it must be pixels, or 0 for every size"
        )
    if not 1 <= settings.quality <= 95:
        raise ValueError(f"quality is {settings.quality}: it must lie between 1 and 95")
    if settings.images_per_shard < 1:
        raise ValueError(f"images_per_shard is {settings.images_per_shard}: it must be positive")
    unknown = [split for split in settings.masks if split not in SPLITS]
    if unknown:
        raise ValueError(f"masks of split {unknown[0]!r}: choose from {', '.join(SPLITS)}")


def union(sources: dict[str, Source]) -> Store:
    """Indexes the images of all splits; the same name in two splits is one image.

    Raises ValueError if two images of a split have the same name.
    """
    row: dict[str, int] = {}
    origin, rows = [], {}
    for split, source in sources.items():
        rows[split] = np.zeros(len(source), np.int32)
        for i in range(len(source)):
            name = source.name(i)
            if name not in row:
                row[name] = len(row)
                origin.append((split, i))
            rows[split][i] = row[name]
        if len(np.unique(rows[split])) != len(source):
            twice = int(np.bincount(rows[split]).argmax())
            raise ValueError(
                f"split {split!r}: two images have the name {list(row)[twice]!r}: the source's name(i) "
                "must be unique"
            )
    return Store(sources, list(row), origin, rows)


def identify(store: Store, settings: Settings) -> dict[str, Any]:
    """Values that must agree for a second start to continue; reads labels and file sizes."""
    labels = hashlib.sha256()
    for split, source in store.sources.items():
        parts = (store.rows[split], source.labels, getattr(source, "multi_hot", None))
        labels.update(f"{split} {source.class_names}".encode())
        for part in parts:
            labels.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    return {
        "format": FORMAT,
        "version": VERSION,
        **json.loads(json.dumps(settings._asdict())),  # tuples become lists, as they do on disk
        "images": len(store.names),
        "files": files_checksum(store.names),
        "labels": labels.hexdigest(),
    }


def files_checksum(names: Sequence[str]) -> str:
    """sha256 of names and, where they are paths of files, their sizes.

    The same files under another path, such as a relative one, count as the same.
    """
    digest = hashlib.sha256()
    shared = os.path.commonprefix(names).rpartition("/")  # noqa: RUF071, cut at a slash
    start = len(shared[0] + shared[1])
    for name in names:
        size = ""
        with contextlib.suppress(OSError, ValueError):
            size = os.stat(name).st_size
        digest.update(f"{name[start:]} {size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def stored_reading(settings: Mapping[str, Any]) -> Reading:
    """The channels and the window with which prepared data were written, by their manifest's settings."""
    settings = _ADDED | dict(settings)
    return reading_with(settings["channels"], settings["window"])


def as_stored(wanted: Reading, stored: Reading, where: str) -> Reading:
    """What a run reads of prepared data: the channels and the window that they were written with.

    Args:
      wanted: of the run's config; without a window, or with one of a sample of the set, it takes what
        is stored.
      where: the directory, for messages.
    Raises:
      ValueError: the run states other channels or another window.
    """
    if wanted.channels != stored.channels:
        raise ValueError(
            f"{where} was prepared with model.in_channels={stored.channels}, this run has "
            f"{wanted.channels}: set config.model.in_channels={stored.channels}, or prepare it again"
        )
    window = wanted.window
    if window is not None and window.of_set and not window.ranges and stored.window:
        window = window._replace(ranges=stored.window.ranges)
    if window not in (None, stored.window):
        has = window_text(stored.window) if stored.window else "none"
        raise ValueError(
            f"{where} was prepared with the window {has}, config.data.window is "
            f"{window_text(wanted.window)}: leave config.data.window.mode '', or prepare it again"
        )
    return stored


def check_ours(out: Path) -> None:
    """Raises ValueError if `out` holds files that are not prepared data, or its name is not UTF-8."""
    if printable(out) != str(out):  # array_record cannot open it
        raise ValueError(f"{printable(out)}: its name is not UTF-8: choose another directory")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: choose a directory")
    for name in (MANIFEST, UNFINISHED):
        begun = read_json(out / name)
        if isinstance(begun, dict) and begun.get("format") == FORMAT:
            return
    others = sorted(p.name for p in out.iterdir() if p.name != LOCK and p.suffix != ".tmp")
    if others:
        raise ValueError(f"{out} holds other files, such as {others[0]}: choose an empty directory")


def check_begun(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if `out` is complete. Raises ValueError if it was begun differently."""
    check_ours(out)
    begun = read_json(out / MANIFEST) or read_json(out / UNFINISHED)
    if begun is None:
        return None
    before = begun.get("settings", begun)
    for key, now in identity.items():
        if (then := before.get(key, _ADDED.get(key))) != now:
            what = {"files": "source files (names and sizes)", "labels": "labels or splits"}
            raise ValueError(
                f"{out} was begun with {what.get(key, key)} {str(then)[:24]}, now it is "
                f"{str(now)[:24]}: use the former value, choose another directory, or start over "
                "with --overwrite"
            )
    return begun if "settings" in begun else None


def shard_names(kind: str, count: int, per_shard: int) -> list[str]:
    """File names for `count` records of a kind, such as "images" or "masks-test"."""
    total = -(-count // per_shard)
    return [f"{kind}-{k:05d}-of-{total:05d}.array_record" for k in range(total)]


def is_done(path: Path) -> bool:
    """Whether a shard is complete: it and its sidecar exist and agree."""
    rows = read_json(path.with_suffix(".json"))
    return rows is not None and path.is_file() and path.stat().st_size == rows["bytes"]


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file; None if it is missing. Raises ValueError if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
