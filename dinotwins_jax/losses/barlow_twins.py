"""Barlow Twins: self-supervised learning via redundancy reduction (arXiv:2103.03230)."""

import jax
import jax.numpy as jnp

from dinotwins_jax.losses.base import HeadSpec, Loss
from dinotwins_jax.losses.columns import batch_product
from dinotwins_jax.models.heads import BarlowProjector, batch_moments


def cross_correlation(z_a, z_b, axis_name=None) -> jax.Array:
    """Cross-correlation matrix of the features of two views over the global batch.

    Args:
      z_a, z_b: [B, D] projector outputs of the two views, not normalised.
      axis_name: mapped axis of the batch, under pmap.
    Returns:
      f32[D, D] with c[i, j] = mean_B(norm(z_a)[:, i] * norm(z_b)[:, j]); norm is a batch norm without
      affine part: biased variance, eps 1e-5.
    Raises:
      ValueError: shapes differ.
    Source: eq. 2; barlowtwins main.py, BarlowTwins.forward.
    Differs: the gradient is that of the global batch's loss; the official all_reduce is outside of
      autograd, which scales the gradient by 1 / number of devices.
    """
    if z_a.shape != z_b.shape or z_a.ndim != 2:
        raise ValueError(f"z_a {z_a.shape} and z_b {z_b.shape} must have one shape [B, D]")

    def normalise(z):
        z = z.astype(jnp.float32)
        mean, var, _ = batch_moments(z, axis_name)
        return (z - mean) * jax.lax.rsqrt(var + 1e-5)

    return batch_product(normalise(z_a), normalise(z_b), axis_name)


def barlow_twins_loss(
    z_a, z_b, lambd=0.0051, axis_name=None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum_i (c_ii - 1)^2 + lambd * sum_{i != j} c_ij^2.

    Args: z_a, z_b: [B, D], not normalised; lambd: weight of the redundancy term, dimensionless.
    Returns:
      f32[] (a sum over D and D^2 entries: hundreds are normal), {"on_diag", "off_diag"} unweighted.
    Source: eq. 1; barlowtwins main.py, BarlowTwins.forward.
    """
    c = cross_correlation(z_a, z_b, axis_name)
    on_diag, off_diag = _terms(c)
    return on_diag + lambd * off_diag, {"on_diag": on_diag, "off_diag": off_diag}


@jax.custom_jvp
def _terms(c):
    on_diag = jnp.sum((jnp.diagonal(c) - 1.0) ** 2)
    # Masked instead of sum(c^2) - sum(diag^2), which loses digits once the diagonal dominates.
    off_diag = jnp.sum(jnp.where(jnp.eye(c.shape[0], dtype=bool), 0.0, c) ** 2)
    return on_diag, off_diag


@_terms.defjvp
def _terms_jvp(primals, tangents):
    """One pass over the matrix in the gradient, where JAX's own scatters into the diagonal."""
    (c,), (dc,) = primals, tangents
    diagonal = jnp.eye(c.shape[0], dtype=bool)
    on_diag = jnp.sum(jnp.where(diagonal, 2.0 * (c - 1.0), 0.0) * dc)
    off_diag = jnp.sum(jnp.where(diagonal, 0.0, 2.0 * c) * dc)
    return _terms(c), (on_diag, off_diag)


def barlow_twins(
    *,
    hidden_dims: tuple[int, ...] = (8192, 8192, 8192),
    lambd: float = 0.0051,
    pair: str = "student_student",
    views: str = "global",
    head: str = "barlow_twins",
) -> Loss:
    """The Barlow Twins loss term; averages over pairs of views.

    Args:
      hidden_dims: widths of the projector, the last one is D.
      pair: "student_student", or "student_teacher": one view comes from the teacher, whose projector
        is an EMA copy that uses its own batch statistics.
      views: "global", or "all": local crops are paired too (with every other view; with
        student_teacher, with every other teacher view).
    Raises:
      ValueError: unknown pair or views, or no widths.
    Differs: the official code has one student and two views, which is pair="student_student",
      views="global"; the other choices are for a hybrid that the paper's abstract leaves open.
    """
    if pair not in ("student_student", "student_teacher"):
        raise ValueError(f"pair is '{pair}': choose student_student or student_teacher")
    if views not in ("global", "all"):
        raise ValueError(f"views is '{views}': choose global or all")
    if not hidden_dims:
        raise ValueError(
            "hidden_dims is empty: name at least the output width, such as (8192, 8192, 8192)"
        )
    with_teacher = pair == "student_teacher"
    projector = BarlowProjector(tuple(hidden_dims))
    spec = HeadSpec(projector, crops=views, teacher=with_teacher, per_view=True)

    def apply(loss_state, student, teacher, hparams):
        axis_name = hparams["axis_name"]
        z = student[head]  # [B, V, D]
        pairs = _pairs(z, jax.lax.stop_gradient(teacher[head]) if with_teacher else None)
        correlations = [cross_correlation(a, b, axis_name) for a, b in pairs]
        terms = [_terms(c) for c in correlations]
        on_diag, off_diag = (sum(t) / len(terms) for t in zip(*terms, strict=True))
        D = z.shape[-1]
        c = jax.lax.stop_gradient(correlations[0])
        metrics = {
            "on_diag": on_diag,
            "off_diag": off_diag,
            "diag_mean": jnp.mean(jnp.diagonal(c)),  # 1: the views agree; 0: they share nothing
            "off_diag_rms": jnp.sqrt(jax.lax.stop_gradient(off_diag) / max(D * (D - 1), 1)),
        }
        return on_diag + lambd * off_diag, loss_state, metrics

    return Loss({head: spec}, dict, apply)


def _pairs(z, teacher_z):
    """Yields pairs of [B, D] to correlate, never a view with itself."""
    V = z.shape[1]
    if teacher_z is None:
        return [(z[:, i], z[:, j]) for i in range(V) for j in range(i + 1, V)]
    return [(z[:, v], teacher_z[:, t]) for v in range(V) for t in range(2) if t != v]
