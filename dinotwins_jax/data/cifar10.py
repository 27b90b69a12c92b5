"""CIFAR-10 (Krizhevsky, 2009) as JPEG bytes in two .npz files."""

import zipfile
from pathlib import Path

import numpy as np

from dinotwins_jax.data.base import EncodedImages, check_dir, check_split


class Cifar10(EncodedImages):
    """CIFAR-10 from train.npz, test.npz and classes.txt in `dir`; images are decoded on access.

    Each .npz holds jpeg u8[bytes], all files end to end; offsets i64[n + 1], image i being
    jpeg[offsets[i]:offsets[i + 1]]; labels u8[n]. classes.txt has one name per line, in label order.
    "pretrain" and "train" are both the 50,000 training images.
    Raises FileNotFoundError or ValueError, in one line, for a missing or invalid file.
    """

    def __init__(self, split: str, *, dir: str = ""):
        check_split(split)
        root = check_dir("cifar10", dir)
        path = root / ("test.npz" if split == "test" else "train.npz")
        for file in (path, root / "classes.txt"):
            if not file.is_file():
                raise FileNotFoundError(f"data source 'cifar10': no {file.name} in {root}")
        self.class_names = tuple((root / "classes.txt").read_text().split())
        self._path = str(path)
        self._jpeg, self._offsets, self.labels = _read(path, len(self.class_names))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def encoded(self, i: int) -> bytes:
        """The JPEG's bytes."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        i %= len(self)
        start, stop = self._offsets[i : i + 2]
        return self._jpeg[start:stop].tobytes()

    def name(self, i: int) -> str:
        return f"{self._path}[{i}]"

    def default_canvas(self, global_size: int) -> int:
        return 32


def _read(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        with np.load(path) as arrays:
            missing = [k for k in ("jpeg", "offsets", "labels") if k not in arrays]
            if missing:
                raise ValueError(f"no array {missing[0]!r} in it, only {', '.join(arrays)}")
            jpeg, offsets = arrays["jpeg"], arrays["offsets"]
            labels = arrays["labels"].astype(np.int32)
        whole = len(offsets) == len(labels) + 1 and offsets[-1] == len(jpeg)
        if not whole or (np.diff(offsets) < 0).any():
            raise ValueError("offsets do not fit jpeg and labels")
        if labels.size and labels.max() >= num_classes:
            raise ValueError(f"label {labels.max()}, but classes.txt names {num_classes}")
    except (ValueError, EOFError, zipfile.BadZipFile) as err:
        raise ValueError(f"{path}: not a CIFAR-10 archive: {err}") from None
    return jpeg, offsets, labels
