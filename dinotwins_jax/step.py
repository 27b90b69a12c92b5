"""One training step as small pure functions.

The order is the official one: views -> teacher forward -> student forward -> loss with the previous
center -> gradients -> clip -> last-layer freeze -> optimiser -> teacher EMA of the updated student;
the new center comes out of the loss.
"""

import inspect
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from dinotwins_jax.balance import balance
from dinotwins_jax.losses.base import HeadSpec, Loss, named, weight_at
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
    match_gradients_to: str = "",
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
      match_gradients_to: a term of the loss, see `balance`.
    Returns:
      train_step(state, batch) -> (state, metrics f32[] each).
    """
    bound = {"axis_name": axis_name, "dtype": backbone.dtype}
    terms = {
        name: (
            weight,
            term._replace(heads={k: _bind(spec, bound) for k, spec in term.heads.items()}),
        )
        for name, (weight, term) in (loss.terms or {"": (1.0, loss)}).items()
    }
    heads = {name: spec for _, term in terms.values() for name, spec in term.heads.items()}

    def train_step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        hparams = {name: schedule(state.step) for name, schedule in schedules.items()}
        hparams |= {"step": state.step, "axis_name": axis_name}
        root = jax.random.key(seed)
        ids = _image_ids(jax.tree.leaves(batch)[0].shape[0], axis_name)
        crops = views(batch, jax.random.fold_in(root, AUGMENT))
        teacher = teacher_forward(backbone, heads, state, crops)
        drop_key = jax.random.fold_in(jax.random.fold_in(root, DROP_PATH), state.step)
        student, pull_back = jax.vjp(
            lambda params: student_features(backbone, params, crops, drop_key, ids),
            state.params["backbone"],
        )
        value, grads, (loss_state, batch_stats, metrics) = loss_gradients(
            terms, state, student, teacher, hparams, match_gradients_to
        )
        grads = {"backbone": pull_back(grads["features"])[0], "heads": grads["heads"]}
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        params, opt_state = apply_gradients(tx, state, grads, hparams)
        teacher_params = ema_update(
            state.teacher_params,
            teacher_part(params, heads),
            momentum=hparams["teacher_momentum"],
        )
        metrics |= spread(student["cls"][:, :2], axis_name)
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


def student_features(backbone, params, crops, drop_key, ids) -> dict:
    """What the student's backbone, with drop path, makes of all crops."""
    groups = {"global": crops["global_crops"], "local": crops["local_crops"]}
    groups = {name: images for name, images in groups.items() if images.shape[1]}
    return _features(backbone, params, groups, {"train": True}, (drop_key, ids))


def loss_gradients(terms, state: TrainState, features, teacher, hparams, match_to):
    """The weighted sum of the terms and its gradients, each term through its own heads.

    The terms meet at the backbone's features. Differentiating them one by one up to there costs no
    more than their sum, and shows what each asks of the backbone.

    Returns:
      value f32[], {"features": like `features`, "heads": {name: …}}, and
      (loss_state, batch_stats, metrics).
    """
    values, weights, feature_grads, head_grads = {}, {}, {}, {}
    loss_state, batch_stats, metrics = {}, dict(state.batch_stats), {}
    for name, (weight, term) in terms.items():

        def objective(features, params, name=name, term=term):
            own, stats = _project(term.heads, params, state.batch_stats, features["cls"])
            kept = state.loss_state[name] if name else state.loss_state
            value, kept, own = term.apply(kept, features | own, teacher, hparams)
            return value, (kept, stats, named(name, value, own) if name else own)

        params = {head: state.params["heads"][head] for head in term.heads}
        (values[name], (loss_state[name], stats, own)), (feature_grads[name], head_grads[name]) = (
            jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(features, params)
        )
        batch_stats, metrics = batch_stats | stats, metrics | own
        weights[name] = weight_at(weight, hparams)
    if len(terms) > 1:
        shared = {name: grads["cls"] for name, grads in feature_grads.items()}
        weights, found = balance(weights, shared, match_to=match_to, axis_name=hparams["axis_name"])
        metrics |= found
    value = sum(weights[name] * value for name, value in values.items())
    features_grad = jax.tree.map(
        lambda *g: sum(w * x for w, x in zip(weights.values(), g, strict=True)),
        *feature_grads.values(),
    )
    heads = {}
    for name, grads in head_grads.items():
        for head, grad in grads.items():
            grad = jax.tree.map(partial(jnp.multiply, weights[name]), grad)
            heads[head] = jax.tree.map(jnp.add, heads[head], grad) if head in heads else grad
    grads = {"features": features_grad, "heads": heads}
    return value, grads, (loss_state if "" not in terms else loss_state[""], batch_stats, metrics)


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
