"""Loss and gradients at the backbone's features: each term through its own heads.

Letters: B images, V views, N tokens, E width of a token.
"""

from functools import partial

import jax
import jax.numpy as jnp

from dinotwins_jax.losses.base import HeadSpec, Loss, Masked, Weight, WeightedSum, weight_at
from dinotwins_jax.models.barriers import in_memory
from dinotwins_jax.training.balance import balance
from dinotwins_jax.training.state import TrainState

Terms = dict[str, tuple[Weight, Loss]]


def bound_terms(loss: WeightedSum, *, axis_name: str | None, backbone) -> Terms:
    """The terms of a sum, with the mapped axis and the backbone's compute options set in those heads that
    have such fields."""
    fields = {name: getattr(backbone, name) for name in ("dtype", "plain_gradients")}
    fields["axis_name"] = axis_name

    def bind(spec: HeadSpec) -> HeadSpec:
        known = {name: value for name, value in fields.items() if hasattr(spec.module, name)}
        return spec._replace(module=spec.module.clone(**known))

    return {
        name: (weight, term._replace(heads={k: bind(spec) for k, spec in term.heads.items()}))
        for name, (weight, term) in loss.terms.items()
    }


def heads_of(terms: Terms) -> dict[str, HeadSpec]:
    """The heads of all terms."""
    return {name: spec for _, term in terms.values() for name, spec in term.heads.items()}


def loss_gradients(terms: Terms, state: TrainState, features, teacher, hparams, match_to):
    """The weighted sum of the terms and its gradients.

    The terms share the backbone's features. Differentiating them one by one up to there costs no more
    than their sum, and gives each term's gradient at the features.

    Args:
      features, teacher: of the backbone, as in `forward.Forward`.
      hparams: as in `losses.base.Loss`.
      match_to: a term, see `balance`.
    Returns:
      value f32[], {"features": like `features`, "heads": {name: …}}, and
      (loss_state, batch_stats, metrics).
    """
    teacher = teacher_outputs(terms, state, teacher, hparams["masked"])
    values, weights, feature_grads, head_grads = {}, {}, {}, {}
    loss_state, batch_stats, metrics = {}, dict(state.batch_stats), {}
    for name, (weight, term) in terms.items():
        params = {spec.shares or head for head, spec in term.heads.items()}
        params = {head: state.params["heads"][head] for head in sorted(params)}
        objective = partial(_objective, name, term, state, teacher, hparams)
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
            grad = jax.tree.map(lambda g, w=weights[name]: in_memory(w * g), grad)
            heads[head] = jax.tree.map(jnp.add, heads[head], grad) if head in heads else grad
    grads = {"features": features_grad, "heads": heads}
    return value, grads, (loss_state, batch_stats, metrics)


def _objective(name, term: Loss, state: TrainState, teacher, hparams, features, params):
    """(value, (new loss_state, new batch_stats, metrics)) of one term, its metrics under its name."""
    own, stats = project(term.heads, params, state.batch_stats, features, hparams["masked"])
    value, kept, metrics = apply_term(
        name, term, state.loss_state[name], features | own, teacher, hparams
    )
    metrics = {f"{name}/loss": value} | {f"{name}/{key}": v for key, v in metrics.items()}
    return value, (kept, stats, metrics)


def apply_term(name: str, term: Loss, loss_state, student: dict, teacher: dict, hparams: dict):
    """term.apply, with one clear error where it reads patch tokens that it did not declare."""
    try:
        return term.apply(loss_state, student, teacher, hparams)
    except KeyError as error:
        lacking = [
            network
            for network, outputs in (("student", student), ("teacher", teacher))
            if "patches" not in outputs
        ]
        if error.args != ("patches",) or not lacking:
            raise
        raise ValueError(
            f"config.loss.{name} reads patch tokens that it does not declare: pass patches="
            f"{(*term.patches, *lacking)} to its Loss"
        ) from error


def teacher_outputs(terms: Terms, state: TrainState, features: dict, masked: Masked | None) -> dict:
    """The teacher's features with the outputs of its heads beside them, without gradient."""
    heads = {name: spec for name, spec in heads_of(terms).items() if spec.teacher}
    params = state.teacher_params["heads"]
    outputs, _ = project(heads, params, state.batch_stats, features, masked)
    return jax.lax.stop_gradient(features | outputs)


def project(
    heads: dict[str, HeadSpec], params, batch_stats, features, masked: Masked | None
) -> tuple[dict, dict]:
    """Head outputs [B, V, …], of masked patches [M, …], and the updated batch statistics of the
    heads."""
    outputs, new_stats = {}, {}
    for name, spec in heads.items():
        x = _input(spec, features, outputs, masked)
        name_of_params = spec.shares or name
        at_once = spec.per_view and getattr(spec.module, "takes_views", False)
        if at_once:
            views = [x.swapaxes(0, 1)]
        elif spec.per_view:
            views = [x[:, v] for v in range(x.shape[1])]
        else:
            views = [x.reshape(-1, x.shape[-1])]
        train = {"train": True} if spec.takes_train else {}
        stats, rows = batch_stats.get(name_of_params), []
        for rows_in in views:
            variables = {"params": params[name_of_params]} | (
                {"batch_stats": stats} if stats is not None else {}
            )
            out, updated = spec.module.apply(variables, rows_in, **train, mutable=["batch_stats"])
            stats = updated.get("batch_stats")
            rows.append(out)
        if stats is not None:
            new_stats[name_of_params] = stats
        if spec.per_view:
            outputs[name] = (rows[0] if at_once else jnp.stack(rows)).swapaxes(0, 1)
        else:
            outputs[name] = rows[0].reshape(*x.shape[:-1], -1)
    return outputs, new_stats


def _input(spec: HeadSpec, features: dict, outputs: dict, masked: Masked | None) -> jax.Array:
    """Input of a head: [B, V, …], or the rows [M, E] of masked patches."""
    if spec.input == "masked":
        patches = features["patches"]["global"]
        return patches.reshape(-1, patches.shape[-1])[masked.row]
    x = features["cls"] if spec.input == "cls" else outputs[spec.input]
    return x if spec.crops == "all" else x[:, :2]
