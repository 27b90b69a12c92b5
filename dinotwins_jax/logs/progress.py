"""Progress display of training: a live view in a terminal, plain lines elsewhere."""

import math
import time
from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from dinotwins_jax.logs.metrics import DIAGNOSTICS
from dinotwins_jax.logs.terminal import watched

_REFRESH = 0.5  # smallest interval between refreshes of the live view, seconds
_TREND = 32  # logs that a trend shows
_BLOCKS = "▁▂▃▄▅▆▇█"


class Progress:
    """Step, losses, images/s and time left, refreshed at every step; outside a terminal, one line per log.

    A context manager; what is printed or warned inside appears above the live view.
    """

    def __init__(self, total: int, done: int):
        self._total, self._first = total, done + 1
        self._start, self._done = (
            time.perf_counter(),
            done,
        )  # start of the estimate of the time left
        self._view = _View(total, done) if watched() else None

    def advance(self, step: int) -> None:
        if step == self._first:  # includes compilation, so it is not timed
            self._start, self._done = time.perf_counter(), step
        if self._view:
            self._view.advance(step, self._left(step))

    def show(self, step: int, means: dict[str, float]) -> None:
        """Refresh the figures: losses as means since the last log."""
        if self._view:
            self._view.show(means)
            return
        losses = {
            k.removesuffix("/loss"): f"{v:.3f}" for k, v in means.items() if k.endswith("loss")
        }
        figures = losses | {
            "img/s": f"{means['images_per_s']:.0f}",
            "data wait": f"{means['data_wait']:.0%}",
        }
        shown = "  ".join(f"{k} {v}" for k, v in figures.items())
        print(f"step {step}/{self._total}  {shown}  left {self._left(step)}", flush=True)

    def print(self, text: str) -> None:
        """Prints a line, above the live view if there is one."""
        print(text, flush=True)

    def _left(self, step: int) -> str:
        """Time until the last step, "0:04:30"."""
        rate = (time.perf_counter() - self._start) / max(step - self._done, 1)
        minutes, seconds = divmod(round(rate * (self._total - step)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

    def __enter__(self) -> "Progress":
        if self._view:
            self._view.open()
        return self

    def __exit__(self, *_) -> None:
        if self._view:
            self._view.close()


class _View:
    """Drawn by the caller, at most every _REFRESH seconds: a thread would take a core from training."""

    def __init__(self, total: int, done: int):
        self._total, self._first, self._step, self._left = total, done, done, "?"
        self._means: dict[str, float] = {}
        self._trends: dict[str, deque] = {}
        self._drawn = -math.inf
        self._live = Live(
            console=Console(stderr=True), auto_refresh=False, get_renderable=self._picture
        )

    def open(self) -> None:
        self._live.start(refresh=True)
        self._live.console.show_cursor(True)  # a killed run could not restore it

    def close(self) -> None:
        self._live.stop()

    def advance(self, step: int, left: str) -> None:
        self._step, self._left = step, left
        if time.perf_counter() - self._drawn >= _REFRESH:
            self._draw()

    def show(self, means: dict[str, float]) -> None:
        self._means = means
        for name in means:
            if _is_shown(name):
                self._trends.setdefault(name, deque(maxlen=_TREND)).append(means[name])

    def _draw(self) -> None:
        self._live.refresh()
        self._drawn = time.perf_counter()

    def _picture(self) -> Group:
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        figures = f"{self._step / self._total:.0%}  left {self._left}"
        if self._step == self._first:
            figures = "compiling the first step"
        elif self._means:
            speed, wait = (self._means[name] for name in ("images_per_s", "data_wait"))
            figures += f"  {speed:.0f} img/s  data wait {wait:.0%}"
        bar = ProgressBar(total=self._total, completed=self._step)
        head.add_row(f"step {self._step}/{self._total}", bar, figures)
        body = Table.grid(padding=(0, 2))
        for justify in ("left", "right", "left"):
            body.add_column(justify=justify, no_wrap=True)
        for name, trend in self._trends.items():
            body.add_row(name, f"{self._means.get(name, math.nan):.4g}", sparkline(trend))
        return Group(head, body)


def _is_shown(name: str) -> bool:
    """Whether a metric is displayed: losses, collapse diagnostics, monitor scores."""
    return (
        name.endswith("loss")
        or name.rpartition("/")[2] in DIAGNOSTICS
        or name.startswith("monitor/")
    )


def sparkline(values) -> str:
    """One block per value, from the lowest ▁ to the highest █; a gap for non-finite values."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] if math.isfinite(v) else " " for v in values)
