"""What a run reads of a picture: its channels, and how samples wider than 8 bits become 8 bits."""

from typing import NamedTuple

from PIL import Image


class Window(NamedTuple):
    """How samples that are not unsigned 8-bit become 0 to 255: linearly from low to high, cut outside.

    ranges: (low, high) of all bands together, or one for each channel, in the file's own numbers; ():
      the percentiles of each picture, or, with `of_set`, not computed yet.
    percentiles: (low, high), in %.
    per_band: percentiles of each band; otherwise of all bands together.
    of_set: the percentiles are those of a sample of the training pictures.
    """

    ranges: tuple[tuple[float, float], ...] = ()
    percentiles: tuple[float, float] = (0.5, 99.5)
    per_band: bool = False
    of_set: bool = False


class Reading(NamedTuple):
    """What a run reads. channels: config.model.in_channels; window: None: the full range of a sample's
    type becomes 0 to 255, and floating-point samples are refused."""

    channels: int = 3
    window: Window | None = None


RGB = Reading()


def allow_pixels(count: int) -> None:
    """Sets Pillow's limit of pixels an image in this process; 0 leaves it as it is."""
    if count and count != Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = count


def printable(name: object) -> str:
    """A name for people: bytes of a file's name that are not UTF-8 become escapes, such as \\udce9."""
    return str(name).encode(errors="backslashreplace").decode()


class BadImage(ValueError):
    """Raised for an unreadable record; `name` identifies it (a file's path), `reason` says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it can be pickled by a worker process
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.name)}: {self.reason}"


class UnfitImage(BadImage):
    """Raised for an intact picture that config.model.in_channels or config.data.window do not fit, or whose
    compression needs another package."""


class Unfit(ValueError):
    """The reason of an `UnfitImage`, where its name is not known."""
