"""Features of a file with the pictures that they are of, for the commands that look at them."""

import contextlib
import os
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from dinotwins_jax.buckets import at_hand
from dinotwins_jax.configuration import config_of
from dinotwins_jax.data import data_section, open_source, split_section
from dinotwins_jax.data.bands import as_colours
from dinotwins_jax.data.base import Source, decode_image, printable
from dinotwins_jax.data.pictures import pictures_in
from dinotwins_jax.data.reading import RGB, Reading
from dinotwins_jax.data.store import MANIFEST
from dinotwins_jax.data.window import reading_with
from dinotwins_jax.devices.processes import warn
from dinotwins_jax.evals.pictures import picture_of
from dinotwins_jax.evals.sheets import Tile
from dinotwins_jax.features.files import read_features
from dinotwins_jax.features.stated import stated_reading

TOKENS = ("cls", "mean_patch")
SIDE = 256  # pixels of a picture on a sheet


class Gallery:
    """Features with names, labels and pictures.

    Attributes:
      path: the file; names: str[M]; features: f32[M, E].
      labels: i32[M], -1 = none, or None; class_names: tuple of str.
      model: identity of the model that made them; source: where it was, "" if the file does not say.

    Raises:
      ValueError, OSError: no file of features, or none of these tokens; the message is one line.
    """

    def __init__(self, path: str | os.PathLike, tokens: str = "cls"):
        self.path = Path(path).expanduser()
        arrays = read_features(self.path, without=("patches",))
        if tokens not in arrays:
            has = ", ".join(name for name in TOKENS if name in arrays) or "none"
            raise ValueError(
                f"{self.path} has no features {tokens}, it has {has}: embed with --tokens={tokens}"
            )
        self.names, self.features = arrays["names"], arrays[tokens]
        self.labels = arrays.get("labels")
        self.class_names = tuple(arrays.get("class_names", np.array([], np.str_)).tolist())
        self.model = str(arrays["model"])
        self.source = str(arrays.get("source", ""))
        self._place = str(arrays.get("place", ""))
        self._check()

    def _check(self) -> None:
        lengths = {len(self.names), len(self.features)}
        lengths |= set() if self.labels is None else {len(self.labels)}
        if self.features.ndim != 2 or len(lengths) > 1:
            shape = f"features {self.features.shape} of {len(self.names)} names"
            raise ValueError(f"{self.path} is damaged: {shape}; embed again")
        if self.labels is not None and self.labels.max(initial=-1) >= len(self.class_names):
            raise ValueError(
                f"{self.path} is damaged: label {self.labels.max()} of {len(self.class_names)} class names"
            )
        if not len(self.names):
            raise ValueError(f"{self.path} holds no pictures")
        bad = np.flatnonzero(~np.isfinite(self.features).all(axis=1))
        if bad.size:
            raise ValueError(f"{self.path}: features of {self.names[bad[0]]} are not finite")

    def __len__(self) -> int:
        return len(self.names)

    def label(self, i: int) -> str:
        """The class of a picture, "" if it has none."""
        known = self.labels is not None and self.labels[i] >= 0
        return self.class_names[self.labels[i]] if known else ""

    def tile(self, i: int, caption: str = "") -> Tile:
        """A picture with its caption, for `tile_grid`."""
        return Tile(lambda: self.picture(i), name=str(self.names[i]), caption=caption)

    def picture(self, i: int) -> np.ndarray | None:
        """u8[h, w, 3], at most 256 pixels a side; None if it is not there."""
        name = str(self.names[i])
        try:
            if os.path.isfile(name):
                return self.look(name)
            if name in self._records:
                return thumbnail(picture_of(self._pictures, self._records[name]))
        except (ValueError, OSError):
            return None
        return None

    def look(self, file: str) -> np.ndarray:
        """u8[h, w, 3], at most 256 pixels a side, of a file that the model can read.

        Raises:
          BadImage, a ValueError: it cannot be read.
        """
        return thumbnail(as_colours(decode_image(file, max_side=SIDE, reading=self._reading)))

    @cached_property
    def _reading(self) -> Reading:
        """The channels and the window of the run or export that made the features; RGB if they are not
        known."""
        for read, source in ((_of_run, self.source), (stated_reading, Path(self.source))):
            with contextlib.suppress(ValueError, OSError, KeyError, TypeError, AttributeError):
                return read(source)
        return RGB

    @cached_property
    def _pictures(self) -> Source | None:
        """The data of a run, or prepared data, where pictures are no files of their own."""
        kind, _, split = self._place.partition(" ")
        try:
            if kind == "split" and self.source:
                with at_hand(self.source) as workdir:
                    config = config_of(workdir, opens_data=True)
                return open_source(split_section(config, split), split)
            if self._place and (Path(self._place) / MANIFEST).is_file():
                return pictures_in(self._place, self._reading)
        except (ValueError, OSError) as error:
            warn(f"the pictures of {self.path} cannot be opened: {error}")
        return None

    @cached_property
    def _records(self) -> dict[str, int]:
        found = self._pictures
        return {} if found is None else {printable(found.name(i)): i for i in range(len(found))}


def _of_run(source: str) -> Reading:
    with at_hand(source) as workdir:
        data = data_section(config_of(workdir))
    return reading_with(data["in_channels"], data.get("window"))


def thumbnail(image: np.ndarray) -> np.ndarray:
    """u8[H, W, 3] -> u8[h, w, 3] of at most 256 pixels a side."""
    if max(image.shape[:2]) <= SIDE:
        return image
    small = Image.fromarray(image)
    small.thumbnail((SIDE, SIDE))
    return np.asarray(small)


def same_model(first: Gallery, second: Gallery) -> None:
    """Raises ValueError unless one model made both features."""
    if first.model != second.model:
        raise ValueError(f"{first.path} and {second.path} hold features of two different models")
