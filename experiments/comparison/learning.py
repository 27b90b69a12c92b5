"""Learning curves of a comparison: held-out training images against images seen."""

from pathlib import Path

import numpy as np

from dinotwins_jax.evals.curves import series
from dinotwins_jax.evals.names import monitor_title
from experiments.comparison.lines import Panel, draw_lines
from experiments.comparison.outcome import read_log

METRICS = ("monitor/knn_top1", "monitor/ridge_top1", "monitor/ridge_map")


def learning_curves(
    workdirs: dict[str, list[Path]], batches: dict[str, int]
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """{metric: {method: (images seen f64[n], values f64[seeds, n])}} of the metrics that the runs logged,
    at the steps that all seeds of a method have.

    Args:
      workdirs: method -> its runs by seed; batches: images in a step of each method.
    """
    found: dict[str, dict] = {}
    for method, runs in workdirs.items():
        logs = [read_log(run) for run in runs]
        for metric in METRICS:
            curves = [dict(zip(*series(log, metric), strict=True)) for log in logs]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            if steps:
                values = np.array([[curve[step] for step in steps] for curve in curves])
                of = np.array(steps) * batches[method], values
                found.setdefault(metric, {})[method] = of
    return found


def draw_learning(path: Path, workdirs: dict[str, list[Path]], batches: dict[str, int]) -> None:
    """Draws `learning_curves`, a panel a metric; nothing where no run was monitored."""
    panels = [
        Panel(f"{monitor_title(metric)}, held-out training images, in %", "images seen", rows)
        for metric, rows in learning_curves(workdirs, batches).items()
    ]
    if panels:
        draw_lines(path, panels)
