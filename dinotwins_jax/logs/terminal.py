"""Interactive-terminal detection, and a progress bar for images. No jax."""

import os
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def watched() -> bool:
    """Whether stdout and stderr are an interactive terminal that can move its cursor.

    A notebook's "!" commands have a terminal too, but its cells cannot move the cursor: False.
    """
    return (
        sys.stdout.isatty()
        and sys.stderr.isatty()
        and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        and "JPY_PARENT_PID" not in os.environ  # Jupyter's and Colab's kernels set it
        and "utf" in (sys.stderr.encoding or "").lower()
    )


def image_bar() -> Progress:
    """Progress bar that counts images, a context manager; shows nothing outside a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("img"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=2,
        disable=not watched(),
    )
