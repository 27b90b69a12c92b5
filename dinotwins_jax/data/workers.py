"""Process pool for tasks of many images: progress, a prompt stop, no orphans. No jax.

Processes, not threads, since encoding holds the GIL half of the time; spawned, not forked, since the
parent may hold threads and locks of other libraries.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import sharedctypes
from typing import Any

from dinotwins_jax.logs.terminal import image_bar

_POLL = 0.2  # seconds between two polls of the counters

_worker: dict[str, Any] = {}  # in a worker process: data shared by its tasks


class Stopped(Exception):
    """Raised in a worker whose task the parent has cancelled."""


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def pack(shared: Any) -> bytes:
    """Pickles the data that all tasks share. Raises ValueError if that fails."""
    try:
        return pickle.dumps(shared)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"the data source cannot be pickled: {error}") from None


def run(
    function: Callable, tasks: list[tuple[Any, list]], shared: bytes, workers: int, args: tuple
) -> None:
    """Calls function(key, items, shared, tick, *args) for every (key, items) of tasks.

    Args:
      function: a module-level function that calls tick() once per item; its result is ignored.
      shared: from `pack`; a worker unpacks it once.
      workers: processes, 0: one per core.
    Raises:
      OSError: a worker was killed.
      Any error of a task; then, and on KeyboardInterrupt, all other tasks are stopped at once.
    """
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    # Without locks: a process killed while holding one would block all others.
    counts, stop = sharedctypes.RawArray("i", len(tasks)), sharedctypes.RawValue("b", 0)
    executor = ProcessPoolExecutor(
        min(workers or num_cores(), len(tasks)), context, _start, (shared, counts, stop)
    )
    total = sum(len(items) for _, items in tasks)
    with image_bar() as bar:
        counted = bar.add_task("", total=total)
        try:
            # The workers inherit the mask, so that only this process handles Ctrl-C.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                todo = {
                    executor.submit(_call, function, k, *task, args) for k, task in enumerate(tasks)
                }
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            while todo:
                done, todo = wait(todo, _POLL, FIRST_COMPLETED)
                bar.update(counted, completed=sum(counts))
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise OSError(
                "a worker process died, most often because memory ran out: try fewer --workers"
            ) from None
        finally:
            stop.value = 1
            executor.shutdown(cancel_futures=True)


def _start(shared: bytes, counts, stop) -> None:
    """Initialises a worker process."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker.update(packed=shared, counts=counts, stop=stop)


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()  # a killed parent cannot send a message
    os._exit(1)


def _call(function: Callable, task: int, key: Any, items: list, args: tuple) -> None:
    def tick() -> None:
        if _worker["stop"].value:
            raise Stopped
        _worker["counts"][task] += 1

    if "packed" in _worker:  # here and not in _start, so that its errors reach the parent
        _worker["shared"] = pickle.loads(_worker.pop("packed"))
    function(key, items, _worker["shared"], tick, *args)
