"""Diagnosis of a non-finite step: the module that produced the first non-finite value."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.losses.base import WeightedSum, weight_at
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.training.forward import student_features, teacher_features
from dinotwins_jax.training.inputs import step_inputs
from dinotwins_jax.training.objective import (
    apply_term,
    bound_terms,
    loss_gradients,
    project,
    teacher_outputs,
)
from dinotwins_jax.training.state import TrainState


def make_diagnosis(
    *,
    backbone: VisionTransformer,
    loss: WeightedSum,
    make_crops: Callable,
    schedules: dict[str, Callable],
    seed: int,
    match_gradients_to: str = "",
) -> Callable:
    """Builds a function that repeats a step and returns where it first was not finite.

    Args: as for make_train_step; the batch is one array over all devices, not mapped.
    Returns:
      diagnose(state, batch) -> e.g. "student/backbone/blocks_3/mlp", with modules in the order in which
      they run: teacher, student, heads, terms of the loss, then the gradients from the heads back to
      the patch embedding; "" if everything is finite.
    """
    backbone = backbone.clone(
        remat=False
    )  # values inside a rematerialised block cannot be recorded
    terms = bound_terms(loss, axis_name=None, backbone=backbone)
    names: list[str] = []

    @jax.jit
    def look(state: TrainState, batch) -> jax.Array:
        names.clear()
        flags: list[jax.Array] = []

        def note(name, tree):
            names.append(name)
            flags.append(_finite(tree))

        for name in ("params", "teacher_params", "anchor_params", "batch_stats", "loss_state"):
            note(f"{name} before the step", getattr(state, name))
        crops = make_crops(batch)
        note("crops", crops)
        hparams, drop_key, ids = inputs = step_inputs(
            loss, backbone, schedules, seed, state.step, crops, None
        )
        masked = hparams["masked"]
        networks = state.teacher_params["backbone"], state.anchor_params or None
        with nn.intercept_methods(partial(_watch, note, "teacher/backbone")):
            teacher = teacher_features(backbone, *networks, crops)
        with nn.intercept_methods(partial(_watch, note, "teacher/heads")):
            full_teacher = teacher_outputs(terms, state, teacher, masked)
        student_of = partial(
            student_features,
            backbone,
            crops=crops,
            drop_key=drop_key,
            ids=ids,
            hidden=inputs.hidden,
        )
        with nn.intercept_methods(partial(_watch, note, "student/backbone")):
            features = student_of(state.params["backbone"])
        for name, (weight, term) in terms.items():
            here = f"loss/{name}"
            with nn.intercept_methods(partial(_watch, note, f"student/heads of {here}")):
                outputs, _ = project(
                    term.heads, state.params["heads"], state.batch_stats, features, masked
                )
            kept, full_student = state.loss_state[name], features | outputs
            note(here, apply_term(name, term, kept, full_student, full_teacher, hparams)[:2])
            note(f"weight of {here}", jnp.asarray(weight_at(weight, hparams)))
        _, pull_back = jax.vjp(student_of, state.params["backbone"])
        _, grads, _ = loss_gradients(terms, state, features, teacher, hparams, match_gradients_to)
        for name, grad in grads["heads"].items():
            note(f"gradient of heads/{name}", grad)
        note("gradient at the features", grads["features"])
        (backward,) = pull_back(grads["features"])
        for name in sorted(backward, key=_depth, reverse=True):
            note(f"gradient of backbone/{name}", backward[name])
        return jnp.stack(flags)

    def diagnose(state: TrainState, batch) -> str:
        finite = np.asarray(look(state, batch))
        return next((name for name, ok in zip(names, finite, strict=True) if not ok), "")

    return diagnose


def _watch(note, prefix: str, method, args, kwargs, context):
    """Interceptor of Flax modules: records the output of each call, inner modules first."""
    out = method(*args, **kwargs)
    if context.method_name == "__call__":
        note("/".join((prefix, *context.module.path)), out)
    return out


def _finite(tree) -> jax.Array:
    arrays = [
        x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")
    ]  # LayerNorm returns a function
    leaves = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves] or [jnp.bool_(True)]))


def _depth(name: str) -> float:
    """Depth of a part of the backbone; gradients are checked from the last part to the first."""
    if name.startswith("blocks_"):
        return int(name.removeprefix("blocks_"))
    return 1e9 if name == "norm" else -1.0
