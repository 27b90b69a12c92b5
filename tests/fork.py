"""What a fork of one's own would hold: losses from outside the package, named 'fork:…' in a config."""

import jax.numpy as jnp

from dinotwins_jax.losses import Loss


def alignment(*, scale: float = 1.0, nan_from_step: int = -1) -> Loss:
    """Mean squared distance of the two views' class tokens; NaN from a step on, if asked."""

    def apply(loss_state, student, teacher, hparams):
        cls = student["cls"]
        loss = scale * jnp.mean((cls[:, 0] - cls[:, 1]) ** 2)
        sick = (nan_from_step >= 0) & (hparams["step"] >= nan_from_step)
        return jnp.where(sick, jnp.nan, loss), {"calls": loss_state["calls"] + 1}, {}

    return Loss({}, lambda: {"calls": jnp.zeros((), jnp.int32)}, apply)
