"""The official optimisers as optax transformations.

`update` takes this step's scalars as keywords: tx.update(grads, state, params, lr=…, weight_decay=…),
so that schedules stay outside and every value is logged. A further keyword, keep(new, old) -> next state,
decides whether a step counts; updates are computed from the state that it returns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def decay_mask(params):
    """True where weight decay applies: not on biases and 1-D tensors (norm scales, LayerScale).

    Class token, positions, registers and prototypes are decayed, as in the official code.
    Source: dino utils.py, get_params_groups.
    """

    def decays(path, leaf):
        return not str(path[-1].key).endswith("bias") and jnp.ndim(leaf) != 1

    return jax.tree_util.tree_map_with_path(decays, params)


def labels(params, waiting=("last_layer", "backbone")):
    """Labels each parameter with the part of its path that is in `waiting`, else "rest"; prototypes are
    under "last_layer" of their head."""

    def label(path, _):
        return next((str(p.key) for p in path if str(p.key) in waiting), "rest")

    return jax.tree_util.tree_map_with_path(label, params)


def lr_scales(
    params,
    layer_decay: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    predictor_lr_mult: float = 1.0,
):
    """Learning-rate factor of each parameter, one float per leaf.

    Backbone: block i of `depth` has layer_decay^(depth - i); patch embedding, positions and all tokens
    layer_decay^(depth + 1), the patch embedding times patch_embed_lr_mult; the final norm has 1.
    Heads have 1, predictors ("heads", "<head>_predictor") predictor_lr_mult. Weight decay is scaled too, as
    in PyTorch, where it is multiplied by the rate.
    Source: dinov2 utils/param_groups.py, get_vit_lr_decay_rate and get_params_groups_with_decay.
    """
    depth = sum(name.startswith("blocks_") for name in params.get("backbone", {}))

    def scale(path, _):
        names = [str(p.key) for p in path]
        if names[0] == "heads" and names[1].endswith("_predictor"):
            return predictor_lr_mult
        if names[0] != "backbone" or names[1] == "norm":
            return 1.0
        block = names[1].startswith("blocks_")
        layer = int(names[1].removeprefix("blocks_")) + 1 if block else 0
        own = patch_embed_lr_mult if names[1] == "patch_embed" else 1.0
        return own * layer_decay ** (depth + 1 - layer)

    return jax.tree_util.tree_map_with_path(scale, params)


def clip_per_parameter(max_norm: float) -> optax.GradientTransformation:
    """Scales each tensor's gradient to an L2 norm of at most `max_norm`.

    The coefficient max_norm / (norm + 1e-6) applies when below 1. Source: dino utils.py, clip_gradients.
    """

    def clip(g):
        norm = jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32))))
        return g * jnp.minimum(1.0, max_norm / (norm + 1e-6)).astype(g.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def adamw(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, scales: Callable = lr_scales
) -> optax.GradientTransformationExtraArgs:
    """AdamW with decoupled decay: p <- p - lr * (adam + weight_decay * p), as PyTorch.

    scales: params -> factor of lr of each leaf.
    """

    def update(grads, state, params, *, lr, weight_decay, keep=_new, **_):
        count = keep(state.count + 1, state.count)
        mu = keep(optax.tree.update_moment(grads, state.mu, b1, 1), state.mu)
        nu = keep(optax.tree.update_moment(grads, state.nu, b2, 2), state.nu)

        def step(m, v, p, decays, scale):
            u = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            return -(lr * scale) * (u + weight_decay * p if decays else u)

        updates = jax.tree.map(step, mu, nu, params, decay_mask(params), scales(params))
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def _new(new, old):
    return new


def lars(
    momentum: float = 0.9,
    eta: float = 0.001,
    bias_lr_ratio: float = 0.0048 / 0.2,
    scales: Callable = lr_scales,
) -> optax.GradientTransformationExtraArgs:
    """LARS of the official Barlow Twins: 1-D tensors get neither decay nor adaptation.

    Args:
      eta: trust coefficient; bias_lr_ratio: learning rate of 1-D tensors over that of the rest.
      scales: params -> factor of lr of each leaf.
    Source: barlowtwins main.py, LARS and adjust_learning_rate; arXiv:1708.03888.
    """

    def init(params):
        return optax.TraceState(trace=jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params, *, lr, weight_decay, keep=_new, **_):
        def adapt(g, p):
            if p.ndim == 1:
                return g
            g = g + weight_decay * p
            p_norm, g_norm = jnp.linalg.norm(p), jnp.linalg.norm(g)
            return g * jnp.where(
                (p_norm > 0) & (g_norm > 0), eta * p_norm / jnp.where(g_norm > 0, g_norm, 1), 1.0
            )

        trace = jax.tree.map(lambda m, g, p: momentum * m + adapt(g, p), state.trace, grads, params)
        trace = keep(trace, state.trace)

        def step(m, scale):
            return -(lr * (bias_lr_ratio if m.ndim == 1 else 1.0) * scale) * m

        return jax.tree.map(step, trace, scales(params)), optax.TraceState(trace)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_per_module(max_norm: float) -> optax.GradientTransformation:
    """Scales the gradient of the backbone, and of each head, to an L2 norm of at most `max_norm`.

    One norm over all tensors of a module; the coefficient is that of `clip_per_parameter`.
    Source: dinov2 train/train.py, do_train, which clips each entry of model.student by itself.
    """

    def clip(grads):
        coefficient = jnp.minimum(1.0, max_norm / (optax.global_norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * coefficient.astype(g.dtype), grads)

    def update(updates, params):
        heads = {name: clip(head) for name, head in updates["heads"].items()}
        return {"backbone": clip(updates["backbone"]), "heads": heads}

    return optax.stateless(update)


class FromStep(NamedTuple):
    """step: i32[], updates so far; inner_state: of the delayed transformation."""

    step: jax.Array
    inner_state: Any


def from_step(
    inner: optax.GradientTransformationExtraArgs, first: int
) -> optax.GradientTransformationExtraArgs:
    """Applies `inner` from update number `first` on; before, updates are 0 and its state is unchanged.

    As PyTorch skips a parameter whose grad is None. Source: dino utils.py, cancel_gradients_last_layer.
    Differs from optax.conditionally_mask: no branch, which would make XLA copy the whole state.
    """

    def init(params):
        return FromStep(jnp.zeros((), jnp.int32), inner.init(params))

    def update(grads, state, params, *, keep: Callable = _new, **kwargs):
        active = state.step >= first

        def keep_active(new, old):
            return keep(jax.tree.map(lambda n, o: jnp.where(active, n, o), new, old), old)

        updates, inner_state = inner.update(
            grads, state.inner_state, params, keep=keep_active, **kwargs
        )
        updates = jax.tree.map(lambda u: jnp.where(active, u, 0.0), updates)
        return updates, FromStep(keep(state.step + 1, state.step), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def zero_rate_until(
    inner: optax.GradientTransformationExtraArgs, first: int
) -> optax.GradientTransformationExtraArgs:
    """Applies `inner` with a rate of 0 before update number `first`: its moments and counts advance.

    Source: dinov2 train/train.py, build_schedulers, last_layer_lr_schedule.
    """

    def init(params):
        return FromStep(jnp.zeros((), jnp.int32), inner.init(params))

    def update(grads, state, params, *, lr, keep: Callable = _new, **kwargs):
        lr = jnp.where(state.step >= first, lr, 0.0)
        updates, inner_state = inner.update(
            grads, state.inner_state, params, lr=lr, keep=keep, **kwargs
        )
        return updates, FromStep(keep(state.step + 1, state.step), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


OPTIMIZERS = {"adamw": adamw, "lars": lars}
CLIPPERS = {
    "per_parameter": clip_per_parameter,
    "per_module": clip_per_module,
    "global": optax.clip_by_global_norm,
}
FREEZERS = {"skipped": from_step, "zero_rate": zero_rate_until}


def make_optimizer(
    name: str = "adamw",
    *,
    clip: float = 3.0,
    clip_mode: str = "per_parameter",
    freeze_last_layer_steps: int = 0,
    freeze_backbone_steps: int = 0,
    frozen_last_layer: str = "skipped",
    betas: tuple[float, float] = (0.9, 0.999),
    layer_decay: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    predictor_lr_mult: float = 1.0,
    **options,
) -> optax.GradientTransformationExtraArgs:
    """Clipping, then the optimiser; prototypes and, if set, the backbone are frozen at first.

    Args:
      name: adamw | lars; options are its own keyword arguments.
      clip: largest gradient norm, 0 for none.
      clip_mode: per_parameter (DINO: each tensor by itself) | per_module (DINOv2: one norm over the
        backbone, one over each head) | global (one norm over all).
      freeze_last_layer_steps: steps in which the prototypes stay fixed.
      freeze_backbone_steps: the backbone is skipped, so that new heads adapt before it changes.
      frozen_last_layer: skipped (DINO: no update, no decay, no moments, no step count) | zero_rate
        (DINOv2: no update and no decay, while the moments advance).
      betas: decay rates of AdamW's two moments.
      layer_decay, patch_embed_lr_mult, predictor_lr_mult: see `lr_scales`.
    Raises:
      ValueError: unknown name, clip_mode or frozen_last_layer.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer '{name}': choose one of {', '.join(OPTIMIZERS)}")
    for what, value, known in (
        ("clip_mode", clip_mode, CLIPPERS),
        ("frozen_last_layer", frozen_last_layer, FREEZERS),
    ):
        if value not in known:
            raise ValueError(f"unknown {what} '{value}': choose one of {', '.join(known)}")
    scales = partial(
        lr_scales,
        layer_decay=layer_decay,
        patch_embed_lr_mult=patch_embed_lr_mult,
        predictor_lr_mult=predictor_lr_mult,
    )
    if name == "adamw":
        options = {"b1": betas[0], "b2": betas[1]} | options
    make = partial(OPTIMIZERS[name], scales=scales, **options)
    tx = make()
    waits = {
        "last_layer": (FREEZERS[frozen_last_layer], freeze_last_layer_steps),
        "backbone": (from_step, freeze_backbone_steps),
    }
    waiting = {label: freeze(make(), steps) for label, (freeze, steps) in waits.items() if steps}
    if waiting:
        tx = optax.partition({"rest": tx} | waiting, partial(labels, waiting=tuple(waiting)))
    return optax.chain(CLIPPERS[clip_mode](clip), tx) if clip else optax.with_extra_args_support(tx)
