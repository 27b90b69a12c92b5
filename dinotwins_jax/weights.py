"""Weights to evaluate: the teacher in a run's checkpoints, and random ones as the baseline."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dinotwins_jax.build import EvalRun, Run
from dinotwins_jax.checkpoint import Checkpoints, chosen_step
from dinotwins_jax.checkpoint_folder import folder_of_checkpoints
from dinotwins_jax.damage import check_shapes, paths
from dinotwins_jax.streams import INIT, stream
from dinotwins_jax.training.state import init_backbone


class EvalWeights(NamedTuple):
    """Parameters of the backbone to evaluate, and random ones as the baseline."""

    teacher: object
    random: object
    step: int  # of training


def teacher_of(workdir: Path, config, which: str = "latest") -> tuple[dict, int]:
    """The teacher's backbone in a run's checkpoint, as numpy arrays, and its step.

    Args:
      which: "latest", "best" by config.checkpoint.best_metric, or a step.
    Raises:
      ValueError, FileNotFoundError: there is no such checkpoint.
    """
    if not folder_of_checkpoints(workdir).is_dir():
        raise FileNotFoundError(f"no checkpoints in {workdir}: none has been saved yet")
    best = config.checkpoint.get("best_metric", ""), config.checkpoint.get("best_mode", "max")
    with Checkpoints(workdir, 1, *best, read_only=True) as checkpoints:
        if checkpoints.latest() is None:
            raise ValueError(f"{checkpoints.path} is empty: no checkpoint has been saved yet")
        return checkpoints.restore_teacher(chosen_step(checkpoints, which))


def from_checkpoint(
    run: Run | EvalRun, config, workdir: Path, which: str = "latest"
) -> EvalWeights:
    """The teacher of a run's checkpoint; neither losses nor optimiser are needed.

    Raises:
      ValueError, FileNotFoundError: there is no such checkpoint, or it has another model.
    """
    teacher, step = teacher_of(workdir, config, which)
    backbone = with_mask_token(run.backbone, teacher)
    fresh = partial(init_backbone, backbone, stream(config.seed, INIT))
    check_parameters(backbone, teacher, step)
    return EvalWeights(run.placement.whole(teacher), fresh(), step)


def check_parameters(backbone, params, step: int) -> None:
    """Raises ValueError if the parameters of a checkpoint are not those of the backbone."""
    wanted = jax.eval_shape(partial(init_backbone, backbone, jax.random.key(0)))
    check_shapes(step, *({p: np.shape(x) for p, x in paths(tree)} for tree in (params, wanted)))


def with_mask_token(backbone, params):
    """The backbone with a mask token if the parameters have one, as training with masks leaves it."""
    return backbone.clone(mask_token="mask_token" in params)
