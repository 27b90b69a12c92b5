"""Protocol of image sources, and decoding of image files."""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, features

SPLITS = ("pretrain", "train", "test")
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".jpe", ".jfif", ".pnm", ".pbm"),
    *((".jp2",) if features.check("jpg_2000") else ()),
    *((".avif",) if "avif" in features.modules and features.check("avif") else ()),
)


_LARGER = "To read it, set config.data.max_pixels to its pixels, or make it smaller."


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


class Source(Protocol):
    """Random access to images. Must be picklable if worker processes are used.

    Optional, read with getattr(source, "multi_hot", None):
      multi_hot: bool[len(self), len(class_names)], all categories in the image (crowds left out, as in
        labels); None if images have a single label.
      max_pixels: int, the largest image that is read; `open_source` sets it to config.data.max_pixels.
      notes: tuple[str, ...], lines for the description of the data at the start of a run.
    Optional methods:
      masks(i) -> (bool[n, H, W], i32[n]): the objects of image i, and their indices into
        class_names; an object without a mask is left out. hasattr(source, "masks") says whether there
        are any, and so whether scores against masks are computed. A class that knows it only once its
        files are read makes masks a property, which raises AttributeError if no object has a mask
        (Coco, ArrayRecord).
      encoded(i) -> bytes: image i as stored, not decoded (the bytes of a JPEG or another file).
        Raises BadImage. If present, batches are decoded from it, at reduced size where possible, and
        prepared data keep its bytes where possible; a subclass that overrides only [i] is read
        through [i].
    """

    class_names: tuple[str, ...]  # () when unlabelled
    labels: np.ndarray | None  # i32[len(self)], dominant category of each image, -1 for none

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> np.ndarray:
        """u8[H, W, 3] RGB at its own size. Raises BadImage if unreadable."""
        ...

    def name(self, i: int) -> str:
        """Unique name of record i for messages: its path, or e.g. "scenes/train/12".

        Records of two splits share a name only if they are the same image.
        """
        ...

    def default_canvas(self, global_size: int) -> int:
        """Canvas side (pixels) for global crops of global_size, if data.canvas_size is 0."""
        ...


class ImageFiles:
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

    def __getitem__(self, i: int) -> np.ndarray:
        return decode_image(self.paths[i])

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


def decode_image(
    file: str | os.PathLike | bytes,
    *,
    name: str = "",
    max_side: int | None = None,
    canvas: np.ndarray | None = None,
) -> np.ndarray:
    """Decodes an image of any format and mode that PIL reads.

    EXIF rotation is applied, an alpha channel dropped, 16-bit grey scaled to 8 bits, and only the first
    frame of an animation read.

    Args:
      file: a path, or the encoded bytes themselves.
      name: its name in errors, by default its path.
      max_side: pixels. A JPEG at least twice as large is decoded at 1/2, 1/4 or 1/8 of its size, which
        is cheaper; its longer side stays >= max_side.
      canvas: u8[S, S, 3], to be overwritten. A JPEG exactly S wide and no higher may be decoded
        directly into its first rows, which saves a copy.
    Returns:
      u8[H, W, 3] RGB, possibly a view of the canvas.
    Raises:
      BadImage: missing, empty, truncated, not an image, or above PIL.Image.MAX_IMAGE_PIXELS pixels, which
        count after the reduction of a JPEG.
    """
    name = name or (repr(file[:8]) if isinstance(file, bytes) else os.fspath(file))
    try:
        data = file if isinstance(file, bytes) else Path(file).read_bytes()
    except OSError as err:
        raise BadImage(name, err.strerror or str(err)) from err
    if not data:
        raise BadImage(name, "empty, 0 bytes")
    try:
        if (pixels := _plain_jpeg(data, max_side, canvas)) is not None:
            return pixels
        with Image.open(io.BytesIO(data)) as image:
            return rgb_of(image, max_side)
    except MemoryError:
        raise
    except Image.DecompressionBombError as err:
        raise BadImage(name, f"{err} {_LARGER}") from None
    except Image.UnidentifiedImageError:
        raise BadImage(name, f"not an image that PIL can read ({len(data)} bytes)") from None
    except Exception as err:  # PIL's decoders raise nearly every built-in exception on broken files
        reason = " ".join(str(err).split()) or type(err).__name__
        raise BadImage(name, reason) from err


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of the image that `decode_image` gives, upright, from the file's header alone.

    Raises BadImage if the file is missing or its header cannot be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = 1
            with contextlib.suppress(Exception):  # a broken EXIF block is ignored
                turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Image.UnidentifiedImageError:
        raise BadImage(os.fspath(path), "not an image that PIL can read") from None
    except OSError as err:
        raise BadImage(os.fspath(path), err.strerror or str(err)) from err
    except Exception as err:  # as in decode_image
        reason = " ".join(str(err).split()) or type(err).__name__
        raise BadImage(os.fspath(path), reason) from err
    return (width, height) if turned in (5, 6, 7, 8) else (height, width)


def _plain_jpeg(data: bytes, max_side: int | None, canvas: np.ndarray | None) -> np.ndarray | None:
    """Fast decoder for common JPEGs: Pillow's pixels at twice its speed; None for other files.

    Other formats, CMYK, EXIF rotations and flawed files are left to Pillow, which alone decides what
    is broken.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    exif = _exif_segment(data)
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        limit = Image.MAX_IMAGE_PIXELS
        too_large = limit is not None and height * width > limit
        if space not in ("YCbCr", "Gray") or (exif and _is_rotated(data, exif, too_large)):
            return None
        reduced = (
            f for f in (8, 4, 2) if max_side is not None and -(-max(height, width) // f) >= max_side
        )
        factor = next(reduced, 1)
        height, width = -(-height // factor), -(-width // factor)
        if too_large and height * width > limit:
            return None
        if canvas is not None and (width != canvas.shape[1] or height > canvas.shape[0]):
            canvas = None
        return simplejpeg.decode_jpeg(
            data,
            min_factor=factor,
            min_height=height,
            min_width=width,
            buffer=None if canvas is None else canvas[:height].reshape(-1),
        )
    except ValueError:
        return None


def _exif_segment(data: bytes) -> bytes:
    """The EXIF segment before a JPEG's pixels, or b""; searching the bytes is ten times slower."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1] != 0xDA:
        if data[place + 1] == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            return data[place + 4 : place + 2 + int.from_bytes(data[place + 2 : place + 4])]
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return b""


def _is_rotated(data: bytes, exif: bytes, too_large: bool) -> bool:
    """Whether a JPEG has an EXIF rotation; one that Pillow will not open is judged by its segment."""
    with contextlib.suppress(Exception):
        if too_large:
            tags = Image.Exif()
            tags.load(exif)
            return tags.get(ExifTags.Base.Orientation, 1) != 1
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False  # a broken EXIF block is ignored


def rgb_of(image: Image.Image, max_side: int | None) -> np.ndarray:
    width, height = image.size
    longer = max(width, height)
    if max_side is not None and longer >= 2 * max_side:
        # draft() keeps both sides at or above the requested size, so request the image's own
        # aspect.
        image.draft(None, (-(-width * max_side // longer), -(-height * max_side // longer)))
    limit, (width, height) = Image.MAX_IMAGE_PIXELS, image.size
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} x {height} pixels, more than PIL's limit of {limit}. {_LARGER}")
    image.load()
    with contextlib.suppress(Exception):  # the pixels are valid even if the EXIF block is broken
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" in older PIL
        wide = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))
