"""Loading of a batch from record indices: read, shrink, place on a fixed canvas, in threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from sys import getrefcount

import numpy as np
from PIL import Image

from dinotwins_jax.data.bands import resized
from dinotwins_jax.data.base import BadImage, Source, read_image, reading_of

MAX_REPLACEMENT_TRIES = 100  # unreadable records in a row before giving up

Batch = dict[str, np.ndarray]

# (source, index, canvas u8[S, S, C] to overwrite) -> (image u8[h, w, C], possibly a view of the canvas,
# index it came from, bad index or -1)
Read = Callable[[Source, int, np.ndarray], tuple[np.ndarray, int, int]]


def fit_canvas(image: np.ndarray, canvas_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Places an image on a square canvas.

    Args:
      image: u8[H, W, C].
      canvas_size: side S in pixels.
    Returns:
      u8[S, S, C], the image top left and zeros below and to the right, and i32[2], its (height,
      width). An image larger than the canvas is shrunk (bicubic, antialiased, aspect kept, no side
      below 1), a smaller one kept as it is.
    """
    picture = _shrink(image, canvas_size)
    height, width = picture.shape[:2]
    canvas = np.zeros((canvas_size, canvas_size, picture.shape[2]), np.uint8)
    canvas[:height, :width] = picture
    return canvas, np.array([height, width], np.int32)


class BatchLoader:
    """Loads a batch of record indices i64[B] with a pool of threads. Pickles without the pool."""

    def __init__(self, source: Source, canvas_size: int, num_threads: int, read: Read):
        self._args = (source, canvas_size, num_threads, read)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._canvases = _Canvases()

    def __reduce__(self):
        return BatchLoader, self._args

    def close(self) -> None:
        """Releases threads and memory; the next call creates new ones."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False)
            self._pool, self._canvases = None, _Canvases()

    def __call__(self, ids: np.ndarray) -> Batch:
        source, canvas_size, num_threads, read = self._args
        with self._lock:
            self._pool = pool = self._pool or ThreadPoolExecutor(num_threads)
            shape = (len(ids), canvas_size, canvas_size, reading_of(source).channels)
            images = self._canvases.free(shape)
        batch = {
            "image": images,
            "size": np.zeros((len(ids), 2), np.int32),
            "index": np.zeros(len(ids), np.int32),
            "bad": np.zeros(len(ids), np.int32),
        }

        def place(row: int) -> None:
            canvas = batch["image"][row]
            picture, batch["index"][row], batch["bad"][row] = read(source, int(ids[row]), canvas)
            height, width = batch["size"][row] = picture.shape[:2]
            if not np.may_share_memory(picture, canvas):
                canvas[:height, :width] = picture
            canvas[height:] = 0
            canvas[:height, width:] = 0

        def place_all(rows: range) -> None:
            for row in rows:
                place(row)

        # One task per thread: one per image would cost 5% of decoding.
        rows = range(len(ids))
        list(pool.map(place_all, [rows[t::num_threads] for t in range(num_threads)]))
        return batch


class _Canvases:
    """Pool of arrays, reused once unreferenced: fresh memory costs 5% of decoding."""

    def __init__(self, keep: int = 8):
        self._arrays: list[np.ndarray] = []
        self._keep = keep
        alone = [np.empty(0)]
        self._alone = getrefcount(alone[0])  # reference count of an object that only a list holds

    def free(self, shape: tuple[int, ...]) -> np.ndarray:
        """An uninitialised u8[shape] that no view, other thread or device references."""
        for number in range(len(self._arrays)):
            free = getrefcount(self._arrays[number]) == self._alone
            if free and self._arrays[number].shape == shape:
                return self._arrays[number]
        self._arrays = [*self._arrays[1 - self._keep :], np.empty(shape, np.uint8)]
        return self._arrays[-1]


def read_or_next(source: Source, index: int, canvas: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Reads a record for training; an unreadable one is replaced by the next, wrapping round.

    Raises BadImage after MAX_REPLACEMENT_TRIES unreadable records in a row.
    """
    tries = min(MAX_REPLACEMENT_TRIES, len(source))
    for step in range(tries):
        candidate = (index + step) % len(source)
        try:
            return _read(source, candidate, canvas), candidate, index if step else -1
        except BadImage as err:
            last = err
    raise BadImage(
        last.name, f"{last.reason}; the {tries - 1} records before it are unreadable too"
    )


def read_or_black(source: Source, index: int, canvas: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Reads a record for evaluation; an unreadable one gives a black image of the canvas size."""
    try:
        return _read(source, index, canvas), index, -1
    except BadImage:
        canvas[:] = 0
        return canvas, index, index


def _read(source: Source, index: int, canvas: np.ndarray) -> np.ndarray:
    return _shrink(read_image(source, index, max_side=len(canvas), canvas=canvas), len(canvas))


def _shrink(image: np.ndarray, canvas_size: int) -> np.ndarray:
    height, width = image.shape[:2]
    scale = canvas_size / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return resized(image, size, Image.Resampling.BICUBIC)
