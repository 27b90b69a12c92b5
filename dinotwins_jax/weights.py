"""Weights to evaluate: the teacher in a run's checkpoints, and random ones as the baseline."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dinotwins_jax.build import EvalRun, Run
from dinotwins_jax.checkpoint import Checkpoints, chosen_step
from dinotwins_jax.damage import check_shapes, paths
from dinotwins_jax.streams import INIT, stream
from dinotwins_jax.training.state import init_backbone


class EvalWeights(NamedTuple):
    """Parameters of the backbone to evaluate, and random ones as the baseline."""

    teacher: object
    random: object
    step: int  # of training


def from_checkpoint(
    run: Run | EvalRun, config, workdir: Path, which: str = "latest"
) -> EvalWeights:
    """The teacher of a run's checkpoint; neither losses nor optimiser are needed.

    Args:
      which: "latest", "best" by config.checkpoint.best_metric, or a step.
    Raises:
      ValueError, FileNotFoundError: there is no such checkpoint, or it has another model.
    """
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"no checkpoints in {workdir}: none has been saved yet")
    best = config.checkpoint.best_metric, config.checkpoint.best_mode
    with Checkpoints(workdir, 1, *best, read_only=True) as checkpoints:
        if checkpoints.latest() is None:
            raise ValueError(f"{checkpoints.path} is empty: no checkpoint has been saved yet")
        teacher, step = checkpoints.restore_teacher(chosen_step(checkpoints, which))
    backbone = with_mask_token(run.backbone, teacher)
    fresh = partial(init_backbone, backbone, stream(config.seed, INIT))
    saved, wanted = (
        {p: np.shape(x) for p, x in paths(t)} for t in (teacher, jax.eval_shape(fresh))
    )
    check_shapes(step, saved, wanted)
    return EvalWeights(run.placement.whole(teacher), fresh(), step)


def with_mask_token(backbone, params):
    """The backbone with a mask token if the parameters have one, as training with masks leaves it."""
    return backbone.clone(mask_token="mask_token" in params)
