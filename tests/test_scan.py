"""Blocks as a loop: the numbers, gradients and draws of the blocks, and a shorter program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinotwins_jax.models import create_vit

IMAGES = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
SMALL = {"embed_dim": 16, "num_heads": 2, "image_size": 16, "patch_size": 8}
KEY = jax.random.key(3)


def loss_of(vit):
    def loss(params):
        rngs = {"drop_path": KEY, "rope": KEY}
        out = vit.apply({"params": params}, IMAGES, train=True, rngs=rngs, patches=False)
        return (out.cls[:, :5] * jnp.arange(5.0)).sum()

    return jax.jit(jax.value_and_grad(loss))


def params_of(vit):
    return jax.jit(vit.init)(jax.random.key(0), IMAGES)["params"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"drop_path_rate": 0.6, "layer_scale_init": 0.1}, id="drop path"),
        pytest.param(
            {"drop_path_rate": 0.6, "drop_path_uniform": True, "remat": True},
            id="remat",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"positions": "rope", "rope_shift": 0.2, "ffn": "swiglu"},
            id="rope that moves",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_loop_has_the_loss_and_gradients_of_the_blocks(options):
    vit = create_vit("vit_tiny", depth=3, **SMALL, **options)
    params = params_of(vit)
    loss, gradients = loss_of(vit)(params)
    scanned, found = loss_of(vit.clone(scan_blocks=True))(params)
    assert scanned == pytest.approx(float(loss), rel=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, gradients)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * max(1.0, float(abs(theirs).max())))


def test_the_program_does_not_grow_with_the_depth():
    def lines(depth, scan):
        vit = create_vit("vit_tiny", depth=depth, scan_blocks=scan, **SMALL)
        shapes = jax.eval_shape(vit.init, jax.random.key(0), IMAGES)["params"]
        text = loss_of(vit).lower(shapes).as_text()
        return text.count("dot_general")

    assert lines(8, True) == lines(4, True) < lines(4, False) < lines(8, False)


@pytest.mark.slow
def test_parameters_and_features_of_every_block_are_those_of_the_blocks():
    """Initialisation, checkpoints and what reads several blocks do not know of the loop."""
    vit = create_vit("vit_tiny", depth=4, **SMALL)
    params, scanned = params_of(vit), vit.clone(scan_blocks=True)
    jax.tree.map(np.testing.assert_array_equal, params, params_of(scanned))
    assert set(params) > {f"blocks_{k}" for k in range(4)}
    for vit_ in (vit, scanned):
        layers = vit_.apply({"params": params}, IMAGES, n=2, method="intermediate_layers")
        tokens = vit_.apply({"params": params}, IMAGES, 3, method="embed_until")
        whole = vit_.apply({"params": params}, IMAGES)
        rest = vit_.apply({"params": params}, tokens, 3, method="finish_from")
        np.testing.assert_allclose(rest.cls, layers[-1][0], atol=1e-5)
        np.testing.assert_allclose(whole.cls, layers[-1][0], atol=1e-5)
        same = vit_.apply({"params": params}, IMAGES, 0, method="embed_until")
        np.testing.assert_allclose(
            vit_.apply({"params": params}, same, 0, method="finish_from").cls, whole.cls, atol=1e-5
        )
