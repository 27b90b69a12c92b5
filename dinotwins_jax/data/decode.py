"""From record numbers to one batch of pixels: read, shrink, place on a fixed canvas, in threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from dinotwins_jax.data.base import BadImage, Source, decode_image

MAX_REPLACEMENT_TRIES = 100  # records in a row, before a source is given up

Batch = dict[str, np.ndarray]

# (source, index, canvas_size) -> (picture u8[h, w, 3], index it came from, bad index or -1)
Read = Callable[[Source, int, int], tuple[np.ndarray, int, int]]


def fit_canvas(image: np.ndarray, canvas_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts a picture on a square canvas.

    Args:
      image: u8[H, W, 3].
      canvas_size: side S in pixels.
    Returns:
      u8[S, S, 3], the picture top left and zeros below and to the right, and i32[2], its (height,
      width). A picture larger than the canvas is shrunk (bicubic, antialiased, aspect kept, no side
      below 1), a smaller one left as it is.
    """
    picture = _shrink(image, canvas_size)
    height, width = picture.shape[:2]
    canvas = np.zeros((canvas_size, canvas_size, 3), np.uint8)
    canvas[:height, :width] = picture
    return canvas, np.array([height, width], np.int32)


class BatchLoader:
    """Record numbers i64[B] -> a batch, decoded by a pool of threads. Pickles without the pool."""

    def __init__(self, source: Source, canvas_size: int, num_threads: int, read: Read):
        self._args = (source, canvas_size, num_threads, read)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __reduce__(self):
        return BatchLoader, self._args

    def __call__(self, ids: np.ndarray) -> Batch:
        source, canvas_size, num_threads, read = self._args
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(num_threads)
        batch = {
            "image": np.zeros((len(ids), canvas_size, canvas_size, 3), np.uint8),
            "size": np.zeros((len(ids), 2), np.int32),
            "index": np.zeros(len(ids), np.int32),
            "bad": np.zeros(len(ids), np.int32),
        }

        def place(row: int) -> None:
            picture, batch["index"][row], batch["bad"][row] = read(
                source, int(ids[row]), canvas_size
            )
            height, width = batch["size"][row] = picture.shape[:2]
            batch["image"][row, :height, :width] = picture

        list(self._pool.map(place, range(len(ids))))
        return batch


def read_or_next(source: Source, index: int, canvas_size: int) -> tuple[np.ndarray, int, int]:
    """For training: an unreadable record is replaced by the next readable one, wrapping round.

    Raises BadImage after MAX_REPLACEMENT_TRIES unreadable records in a row.
    """
    tries = min(MAX_REPLACEMENT_TRIES, len(source))
    for step in range(tries):
        candidate = (index + step) % len(source)
        try:
            picture = _read(source, candidate, canvas_size)
            return picture, candidate, index if step else -1
        except BadImage as err:
            last = err
    raise BadImage(last.name, f"{last.reason}; so were the {tries - 1} records before it")


def read_or_black(source: Source, index: int, canvas_size: int) -> tuple[np.ndarray, int, int]:
    """For evaluation: an unreadable record is a black picture as large as the canvas."""
    try:
        return _read(source, index, canvas_size), index, -1
    except BadImage:
        return np.zeros((canvas_size, canvas_size, 3), np.uint8), index, index


def _read(source: Source, index: int, canvas_size: int) -> np.ndarray:
    if hasattr(source, "encoded"):
        data, name = source.encoded(index), source.name(index)
        image = decode_image(data, name=name, max_side=canvas_size)
        return _shrink(image, canvas_size)
    image = source[index]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        found = f"{image.dtype}{list(image.shape)}"
        raise ValueError(f"{source.name(index)}: the source gave {found}, not uint8[H, W, 3]")
    return _shrink(image, canvas_size)


def _shrink(image: np.ndarray, canvas_size: int) -> np.ndarray:
    height, width = image.shape[:2]
    scale = canvas_size / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
