"""Progress of an evaluation: a line a finished task, and in a terminal a live line of the running one."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dinotwins_jax.logs.terminal import watched

_QUIET_S = 30.0  # longest silence outside a terminal while images are counted, seconds


class TaskProgress:
    """Names the tasks that run, a context manager.

    In a terminal the last line shows the running task, its part, images and time; what is printed
    appears above it. Everywhere, a line tells each finished task with its seconds.

    Args:
      names: of the tasks, in their order.
    """

    def __init__(self, names: Sequence[str]):
        self._names, self._name, self._part, self._said = list(names), "", "", 0.0
        self.seconds: dict[str, float] = {}
        self._bar = None
        if names and watched():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[images]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                refresh_per_second=2,
                transient=True,
            )
            self._shown = self._bar.add_task("", visible=False, total=None, images="")

    def __enter__(self) -> "TaskProgress":
        if self._names:
            print(f"evaluation: {', '.join(self._names)}", flush=True)
        if self._bar:
            self._bar.start()
            self._bar.console.show_cursor(True)  # a killed run could not restore it
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    @contextlib.contextmanager
    def task(self, name: str) -> Iterator[Callable[[str], None]]:
        """Times the block as task `name`, also where it raises; yields what takes a word for its line."""
        self._name, self._part, start = name, "", time.perf_counter()
        self._said = start
        self._show(None)
        if self._bar:
            self._bar.reset(self._shown)  # of its time
        words = [""]
        try:
            yield words.append
        finally:
            seconds = self.seconds[name] = time.perf_counter() - start
            print(f"  {name:<14}{seconds:8.1f} s   {words[-1]}".rstrip(), flush=True)

    def parts(self, names: Iterable[str]) -> Iterator[str]:
        """Yields the parts of the task, such as the features that are scored, as each begins."""
        for self._part in names:
            self._show(None)
            yield self._part

    def images(self, done: int, total: int) -> None:
        """Counts the images of the running part."""
        if self._bar:
            self._show((done, total) if done < total else None)
        elif done < total and time.perf_counter() - self._said >= _QUIET_S:
            self._said = time.perf_counter()
            print(f"  {self._title()}: {done:,} of {total:,} images", flush=True)

    def _title(self) -> str:
        return f"{self._name}, {self._part}" if self._part else self._name

    def _show(self, images: tuple[int, int] | None) -> None:
        if not self._bar:
            return
        number = self._names.index(self._name) + 1 if self._name in self._names else 0
        done, total = images or (0, None)
        self._bar.tasks[0].total = total  # None, a moving bar, is nothing that `update` can set
        self._bar.update(
            self._shown,
            description=f"{number}/{len(self._names)} {self._title()}",
            visible=True,
            completed=done,
            images=f"{done:,}/{total:,} img" if images else "",
        )
