"""A figure of lines with bands: mean and standard deviation over training seeds."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinotwins_jax.evals.curves import COLOURS, INK, LINE, MUTED


class Panel(NamedTuple):
    """Axes with one line a row.

    rows: name -> (x f64[n], values f64[seeds, n]); a name in `muted` is a grey, dashed line.
    ticks: (places, texts) of a logarithmic x axis; None: a linear one.
    """

    title: str
    xlabel: str
    rows: dict[str, tuple[np.ndarray, np.ndarray]]
    ticks: tuple[list[float], list[str]] | None = None
    muted: tuple[str, ...] = ()


def draw_lines(path: Path, panels: list[Panel]) -> None:
    """Draws the panels side by side; lines are named at their ends."""
    width = 1 / len(panels)
    figure = Figure(figsize=(6.4 * len(panels), 4.2), facecolor="white")
    FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
        _draw(figure.add_axes(((i + 0.1) * width, 0.13, 0.68 * width, 0.77)), panel)
    figure.savefig(path, dpi=150, format="png")


def _draw(axes, panel: Panel) -> None:
    ends = []
    for i, (row, (x, values)) in enumerate(panel.rows.items()):
        mean, std = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0.0
        muted = row in panel.muted
        colour = MUTED if muted else COLOURS[i % len(COLOURS)]
        axes.plot(x, mean, "--" if muted else "-o", color=colour, lw=1.6, ms=3.5)
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, lw=0)
        ends.append((float(mean[-1]), float(x[-1]), row, colour))
    low, high = axes.get_ylim()
    above = -np.inf
    for value, x, row, colour in sorted(ends):  # labels that would overlap are moved up
        above = max(value, above + 0.05 * (high - low))
        axes.annotate(row, (x, above), (7, 0), textcoords="offset points", color=colour,
                      fontsize=9, va="center", annotation_clip=False)  # fmt: skip
    if panel.ticks is not None:
        axes.set_xscale("log")
        axes.set_xticks(*panel.ticks)
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=LINE, lw=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    axes.set_xlabel(panel.xlabel, fontsize=9, color=MUTED)
    axes.set_title(panel.title, fontsize=10, color=INK, loc="left")
