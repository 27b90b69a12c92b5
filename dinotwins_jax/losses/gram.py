"""Gram anchoring: keeps patch similarities close to an earlier teacher's (DINOv3, arXiv:2508.10104)."""

import jax
import jax.numpy as jnp

from dinotwins_jax.losses.base import Anchor, Loss, global_batch
from dinotwins_jax.models.heads import l2_normalise

LEVELS = ("image", "batch")


def gram_loss(
    student_patches: jax.Array,
    teacher_patches: jax.Array,
    level: str = "image",
    normalise: bool = True,
    remove_negatives: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """Mean squared difference of two Gram matrices of patch features.

        level "image": mean over images and pairs of patches (i, j) of one image of
                       (<s_i, s_j> - <t_i, t_j>)^2
        level "batch": the same over all pairs of patches of the batch

    Args:
      student_patches, teacher_patches: [B, N, D]; no gradient reaches the teacher's.
      normalise: features on the unit sphere, so that products are cosines.
      remove_negatives: both matrices are clipped at 0 first.
      axis_name: mapped axis of the batch, under pmap; level "batch" pairs patches of all devices.
    Returns:
      f32[].
    Source: DINOv3 section 4.2, its loss L_Gram; dinov3 loss/gram_loss.py, GramLoss.forward.
    """
    if student_patches.shape != teacher_patches.shape or student_patches.ndim != 3:
        raise ValueError(
            f"student_patches {student_patches.shape} and teacher_patches {teacher_patches.shape} must "
            "have one shape [B, N, D]"
        )
    _check_level(level)
    teacher_patches = jax.lax.stop_gradient(teacher_patches)

    def gram(x):
        x = x.astype(jnp.float32)
        x = l2_normalise(x) if normalise else x
        if level == "image":
            products = jnp.einsum("bnd,bmd->bnm", x, x)
        else:
            x = x.reshape(-1, x.shape[-1])
            products = x @ global_batch(x, axis_name)[0].T
        return jnp.maximum(products, 0.0) if remove_negatives else products

    loss = jnp.mean((gram(student_patches) - gram(teacher_patches)) ** 2)
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def _check_level(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"level is '{level}': choose {' or '.join(LEVELS)}")


def gram(
    *,
    start_steps: int = 0,
    refresh_steps: int = 0,
    max_refreshes: int = 3,
    level: str = "image",
    normalise: bool = True,
    remove_negatives: bool = False,
) -> Loss:
    """The Gram anchoring loss term, on all patch tokens of the global crops.

    Args:
      start_steps: the loss is 0 before; then the anchor is the teacher of that step.
      refresh_steps: interval in steps at which the anchor is reset to the current teacher; 0: never.
      max_refreshes: largest number of resets.
      level, normalise, remove_negatives: as `gram_loss`.
    Differs: the anchor sees the crops that the student sees; the official stage feeds it undistorted ones
      of twice the size and shrinks their feature map. The loss has its weight from the first step on;
      there the weight rises over one epoch, and the first anchor is a checkpoint that the user names.
    """
    _check_level(level)
    if min(start_steps, refresh_steps, max_refreshes) < 0:
        raise ValueError("start, refresh and max_refreshes must not be negative")

    def apply(loss_state, student, teacher, hparams):
        def crops(features):
            patches = features["patches"]["global"]
            return patches.reshape(-1, *patches.shape[2:])

        loss = gram_loss(
            crops(student),
            crops(teacher["anchor"]),
            level,
            normalise,
            remove_negatives,
            hparams["axis_name"],
        )
        return jnp.where(hparams["step"] >= start_steps, loss, 0.0), loss_state, {}

    return Loss(
        {},
        dict,
        apply,
        anchor=Anchor(start_steps, refresh_steps, max_refreshes),
        patches=("student",),
    )
