"""What is evaluated: the weights of a run beside untrained ones, how images are shown to them, features.

Between the config and evals/, which do not see it.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jax

from dinotwins_jax.build import Run
from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.evals import dense
from dinotwins_jax.evals.features import (
    VERSION,
    View,
    backbone_embed,
    backbone_features,
    extract,
    pixel_embed,
)
from dinotwins_jax.evals.probes import PROBES, ProbeOptions, with_labels
from dinotwins_jax.files import replace_text
from dinotwins_jax.models.vit import as_pair


class Subject(NamedTuple):
    """The weights to evaluate, and the untrained ones that they are compared with."""

    teacher: object  # parameters of the backbone
    random: object
    step: int  # of training


def from_checkpoint(run: Run, config, workdir: Path, which: str = "latest") -> Subject:
    """The teacher of a run's checkpoint.

    Args:
      which: "latest", "best" by config.checkpoint.best_metric, or a step.
    Raises:
      ValueError, FileNotFoundError: there is no such checkpoint.
    """
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"no checkpoints in {workdir}: the run has not come so far yet")
    best = config.checkpoint.best_metric, config.checkpoint.best_mode
    with Checkpoints(workdir, 1, *best, read_only=True) as checkpoints:
        if checkpoints.latest() is None:
            raise ValueError(f"{checkpoints.path} is empty: the run has not come so far yet")
        like = run.placement.abstract(jax.eval_shape(run.fresh_state))
        state, _ = checkpoints.restore(like, chosen_step(checkpoints, which))
    teacher = run.placement.whole(state.teacher_params["backbone"])
    return Subject(teacher, run.random_backbone(), int(state.step))


def chosen_step(checkpoints: Checkpoints, which: str) -> int | None:
    """The step that is meant, None for the latest that is whole."""
    if which == "latest":
        return None
    step = checkpoints.best() if which == "best" else int(which) if which.isdigit() else None
    if step not in checkpoints.steps():
        raise ValueError(
            f"--checkpoint is '{which}': choose latest, best (of those with the metric "
            f"config.checkpoint.best_metric) or one of the steps {checkpoints.steps()}"
        )
    return step


def eval_view(run: Run, config) -> View:
    """How the probes see an image."""
    crop = config.views.global_size
    crop = crop if isinstance(crop, int) else tuple(crop)
    resize = max(config.evals.resize, *as_pair(crop))
    put = run.placement.put_images
    return View(resize, crop, run.canvas_size, config.evals.batch_size, put)


def look_at(run: Run, config, count: int) -> dense.Looked:
    """Test images at config.evals.attention_size, rounded down to whole patches."""
    grid = config.evals.attention_size // run.backbone.patch_size
    side = grid * run.backbone.patch_size
    # The attention of all blocks is on the device at once: at most 3e7 numbers a head.
    batch = max(1, min(config.evals.batch_size, round(3e7 / (grid**4 * run.backbone.depth))))
    view = View(side, side, run.canvas_size, batch, run.placement.put_images)
    return dense.look_at(run.probe_sources[1], view, count=count)


class Features:
    """The features of all rows, extracted when a task first asks for them."""

    def __init__(self, run: Run, config, subject: Subject, cache: Path, data: list[str]):
        options = {"n_last_blocks": config.evals.n_last_blocks}
        compiled = backbone_features(run.backbone, **options)
        options["mean_patch"] = config.evals.mean_patch
        self.embeds = {
            "teacher": backbone_embed(run.backbone, subject.teacher, compiled, **options),
            "random weights": backbone_embed(run.backbone, subject.random, compiled, **options),
            "raw pixels": pixel_embed(),
        }
        self._sources, self._view = run.probe_sources, eval_view(run, config)
        # Several processes must do the same: a file that one of them finds could part them.
        self._cache = cache if jax.process_count() == 1 else None
        self._data, self._found = data, None

    def probe(self, task: str, row: str, options: ProbeOptions) -> dict[str, dict]:
        """{task: scores} of one row; those of the baselines are kept, since many runs share them."""
        embed = self.embeds[row]
        key = json.dumps(
            [VERSION, task, embed.identity, embed.linear, options, self._view[:4], self._data]
        )
        name = f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        path = None if row == "teacher" or self._cache is None else self._cache / name
        if path is not None and path.is_file():
            return json.loads(path.read_text())
        scores = PROBES[task](embed, *self.labelled()[row], options)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(scores) + "\n")
        return scores

    def labelled(self) -> dict[str, tuple]:
        """{row: (train, test)} as Labelled."""
        if self._found is None:
            splits = []
            for source, data in zip(self._sources, self._data, strict=True):
                found, indices = extract(
                    self.embeds, source, self._view, cache=self._cache, data=data
                )
                splits.append({row: with_labels(x, indices, source) for row, x in found.items()})
            self._found = {row: tuple(split[row] for split in splits) for row in self.embeds}
        return self._found
