"""plain_gradients=True: the same numbers, and forward mode through the backbone and a hybrid step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close
from small_steps import step_on_crops

from dinotwins_jax.losses import make_loss
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.training.optim import make_optimizer
from dinotwins_jax.training.state import create_state

VIT = VisionTransformer(
    embed_dim=24,
    depth=1,
    num_heads=2,
    patch_size=4,
    image_size=8,
    init_std=0.2,
    plain_gradients=True,
)
OTHER = {"ffn": "swiglu", "positions": "rope", "layer_scale_init": 0.5, "num_register_tokens": 2}
TERMS = {
    "dino": {"out_dim": 12, "hidden_dim": 12, "bottleneck_dim": 6},
    "barlow_twins": {"weight": 0.1, "hidden_dims": (8, 8)},
}


def like(tree, seed=0):
    """A random tree of the same shapes."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    normal = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, normal)


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [pytest.param({}, id="mlp"), pytest.param(OTHER, id="swiglu, rope")],
)
def test_forward_mode_and_hessian_vector_products_of_the_backbone(fields):
    vit = VIT.clone(**fields)
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    params = jax.jit(vit.init)(jax.random.key(0), images)["params"]
    tangent = like(params)

    def value(params, vit=vit):
        out = vit.apply({"params": params}, images)
        return jnp.sum(jnp.tanh(out.cls)) + jnp.sum(jnp.sin(out.patches))

    def along(params):
        return jax.jvp(value, (params,), (tangent,))[1]

    gradient = jax.jit(jax.grad(value))
    default = jax.jit(jax.grad(lambda p: value(p, vit.clone(plain_gradients=False))))
    assert_close(jax.jit(along)(params), inner(gradient(params), tangent), 1e-4)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), gradient(params), default(params))
    product = jax.jit(lambda p: jax.jvp(jax.grad(value), (p,), (tangent,))[1])(params)
    other = jax.jit(jax.grad(lambda p: inner(jax.grad(value)(p), tangent)))(params)  # reverse twice
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-3), product, other)


@pytest.mark.slow
def test_hand_written_gradients_refuse_forward_mode():
    vit = VIT.clone(plain_gradients=False)
    images = jnp.ones((1, 8, 8, 3))
    params = jax.jit(vit.init)(jax.random.key(0), images)["params"]
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda p: vit.apply({"params": p}, images).cls, (params,), (params,))


@pytest.mark.slow
def test_the_loss_of_a_hybrid_step_has_a_directional_derivative():
    loss, tx = make_loss(TERMS), make_optimizer()
    values = {"lr": 1e-3, "weight_decay": 0.0, "teacher_momentum": 0.9, "teacher_temp": 0.1}
    state = create_state(VIT, loss, tx, jax.random.key(0))
    crops = {
        "global_crops": jax.random.normal(jax.random.key(1), (4, 2, 8, 8, 3)),
        "local_crops": jax.random.normal(jax.random.key(2), (4, 1, 4, 4, 3)),
    }

    def value(params, vit):
        step = step_on_crops(vit, loss, tx, values)
        return step(state.replace(params=params), crops)[1]["loss"]

    tangent = like(state.params)
    slope = jax.jit(lambda p: jax.jvp(lambda p: value(p, VIT), (p,), (tangent,))[1])(state.params)
    default = jax.jit(jax.grad(lambda p: value(p, VIT.clone(plain_gradients=False))))
    np.testing.assert_allclose(slope, inner(default(state.params), tangent), rtol=1e-3)
