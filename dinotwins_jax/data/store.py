"""Prepared data before they are written: which image is which, and what is there already.

    images-00000-of-00012.array_record      an image a record (data/records.py)
    masks-test-00000-of-00005.array_record  the masks of split "test", a row of the split a record
    splits.npz                              sizes i32[n, 2], original_sizes i32[n, 2] and names of
                                            the n images; for a split its rows i32[m] among them,
                                            labels i32[m], multi_hot u8[m, ...] (packed bits)
    manifest.json                           all the rest; written last

data/shards.py writes it, data/array_record.py reads it.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinotwins_jax.data.base import SPLITS, Source

FORMAT, VERSION = "dinotwins_jax prepared images", 1
MANIFEST, ARRAYS = "manifest.json", "splits.npz"
UNFINISHED, LOCK = "unfinished.json", "lock"


class Settings(NamedTuple):
    """What decides the bytes that are written, besides the source."""

    short_side: int = 256  # pixels; 0: every size kept
    quality: int = 92  # of the JPEGs that are encoded anew
    masks: tuple[str, ...] = ("test",)  # splits whose masks are stored, if the source has any
    images_per_shard: int = 1024


class Store(NamedTuple):
    """Which image is which: the union of the splits, each name once, in order of the splits."""

    sources: dict[str, Source]
    names: list[str]
    origin: list[tuple[str, int]]  # of each image, the first split that has it, and its index there
    rows: dict[str, np.ndarray]  # split -> i32[len(source)], which image each index is


def check_settings(settings: Settings) -> None:
    """Raises ValueError for a value out of range."""
    if settings.short_side < 0:
        raise ValueError(f"short_side is {settings.short_side}: pixels, or 0 to keep every size")
    if not 1 <= settings.quality <= 95:
        raise ValueError(f"quality is {settings.quality}: it must lie between 1 and 95")
    if settings.images_per_shard < 1:
        raise ValueError(f"images_per_shard is {settings.images_per_shard}: it must be positive")
    unknown = [split for split in settings.masks if split not in SPLITS]
    if unknown:
        raise ValueError(f"masks of {unknown[0]!r}: a split is one of {', '.join(SPLITS)}")


def union(sources: dict[str, Source]) -> Store:
    """The images of all splits; the same name in two splits is one image.

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
                f"split {split!r}: two images are called {list(row)[twice]!r}: the source's name(i) "
                "must tell them apart"
            )
    return Store(sources, list(row), origin, rows)


def identify(store: Store, settings: Settings) -> dict[str, Any]:
    """What two starts must have in common to be the same work; reads labels and files' sizes."""
    files, labels = hashlib.sha256(), hashlib.sha256()
    # The same files by another path, such as a relative one, are the same.
    shared = os.path.commonprefix(store.names).rpartition("/")  # noqa: RUF071, cut at a slash
    start = len(shared[0] + shared[1])
    for name in store.names:
        size = ""
        with contextlib.suppress(OSError, ValueError):
            size = os.stat(name).st_size  # where the name is a file's
        files.update(f"{name[start:]} {size}\0".encode(errors="surrogateescape"))
    for split, source in store.sources.items():
        parts = (store.rows[split], source.labels, getattr(source, "multi_hot", None))
        labels.update(f"{split} {source.class_names}".encode())
        for part in parts:
            labels.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    return {
        "format": FORMAT,
        "version": VERSION,
        **settings._asdict(),
        "masks": list(settings.masks),
        "images": len(store.names),
        "files": files.hexdigest(),
        "labels": labels.hexdigest(),
    }


def check_ours(out: Path) -> None:
    """Raises ValueError if `out` is a directory of something else."""
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
    """The manifest, if `out` is complete. Raises ValueError if it is not the same work's."""
    check_ours(out)
    begun = read_json(out / MANIFEST) or read_json(out / UNFINISHED)
    if begun is None:
        return None
    before = begun.get("settings", begun)
    for key, now in identity.items():
        if before.get(key) != now:
            what = {"files": "source files (names and sizes)", "labels": "labels or splits"}
            raise ValueError(
                f"{out} was begun with {what.get(key, key)} {str(before.get(key))[:24]}, now it is "
                f"{str(now)[:24]}: go on as it was begun, choose another directory, or start anew "
                "with --overwrite"
            )
    return begun if "settings" in begun else None


def shard_names(kind: str, count: int, per_shard: int) -> list[str]:
    """File names for `count` records of a kind, such as "images" or "masks-test"."""
    total = -(-count // per_shard)
    return [f"{kind}-{k:05d}-of-{total:05d}.array_record" for k in range(total)]


def is_done(path: Path) -> bool:
    """Whether a shard is complete: it and its sidecar are there and agree."""
    rows = read_json(path.with_suffix(".json"))
    return rows is not None and path.is_file() and path.stat().st_size == rows["bytes"]


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file, None if it is not there. Raises ValueError if it is no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
