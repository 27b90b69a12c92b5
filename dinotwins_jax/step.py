"""One training step as small pure functions.

The order is the official one: views -> teacher forward -> student forward -> loss with the previous
center -> gradients -> clip -> last-layer freeze -> optimiser -> teacher EMA of the updated student;
the new center comes out of the loss.
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dinotwins_jax.losses.base import HeadSpec, Loss
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.state import TrainState, ema_update, teacher_part

# One random stream a use, each folded into the run's key.
INIT, AUGMENT, DROP_PATH = range(3)


def make_train_step(
    *,
    backbone: VisionTransformer,
    loss: Loss,
    views: Callable,
    tx: optax.GradientTransformationExtraArgs,
    schedules: dict[str, Callable],
    seed: int,
    axis_name: str | None = None,
) -> Callable:
    """The pure function of a step, ready for jit or pmap.

    Args:
      backbone: student and teacher are this module with two sets of parameters.
      views: (batch, key) -> {"global_crops": [B, 2, h, w, 3], "local_crops": [B, n, h, w, 3]}.
        The key is the same in every step: fold in what tells one picture of the run from another.
      tx: update(grads, opt_state, params, lr=…, weight_decay=…).
      schedules: lr, weight_decay, teacher_momentum, teacher_temp: step -> f32[].
      seed: all randomness of the step comes from it. Drop path: (seed, step, image in the batch).
      axis_name: mapped axis under pmap; None under jit, where arrays are global.
    Returns:
      train_step(state, batch) -> (state, metrics f32[] each).
    """
    bound = {"axis_name": axis_name, "dtype": backbone.dtype}
    loss = loss._replace(heads={name: _bind(spec, bound) for name, spec in loss.heads.items()})

    def train_step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        hparams = {name: schedule(state.step) for name, schedule in schedules.items()}
        hparams |= {"step": state.step, "axis_name": axis_name}
        root = jax.random.key(seed)
        ids = _image_ids(jax.tree.leaves(batch)[0].shape[0], axis_name)
        crops = views(batch, jax.random.fold_in(root, AUGMENT))
        teacher = teacher_forward(backbone, loss.heads, state, crops)

        def objective(params):
            drop_key = jax.random.fold_in(jax.random.fold_in(root, DROP_PATH), state.step)
            student, batch_stats = student_forward(
                backbone, loss.heads, params, state.batch_stats, crops, drop_key, ids
            )
            value, loss_state, metrics = loss.apply(state.loss_state, student, teacher, hparams)
            metrics |= spread(student["cls"][:, :2], axis_name)
            return value, (loss_state, batch_stats, metrics)

        (value, (loss_state, batch_stats, metrics)), grads = jax.value_and_grad(
            objective, has_aux=True
        )(state.params)
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        params, opt_state = apply_gradients(tx, state, grads, hparams)
        teacher_params = ema_update(
            state.teacher_params,
            teacher_part(params, loss.heads),
            momentum=hparams["teacher_momentum"],
        )
        metrics |= {"loss": value, "grad_norm": optax.global_norm(grads)}
        metrics |= {name: hparams[name] for name in schedules}
        return TrainState(
            state.step + 1, params, teacher_params, batch_stats, opt_state, loss_state
        ), metrics

    return train_step


def teacher_forward(backbone, heads, state: TrainState, crops) -> dict:
    """Outputs of the teacher on the global crops: no drop path, no gradient."""
    params = jax.lax.stop_gradient(state.teacher_params)
    images = crops["global_crops"]
    outputs = _features(backbone, params["backbone"], {"global": images}, {"train": False}, None)
    teacher_heads = {name: spec for name, spec in heads.items() if spec.teacher}
    projected, _ = _project(teacher_heads, params["heads"], state.batch_stats, outputs["cls"])
    return jax.lax.stop_gradient(outputs | projected)


def student_forward(
    backbone, heads, params, batch_stats, crops, drop_key, ids
) -> tuple[dict, dict]:
    """Outputs of the student on all crops, and the heads' new batch statistics."""
    groups = {"global": crops["global_crops"], "local": crops["local_crops"]}
    groups = {name: images for name, images in groups.items() if images.shape[1]}
    outputs = _features(backbone, params["backbone"], groups, {"train": True}, (drop_key, ids))
    projected, new_stats = _project(heads, params["heads"], batch_stats, outputs["cls"])
    return outputs | projected, batch_stats | new_stats


def apply_gradients(tx, state: TrainState, grads, hparams):
    """(new params, new opt_state)."""
    updates, opt_state = tx.update(
        grads, state.opt_state, state.params, lr=hparams["lr"], weight_decay=hparams["weight_decay"]
    )
    return optax.apply_updates(state.params, updates), opt_state


def spread(cls: jax.Array, axis_name: str | None = None) -> dict[str, jax.Array]:
    """How much of the feature space the backbone uses; cls: f32[B, 2, E] of the global crops.

    feature_std: mean over dimensions of the standard deviation over images of cls / |cls|, times
      sqrt(E): 1 for isotropic features, 0 when all images are one point.
    effective_rank: participation ratio (sum l)^2 / sum l^2 of the covariance's eigenvalues, between 1
      and E, without an eigendecomposition.
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


def _features(backbone, params, groups, options, drop) -> dict:
    """{"cls": [B, V, E], "patches": {group: [B, v, N, E]}}: one backbone pass a crop size."""
    cls, patches = [], {}
    for number, (name, images) in enumerate(groups.items()):
        B, v = images.shape[:2]
        kwargs = dict(options)
        if drop is not None and backbone.drop_path_rate > 0:
            key, ids = drop
            kwargs["rngs"] = {"drop_path": jax.random.fold_in(key, number)}
            kwargs["sample_ids"] = (ids[:, None] * v + jnp.arange(v)).reshape(-1)
        out = backbone.apply({"params": params}, images.reshape(B * v, *images.shape[2:]), **kwargs)
        cls.append(out.cls.reshape(B, v, -1))
        patches[name] = out.patches.reshape(B, v, *out.patches.shape[1:])
    return {"cls": jnp.concatenate(cls, axis=1), "patches": patches}


def _project(heads: dict[str, HeadSpec], params, batch_stats, cls) -> tuple[dict, dict]:
    """Head outputs [B, V, …] and the statistics that heads with batch norm leave behind."""
    outputs, new_stats = {}, {}
    for name, spec in heads.items():
        x = cls if spec.crops == "all" else cls[:, :2]
        views = (
            [x[:, v] for v in range(x.shape[1])] if spec.per_view else [x.reshape(-1, x.shape[-1])]
        )
        train = (
            {"train": True}
            if "train" in inspect.signature(type(spec.module).__call__).parameters
            else {}
        )
        stats, rows = batch_stats.get(name), []
        for rows_in in views:
            variables = {"params": params[name]} | (
                {"batch_stats": stats} if stats is not None else {}
            )
            out, updated = spec.module.apply(variables, rows_in, **train, mutable=["batch_stats"])
            stats = updated.get("batch_stats")
            rows.append(out)
        if stats is not None:
            new_stats[name] = stats
        outputs[name] = (
            jnp.stack(rows, axis=1) if spec.per_view else rows[0].reshape(*x.shape[:2], -1)
        )
    return outputs, new_stats


def _bind(spec: HeadSpec, bound: dict) -> HeadSpec:
    """The head with the mapped axis and the compute dtype of the run, where it has such fields."""
    fields = {name: value for name, value in bound.items() if hasattr(spec.module, name)}
    return spec._replace(module=spec.module.clone(**fields))


def _image_ids(local_batch: int, axis_name: str | None) -> jax.Array:
    """Position of each image in the global batch: what random keys are made of."""
    offset = 0 if axis_name is None else jax.lax.axis_index(axis_name) * local_batch
    return offset + jnp.arange(local_batch)
