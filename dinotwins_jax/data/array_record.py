"""Source of prepared data, as written by python -m dinotwins_jax.prepare (see store.py)."""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from grain.sources import ArrayRecordDataSource

from dinotwins_jax.data.base import (
    BadImage,
    EncodedImages,
    canvas_for_photos,
    check_dir,
    check_split,
)
from dinotwins_jax.data.records import read_mask_record
from dinotwins_jax.data.store import (
    ARRAYS,
    FORMAT,
    MANIFEST,
    UNFINISHED,
    VERSION,
    read_json,
    stored_reading,
)


class ArrayRecord(EncodedImages):
    """A split of prepared data. Thread-safe and picklable; files are opened at the first read.

    labels, multi_hot, class_names, notes and name(i) are those of the original source, without the images
    that could not be read; stored: the channels and the window that its pictures were written with.

    Args:
      split: "pretrain", "train" or "test".
      dir: the prepared directory.
      whole: all stored images instead of the split's, without labels and masks.
    Raises:
      FileNotFoundError: no such directory, not finished, or a shard is missing.
      ValueError: not prepared data, another version, or a shard of the wrong length.
    """

    def __init__(self, split: str, *, dir: str = "", whole: bool = False):
        check_split(split)
        root = check_dir("array_record", dir)
        manifest = _read_manifest(root)
        if split not in manifest["splits"]:
            there = ", ".join(manifest["splits"])
            raise ValueError(f"{root}: no split {split!r} was prepared, only {there}")
        part = manifest["splits"][split]
        self._where = f"{root}, split {split!r}"
        self._short_side = manifest["settings"]["short_side"]
        self.stored = self.reading = stored_reading(manifest["settings"])
        self._images = _open(root, manifest["shards"])
        self._masks = _open(root, part["masks"]) if part["masks"] else None
        self.class_names: tuple[str, ...] = tuple(part["class_names"])
        dropped = part.get("dropped", 0)
        left_out = f"{dropped} unreadable when prepared: left out, listed in {MANIFEST}"
        self.notes = (*part.get("notes", ()), *((left_out,) if dropped else ()))
        _check_bytes(root, manifest["arrays"])
        arrays = _read_arrays(root / ARRAYS)
        self._rows = arrays[f"{split}_rows"]
        self._names, self._name_offsets = arrays["names"], arrays["name_offsets"]
        if whole:
            self._rows, self._masks = np.arange(len(arrays["sizes"])), None
            self.class_names, split = (), ""
        self._longer_side = float(np.quantile(arrays["sizes"].max(axis=1), 0.95))
        self.labels: np.ndarray | None = arrays.get(f"{split}_labels")
        self.multi_hot: np.ndarray | None = None
        if f"{split}_multi_hot" in arrays:
            packed, count = arrays[f"{split}_multi_hot"], len(self.class_names)
            self.multi_hot = np.unpackbits(packed, axis=1, count=count).astype(bool)

    def __len__(self) -> int:
        return len(self._rows)

    def encoded(self, i: int) -> bytes:
        """The stored image file. Raises BadImage if the record is damaged."""
        return self._read(self._images, int(self._rows[i]), i)

    @property
    def masks(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """masks(i) -> (bool[n, H, W] at the stored size, i32[n] indices into class_names).

        Raises AttributeError if none are stored, so that hasattr works.
        """
        if self._masks is None:
            raise AttributeError(f"{self._where}: no masks; prepare with --masks to have them")
        return lambda i: read_mask_record(self._read(self._masks, range(len(self))[i], i))

    def name(self, i: int) -> str:
        row = self._rows[i]
        start, stop = self._name_offsets[row : row + 2]
        return self._names[start:stop].tobytes().decode(errors="surrogateescape")

    def default_canvas(self, global_size: int) -> int:
        """Canvas side that fits 95% of the images, at most twice the short side; a multiple of 32."""
        longest = math.ceil(self._longer_side / 32) * 32
        most = -(-2 * self._short_side // 32) * 32 or canvas_for_photos(global_size)
        return min(longest, most)

    def _read(self, records: ArrayRecordDataSource, row: int, i: int) -> bytes:
        try:
            return records[row]
        except RuntimeError as error:  # from array_record: a block's checksum is wrong
            raise BadImage(self.name(i), f"its record is damaged: {str(error)[:200]}") from None


class _Shard(NamedTuple):
    """A whole file as a read instruction, so that array_record need not open it to count records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def _read_manifest(root: Path) -> dict:
    manifest = read_json(root / MANIFEST)
    unfinished = read_json(root / UNFINISHED) if manifest is None else None
    if unfinished is not None:
        raise FileNotFoundError(f"{root} is unfinished; to continue: {unfinished['command']}")
    if manifest is None:
        raise FileNotFoundError(
            f"{root} has no {MANIFEST}: write prepared data with python -m dinotwins_jax.prepare"
        )
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{root / MANIFEST}: not the manifest of prepared data")
    if manifest["version"] != VERSION:
        found = manifest["version"]
        raise ValueError(f"{root}: version {found} of prepared data, this code reads {VERSION}")
    return manifest


def _open(root: Path, shards: list[dict]) -> ArrayRecordDataSource:
    for shard in shards:
        _check_bytes(root, shard)
    return ArrayRecordDataSource(
        [_Shard(str(root / s["file"]), 0, s["records"], s["records"]) for s in shards]
    )


def _check_bytes(root: Path, entry: dict) -> None:
    path = root / entry["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy it again, or prepare again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(
            f"{path} has {size} bytes, not {entry['bytes']}: copy it again, or prepare again"
        )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
