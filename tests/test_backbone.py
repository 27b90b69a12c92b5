"""SwiGLU, rotary positions and the epsilon of the norms, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refs_backbone as refs
from golden_files import assert_close, assert_trees_close

from dinotwins_jax.models.block import swiglu, swiglu_width
from dinotwins_jax.models.layers import normalise
from dinotwins_jax.models.positions import (
    RopeMoves,
    move_places,
    patch_places,
    rope_of,
    rotate,
)
from dinotwins_jax.models.vit import VisionTransformer

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "image_size": 16}
NEW = {"ffn": "swiglu", "positions": "rope"}


def normal(seed, *shape):
    return np.random.RandomState(seed).normal(size=shape)


def test_rotation_and_its_gradient_equal_the_plain_loop():
    grid, prefix = (2, 3), 3
    x, weight, direction = (normal(seed, 1, 1, 9, 8) for seed in range(3))
    rope = rope_of(grid, 8, prefix)

    def ours(x):
        return jnp.sum(weight * rotate(x, rope))

    def plain(x):
        return np.sum(weight[0, 0] * refs.rotated(x[0, 0], grid, prefix))

    assert_close(rotate(jnp.float32(x), rope)[0, 0], refs.rotated(x[0, 0], grid, prefix), 1e-5)
    np.testing.assert_array_equal(rotate(jnp.float32(x), rope)[:, :, :3], np.float32(x[:, :, :3]))
    along = np.sum(direction * np.asarray(jax.grad(ours)(jnp.float32(x)), np.float64))
    assert abs(along - refs.slope(plain, x, direction)) < 1e-4


def test_rotated_products_depend_on_the_distance_of_patches_alone():
    """In a row of 8 patches, q of patch i times k of patch i + 2 is one number for all i."""
    rope = rope_of((1, 8), 16, 1)
    q, k = (jnp.broadcast_to(normal(seed, 16), (1, 1, 9, 16)) for seed in range(2))
    products = jnp.einsum("bhtd,bhsd->ts", rotate(q, rope), rotate(k, rope))[1:, 1:]
    two_on = np.diagonal(products, offset=2)
    np.testing.assert_allclose(two_on, two_on[0], rtol=1e-4)
    assert abs(products[0, 1] - products[0, 2]) > 1e-2


def test_swiglu_and_its_gradient_equal_the_plain_loop():
    x, direction = normal(0, 2, 6), normal(1, 2, 6)
    weight, hidden = normal(2, 2, 6), swiglu_width(12)
    assert hidden == 8
    w = [normal(3, 6, 16), normal(4, 16), normal(5, 8, 6), normal(6, 6)]
    params = {"w12": {"kernel": w[0], "bias": w[1]}, "w3": {"kernel": w[2], "bias": w[3]}}
    params = jax.tree.map(jnp.float32, params)

    def ours(x, params):
        return swiglu(12).apply({"params": params}, x, lambda x: x)

    def plain(x, *w):
        return np.sum(weight * refs.swiglu(x, *w))

    assert_close(ours(jnp.float32(x), params), refs.swiglu(x, *w), 1e-4)
    loss = lambda x, params: jnp.sum(weight * ours(x, params))  # noqa: E731
    dx, dparams = jax.grad(loss, (0, 1))(jnp.float32(x), params)
    along = np.sum(direction * np.asarray(dx, np.float64))
    np.testing.assert_allclose(along, refs.slope(lambda x: plain(x, *w), x, direction), rtol=1e-4)
    grads = [dparams["w12"]["kernel"], dparams["w12"]["bias"], dparams["w3"]["kernel"]]
    for place, grad in enumerate(grads):
        turn = normal(7, *w[place].shape)

        def moved(v, place=place):
            return plain(x, *w[:place], v, *w[place + 1 :])

        along = np.sum(turn * np.asarray(grad, np.float64))
        np.testing.assert_allclose(along, refs.slope(moved, w[place], turn), rtol=1e-4)


@pytest.mark.parametrize(("hidden", "width"), [(1536 * 4, 4096), (48, 32), (100, 72), (384, 256)])
def test_the_width_of_swiglu_is_dinov2s(hidden, width):
    assert swiglu_width(hidden) == width


@pytest.mark.slow
def test_norm_eps_reaches_every_norm():
    x, scale, bias = 1e-3 * normal(0, 5, 12), np.ones(12), np.zeros(12)
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    assert_close(normalise(jnp.float32(x), scale, bias, 1e-5), expected, 1e-5)
    images = jnp.float32(normal(1, 1, 16, 16, 3))
    vit = VisionTransformer(**TINY)
    params = jax.jit(vit.init)(jax.random.key(0), images)["params"]

    def cls(eps):
        return vit.clone(norm_eps=eps).apply({"params": params}, images).cls

    # With an epsilon far above the variance a norm divides by its square root, block by block.
    assert np.std(cls(1e-6)) > 100 * np.std(cls(1e6))
    bound = vit.clone(norm_eps=0.5).bind({"params": params})
    assert {bound.norm.eps, *(block.norm_eps for block in bound.blocks)} == {0.5}


@pytest.mark.parametrize(
    "fields",
    [NEW, pytest.param({"positions": "rope", "num_register_tokens": 2}, marks=pytest.mark.slow)],
)
def test_options_work_on_any_grid_and_in_two_halves(fields):
    vit = VisionTransformer(**TINY, **fields)
    params = jax.jit(vit.init)(jax.random.key(0), jnp.ones((1, 16, 16, 3)))["params"]
    assert "pos_embed" not in params
    images = jnp.float32(normal(1, 2, 24, 40, 3))
    out = vit.apply({"params": params}, images, return_attention=True)
    prefix = 1 + vit.num_register_tokens
    assert out.patches.shape == (2, 15, 48) and out.attention.shape[-1] == prefix + 15
    assert_close(vit.apply({"params": params}, images, patches=False).cls, out.cls, 1e-5)
    maps = vit.apply({"params": params}, images, method="attentions")
    np.testing.assert_array_equal(maps[-1], out.attention)
    tokens = vit.apply({"params": params}, images, 1, method="embed_until")
    halves = vit.apply({"params": params}, tokens, 1, grid=(3, 5), method="finish_from")
    np.testing.assert_array_equal(halves.patches, out.patches)
    with pytest.raises(ValueError, match=rf"{prefix + 15} tokens, but grid \(2, 2\) has"):
        vit.apply({"params": params}, tokens, 1, method="finish_from")


def test_places_tell_patches_apart():
    """Without positions a shuffled image has the same class token."""
    images = jnp.float32(normal(0, 1, 16, 16, 3))
    vit = VisionTransformer(**TINY, positions="rope", init_std=0.3)
    params = jax.jit(vit.init)(jax.random.key(0), images)["params"]
    swapped = jnp.roll(images, 8, axis=2)
    a, b = (vit.apply({"params": params}, x).cls for x in (images, swapped))
    assert float(jnp.max(jnp.abs(a - b))) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"remat": True}, {"dtype": jnp.bfloat16}])
def test_gradients_are_those_of_the_plain_model(change):
    images, weight = jnp.float32(normal(0, 2, 16, 24, 3)), normal(1, 2, 48)
    vit = VisionTransformer(**TINY, **NEW, num_register_tokens=1, layer_scale_init=0.5)
    params = jax.jit(vit.init)(jax.random.key(0), images)["params"]

    def grads(vit):
        loss = lambda p: jnp.sum(weight * vit.apply({"params": p}, images).cls)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    changed = vit.clone(**change)
    if "remat" in change:
        assert_trees_close(grads(changed), grads(vit), 1e-5)
    else:  # 8 bits of mantissa; where the gradient is large it agrees to a few hundredths
        for a, b in zip(jax.tree.leaves(grads(changed)), jax.tree.leaves(grads(vit)), strict=True):
            assert a.dtype == jnp.float32
            assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b) + 1e-3


def test_moves_are_those_of_the_paper():
    places = jnp.float32(patch_places((2, 3)))
    np.testing.assert_allclose(places[:, 0], [-0.5] * 3 + [0.5] * 3)
    np.testing.assert_allclose(places[:3, 1], [-2 / 3, 0, 2 / 3], atol=1e-6)
    keys = jax.random.split(jax.random.key(0), 200)

    def draw(**moves):
        return np.stack([move_places(places, RopeMoves(**moves), key) for key in keys[:100]])

    shift = draw(shift=0.2) - places
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-6)
    assert 0.15 < np.abs(shift).max() < 0.2 and abs(shift.mean()) < 0.05
    assert np.abs(shift[:, 0, 0] - shift[:, 0, 1]).max() > 0.1  # an axis each
    stretch = draw(jitter=2.0)[:, 0] / places[0]
    assert 0.5 < stretch.min() < 0.6 and 1.7 < stretch.max() < 2.0
    assert np.abs(stretch[:, 0] - stretch[:, 1]).max() > 0.3
    factor = draw(rescale=2.0)[:, 0] / places[0]
    np.testing.assert_allclose(factor[:, 0], factor[:, 1], rtol=1e-5)
    assert abs(np.log(factor).mean()) < 0.15  # log-uniform: as often smaller as larger


@pytest.mark.slow
def test_patches_move_in_training_alone_and_by_their_key():
    vit = VisionTransformer(
        **TINY, positions="rope", rope_shift=0.3, rope_rescale=2.0, init_std=0.3
    )
    images = jnp.float32(normal(0, 2, 16, 16, 3))
    params = jax.jit(vit.init)(jax.random.key(0), images)["params"]

    def cls(train, seed):
        rngs = {"rope": jax.random.key(seed)}
        return vit.apply({"params": params}, images, train=train, rngs=rngs).cls

    still = vit.clone(rope_shift=None, rope_rescale=None).apply({"params": params}, images).cls
    np.testing.assert_array_equal(cls(False, 0), still)
    np.testing.assert_array_equal(cls(True, 0), cls(True, 0))
    for other in (still, cls(True, 1)):
        assert float(jnp.max(jnp.abs(cls(True, 0) - other))) > 1e-3


def test_options_that_do_not_fit_are_named():
    images = jnp.ones((1, 16, 16, 3))
    for fields, message in (
        ({"ffn": "glu"}, "ffn is 'glu': choose mlp or swiglu"),
        ({"positions": "rotary"}, "positions is 'rotary': choose learned or rope"),
        ({"positions": "rope", "num_heads": 8}, "embed_dim 48 / num_heads 8"),
        ({"rope_jitter": 2.0}, "rope_jitter and rope_rescale need positions='rope'"),
    ):
        with pytest.raises(ValueError, match=message):
            VisionTransformer(**TINY | fields).init(jax.random.key(0), images)
