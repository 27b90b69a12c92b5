"""BYOL: the student predicts the teacher's projection of the other view (arXiv:2006.07733)."""

import jax
import jax.numpy as jnp

from dinotwins_jax.losses.base import HeadSpec, Loss
from dinotwins_jax.models.heads import BarlowProjector, l2_normalise


def byol_loss(predictions: jax.Array, targets: jax.Array, axis_name: str | None = None):
    """sum over the two views v of mean_B |unit(predictions[:, v]) - unit(targets[:, 1 - v])|^2.

    Args:
      predictions: [B, 2, D] of the student; targets: [B, 2, D] of the teacher, without gradient.
      axis_name: mapped axis of the batch, under pmap.
    Returns:
      f32[] in [0, 8]; 4 for unrelated features.
    Source: eq. 2, and its sum with the views exchanged; byol byol_experiment.py, loss_fn.
    Differs: the smallest norm is 1e-12, there 1e-6.
    """
    if predictions.shape != targets.shape or predictions.ndim != 3 or predictions.shape[1] != 2:
        raise ValueError(
            f"predictions {predictions.shape} and targets {targets.shape} must have one shape [B, 2, D]"
        )
    targets = l2_normalise(jax.lax.stop_gradient(targets))[:, ::-1]
    cosine = jnp.sum(l2_normalise(predictions) * targets, axis=-1)
    loss = jnp.mean(jnp.sum(2.0 - 2.0 * cosine, axis=1))
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def byol(
    *, hidden_dim: int = 4096, out_dim: int = 256, norm_output: bool = False, head: str = "byol"
) -> Loss:
    """The BYOL loss term: a projector with a teacher, followed by the student's predictor.

    Args:
      hidden_dim, out_dim: widths of both MLPs (Linear, batch norm, ReLU, Linear).
      norm_output: add a batch norm without parameters after each, as MoCo v3 does for a ViT, which has no
        batch norm itself (arXiv:2104.02057).
      head: name of the projector; the predictor is "<head>_predictor".
    Differs: the hidden layer's Linear has no bias, which the following batch norm would cancel; there is no
      teacher temperature and no loss on local crops: views are the two global crops.
    """
    predictor = f"{head}_predictor"
    mlp = BarlowProjector((hidden_dim, out_dim), norm_output)
    heads = {
        head: HeadSpec(mlp, crops="global", per_view=True),
        predictor: HeadSpec(mlp, input=head, teacher=False, per_view=True),
    }

    def apply(loss_state, student, teacher, hparams):
        loss = byol_loss(student[predictor], teacher[head], hparams["axis_name"])
        return loss, loss_state, {}

    return Loss(heads, dict, apply)
