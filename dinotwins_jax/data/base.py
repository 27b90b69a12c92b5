"""Protocol of image sources, and the reading of their images."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import features

from dinotwins_jax.data.bands import luma
from dinotwins_jax.data.images import decode_image, image_size
from dinotwins_jax.data.reading import RGB, BadImage, Reading, UnfitImage, allow_pixels, printable
from dinotwins_jax.data.window import eight_bits

__all__ = ["BadImage", "UnfitImage", "allow_pixels", "decode_image", "image_size", "printable"]


SPLITS = ("pretrain", "train", "test")
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".jpe", ".jfif", ".pnm", ".pbm"),
    *((".jp2",) if features.check("jpg_2000") else ()),
    *((".avif",) if "avif" in features.modules and features.check("avif") else ()),
)


class Source(Protocol):
    """Random access to images. Must be picklable if worker processes are used.

    Optional, read with getattr(source, "multi_hot", None):
      multi_hot: bool[len(self), len(class_names)], all categories in the image (crowds left out, as in
        labels); None if images have a single label.
      max_pixels: int, the largest image that is read; `open_source` sets it to config.data.max_pixels.
      reading: Reading, the channels that a run reads and its window; `open_source` sets it.
      stored: Reading with which prepared data were written (ArrayRecord).
      notes: tuple[str, ...], lines for the description of the data at the start of a run.
    Optional methods:
      masks(i) -> (bool[n, H, W], i32[n]): the objects of image i, and their indices into class_names; an
        object without a mask is left out. hasattr(source, "masks") says whether there are any; which
        images have some, an attribute `masked` bool[len(self)], else the first masks. Where that is
        known only once files are read, masks is a property that raises AttributeError (Coco, ArrayRecord).
      boxes(i): as masks, each object's box filled; used where there are no masks. `boxed`: as `masked`.
      encoded(i) -> bytes: image i as stored, not decoded (the bytes of a JPEG or another file).
        Raises BadImage. If present, batches are decoded from it, at reduced size where possible, and
        prepared data keep its bytes where possible; a subclass that overrides only [i] is read
        through [i].
    """

    class_names: tuple[str, ...]  # () when unlabelled
    labels: np.ndarray | None  # i32[len(self)], dominant category of each image, -1 for none

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> np.ndarray:
        """u8[H, W, C] at its own size, C = config.model.in_channels. Raises BadImage if unreadable.

        Arrays of a source without encoded() are converted when they are read (`read_image`): u8[H, W, 3]
        to one channel by luma, and with config.data.window samples of any other type.
        """
        ...

    def name(self, i: int) -> str:
        """Unique name of record i for messages: its path, or e.g. "scenes/train/12".

        Records of two splits share a name only if they are the same image.
        """
        ...

    def default_canvas(self, global_size: int) -> int:
        """Canvas side (pixels) for global crops of global_size, if data.canvas_size is 0."""
        ...


class EncodedImages:
    """The images of a source that has encoded(i) and name(i)."""

    reading = RGB

    def __getitem__(self, i: int) -> np.ndarray:
        return decode_image(self.encoded(i), name=self.name(i), reading=self.reading)


class ImageFiles(EncodedImages):
    """A Source over a list of image files; subclasses fill in paths, labels and class_names."""

    def __init__(
        self,
        paths: Sequence[str],
        *,
        labels: np.ndarray | None = None,
        multi_hot: np.ndarray | None = None,
        class_names: tuple[str, ...] = (),
    ):
        self.paths = list(paths)
        self.labels = labels
        self.multi_hot = multi_hot
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, i: int) -> bytes:
        """The file's bytes. Raises BadImage if there is no such file."""
        try:
            return Path(self.paths[i]).read_bytes()
        except OSError as err:
            raise BadImage(self.paths[i], err.strerror or str(err)) from err

    def name(self, i: int) -> str:
        return self.paths[i]

    def default_canvas(self, global_size: int) -> int:
        return canvas_for_photos(global_size)


def gives_encoded(source: Source) -> bool:
    """Whether encoded(i) gives the same image as [i]; False if a subclass overrides only [i]."""
    for kind in type(source).__mro__:
        if "encoded" in vars(kind) or "__getitem__" in vars(kind):
            return "encoded" in vars(kind)
    return False


def reading_of(source: Source) -> Reading:
    """The channels and the window with which a source is read; RGB if nothing else was set."""
    return getattr(source, "reading", RGB)


def read_image(
    source: Source, i: int, *, max_side: int | None = None, canvas: np.ndarray | None = None
) -> np.ndarray:
    """Image i of a source, u8[H, W, C]; max_side, canvas: as in `decode_image`.

    Raises:
      BadImage: unreadable. ValueError: an array that the run cannot take.
    """
    allow_pixels(getattr(source, "max_pixels", 0))  # this may be another process
    reading = reading_of(source)
    if not gives_encoded(source):
        return _checked(source[i], source.name(i), reading)
    data, name = source.encoded(i), source.name(i)
    return decode_image(data, name=name, max_side=max_side, canvas=canvas, reading=reading)


def _checked(image: np.ndarray, name: str, reading: Reading) -> np.ndarray:
    """u8[H, W, C] of the array that a source returned. Raises ValueError for any other."""
    channels = reading.channels
    bands = image.shape[2] if image.ndim == 3 and 0 not in image.shape else 0
    typed = image.dtype == np.uint8 or (reading.window and image.dtype.kind in "iuf")
    if not typed or not (bands == channels or (bands == 3 and channels == 1)):
        found = f"{image.dtype}{list(image.shape)}"
        raise ValueError(f"{name}: the source returned {found}, not uint8[H, W, {channels}]")
    return eight_bits(image if bands == channels else luma(image), reading.window)


def check_split(split: str) -> None:
    """Raises ValueError if split is not one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")


def check_dir(source: str, dir: str | os.PathLike) -> Path:
    """The data directory. Raises ValueError if not given, FileNotFoundError if missing."""
    if not dir:
        raise ValueError(f"data source {source!r} needs dir, the directory of its files")
    root = Path(dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data source {source!r}: no such directory: {root}")
    return root


def canvas_for_photos(global_size: int) -> int:
    """Smallest multiple of 32 >= global_size * 20 / 7 pixels: 224 -> 640, COCO's own; 32 -> 96."""
    return -(-global_size * 20 // (7 * 32)) * 32
