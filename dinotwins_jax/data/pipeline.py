"""Input pipeline: seeded order, decoding, a fixed canvas, prefetching. Host only, no jax.

The order is a stream of positions: epoch 0's shuffle, epoch 1's, and so on, without gaps. Global
batch b holds positions [b * batch_size, (b + 1) * batch_size), so a batch may span two epochs, and no
record is ever dropped. The record at a position depends only on (seed, position, number of records),
not on worker processes, threads, the number of hosts or the step of a resume.

A batch: "image" u8[B, S, S, C], each image in the top left corner, padded with zeros; "size" i32[B,
2], its (height, width); "index" i32[B], the record it came from; "bad" i32[B], the unreadable record
that it replaces, else -1. In training also "place" i32[B, 2], (epoch, position in it), from which random
keys are derived.
"""

import atexit
import re
import signal
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from dinotwins_jax.data.base import BadImage, Source, read_image
from dinotwins_jax.data.decode import Batch, BatchLoader, read_or_black, read_or_next
from dinotwins_jax.data.decode import fit_canvas as fit_canvas  # re-exported
from dinotwins_jax.data.workers import num_cores

BATCHES_AHEAD = 2  # enough to hide decoding; each is batch_size * canvas_size^2 * C bytes


def train_batches(
    source: Source,
    *,
    batch_size: int,
    canvas_size: int,
    seed: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> "TrainBatches":
    """Endless shuffled batches; order and contents are in the module docstring.

    An unreadable record is replaced by the next readable one (index + 1, wrapping round).

    Args:
      batch_size: of the global batch. A process gets rows [p * L, (p + 1) * L) of it, L =
        batch_size / process_count.
      canvas_size: side S in pixels.
      seed: of the order, >= 0.
      num_workers: decoding processes; 0 decodes in threads of this process, which PIL runs in
        parallel.
      num_threads: decoding threads per process; by default its share of the cores.
    Raises:
      ValueError: an empty source, or inconsistent numbers.
      BadImage: from next(), after MAX_REPLACEMENT_TRIES unreadable records in a row.
      ChildProcessError: from next(), when the system killed a worker process.
    """
    _check_source(source, batch_size, canvas_size)
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in [0, {process_count})")
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide by {process_count} processes")
    if seed < 0 or num_workers < 0:
        raise ValueError(f"seed and num_workers must not be negative: got {seed} and {num_workers}")
    local = batch_size // process_count
    rows = slice(process_index * local, (process_index + 1) * local)
    threads = num_threads or max(1, num_cores() // max(1, num_workers))
    load = BatchLoader(source, canvas_size, threads, read_or_next)
    order = {"batch_size": batch_size, "seed": seed, "rows": rows}
    return TrainBatches(len(source), load, **order, num_workers=num_workers)


class TrainBatches(Iterator[Batch]):
    """Iterator that train_batches returns. Threads and processes start at the first next()."""

    def __init__(
        self,
        num_records: int,
        load: BatchLoader,
        *,
        batch_size: int,
        seed: int,
        rows: slice,
        num_workers: int,
    ):
        self._num_records = num_records
        self._load = load
        self._batch_size = batch_size
        self._seed = seed
        self._rows = rows
        self._num_workers = num_workers
        self._position = 0  # of the next global batch, in the stream
        self._batches: Any = None
        # grain's own clean-up at exit runs too late and prints a traceback; this one runs earlier.
        atexit.register(_close_if_alive, weakref.ref(self))

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = next(self._batches)
        except RuntimeError as err:  # raised by grain for a dead worker
            if "terminated unexpectedly" not in str(err):
                raise
            code = "".join(re.findall(r"exit code (-?\d+)", str(err))[:1]) or "unknown"
            raise ChildProcessError(
                f"a decoding process died (exit code {code}; -9: killed by the system, mostly when "
                f"memory runs out): lower config.data.num_workers, now {self._num_workers}"
            ) from None
        self._position += self._batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        """Position of the stream: small, JSON-serialisable, the same in every process."""
        return {"position": self._position, "seed": self._seed, "num_records": self._num_records}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues exactly where get_state() was called, for any workers, hosts or batch size.

        Raises ValueError if the state has another seed or number of records.
        """
        for key, mine in (("seed", self._seed), ("num_records", self._num_records)):
            if state[key] != mine:
                raise ValueError(f"the saved data order has {key} {state[key]}, this run {mine}")
        self.close()
        self._position = int(state["position"])

    def close(self) -> None:
        """Stops threads and worker processes; the next next() starts new ones."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        self._load.close()

    def _start(self) -> Any:
        # grain's shuffle of epoch e uses seed + e: epoch 1 of seed 0 would equal epoch 0 of seed 1.
        (mixed,) = np.random.SeedSequence(self._seed).generate_state(1)
        stream = grain.MapDataset.range(self._num_records).shuffle(int(mixed))
        # Practically endless: repeat() alone is too long to be sliced at batch size 1.
        stream = stream.repeat(sys.maxsize // 4 // self._num_records)
        load = partial(_load_at, self._load, self._rows, self._position, self._num_records)
        batches = stream[self._position :].batch(self._batch_size).map_with_index(load)
        dataset = batches.to_iter_dataset(grain.ReadOptions(BATCHES_AHEAD, BATCHES_AHEAD))
        if self._num_workers:
            if (
                not flags.FLAGS.is_parsed()
            ):  # grain reads absl flags, which a notebook does not parse
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self._num_workers)
            dataset = dataset.mp_prefetch(options, _leave_ctrl_c_to_the_parent)
        return iter(dataset)


def _leave_ctrl_c_to_the_parent(worker: int, workers: int) -> None:
    """Ignores SIGINT, which a terminal sends to all processes; the parent handles it."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _load_at(load, rows: slice, start: int, num_records: int, number: int, ids) -> Batch:
    """Loads this process' rows of the global batch of `ids`, batch `number` after `start`."""
    positions = start + number * len(ids) + np.arange(len(ids))[rows]
    place = np.stack(np.divmod(positions, num_records), axis=1).astype(np.int32)
    return load(ids[rows]) | {"place": place}


def _close_if_alive(batches: "weakref.ref[TrainBatches]") -> None:
    if (alive := batches()) is not None:
        alive.close()


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    canvas_size: int,
    indices: Sequence[int] | np.ndarray | None = None,
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """All records once, in order, or those of `indices`; all batches are full.

    A batch also has "valid" bool[B]: False for the repeats of the last record that fill up the
    last batch, and for an unreadable record, whose row is a black canvas and marked in "bad".

    Raises ValueError for an empty source or an index outside it.
    """
    _check_source(source, batch_size, canvas_size)
    ids = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    outside = ids[(ids < 0) | (ids >= len(source))]
    if outside.size:
        raise ValueError(f"index {outside[0]} is not in [0, {len(source)})")
    load = BatchLoader(source, canvas_size, num_threads or num_cores(), read_or_black)
    return _in_order(ids, load, batch_size)


def _in_order(
    ids: np.ndarray, load: Callable[[np.ndarray], Batch], batch_size: int
) -> Iterator[Batch]:
    def full_batch(b: int) -> Batch:
        batch = load(ids[b * batch_size : (b + 1) * batch_size])
        batch["valid"] = batch["bad"] < 0
        short = batch_size - len(batch["bad"])
        for key, array in batch.items() if short else ():
            batch[key] = np.concatenate([array, np.repeat(array[-1:], short, axis=0)])
        batch["valid"][batch_size - short :] = False
        return batch

    dataset = grain.MapDataset.range(-(-len(ids) // batch_size)).map(full_batch)
    batches = iter(dataset.to_iter_dataset(grain.ReadOptions(BATCHES_AHEAD, BATCHES_AHEAD)))
    try:
        yield from batches
    finally:
        batches.close()


class BadImageLog:
    """Counts the distinct unreadable records in batches.

    add() logs each new one once, and raises ValueError for more than max(1, limit * len(source)) of
    them: a single broken file never stops a run, a broken data set does. limit is a fraction.
    """

    def __init__(self, source: Source, limit: float = 0.01):
        self._source = source
        self._limit = limit
        self.indices: list[int] = []  # distinct, in order of appearance

    def add(self, batch: Batch) -> None:
        """Counts the records in batch["bad"], i32[B]."""
        bad = np.asarray(batch["bad"])
        for i in dict.fromkeys(bad[bad >= 0].tolist()):
            if i not in self.indices:
                self.indices.append(i)
                logging.warning("unreadable image, left out: %s", self._describe(i))
        count, total = len(self.indices), len(self._source)
        if count > max(1, self._limit * total):
            first = "; ".join(self._describe(i) for i in self.indices[:3])
            raise ValueError(
                f"{count} of {total} images unreadable ({count / total:.1%}), "
                f"more than {self._limit:.2%}: the first are {first}"
            )

    def _describe(self, i: int) -> str:
        try:
            read_image(self._source, i)
        except BadImage as err:
            return str(err)
        return f"{self._source.name(i)}: unreadable in its batch, readable now"


def _check_source(source: Source, batch_size: int, canvas_size: int) -> None:
    if batch_size < 1 or canvas_size < 1:
        raise ValueError(f"batch_size {batch_size} and canvas_size {canvas_size} must be positive")
    if len(source) == 0:
        raise ValueError("the data source is empty: it has no images")
