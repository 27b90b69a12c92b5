"""Runs tasks on all cores, each of them many images: progress, a prompt stop, no orphans. No jax.

Processes and not threads, since encoding holds the interpreter's lock half of the time; spawned and
not forked, since the parent may hold threads and locks of other libraries.
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

_POLL = 0.2  # seconds between two looks at the counters

_worker: dict[str, Any] = {}  # of a worker process: what its tasks share


class Stopped(Exception):
    """A worker gave its task up because the parent asked for it."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def pack(shared: Any) -> bytes:
    """What all tasks share, as it travels to the workers. Raises ValueError if it cannot."""
    try:
        return pickle.dumps(shared)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"the data source does not pickle: {error}") from None


def run(
    function: Callable, tasks: list[tuple[Any, list]], shared: bytes, workers: int, args: tuple
) -> None:
    """Calls function(key, items, shared, tick, *args) for every (key, items) of tasks.

    Args:
      function: of a module, calls tick() once an item; its result is not used.
      shared: of `pack`; a worker unpacks it once.
      workers: processes, 0: one a core.
    Raises:
      OSError: a worker was killed.
      Whatever a task raises; all others are stopped then, and on KeyboardInterrupt, in the middle.
    """
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    # Without locks: a process that is killed while it holds one would stop all others.
    counts, stop = sharedctypes.RawArray("i", len(tasks)), sharedctypes.RawValue("b", 0)
    executor = ProcessPoolExecutor(
        min(workers or num_cores(), len(tasks)), context, _start, (shared, counts, stop)
    )
    total = sum(len(items) for _, items in tasks)
    with image_bar() as bar:
        counted = bar.add_task("", total=total)
        try:
            # The workers inherit the mask, so that Ctrl-C reaches this process alone.
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
                "a worker process died, most often killed for want of memory: try fewer --workers"
            ) from None
        finally:
            stop.value = 1
            executor.shutdown(cancel_futures=True)


def _start(shared: bytes, counts, stop) -> None:
    """In a worker, once."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker.update(packed=shared, counts=counts, stop=stop)


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()  # a parent that is killed cannot say so
    os._exit(1)


def _call(function: Callable, task: int, key: Any, items: list, args: tuple) -> None:
    def tick() -> None:
        if _worker["stop"].value:
            raise Stopped
        _worker["counts"][task] += 1

    if "packed" in _worker:  # here and not in _start, so that its errors reach the parent
        _worker["shared"] = pickle.loads(_worker.pop("packed"))
    function(key, items, _worker["shared"], tick, *args)
