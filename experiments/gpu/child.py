"""Child side of a part: a process that measures items and reports each as a line of JSON.

It ends with everything that it started as soon as its parent does, which holds its stdin.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from experiments.gpu.budget import needs
from experiments.gpu.plan import Item
from experiments.gpu.reason import of_error

_AT_ONCE = 4  # compilations at most


class Job(NamedTuple):
    """What the parent asks for.

    end: by time.monotonic(), which all processes of a machine share; alone: one item after the other; out:
    folder for files; data: of the user, or ""; toy: tiny sizes; found: the report so far; log: file with
    this process' output.
    """

    items: list[Item]
    end: float
    alone: bool
    out: str
    data: str
    toy: bool
    found: dict
    log: str

    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()


def serve(
    measure: Callable[[Item, Any, Job], dict],
    prepare: Callable[[Item, Job], Any] = lambda item, job: None,
    cores: int = os.cpu_count() or 1,
) -> None:
    """Measures the items of the job on stdin that fit into its time, in their order.

    Args:
      measure: (item, what prepare returned, job) -> figures, all of them JSON.
      prepare: compiles; called in threads for several items at once, unless the job is alone.
      cores: of the host; a compilation takes four.
    """
    values = json.loads(sys.stdin.readline())
    job = Job(**values | {"items": [Item(*item) for item in values["items"]]})
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries

    def tell(values: dict) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    at_once = 1 if job.alone else max(1, min(_AT_ONCE, cores // 4))
    waiting, done = list(job.items), []
    with ThreadPoolExecutor(at_once) as pool:
        while wave := _next(waiting, done, job.left(), at_once):
            waiting = [item for item in waiting if item not in wave]
            tell({"working": [item.name for item in wave]})
            start = time.monotonic()
            ready = [pool.submit(prepare, item, job) for item in wave]
            for future in ready:
                future.exception()  # until all are compiled: measuring needs the machine
            prepared = time.monotonic() - start
            for item, future in zip(wave, ready, strict=True):
                start = time.monotonic()
                try:
                    found = {"figures": measure(item, future.result(), job)}
                except Exception as error:
                    found = {"reason": of_error(error)}
                taken = prepared + time.monotonic() - start
                if "figures" in found and item.paces:
                    done.append((item.seconds, taken))
                tell({"item": item.name, "seconds": round(taken, 2)} | found)
    tell({"ended": True})  # taking down a device's runtime can take long, or fail


def _next(waiting: list[Item], done: list, left: float, at_once: int) -> list[Item]:
    """The next items that fit into the time."""
    return [item for item in waiting if needs(item.seconds, done) <= left][:at_once]


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)
