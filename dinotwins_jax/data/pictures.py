"""Pictures from anywhere: those that a caller holds (paths, PIL images, arrays), and those of a folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image

from dinotwins_jax.data.array_record import ArrayRecord
from dinotwins_jax.data.bands import Samples, eight_bit_channels
from dinotwins_jax.data.base import (
    EXTENSIONS,
    BadImage,
    ImageFiles,
    Source,
    canvas_for_photos,
)
from dinotwins_jax.data.folder import split_pattern
from dinotwins_jax.data.images import decode_image, opened_image
from dinotwins_jax.data.listing import list_images
from dinotwins_jax.data.reading import RGB, Reading, Unfit
from dinotwins_jax.data.store import MANIFEST, as_stored

Picture = str | os.PathLike | Image.Image | np.ndarray


class Pictures:
    """A Source over a list of pictures, without labels.

    Args:
      pictures: paths, PIL images, or u8[H, W, C] and u8[H, W] arrays; with a window arrays of any numbers.
      max_side: pixels; JPEG files at least twice as large are decoded at a reduced size, as in training.
      reading: channels and window of the model.
    Raises:
      TypeError, ValueError: a picture of another kind; the message has its position.
    """

    class_names: tuple[str, ...] = ()
    labels = None

    def __init__(
        self,
        pictures: Sequence[Picture],
        max_side: int | None = None,
        reading: Reading = RGB,
    ):
        self._pictures = [_checked(p, k, reading) for k, p in enumerate(pictures)]
        self._max_side, self.reading = max_side, reading
        # Two threads must not decode one opened file, which may be in the list twice.
        self._locks = {id(p): Lock() for p in self._pictures if isinstance(p, Image.Image)}

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, i: int) -> np.ndarray:
        picture, reading = self._pictures[i], self.reading
        if isinstance(picture, Path):
            return decode_image(picture, max_side=self._max_side, reading=reading)
        if isinstance(picture, Image.Image):
            with self._locks[id(picture)]:
                return opened_image(picture, name=self.name(i), reading=reading)
        try:
            return eight_bit_channels(Samples(picture), reading)
        except Unfit as error:
            raise BadImage(self.name(i), str(error)) from None

    def check_names(self) -> None:
        """Raises ValueError unless all are files: an array or PIL image has no name of its own."""
        for k, picture in enumerate(self._pictures):
            if not isinstance(picture, Path):
                kind = type(picture).__name__
                raise ValueError(f"image {k} is a {kind}: only paths can be embedded into a file")

    def name(self, i: int) -> str:
        picture = self._pictures[i]
        return os.fspath(picture) if isinstance(picture, Path) else f"picture {i}"

    def default_canvas(self, global_size: int) -> int:
        return canvas_for_photos(global_size)


def listed(pictures) -> list[Picture]:
    """A list of pictures from one picture, a sequence or array of them, or u8[B, H, W, C].

    Raises:
      TypeError, ValueError: not pictures.
    """
    if isinstance(pictures, str | os.PathLike | Image.Image):
        return [pictures]
    if hasattr(pictures, "__array__"):  # of NumPy, JAX, PyTorch, pandas
        pictures = np.asarray(pictures)
        if pictures.dtype.kind in "UO" and pictures.ndim == 1:  # the names that embed returns
            return pictures.tolist()
    if isinstance(pictures, np.ndarray) and pictures.ndim in (2, 3):
        return [pictures]
    if isinstance(pictures, np.ndarray) and pictures.ndim != 4:
        raise ValueError(
            f"images {pictures.dtype}{list(pictures.shape)}: arrays are uint8 [H, W, 3] or [B, H, W, 3]"
        )
    try:
        return list(pictures)
    except TypeError:
        raise TypeError(
            f"images is a {type(pictures).__name__}: paths, PIL images or uint8 arrays [H, W, 3]"
        ) from None


def _checked(picture: Picture, k: int, reading: Reading) -> Path | Image.Image | np.ndarray:
    if isinstance(picture, str | os.PathLike):
        return Path(picture).expanduser()
    if isinstance(picture, Image.Image):
        return picture
    if not hasattr(picture, "__array__"):
        raise TypeError(
            f"image {k} is a {type(picture).__name__}: a path, a PIL image or a uint8 array [H, W, 3]"
        )
    array = np.asarray(picture)
    typed = array.dtype == np.uint8 or (reading.window and array.dtype.kind in "iuf")
    if not typed or array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            f"image {k} is {array.dtype}{list(array.shape)}: it must be uint8 [H, W, "
            f"{reading.channels}]"
        )
    return array[..., None] if array.ndim == 2 else array


def pictures_in(where: str | os.PathLike, reading: Reading = RGB) -> Source:
    """All pictures of a folder with its subfolders, of a glob pattern, or of prepared data, by name.

    Args:
      reading: channels and window of the model; prepared data have theirs.
    Raises:
      FileNotFoundError: no such folder, or no pictures there.
      ValueError: prepared data that is damaged.
    """
    root, pattern = split_pattern(where)
    if not pattern and root.is_file():
        return _files([os.fspath(root)], reading)
    if not pattern and not root.is_dir():
        raise FileNotFoundError(f"no such folder, file or pattern of images: {root}")
    if not pattern and (root / MANIFEST).is_file():
        prepared = ArrayRecord("pretrain", dir=root, whole=True)
        prepared.reading = as_stored(
            reading._replace(window=None), prepared.stored, os.fspath(root)
        )
        return prepared
    names = list_images(root, pattern, "pretrain").names
    if not names:
        place = f"match {root / pattern}" if pattern else f"under {root}"
        raise FileNotFoundError(f"no images {place}; looked for {' '.join(EXTENSIONS)}")
    return _files([str(root / name) for name in names], reading)


def _files(paths: list[str], reading: Reading) -> ImageFiles:
    files = ImageFiles(paths)
    files.reading = reading
    return files
