"""Views of a source's images for evaluation, batch by batch.

Letters: M images, B batch, C channels.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dinotwins_jax.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD, center_view
from dinotwins_jax.data.pipeline import BadImageLog, eval_batches
from dinotwins_jax.devices.agreement import agree


def silent(done: int, total: int) -> None:
    """Reports nothing."""


class View(NamedTuple):
    """View of a source's images for evaluation: `center_view`, batch by batch."""

    resize: int  # pixels, short side before the crop
    crop: int | tuple[int, int]  # pixels
    canvas_size: int  # pixels
    batch_size: int  # images
    put: Callable[[np.ndarray], jax.Array] = jnp.asarray  # a batch's array -> this process' devices
    mean: tuple[float, ...] = IMAGENET_MEAN  # of each of the C channels
    std: tuple[float, ...] = IMAGENET_STD
    report: Callable[[int, int], None] = silent  # called with (images done, of) after each batch

    def batches(
        self, source, indices=None, bad_limit: float = 0.01
    ) -> Iterator[tuple[jax.Array, np.ndarray, np.ndarray]]:
        """Yields (views f32[B, h, w, C], indices i64[B], valid bool[B]) of all records or `indices`.

        All batches are full; an invalid row is a repeat or was unreadable. Raises ValueError if more
        than a share bad_limit of the source is unreadable.
        """
        # A loop over images sharded over devices would gather all of them on every device.
        one_by_one = False if jax.local_device_count() > 1 else None
        moments = self.mean, self.std
        view = _compiled_view(self.resize, self.crop, one_by_one, *moments)
        log, done = BadImageLog(source, bad_limit), 0
        total = len(source if indices is None else indices)
        for batch in eval_batches(
            source, batch_size=self.batch_size, canvas_size=self.canvas_size, indices=indices
        ):
            log.add(batch)
            views = view(self.put(batch["image"]), self.put(batch["size"]))
            yield views, batch["index"], batch["valid"]
            done = min(done + self.batch_size, total)
            self.report(done, total)

    def of(self, source, indices=None) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """Yields (views f32[b, h, w, C], indices i64[b]) of the readable records only."""
        for views, index, valid in self.batches(source, indices):
            yield (views if valid.all() else views[valid]), index[valid]

    def map(
        self, function: Callable, source, indices=None, bad_limit: float = 0.01
    ) -> tuple[Any, np.ndarray]:
        """Applies function(views) -> pytree of [B, …] to all readable records; results on the host.

        With several processes, each computes an equal share of the records, and all get all results,
        or fail together.

        Returns:
          (pytree of [M, …], indices i64[M]).
        Raises:
          ValueError, OSError: unreadable images, as `batches`; or of the function.
        """
        indices = np.arange(len(source)) if indices is None else np.asarray(indices)
        share = np.array_split(indices, jax.process_count())[jax.process_index()]
        rows, found, error = [], [], None
        try:
            # A process without records runs one anyway, to know the shapes, and drops the result.
            share_or_one = share if share.size else indices[:1]
            for views, index, valid in self.batches(source, share_or_one, bad_limit):
                valid = valid & bool(share.size)
                kept = jax.tree.map(lambda x, valid=valid: np.asarray(x)[valid], function(views))
                rows.append(kept)
                found.append(index[valid])
        except (ValueError, OSError) as caught:
            error = caught
        agree(error)
        result = jax.tree.map(lambda *parts: np.concatenate(parts), *rows), np.concatenate(found)
        return _of_all_processes(result, len(result[1]))


def _of_all_processes(tree, rows: int):
    """Concatenates the rows of all processes, in process order."""
    if jax.process_count() == 1:
        return tree
    counts = multihost_utils.process_allgather(np.array(rows))
    most = int(counts.max())

    def gather(x):
        # As bytes: jax would convert f64 to f32 and i64 to i32.
        padded = np.zeros((most, *x.shape[1:]), x.dtype)
        padded[:rows] = x
        raw = padded.reshape(most, -1).view(np.uint8)
        raw = np.asarray(multihost_utils.process_allgather(raw))
        parts = [np.ascontiguousarray(raw[p, :n]) for p, n in enumerate(counts)]
        return np.concatenate([part.view(x.dtype).reshape(-1, *x.shape[1:]) for part in parts])

    return jax.tree.map(gather, tree)


@functools.cache
def _compiled_view(
    resize: int, crop: int | tuple[int, int], one_by_one: bool | None, mean: tuple, std: tuple
) -> Callable:
    options = {"resize": resize, "crop": crop, "one_by_one": one_by_one, "mean": mean, "std": std}
    return jax.jit(partial(center_view, **options))
