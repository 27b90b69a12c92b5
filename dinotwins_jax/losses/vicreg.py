"""VICReg: invariance, variance and covariance of two views (arXiv:2105.04906)."""

import jax
import jax.numpy as jnp

from dinotwins_jax.losses.base import HeadSpec, Loss
from dinotwins_jax.losses.columns import batch_product
from dinotwins_jax.models.heads import BarlowProjector, batch_moments


def vicreg_loss(
    z_a: jax.Array,
    z_b: jax.Array,
    similarity: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    axis_name: str | None = None,
):
    """similarity * invariance + variance * hinge + covariance * redundancy.

        invariance = mean_{B, D} (z_a - z_b)^2
        hinge      = mean over both views of mean_D max(0, 1 - sqrt(var_B(z) + 1e-4))
        redundancy = sum over both views of sum_{i != j} cov(z)_ij^2 / D     (var, cov: over B - 1)

    Args:
      z_a, z_b: [B, D] projections of the two views, not normalised; the global batch has B > 1.
      axis_name: mapped axis of the batch, under pmap.
    Returns:
      f32[], {"invariance", "variance", "covariance"} unweighted.
    Source: eq. 1-6; vicreg main_vicreg.py, VICReg.forward, which halves the sum of the two hinges.
    """
    if z_a.shape != z_b.shape or z_a.ndim != 2:
        raise ValueError(f"z_a {z_a.shape} and z_b {z_b.shape} must have one shape [B, D]")
    z = jnp.stack([z_a, z_b]).astype(jnp.float32)  # [2, B, D]
    D = z.shape[-1]
    mean, var, count = batch_moments(z, axis_name)
    if count < 2:
        raise ValueError("VICReg needs at least two images to compute a variance")

    def everyone(x):
        return x if axis_name is None else jax.lax.pmean(x, axis_name)

    unbiased = count / (count - 1)
    std = jnp.sqrt(var[:, 0] * unbiased + 1e-4)  # [2, D]
    z0 = z - mean
    cov = jnp.stack([batch_product(view, view, axis_name) for view in z0]) * unbiased
    off_diagonal = jnp.where(jnp.eye(D, dtype=bool), 0.0, cov)
    parts = {
        "invariance": everyone(jnp.mean((z[0] - z[1]) ** 2)),
        "variance": jnp.mean(jnp.maximum(0.0, 1.0 - std)),
        "covariance": jnp.sum(off_diagonal**2) / D,
    }
    weights = {"invariance": similarity, "variance": variance, "covariance": covariance}
    return sum(weights[name] * part for name, part in parts.items()), parts


def vicreg(
    *,
    hidden_dims: tuple[int, ...] = (8192, 8192, 8192),
    similarity: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    head: str = "vicreg",
) -> Loss:
    """The VICReg loss term, on the student's two global crops; it uses no teacher.

    Args: hidden_dims: widths of the expander, the last one is D; the rest as `vicreg_loss`.
    """
    spec = HeadSpec(
        BarlowProjector(tuple(hidden_dims)), crops="global", teacher=False, per_view=True
    )

    def apply(loss_state, student, teacher, hparams):
        z = student[head]
        loss, metrics = vicreg_loss(
            z[:, 0], z[:, 1], similarity, variance, covariance, hparams["axis_name"]
        )
        return loss, loss_state, metrics

    return Loss({head: spec}, dict, apply)
