"""iBOT: the student predicts the teacher's output at masked patches (arXiv:2111.07832)."""

import jax
import jax.numpy as jnp

from dinotwins_jax.losses.base import HeadSpec, Loss, Masks
from dinotwins_jax.losses.dino import check_centering, teacher_probabilities
from dinotwins_jax.losses.sinkhorn import sinkhorn_knopp
from dinotwins_jax.models.heads import DINOHead


def ibot_patch_loss(
    student_logits, teacher_logits, center, masks, student_temp, teacher_temp, axis_name=None
) -> jax.Array:
    """Cross-entropy between the teacher's and the student's distribution for each masked patch.

        p = softmax((teacher_logits - center) / teacher_temp)                      # no gradient
        loss = mean over crops of mean over masked patches of -sum_K p * log_softmax(student / student_temp)

    Args:
      student_logits, teacher_logits: [B, N, K], a row per crop; teacher's raw (not centered).
      center: f32[K]; masks: bool[B, N], True where masked; a crop without masked patches counts as 0.
      student_temp, teacher_temp: softmax temperatures, > 0.
      axis_name: mapped axis of the crops, under pmap.
    Returns:
      f32[].
    Source: iBOT eq. 2; dinov2 loss/ibot_patch_loss.py, iBOTPatchLoss.forward.
    """
    if student_logits.shape != teacher_logits.shape or masks.shape != student_logits.shape[:2]:
        raise ValueError(
            f"student_logits {student_logits.shape}, teacher_logits {teacher_logits.shape} and masks "
            f"{masks.shape} do not fit: expected [B, N, K] twice and [B, N]"
        )
    K = center.shape[0]
    weight = masks / jnp.maximum(jnp.sum(masks, axis=1, keepdims=True), 1)
    targets = teacher_probabilities(teacher_logits.reshape(-1, K), center, teacher_temp)
    return masked_cross_entropy(
        student_logits.reshape(-1, K),
        targets,
        weight.reshape(-1),
        len(masks),
        student_temp,
        axis_name,
    )


def masked_cross_entropy(student_logits, targets, weight, crops, student_temp, axis_name=None):
    """sum_M weight * cross-entropy / crops, f32[].

    Args: student_logits [M, K]; targets f32[M, K], rows sum to 1; weight f32[M]; crops: on this device.
    """
    student = student_logits.astype(jnp.float32) / student_temp
    # -sum_K p log_softmax(s) = logsumexp(s) - <p, s>, as p sums to one.
    cross_entropy = jax.nn.logsumexp(student, axis=-1) - jnp.sum(targets * student, axis=-1)
    loss = jnp.sum(weight * jnp.where(weight > 0, cross_entropy, 0.0)) / crops
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def update_center(center, teacher_logits, weight, momentum, axis_name=None) -> jax.Array:
    """momentum * center + (1 - momentum) * mean of the masked patches' teacher logits.

    Args: center f32[K]; teacher_logits [M, K]; weight f32[M], 0 for padding.
    """
    real = (weight > 0).astype(jnp.float32)
    total, count = real @ teacher_logits.astype(jnp.float32), jnp.sum(real)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    mean = total / jnp.maximum(count, 1.0)
    new = momentum * center + (1.0 - momentum) * mean
    return jax.lax.stop_gradient(jnp.where(count > 0, new, center))


def ibot(
    *,
    out_dim: int = 65536,
    hidden_dim: int = 2048,
    bottleneck_dim: int = 256,
    norm_last_layer: bool = True,
    weight_norm: bool = True,
    shared_head: str = "",
    student_temp: float = 0.1,
    centering: str = "ema",
    center_momentum: float = 0.9,
    image_fraction: float = 0.5,
    mask_ratio: tuple[float, float] = (0.1, 0.5),
    min_patches: int = 4,
    head: str = "ibot",
) -> Loss:
    """The iBOT loss term; hparams["teacher_temp"] comes from the schedule.

    Args:
      out_dim, hidden_dim, bottleneck_dim, norm_last_layer, weight_norm: of its own head, as `DINOHead`.
      shared_head: a head of another loss, such as "dino", to use instead; out_dim must be equal.
      student_temp, center_momentum: as in losses/dino.py. centering: "ema" | "sinkhorn_knopp".
      image_fraction, mask_ratio, min_patches: see `Masks`.
    Raises:
      ValueError: temperature, momentum, centering or ratio outside of its range.
    """
    check_centering(centering, student_temp, center_momentum)
    if not 0 < image_fraction <= 1 or not 0 <= mask_ratio[0] <= mask_ratio[1] < 1:
        raise ValueError(
            f"image_fraction {image_fraction} must lie in (0, 1], mask_ratio {tuple(mask_ratio)} must "
            "rise within [0, 1)"
        )
    own = DINOHead(out_dim, hidden_dim, bottleneck_dim, norm_last_layer, weight_norm=weight_norm)
    spec = HeadSpec(None if shared_head else own, input="masked", shares=shared_head)

    def init():
        return {"center": jnp.zeros((out_dim,), jnp.float32)} if centering == "ema" else {}

    def apply(loss_state, student, teacher, hparams):
        axis_name, temp, masked = hparams["axis_name"], hparams["teacher_temp"], hparams["masked"]
        if (K := student[head].shape[-1]) != out_dim:
            raise ValueError(f"out_dim is {out_dim}: the shared head '{shared_head}' has {K}")
        if centering == "ema":
            center = loss_state["center"]
            targets = teacher_probabilities(teacher[head], center, temp)
            new = update_center(center, teacher[head], masked.weight, center_momentum, axis_name)
            loss_state = {"center": new}
        else:
            targets = sinkhorn_knopp(teacher[head], temp, weight=masked.weight, axis_name=axis_name)
        crops = masked.where.shape[0] * masked.where.shape[1]
        loss = masked_cross_entropy(
            student[head], targets, masked.weight, crops, student_temp, axis_name
        )
        hidden = jnp.mean(masked.where.astype(jnp.float32))
        hidden = hidden if axis_name is None else jax.lax.pmean(hidden, axis_name)
        return loss, loss_state, {"hidden": hidden}

    masks = Masks(image_fraction, tuple(mask_ratio), min_patches)
    return Loss({head: spec}, init, apply, masks=masks)
