"""Whether anybody watches, and a bar for long work on images. No jax."""

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
    """Whether stdout and stderr are a terminal that can move its cursor, and nobody's pipe or file.

    What a notebook runs by "!" has a terminal too, by name: its cells only grow.
    """
    return (
        sys.stdout.isatty()
        and sys.stderr.isatty()
        and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        and "JPY_PARENT_PID" not in os.environ  # Jupyter's and Colab's kernels set it
        and "utf" in (sys.stderr.encoding or "").lower()
    )


def image_bar() -> Progress:
    """A bar that counts images, to be used in `with`; nothing where nobody watches."""
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
