"""Progress of work on a known number of images: a bar in a terminal, a line now and then elsewhere."""

import time

from dinotwins_jax.logs.terminal import image_bar, watched

_EVERY = 10.0  # seconds between two lines


class Count:
    """A context manager; advance(n) after each batch of n images."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._start = self._shown = time.perf_counter()
        self._bar = image_bar()
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> "Count":
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        self._done = min(self._done + images, self._total)
        self._bar.update(self._task, completed=self._done)
        now = time.perf_counter()
        if not watched() and now - self._shown >= _EVERY:
            self._shown = now
            speed = self._done / (now - self._start)
            print(
                f"{self._what}: {self._done:,} of {self._total:,} images, {speed:.0f}/s", flush=True
            )
