"""Pictures from anywhere: those that a caller holds (paths, PIL images, arrays), and those of a folder."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dinotwins_jax.data.array_record import ArrayRecord
from dinotwins_jax.data.base import (
    EXTENSIONS,
    BadImage,
    ImageFiles,
    Source,
    canvas_for_photos,
    decode_image,
    rgb_of,
)
from dinotwins_jax.data.folder import split_pattern
from dinotwins_jax.data.listing import list_images
from dinotwins_jax.data.store import MANIFEST

Picture = str | os.PathLike | Image.Image | np.ndarray


class Pictures:
    """A Source over a list of pictures, without labels.

    Args:
      pictures: paths, PIL images, or u8[H, W, 3] and u8[H, W] arrays.
      max_side: pixels; JPEG files at least twice as large are decoded at a reduced size, as in training.
    Raises:
      TypeError, ValueError: a picture of another kind; the message has its position.
    """

    class_names: tuple[str, ...] = ()
    labels = None

    def __init__(self, pictures: Sequence[Picture], max_side: int | None = None):
        self._pictures = [_checked(picture, k) for k, picture in enumerate(pictures)]
        self._max_side = max_side

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, i: int) -> np.ndarray:
        picture = self._pictures[i]
        if isinstance(picture, np.ndarray):
            return picture
        if isinstance(picture, Path):
            return decode_image(picture, max_side=self._max_side)
        try:
            return rgb_of(picture, None)
        except (OSError, ValueError) as error:
            raise BadImage(self.name(i), " ".join(str(error).split())) from error

    def name(self, i: int) -> str:
        picture = self._pictures[i]
        return os.fspath(picture) if isinstance(picture, Path) else f"picture {i}"

    def default_canvas(self, global_size: int) -> int:
        return canvas_for_photos(global_size)


def listed(pictures) -> list[Picture]:
    """A list of pictures from one picture, a sequence of them, or u8[B, H, W, 3].

    Raises:
      TypeError, ValueError: not pictures.
    """
    if isinstance(pictures, str | os.PathLike | Image.Image):
        return [pictures]
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


def _checked(picture: Picture, k: int) -> Path | Image.Image | np.ndarray:
    if isinstance(picture, str | os.PathLike):
        return Path(picture).expanduser()
    if isinstance(picture, Image.Image):
        return picture
    if not hasattr(picture, "__array__"):
        raise TypeError(
            f"image {k} is a {type(picture).__name__}: a path, a PIL image or a uint8 array [H, W, 3]"
        )
    array = np.asarray(picture)
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not (grey or array.ndim == 3) or 0 in array.shape:
        raise ValueError(
            f"image {k} is {array.dtype}{list(array.shape)}: it must be uint8 [H, W, 3]"
        )
    array = array[..., None] if grey else array
    if array.shape[2] not in (1, 3):
        raise ValueError(f"image {k} is uint8{list(array.shape)}: it must be uint8 [H, W, 3]")
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def pictures_in(where: str | os.PathLike) -> Source:
    """All pictures of a folder with its subfolders, of a glob pattern, or of prepared data, by name.

    Raises:
      FileNotFoundError: no such folder, or no pictures there.
      ValueError: prepared data that is damaged.
    """
    root, pattern = split_pattern(where)
    if not pattern and root.is_file():
        return ImageFiles([os.fspath(root)])
    if not pattern and not root.is_dir():
        raise FileNotFoundError(f"no such folder, file or pattern of images: {root}")
    if not pattern and (root / MANIFEST).is_file():
        return ArrayRecord("pretrain", dir=root, whole=True)
    names = list_images(root, pattern, "pretrain").names
    if not names:
        place = f"match {root / pattern}" if pattern else f"under {root}"
        raise FileNotFoundError(f"no images {place}; looked for {' '.join(EXTENSIONS)}")
    return ImageFiles([str(root / name) for name in names])
