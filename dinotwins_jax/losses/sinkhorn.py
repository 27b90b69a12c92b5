"""Sinkhorn-Knopp: assigns every prototype an equal share of the batch (arXiv:2006.09882, eq. 3)."""

import jax
import jax.numpy as jnp

# In units of the temperature: e^-60 beside 1 is nothing, and e^-87 is float32's smallest number.
_DEEPEST = 60.0


def sinkhorn_knopp(
    teacher_logits: jax.Array,
    temp: jax.Array | float,
    num_iters: int = 3,
    weight: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Soft assignments whose rows sum to 1 and whose columns converge to a sum of B / K.

        Q = exp(teacher_logits / temp); Q /= sum(Q)
        num_iters times:  Q[:, k] /= K * sum_B Q[:, k];  Q[b] /= B * sum_K Q[b]
        return B * Q

    Args:
      teacher_logits: [B, K]; every view of an image is a row of its own.
      temp: softmax temperature, > 0.
      weight: [B], 0 for padding rows, which are ignored and get zeros. None: all count.
      axis_name: mapped axis of the batch, under pmap.
    Returns:
      f32[B, K], without gradient.
    Source: dinov2 loss/dino_clstoken_loss.py and ibot_patch_loss.py, sinkhorn_knopp_teacher.
    Differs: the largest logit is subtracted before the exponential, which only avoids overflow. A row
      whose largest logit lies more than 60 temperatures below is raised to there: its entries would all
      become zero and leave it without an assignment, in the official code with NaN.
    """
    if teacher_logits.ndim != 2 or num_iters < 1:
        raise ValueError(
            f"teacher_logits {teacher_logits.shape} must be [B, K], num_iters {num_iters} at least 1"
        )

    def total(x):
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    logits = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32)) / temp
    real = jnp.ones(len(logits)) if weight is None else (weight > 0).astype(jnp.float32)
    B, K = total(jnp.sum(real)), logits.shape[1]
    peak = jnp.max(jnp.where(real[:, None] > 0, logits, -jnp.inf))
    peak = peak if axis_name is None else jax.lax.pmax(peak, axis_name)
    peak = jnp.minimum(peak, jnp.max(logits, axis=1, keepdims=True) + _DEEPEST)
    q = jnp.where(real[:, None] > 0, jnp.exp(logits - peak), 0.0)
    q = _share(q, total(jnp.sum(q)))
    for _ in range(num_iters):
        q = _share(q, K * total(jnp.sum(q, axis=0)))
        q = _share(q, B * jnp.sum(q, axis=1, keepdims=True))
    return B * q


def _share(q, total):
    """q / total, or 0 where total is 0."""
    return jnp.where(total > 0, q / jnp.where(total > 0, total, 1.0), 0.0)
