"""One training step as small pure functions.

The order is the official one: views -> teacher forward -> student forward -> loss with the previous
center -> gradients -> clip -> last-layer freeze -> optimiser -> teacher EMA of the updated student;
the new center comes out of the loss. A step whose loss, gradient or running statistics are not finite
changes nothing but the step count and the count of such steps.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from dinotwins_jax.losses.base import Anchor, WeightedSum
from dinotwins_jax.models.barriers import in_memory
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.training.forward import forward
from dinotwins_jax.training.inputs import StepInputs, step_inputs
from dinotwins_jax.training.objective import bound_terms, heads_of, loss_gradients
from dinotwins_jax.training.state import TrainState, ema_update, teacher_part


def make_train_step(
    *,
    backbone: VisionTransformer,
    loss: WeightedSum,
    make_crops: Callable,
    tx: optax.GradientTransformationExtraArgs,
    schedules: dict[str, Callable],
    seed: int,
    axis_name: str | None = None,
    match_gradients_to: str = "",
    micro_batches: int = 1,
    gather: Callable | None = None,
) -> Callable:
    """The pure function of a step, ready for jit or pmap.

    Args:
      backbone: student and teacher are this module with two sets of parameters.
      make_crops: batch -> {"global_crops": [B, 2, h, w, C], "local_crops": [B, n, h, w, C]}.
      tx: update(grads, opt_state, params, lr=…, weight_decay=…, keep=…), see optim.py.
      schedules: lr, weight_decay, teacher_momentum, teacher_temp: step -> f32[].
      seed: of drop path and masks, which depend on (seed, step, image in the batch).
      axis_name: mapped axis under pmap; None under jit, where arrays are global.
      match_gradients_to: a term of the loss, see `balance`.
      micro_batches: parts in which the batch goes through the backbone, see `forward`; the numbers are
        those of the whole batch.
      gather: gathers parameters sharded over devices before use; None: they are not sharded.
    Returns:
      train_step(state, batch) -> (state, metrics f32[] each).
    """
    terms = bound_terms(loss, axis_name=axis_name, backbone=backbone)
    patches = loss.reads_patches("student"), loss.reads_patches("teacher")
    backbone = backbone.clone(gather=gather)

    def train_step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        crops = jax.eval_shape(make_crops, batch)
        inputs = step_inputs(loss, backbone, schedules, seed, state.step, crops, axis_name)
        hparams = inputs.hparams
        value, grads, (loss_state, batch_stats, metrics), cls = gradients(state, batch, inputs)
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        for leaf in jax.tree.leaves((loss_state, batch_stats)):
            finite &= jnp.all(jnp.isfinite(leaf))
        keep = partial(jax.tree.map, partial(_keep, finite))
        params, opt_state = apply_gradients(tx, state, grads, hparams, keep)
        teacher_params = ema_update(
            state.teacher_params,
            teacher_part(params, heads_of(terms)),
            momentum=hparams["teacher_momentum"],
        )
        state = TrainState(
            step=state.step + 1,
            params=params,
            teacher_params=keep(teacher_params, state.teacher_params),
            batch_stats=keep(batch_stats, state.batch_stats),
            opt_state=opt_state,
            loss_state=keep(loss_state, state.loss_state),
            skipped=count_skipped(state.skipped, finite),
            anchor_params=state.anchor_params,
        )
        if loss.anchor is not None:
            state = state.replace(anchor_params=_anchor(loss.anchor, state))
        metrics |= spread(cls[:, :2], axis_name)
        metrics |= {"loss": value, "grad_norm": grad_norm}
        metrics |= {name: hparams[name] for name in schedules}
        return state, metrics | {f"skipped/{name}": n for name, n in state.skipped.items()}

    def gradients(state: TrainState, batch, inputs: StepInputs):
        networks = (state.params["backbone"], state.teacher_params["backbone"])
        student, teacher, pull_back = forward(
            backbone,
            make_crops,
            *networks,
            batch,
            inputs.drop_key,
            inputs.ids,
            hidden=inputs.hidden,
            anchor_params=state.anchor_params if loss.anchor else None,
            micro_batches=micro_batches,
            patches=patches,
        )
        heads = state if gather is None else _with_heads(state, gather)
        value, grads, kept = loss_gradients(
            terms, heads, student, teacher, inputs.hparams, match_gradients_to
        )
        grads = {"backbone": pull_back(grads["features"]), "heads": grads["heads"]}
        return value, grads, kept, student["cls"]

    return train_step


def _anchor(anchor: Anchor, state: TrainState):
    """The anchor's backbone after this step: the teacher's if a refresh is due."""
    since = state.step - anchor.start
    due = since == 0
    if anchor.refresh:
        again = (since > 0) & (since % anchor.refresh == 0)
        due |= again & (since // anchor.refresh <= anchor.max_refreshes)
    return jax.tree.map(
        lambda new, old: _keep(due, new, old), state.teacher_params["backbone"], state.anchor_params
    )


def _with_heads(state: TrainState, gather: Callable) -> TrainState:
    """The state with its heads gathered."""
    networks = {"params": state.params, "teacher_params": state.teacher_params}
    return state.replace(
        **{name: of | {"heads": gather(of["heads"])} for name, of in networks.items()}
    )


def apply_gradients(tx, state: TrainState, grads, hparams, keep: Callable):
    """(params, opt_state), new ones where keep(new, old) takes them."""
    scalars = {name: hparams[name] for name in ("lr", "weight_decay")}
    updates, opt_state = tx.update(grads, state.opt_state, state.params, keep=keep, **scalars)
    return keep(optax.apply_updates(state.params, updates), state.params), opt_state


def _keep(finite: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` after a finite step, else `old`. Stored before its first use, so that it can reuse the memory
    of `old`, which is no longer needed."""
    return in_memory(jnp.where(finite, new, old))


def count_skipped(skipped: dict[str, jax.Array], finite: jax.Array) -> dict[str, jax.Array]:
    """The counts of steps that were not finite, after one more step."""
    bad = jnp.where(finite, 0, 1)
    in_a_row = jnp.where(finite, 0, skipped["in_a_row"] + 1)
    return {"total": skipped["total"] + bad, "in_a_row": in_a_row}


def spread(cls: jax.Array, axis_name: str | None = None) -> dict[str, jax.Array]:
    """Spread of the backbone's features; cls: f32[B, 2, E] of the global crops.

    feature_std: mean over dimensions of the standard deviation over images of cls / |cls|, times
      sqrt(E): 1 for isotropic features, 0 when all images are one point.
    effective_rank: participation ratio (sum l)^2 / sum l^2 of the covariance's eigenvalues, between 1
      and E, without an eigendecomposition; towards 0 where the variances sum to less than 1e-6, the
      rounding of features that are one point.
    """
    x = jax.lax.stop_gradient(cls).reshape(-1, cls.shape[-1])
    pmean = (lambda v: v) if axis_name is None else (lambda v: jax.lax.pmean(v, axis_name))
    unit = x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
    unit_variance = pmean(jnp.mean(unit**2, axis=0)) - pmean(jnp.mean(unit, axis=0)) ** 2
    x = x - pmean(jnp.mean(x, axis=0))
    covariance = pmean(x.T @ x / x.shape[0])
    trace = jnp.trace(covariance)
    return {
        "feature_std": jnp.mean(jnp.sqrt(jnp.maximum(unit_variance, 0.0))) * x.shape[-1] ** 0.5,
        "effective_rank": trace**2 / (jnp.sum(covariance**2) + 1e-12),
    }
