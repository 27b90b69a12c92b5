"""Inputs of a step besides its crops: schedule values, masks, drop-path key."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dinotwins_jax.losses.base import WeightedSum
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.streams import DROP_PATH, MASKS, stream
from dinotwins_jax.training.masks import draw_masks


class StepInputs(NamedTuple):
    """hparams: of the contract of a loss, see `losses.base.Loss`.
    drop_key: of drop path in this step; ids: i32[B], place of each image in the global batch.
    """

    hparams: dict
    drop_key: jax.Array
    ids: jax.Array

    @property
    def hidden(self) -> jax.Array | None:
        """bool[B, 2, N], patches of the global crops that the student does not see."""
        masked = self.hparams["masked"]
        return None if masked is None else masked.where


def step_inputs(
    loss: WeightedSum,
    backbone: VisionTransformer,
    schedules: dict[str, Callable],
    seed: int,
    step: jax.Array,
    crops: dict,
    axis_name: str | None,
) -> StepInputs:
    """The inputs of step i32[], a function of (seed, step) alone; crops: arrays or their shapes."""
    ids = image_ids(crops["global_crops"].shape[0], axis_name)
    hparams = {name: schedule(step) for name, schedule in schedules.items()}
    hparams |= {"step": step, "axis_name": axis_name, "masked": None}
    if loss.masks is not None:
        grid = backbone.grid(crops["global_crops"].shape[2:4])
        images = len(ids) * (1 if axis_name is None else jax.lax.axis_size(axis_name))
        key = jax.random.fold_in(stream(seed, MASKS), step)
        hparams["masked"] = draw_masks(loss.masks, grid, key, ids, images)
    return StepInputs(hparams, jax.random.fold_in(stream(seed, DROP_PATH), step), ids)


def image_ids(local_batch: int, axis_name: str | None) -> jax.Array:
    """i32[B], position of each image in the global batch, from which random keys are derived."""
    offset = 0 if axis_name is None else jax.lax.axis_index(axis_name) * local_batch
    return offset + jnp.arange(local_batch)
