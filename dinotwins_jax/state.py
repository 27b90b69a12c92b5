"""Everything that a resumed run needs and nothing more: one flat pytree of pytrees."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dinotwins_jax.losses.base import HeadSpec, Loss
from dinotwins_jax.models.vit import VisionTransformer, as_pair

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """step: i32[], steps done.
    params: student {"backbone": …, "heads": {name: …}}.
    teacher_params: the same, less the heads that have no teacher; EMA, never differentiated.
    batch_stats: {head: running statistics} of the student's heads with batch norm.
    opt_state: of the student's parameters.
    loss_state: one subtree a loss, e.g. {"dino": {"center": f32[K]}}.
    skipped: {"total": i32[], "in_a_row": i32[]}, steps whose loss or gradient was not finite.
    """

    step: jax.Array
    params: PyTree
    teacher_params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    loss_state: PyTree
    skipped: dict[str, jax.Array]


def create_state(
    backbone: VisionTransformer, loss: Loss, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """A fresh state; the teacher starts as a copy of the student.

    The backbone depends on (key, backbone) alone, so runs with different losses start equal.
    """
    params = {"backbone": init_backbone(backbone, key), "heads": {}}
    batch_stats = {}
    for number, name in enumerate(sorted(loss.heads)):
        module = unbound(loss.heads[name])
        variables = module.init(
            jax.random.fold_in(key, number + 1), jnp.zeros((2, backbone.embed_dim))
        )
        params["heads"][name] = variables["params"]
        if "batch_stats" in variables:
            batch_stats[name] = variables["batch_stats"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        teacher_params=jax.tree.map(jnp.copy, teacher_part(params, loss.heads)),
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        loss_state=loss.init(),
        skipped={"total": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)},
    )


def init_backbone(backbone: VisionTransformer, key: jax.Array) -> PyTree:
    """Random parameters of the backbone, those that `create_state` starts from with this key."""
    image = jnp.zeros((1, *as_pair(backbone.image_size), 3))
    return jax.jit(backbone.init)(jax.random.fold_in(key, 0), image)["params"]


def unbound(spec: HeadSpec) -> nn.Module:
    """The head without a mapped axis, which exists only inside pmap."""
    return spec.module.clone(axis_name=None) if hasattr(spec.module, "axis_name") else spec.module


def teacher_part(params: PyTree, heads: dict[str, HeadSpec]) -> PyTree:
    """Of the student's parameters, those that have a teacher."""
    kept = {name: head for name, head in params["heads"].items() if heads[name].teacher}
    return {"backbone": params["backbone"], "heads": kept}


def ema_update(old: PyTree, new: PyTree, *, momentum: jax.Array) -> PyTree:
    """momentum * old + (1 - momentum) * new, leaf by leaf; momentum is the kept fraction."""
    return jax.tree.map(lambda o, n: momentum * o + (1.0 - momentum) * n, old, new)
