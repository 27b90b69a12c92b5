"""SimCLR: contrasts two views of an image with all other images of the batch (arXiv:2002.05709)."""

import jax
import jax.numpy as jnp

from dinotwins_jax.losses.base import HeadSpec, Loss, global_batch
from dinotwins_jax.models.heads import BarlowProjector, l2_normalise


def nt_xent_loss(z: jax.Array, temp: float = 0.1, axis_name: str | None = None):
    """Normalised-temperature cross-entropy: each view identifies its partner among 2B - 1 others.

        l(i, j) = -log( exp(cos(z_i, z_j) / temp) / sum_{k != i} exp(cos(z_i, z_k) / temp) )
        loss = mean over all 2B ordered positive pairs

    Args:
      z: [B, 2, D] projections, not normalised.
      temp: temperature, > 0.
      axis_name: mapped axis of the batch, under pmap; the others come from the global batch.
    Returns:
      f32[], {"accuracy": share of views whose partner is the nearest}.
    Source: eq. 1 and algorithm 1; simclr objective.py, add_contrastive_loss.
    Differs: half of what that code computes, which adds the means over the two views where the paper's
      algorithm 1 averages over both. For its scale set the weight of the term to 2. The smallest norm
      is 1e-12, there 1e-6.
    """
    if z.ndim != 3 or z.shape[1] != 2:
        raise ValueError(f"z {z.shape} must be [B, 2, D]")
    z = l2_normalise(z)
    others, first = global_batch(z, axis_name)  # [G, 2, D]
    logits = jnp.einsum("bvd,gwd->bvgw", z, others) / temp
    B, G = len(z), len(others)
    image = first + jnp.arange(B)
    same_image = image[:, None] == jnp.arange(G)  # [B, G]
    view = jnp.eye(2, dtype=bool)
    myself = same_image[:, None, :, None] & view[:, None, :]
    partner = same_image[:, None, :, None] & ~view[:, None, :]
    logits = jnp.where(myself, -jnp.inf, logits).reshape(B, 2, -1)
    partner = partner.reshape(B, 2, -1)
    positive = jnp.sum(jnp.where(partner, logits, 0.0), axis=-1)
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - positive)
    accuracy = jnp.mean(jnp.take_along_axis(partner, jnp.argmax(logits, -1)[..., None], -1))
    if axis_name is not None:
        loss, accuracy = jax.lax.pmean((loss, accuracy), axis_name)
    return loss, {"accuracy": accuracy}


def simclr(
    *, hidden_dims: tuple[int, ...] = (2048, 2048, 128), temp: float = 0.1, head: str = "simclr"
) -> Loss:
    """The SimCLR loss term, on the student's two global crops; it uses no teacher.

    Args:
      hidden_dims: widths of the projector, the last one is D.
      temp: temperature of the softmax.
    Raises:
      ValueError: temperature not positive.
    Differs: the projector's last layer has no batch norm (the official third layer has one).
    """
    if temp <= 0:
        raise ValueError(f"temp is {temp}: it must be positive (0.1 in the paper)")
    spec = HeadSpec(
        BarlowProjector(tuple(hidden_dims)), crops="global", teacher=False, per_view=True
    )

    def apply(loss_state, student, teacher, hparams):
        loss, metrics = nt_xent_loss(student[head], temp, hparams["axis_name"])
        return loss, loss_state, metrics

    return Loss({head: spec}, dict, apply)
