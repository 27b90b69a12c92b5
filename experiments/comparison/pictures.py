"""The pictures of a comparison: curves of all runs, attention side by side."""

from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from dinotwins_jax.build import build
from dinotwins_jax.evals import curves
from dinotwins_jax.evals.attention import attention_comparison
from dinotwins_jax.evals.dense import titles
from dinotwins_jax.evals.localisation import attention_maps
from dinotwins_jax.evaluation import picture_images
from dinotwins_jax.weights import from_checkpoint
from experiments.comparison.outcome import read_log

PANELS = [
    "monitor/knn_top1",
    "monitor/ridge_top1",
    "monitor/ridge_map",
    "effective_rank",
    "dino/loss",
    "dino/kl",
    "dino/teacher_entropy",
    "barlow_twins/loss",
    ("balance/barlow_twins/weighted_norm", "balance/dino/weighted_norm"),
    "balance/cos/barlow_twins,dino",
]


def draw_curves(path: Path, workdirs: dict[str, list[Path]]) -> None:
    """Draws all panels with data, one colour per method, one line per seed."""
    logs = {method: [read_log(run) for run in runs] for method, runs in workdirs.items()}

    def drawn(panel):
        keys = (panel,) if isinstance(panel, str) else panel
        return any(len(curves.series(log, keys[0])[0]) for of in logs.values() for log in of)

    figure = curves.draw_curves(logs, [panel for panel in PANELS if drawn(panel)])
    figure.savefig(path, dpi=150, format="png")


def draw_attention(path: Path, workdirs: dict[str, Path], configs: dict[str, ConfigDict]) -> None:
    """Draws the teachers' attention on the same test images."""
    maps = {}
    for method, workdir in workdirs.items():
        config = configs[method]
        run = build(config)
        images = picture_images(run, config, config.evals.pictures or 4)
        teacher = from_checkpoint(run, config, workdir).teacher
        maps[method] = images.map(partial(attention_maps, run.backbone, teacher))[0]
    attention_comparison(path, images.pixels, maps, titles(images))
