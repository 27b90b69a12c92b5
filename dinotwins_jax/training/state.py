"""Training state: everything needed to resume a run, as one pytree."""

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
    """Training state.

    step: i32[], steps done.
    params: student {"backbone": …, "heads": {name: …}}.
    teacher_params: the same without heads that have no teacher; EMA, never differentiated.
    batch_stats: {head: running statistics} of the student's heads with batch norm.
    opt_state: of the student's parameters.
    loss_state: one subtree per loss, e.g. {"dino": {"center": f32[K]}}.
    skipped: {"total": i32[], "in_a_row": i32[]}, steps with a non-finite loss or gradient.
    anchor_params: an earlier teacher's backbone, {} if no loss needs one.
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
    """Creates the initial state; the teacher starts as a copy of the student.

    The backbone depends only on (key, backbone), so runs with different losses start from equal weights.
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
    """Initial parameters of the backbone, the same as in `create_state` with this key."""
    image = jnp.zeros((1, *as_pair(backbone.image_size), backbone.in_channels))
    return jax.jit(backbone.init)(jax.random.fold_in(key, 0), image)["params"]


def own_heads(heads: dict[str, HeadSpec]) -> dict[str, HeadSpec]:
    """Heads with parameters of their own."""
    return {name: spec for name, spec in heads.items() if not spec.shares}


def head_width(heads: dict[str, HeadSpec], name: str, embed_dim: int) -> int:
    """Input width of a head."""
    below = heads[name].input
    if below in ("cls", "masked"):
        return embed_dim
    if below not in heads:
        raise ValueError(
            f"head '{name}' has input '{below}': choose cls, masked, or a head of its loss"
        )
    x = jnp.zeros((2, head_width(heads, below, embed_dim)))
    module = unbound(heads[below])
    return jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x)[0]).shape[-1]


def unbound(spec: HeadSpec) -> nn.Module:
    """The head's module without the mapped axis, which exists only inside pmap."""
    return spec.module.clone(axis_name=None) if hasattr(spec.module, "axis_name") else spec.module


def teacher_part(params: PyTree, heads: dict[str, HeadSpec]) -> PyTree:
    """The student's parameters that have a teacher."""
    kept = {name: head for name, head in params["heads"].items() if heads[name].teacher}
    return {"backbone": params["backbone"], "heads": kept}


def ema_update(old: PyTree, new: PyTree, *, momentum: jax.Array) -> PyTree:
    """momentum * old + (1 - momentum) * new, leaf by leaf; momentum is the kept fraction."""
    return jax.tree.map(lambda o, n: momentum * o + (1.0 - momentum) * n, old, new)
