"""DINO: self-distillation with no labels (arXiv:2104.14294, section 3 and algorithm 1)."""

import jax
import jax.numpy as jnp

from dinotwins_jax.losses.base import HeadSpec, Loss
from dinotwins_jax.losses.sinkhorn import sinkhorn_knopp
from dinotwins_jax.models.heads import DINOHead


def dino_loss(
    student_logits, teacher_logits, center, student_temp, teacher_temp, axis_name=None
) -> jax.Array:
    """Cross-entropy between the teacher's and the student's view of the same image.

        for t in teacher views (2 global), v in student views (2 global, then local), t != v:
            p = softmax((teacher_logits[:, t] - center) / teacher_temp)      # no gradient
            terms.append(mean_B(-sum_K p * log_softmax(student_logits[:, v] / student_temp)))
        loss = mean(terms)

    Args:
      student_logits: [B, V, K], V >= 2.
      teacher_logits: [B, 2, K], raw (not centered).
      center: f32[K], from the previous steps.
      student_temp, teacher_temp: softmax temperatures, > 0.
      axis_name: mapped axis to average over, under pmap.
    Returns:
      f32[].
    Raises:
      ValueError: shapes that do not fit.
    Source: eq. 1-3; dino main_dino.py, DINOLoss.forward.
    """
    B, V, K = student_logits.shape
    if teacher_logits.shape != (B, 2, K) or V < 2 or center.shape != (K,):
        raise ValueError(
            f"student_logits {student_logits.shape}, teacher_logits {teacher_logits.shape} and center "
            f"{center.shape} do not fit: expected [B, V >= 2, K], [B, 2, K] and [K]"
        )
    teacher = teacher_probabilities(teacher_logits, center, teacher_temp)
    return cross_view_entropy(student_logits, teacher, student_temp, axis_name)


def cross_view_entropy(student_logits, teacher, student_temp, axis_name=None) -> jax.Array:
    """`dino_loss` for given teacher distributions f32[B, 2, K] without gradient, whose rows sum to 1."""
    B, V, _ = student_logits.shape
    student = student_logits.astype(jnp.float32) / student_temp
    # -sum_K p log_softmax(s) = logsumexp(s) - <p, s>, as p sums to one: no log-softmax per pair.
    lse = jax.nn.logsumexp(student, axis=-1)  # [B, V]
    # A TPU would round the factors to bfloat16.
    agreement = jnp.einsum("btk,bvk->btv", teacher, student, precision="highest")
    cross_entropy = lse[:, None, :] - agreement  # [B, 2, V]
    other_view = ~jnp.eye(2, V, dtype=bool)
    loss = jnp.sum(jnp.where(other_view, cross_entropy, 0.0)) / (B * (2 * V - 2))
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def teacher_probabilities(teacher_logits, center, teacher_temp) -> jax.Array:
    """Centered and sharpened teacher distributions f32[…, K], without gradient."""
    logits = (teacher_logits.astype(jnp.float32) - center) / teacher_temp
    return jax.lax.stop_gradient(jax.nn.softmax(logits, axis=-1))


def update_center(center, teacher_logits, momentum, axis_name=None) -> jax.Array:
    """momentum * center + (1 - momentum) * mean of the raw teacher logits over views and global batch.

    Args: center f32[K]; teacher_logits [B, 2, K]; momentum: kept fraction.
    Source: eq. 4; dino main_dino.py, DINOLoss.update_center.
    """
    mean = jnp.mean(teacher_logits.astype(jnp.float32), axis=(0, 1))
    mean = mean if axis_name is None else jax.lax.pmean(mean, axis_name)
    return jax.lax.stop_gradient(momentum * center + (1.0 - momentum) * mean)


def dino(
    *,
    out_dim: int = 65536,
    hidden_dim: int = 2048,
    bottleneck_dim: int = 256,
    norm_last_layer: bool = True,
    weight_norm: bool = True,
    use_bn: bool = False,
    student_temp: float = 0.1,
    centering: str = "ema",
    center_momentum: float = 0.9,
    head: str = "dino",
) -> Loss:
    """The DINO loss term; hparams["teacher_temp"] comes from the schedule.

    Args: as `DINOHead` and `dino_loss`.
      centering: "ema", the running center; or "sinkhorn_knopp" (DINOv2): the teacher's distributions of
        the batch are balanced over the prototypes, without a center.
      head: the name of its head in the outputs.
    Raises:
      ValueError: temperature, momentum or centering outside its range.
    """
    check_centering(centering, student_temp, center_momentum)
    options = {"use_bn": use_bn, "weight_norm": weight_norm}
    spec = HeadSpec(DINOHead(out_dim, hidden_dim, bottleneck_dim, norm_last_layer, **options))

    def init():
        return {"center": jnp.zeros((out_dim,), jnp.float32)} if centering == "ema" else {}

    def apply(loss_state, student, teacher, hparams):
        axis_name, temp = hparams["axis_name"], hparams["teacher_temp"]
        logits, metrics = teacher[head], {}
        if centering == "ema":
            center = loss_state["center"]
            targets = teacher_probabilities(logits, center, temp)
            loss_state = {"center": update_center(center, logits, center_momentum, axis_name)}
            metrics["center_norm"] = jnp.linalg.norm(center)
        else:
            rows = logits.reshape(-1, out_dim)
            targets = sinkhorn_knopp(rows, temp, axis_name=axis_name).reshape(logits.shape)
        loss = cross_view_entropy(student[head], targets, student_temp, axis_name)
        return (
            loss,
            loss_state,
            metrics | diagnostics(student[head], targets, student_temp, axis_name),
        )

    return Loss({head: spec}, init, apply)


CENTERINGS = ("ema", "sinkhorn_knopp")


def check_centering(centering: str, student_temp: float, center_momentum: float) -> None:
    """Raises ValueError for an invalid centering, temperature or momentum."""
    if student_temp <= 0:
        raise ValueError(f"student_temp is {student_temp}: it must be positive (0.1 in the paper)")
    if centering not in CENTERINGS:
        raise ValueError(f"centering is '{centering}': choose {' or '.join(CENTERINGS)}")
    if not 0 <= center_momentum <= 1:
        raise ValueError(
            f"center_momentum is {center_momentum}: it must lie in [0, 1] (0.9 in the paper)"
        )


def diagnostics(student_logits, targets, student_temp, axis_name=None) -> dict[str, jax.Array]:
    """Collapse diagnostics, all f32[] and without gradient.

    teacher_entropy: mean entropy of one image's teacher distribution / ln K; 1 is uniform, 0 one-hot.
    marginal_entropy: entropy of the batch's mean distribution / ln K; 0: all images on one prototype.
    kl: KL(teacher of one global view, student of the other) in nats; 0: nothing left to learn.

    Args: student_logits [B, V, K]; targets f32[B, 2, K], the teacher's distributions.
    """
    p, log_k = targets, jnp.log(float(targets.shape[-1]))
    student = jax.lax.stop_gradient(student_logits[:, 1::-1].astype(jnp.float32)) / student_temp
    log_s = jax.nn.log_softmax(student, axis=-1)
    negative_entropy = jnp.mean(jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1))
    kl = negative_entropy - jnp.mean(jnp.sum(p * log_s, axis=-1))
    marginal = jnp.mean(p, axis=(0, 1))
    if axis_name is not None:
        negative_entropy, kl, marginal = jax.lax.pmean((negative_entropy, kl, marginal), axis_name)
    return {
        "teacher_entropy": -negative_entropy / log_k,
        "marginal_entropy": -jnp.sum(jax.scipy.special.xlogy(marginal, marginal)) / log_k,
        "kl": kl,
    }
