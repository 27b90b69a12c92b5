"""Training steps on ready-made crops, for tests."""

import jax.numpy as jnp

from dinotwins_jax.training.step import make_train_step


def step_on_crops(backbone, loss, tx, schedules, seed=0, match_gradients_to=""):
    """The step whose batch is {"global_crops", "local_crops"} itself; schedules may be plain numbers."""
    schedules = {
        name: value if callable(value) else lambda step, value=value: jnp.float32(value)
        for name, value in schedules.items()
    }
    return make_train_step(
        backbone=backbone,
        loss=loss,
        make_crops=lambda batch: batch,
        tx=tx,
        schedules=schedules,
        seed=seed,
        match_gradients_to=match_gradients_to,
    )
