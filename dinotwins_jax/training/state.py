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
    anchor_params: an earlier teacher's backbone, {} where no loss asks for one.
    """

    step: jax.Array
    params: PyTree
    teacher_params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    loss_state: PyTree
    skipped: dict[str, jax.Array]
    anchor_params: PyTree = flax.struct.field(default_factory=dict)


def create_state(
    backbone: VisionTransformer, loss: Loss, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """A fresh state; the teacher starts as a copy of the student.

    The backbone depends on (key, backbone) alone, so runs with different losses start equal.
    """
    params = {"backbone": init_backbone(backbone, key), "heads": {}}
    batch_stats = {}
    own = own_heads(loss.heads)
    for number, name in enumerate(sorted(own)):
        module, width = unbound(own[name]), head_width(loss.heads, name, backbone.embed_dim)
        variables = module.init(jax.random.fold_in(key, number + 1), jnp.zeros((2, width)))
        params["heads"][name] = variables["params"]
        if "batch_stats" in variables:
            batch_stats[name] = variables["batch_stats"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        teacher_params=jax.tree.map(jnp.copy, teacher_part(params, loss.heads)),
        anchor_params=jax.tree.map(jnp.copy, params["backbone"] if loss.anchor else {}),
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        loss_state=loss.init(),
        skipped={"total": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)},
    )


def init_backbone(backbone: VisionTransformer, key: jax.Array) -> PyTree:
    """Random parameters of the backbone, those that `create_state` starts from with this key."""
    image = jnp.zeros((1, *as_pair(backbone.image_size), 3))
    return jax.jit(backbone.init)(jax.random.fold_in(key, 0), image)["params"]


def own_heads(heads: dict[str, HeadSpec]) -> dict[str, HeadSpec]:
    """The heads that have parameters of their own."""
    return {name: spec for name, spec in heads.items() if not spec.shares}


def head_width(heads: dict[str, HeadSpec], name: str, embed_dim: int) -> int:
    """The width of what goes into a head."""
    below = heads[name].input
    if below in ("cls", "masked"):
        return embed_dim
    if below not in heads:
        raise ValueError(f"head '{name}' sits on '{below}': cls, masked, or a head of its loss")
    x = jnp.zeros((2, head_width(heads, below, embed_dim)))
    module = unbound(heads[below])
    return jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x)[0]).shape[-1]


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
