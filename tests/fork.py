"""External losses for tests, named 'fork:…' in a config."""

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


def late(*, start_steps: int = 0) -> Loss:
    """A zero loss that records its start step."""

    def apply(loss_state, student, teacher, hparams):
        return 0.0 * jnp.sum(student["cls"]), loss_state, {}

    return Loss({}, lambda: {"start_steps": jnp.int32(start_steps)}, apply)


def patchwise(*, patches: tuple[str, ...] = ("student", "teacher")) -> Loss:
    """Squared distance of student and teacher patches in the first view, plus their squared batch mean."""

    def apply(loss_state, student, teacher, hparams):
        ours, theirs = student["patches"]["global"][:, 0], teacher["patches"]["global"][:, 0]
        mean = jnp.mean(ours, axis=0)
        loss = jnp.mean((ours - theirs) ** 2) + jnp.mean(mean**2)
        return loss, loss_state, {}

    return Loss({}, dict, apply, patches=patches)


def infinite_gradient() -> Loss:
    """The root of a sum of squares that is zero: 0, with a gradient that is NaN."""

    def apply(loss_state, student, teacher, hparams):
        return jnp.sqrt(jnp.sum((0.0 * student["cls"]) ** 2)), loss_state, {}

    return Loss({}, dict, apply)
