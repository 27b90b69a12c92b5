"""Optimisers of the official codes as optax transformations.

`update` takes this step's scalars as keywords: tx.update(grads, state, params, lr=…, weight_decay=…),
so that schedules live outside and every value is logged. A third one, keep(new, old) -> what becomes the
state, decides whether a step counts; updates are made from the state that it gives.
"""

from collections.abc import Callable
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


def last_layer_labels(params):
    """ "last_layer" for the prototypes' parameters (any path with that name), "rest" for all others."""

    def label(path, _):
        return "last_layer" if any(str(p.key) == "last_layer" for p in path) else "rest"

    return jax.tree_util.tree_map_with_path(label, params)


def clip_per_parameter(max_norm: float) -> optax.GradientTransformation:
    """Scale each tensor's gradient to an L2 norm of at most `max_norm`.

    The coefficient max_norm / (norm + 1e-6) applies when below 1. Source: dino utils.py, clip_gradients.
    """

    def clip(g):
        norm = jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32))))
        return g * jnp.minimum(1.0, max_norm / (norm + 1e-6)).astype(g.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def adamw(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """AdamW with decoupled decay: p <- p - lr * (adam + weight_decay * p), PyTorch's numbers."""

    def update(grads, state, params, *, lr, weight_decay, keep=_new, **_):
        count = keep(state.count + 1, state.count)
        mu = keep(optax.tree.update_moment(grads, state.mu, b1, 1), state.mu)
        nu = keep(optax.tree.update_moment(grads, state.nu, b2, 2), state.nu)

        def step(m, v, p, decays):
            u = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            return -lr * (u + weight_decay * p if decays else u)

        updates = jax.tree.map(step, mu, nu, params, decay_mask(params))
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def _new(new, old):
    return new


def lars(
    momentum: float = 0.9, eta: float = 0.001, bias_lr_ratio: float = 0.0048 / 0.2
) -> optax.GradientTransformationExtraArgs:
    """LARS of the official Barlow Twins: 1-D tensors get neither decay nor adaptation.

    Args:
      eta: trust coefficient; bias_lr_ratio: learning rate of 1-D tensors over that of the rest.
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
        rate = jax.tree.map(lambda p: lr * bias_lr_ratio if p.ndim == 1 else lr, params)
        return jax.tree.map(lambda m, r: -r * m, trace, rate), optax.TraceState(trace)

    return optax.GradientTransformationExtraArgs(init, update)


class FromStep(NamedTuple):
    """step: i32[], updates so far; inner_state: of the transformation that waits."""

    step: jax.Array
    inner_state: Any


def from_step(
    inner: optax.GradientTransformationExtraArgs, first: int
) -> optax.GradientTransformationExtraArgs:
    """`inner` from update number `first` on; before it no update and no change of its state.

    Differs from optax.conditionally_mask: no branch, for whose sake XLA copies the whole state.
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


OPTIMIZERS = {"adamw": adamw, "lars": lars}


def make_optimizer(
    name: str = "adamw",
    *,
    clip: float = 3.0,
    clip_mode: str = "per_parameter",
    freeze_last_layer_steps: int = 0,
    **options,
) -> optax.GradientTransformationExtraArgs:
    """Clip, then the optimiser; the prototypes wait.

    Args:
      name: adamw | lars; options are its own keyword arguments.
      clip: largest gradient norm, 0 for none.
      clip_mode: per_parameter (DINO: each tensor by itself) | global (one norm over all).
      freeze_last_layer_steps: for so many steps the prototypes are skipped wholly: no update, no
        decay, no moments, no step count, as PyTorch skips a parameter whose grad is None.
    Raises:
      ValueError: unknown name or clip_mode.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer '{name}': choose one of {', '.join(OPTIMIZERS)}")
    clippers = {"per_parameter": clip_per_parameter, "global": optax.clip_by_global_norm}
    if clip_mode not in clippers:
        raise ValueError(f"unknown clip_mode '{clip_mode}': choose one of {', '.join(clippers)}")
    make = OPTIMIZERS[name]
    tx = make(**options)
    if freeze_last_layer_steps:
        waiting = from_step(make(**options), freeze_last_layer_steps)
        tx = optax.partition({"rest": tx, "last_layer": waiting}, last_layer_labels)
    return optax.chain(clippers[clip_mode](clip), tx) if clip else optax.with_extra_args_support(tx)
