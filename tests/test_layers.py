"""Hand-written gradients equal JAX's own, and the class-token-only block equals the whole block."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinotwins_jax.models import create_vit, vit
from dinotwins_jax.models.heads import cosine_logits
from dinotwins_jax.models.layers import Dense, attend, gelu, normalise, product


def plain_attend(q, k, v):
    y = jax.nn.softmax(jnp.einsum("bhtd,bhsd->bhts", q, k) / np.sqrt(q.shape[-1]), axis=-1) @ v
    return y.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1)


def plain_normalise(x, scale, bias):
    norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
    return norm.apply({"params": {"scale": scale, "bias": bias}}, x)


def dense(before):
    """Dense on `before`(x), which ours recomputes in the backward pass."""

    def ours(x, kernel, *rest):
        layer = Dense(kernel.shape[1], lambda x: before(x, *rest), use_bias=False)
        return layer.apply({"params": {"kernel": kernel}}, x)

    return ours, lambda x, kernel, *rest: before(x, *rest) @ kernel


def plain_cosine(x, v):
    return x @ (v / jnp.linalg.norm(v, axis=1, keepdims=True)).T


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(
    ("ours", "plain", "shapes"),
    [
        (product, jnp.matmul, [(3, 5, 8), (8, 16)]),
        (product, jnp.matmul, [(3, 5, 16), (16, 8)]),
        (product, jnp.matmul, [(7, 8), (8, 8)]),
        (gelu, lambda x: jax.nn.gelu(x, approximate=False), [(4, 33)]),
        (attend, plain_attend, [(2, 3, 6, 4)] * 3),
        (attend, plain_attend, [(2, 3, 1, 4), (2, 3, 6, 4), (2, 3, 6, 4)]),
        (normalise, plain_normalise, [(2, 5, 12), (12,), (12,)]),
        (*dense(gelu), [(3, 5, 8), (8, 16)]),
        (*dense(normalise), [(3, 5, 8), (8, 16), (8,), (8,)]),
        (lambda x, v: cosine_logits(x, v, jnp.float32), plain_cosine, [(6, 8), (20, 8)]),
    ],
    ids=["product, wide", "product, narrow", "product, rows", "gelu", "attend", "attend, one query",
         "normalise", "dense of gelu", "dense of a norm", "cosine logits"],
)  # fmt: skip
def test_values_and_gradients(ours, plain, shapes):
    inputs = arrays(*shapes)
    inputs[0] = 3.0 * inputs[0]
    (weight,) = arrays(jax.eval_shape(plain, *inputs).shape)

    def both(f):
        return jax.jit(
            lambda *x: (f(*x), jax.grad(lambda *x: jnp.sum(weight * f(*x)), range(len(x)))(*x))
        )(*inputs)

    for a, b in zip(jax.tree.leaves(both(ours)), jax.tree.leaves(both(plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"num_register_tokens": 2, "layer_scale_init": 0.5}],
)
@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_class_token_alone_is_that_of_the_whole_block(options, remat):
    model = create_vit(
        "vit_tiny", embed_dim=48, depth=2, num_heads=3, patch_size=8, image_size=16,
        drop_path_rate=0.3, remat=remat, **options,
    )  # fmt: skip
    images, weight = arrays((3, 24, 16, 3), (3, 48))
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]

    def loss(params, patches):
        out = model.apply(
            {"params": params}, images, train=True, patches=patches,
            rngs={"drop_path": jax.random.key(2)},
        )  # fmt: skip
        assert (out.patches is not None) == patches and out.attention is None
        return jnp.sum(weight * out.cls), out.cls

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    for a, b in zip(
        jax.tree.leaves(step(params, False)), jax.tree.leaves(step(params, True)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_attention_of_a_class_token_alone_is_refused():
    model = create_vit("vit_tiny", embed_dim=48, depth=1, num_heads=3, patch_size=8, image_size=16)
    with pytest.raises(ValueError, match="return_attention=True needs patches=True"):
        model.init(
            jax.random.key(0), jnp.zeros((1, 16, 16, 3)), return_attention=True, patches=False
        )


def test_every_block_attends_as_the_field_says(monkeypatch):
    calls = []

    def spy(q, k, v):
        calls.append(q.shape)
        return attend(q, k, v)

    monkeypatch.setitem(vit.ATTENTION, "cudnn", spy)
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "image_size": 16}
    images = jnp.zeros((1, 16, 16, 3))
    for implementation, times in (("xla", 0), ("cudnn", 2)):
        found = create_vit("vit_tiny", attention=implementation, **sizes)
        jax.eval_shape(found.init, jax.random.key(0), images)
        assert len(calls) == times
    with pytest.raises(ValueError, match="attention is 'flash': choose xla or cudnn"):
        create_vit("vit_tiny", attention="flash", **sizes).init(jax.random.key(0), images)
