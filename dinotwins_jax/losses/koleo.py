"""KoLeo: features spread over the sphere (arXiv:1806.03198, eq. 2; DINOv2, arXiv:2304.07193, section 4)."""

import jax
import jax.numpy as jnp

from dinotwins_jax.losses.base import Loss, global_batch
from dinotwins_jax.models.heads import l2_normalise

# Squared distance below which unit features count as the same image: the precision of float32.
_SAME = 1e-9


def koleo_loss(x: jax.Array, axis_name: str | None = None, eps: float = 1e-8) -> jax.Array:
    """-mean_B log(distance to the nearest other feature + eps), of unit features.

    Args:
      x: [B, D], one row per image, not normalised.
      axis_name: mapped axis of the batch, under pmap; neighbours come from the global batch.
    Returns:
      f32[]; 0 if no image has a neighbour.
    Source: dinov2 loss/koleo_loss.py, KoLeoLoss.forward.
    Differs: neighbours come from the global batch, not from one device; always float32; an equal
      feature (a duplicate image) is not a neighbour; there the official gradient is of the order of 1e7.
    """
    if x.ndim != 2:
        raise ValueError(f"x {x.shape} must be [B, D], one row per image")
    x = l2_normalise(x, eps)
    others, first = global_batch(x, axis_name)
    apart = _squared_distances(jax.lax.stop_gradient(x), jax.lax.stop_gradient(others))
    myself = (first + jnp.arange(len(x)))[:, None] == jnp.arange(len(others))
    apart = jnp.where(myself | (apart < _SAME), jnp.inf, apart)
    nearest = jnp.argmin(apart, axis=1)
    alone = jnp.min(apart, axis=1) == jnp.inf
    difference = jnp.where(alone[:, None], 1.0, x - others[nearest] + eps)
    distance = jnp.sqrt(jnp.sum(difference**2, axis=1))
    loss = -jnp.mean(jnp.where(alone, 0.0, jnp.log(distance + eps)))
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def _squared_distances(x, others):
    """f32[B, G] of x [B, D] and others [G, D], relative to their mean, to keep digits."""
    mean = jnp.mean(others, axis=0)
    x, others = x - mean, others - mean
    products = jnp.matmul(x, others.T, precision="highest")
    return jnp.sum(x * x, axis=1)[:, None] + jnp.sum(others * others, axis=1) - 2.0 * products


def koleo() -> Loss:
    """The KoLeo loss term, on the student's class token of each global crop, before any head.

    The loss is the sum over the two crops, as in dinov2 train/ssl_meta_arch.py, where its weight is 0.1.
    """

    def apply(loss_state, student, teacher, hparams):
        loss = sum(koleo_loss(student["cls"][:, v], hparams["axis_name"]) for v in range(2))
        return loss, loss_state, {}

    return Loss({}, dict, apply)
