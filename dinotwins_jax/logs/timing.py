"""Wall time of a run by phase."""

import contextlib
import time
from collections.abc import Iterator


class Phases:
    """Seconds by phase; time outside all phases counts only towards the total."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    @contextlib.contextmanager
    def within(self, outer: str, name: str, really: bool = True) -> Iterator[None]:
        """Moves the time of the block from the enclosing phase `outer` to `name`, if `really`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if really:
                self.move(time.perf_counter() - start, outer, name)

    def move(self, seconds: float, outer: str, name: str) -> None:
        """Moves seconds from the enclosing phase `outer` to `name`."""
        self.add(outer, -seconds)
        self.add(name, seconds)

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds to `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def total(self) -> float:
        """Seconds since construction."""
        return time.perf_counter() - self._start

    def text(self) -> str:
        """Such as "312 s: 4 import, 20 first step, 225 steps"."""
        parts = [f"{seconds:.0f} {name}" for name, seconds in self.seconds.items()]
        return f"{self.total():.0f} s: {', '.join(parts)}"
