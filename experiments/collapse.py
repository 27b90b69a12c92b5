"""Collapse of DINO with centering alone and sharpening alone, and none with both.

    python -m experiments.collapse --out=runs/collapse --plot=docs/collapse.png      # 6 minutes on 2 cores

Section 5.3 and figure 7 of arXiv:2104.14294 on the embedded scenes. With centering alone the teacher
drifts to the uniform distribution: its entropy goes to ln K. With sharpening alone one prototype takes
all images: the entropy of the batch's mean distribution goes to 0. In both cases KL(teacher, student),
which is what the student can still learn, goes to 0. Together they prevent both collapses.
"""

from pathlib import Path

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from configs import dino
from dinotwins_jax.build import build
from dinotwins_jax.cli import exit_code
from dinotwins_jax.evals.table import markdown
from dinotwins_jax.lock import locked
from dinotwins_jax.logs.writers import Log
from dinotwins_jax.train import fit
from dinotwins_jax.workdir import claim_workdir
from experiments.comparison.outcome import read_log

# Centering subtracts a running mean from the teacher's logits; sharpening is a teacher temperature below
# the student's.
WITHOUT_SHARPENING = {"teacher.temp": 0.1, "teacher.warmup_temp": 0.1}
WITHOUT_CENTERING = {"loss.dino.center_momentum": 1.0}  # the center stays at its initial value, 0
VARIANTS = {
    "both": {},
    "centering alone": WITHOUT_SHARPENING,
    "sharpening alone": WITHOUT_CENTERING,
}
METRICS = {
    "teacher_entropy": "entropy of a teacher's distribution / ln K\n1: uniform",
    "marginal_entropy": "entropy of the batch's mean / ln K\n0: one prototype for all images",
    "kl": "KL(teacher, student), nats\n0: nothing left to learn",
}


def config_of(variant: str, steps: int) -> ConfigDict:
    """Config of the demo's DINO without the parts that the variant lacks."""
    config = dino.get_config("demo")
    config.update_from_flattened_dict(
        {"total_steps": steps}
        | {"log.every_steps": max(steps // 40, 1), "log.collapse_warnings": False}
        | {"evals.monitor_every_epochs": 0.0, "checkpoint.every_epochs": config.total_epochs}
        | VARIANTS[variant]
    )
    return config


def curves(out: Path, config_of) -> dict[str, dict[str, list[float]]]:
    """Trains the variants in folders of OUT, resuming them; returns {variant: {"step" or metric: values}}.

    Args: config_of: variant -> config.
    """
    found = {}
    for variant in VARIANTS:
        config, workdir = config_of(variant), out / variant.replace(" ", "_")
        with locked(workdir), Log(workdir, (), "", config.to_dict()) as log:
            claim_workdir(workdir, config.to_dict())
            fit(build(config), config, workdir, log)
        rows = read_log(workdir)
        found[variant] = {"step": [row["step"] for row in rows]} | {
            metric: [row[f"dino/{metric}"] for row in rows] for metric in METRICS
        }
    return found


def table(found: dict) -> str:
    """Table of means over the last quarter of each run."""
    rows = [["", *METRICS]]
    for variant, of in found.items():
        last = {m: np.mean(of[m][-max(len(of[m]) // 4, 1) :]) for m in METRICS}
        rows.append([variant, *(f"{last[m]:.3f}" for m in METRICS)])
    return markdown(rows)


def draw(found: dict, path: Path) -> None:
    """Draws one panel per metric, with one line per variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dinotwins_jax.evals.curves import COLOURS

    figure = Figure(figsize=(9.6, 2.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(METRICS))
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for (variant, of), colour in zip(found.items(), COLOURS, strict=False):
            axis.plot(of["step"], of[metric], color=colour, lw=1.6, label=variant)
        axis.set_title(title, fontsize=8.5, loc="left")
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", color="#d8dee4", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(length=0, labelsize=8)
        axis.set_xlabel("step", fontsize=8)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def define_flags() -> None:
    flags.DEFINE_string("out", "runs/collapse", "Folder of the trainings")
    flags.DEFINE_integer("steps", 400, "Of each", lower_bound=4)
    flags.DEFINE_string("plot", None, "File for the picture")


def main(argv) -> int:
    del argv
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS

    def work():
        found = curves(Path(given.out), lambda variant: config_of(variant, given.steps))
        print(table(found))
        if given.plot:
            draw(found, Path(given.plot))

    return exit_code(work)


if __name__ == "__main__":
    define_flags()
    app.run(main)
