"""A step of every method in bfloat16 against float32, from the same state and crops.

With the crops of a training, at any size: python -m experiments.precision
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrunk import shrunk

from configs import (
    barlow_twins,
    byol,
    dino,
    dinov2,
    dinov3,
    hybrid,
    hybrid_dinov2,
    simclr,
    vicreg,
)
from dinotwins_jax.build import build
from experiments import precision
from experiments.precision import Found, Tensor

BATCH, WIDTH = 32, 96
# Least cosine of a tensor's gradient. Losses that compare the images of a batch see what distinguishes
# them, where a rounding of the features counts for more.
BOUNDS = {
    dino: 0.995,
    dinov2: 0.993,
    dinov3: 0.993,
    hybrid: 0.975,
    hybrid_dinov2: 0.975,
    barlow_twins: 0.975,
    vicreg: 0.975,
    simclr: 0.965,
    byol: 0.96,
}


def config_of(module):
    """The demo of a method: 32 images of 16 pixels, width 96, heads of 64."""
    config = shrunk(module, batch_size=BATCH, model__embed_dim=WIDTH, views__num_local=0)
    for term in config.loss.values():
        for key in ("out_dim", "hidden_dim"):
            if key in term:
                term[key] = 64
        if "hidden_dims" in term:
            term.hidden_dims = (64,) * len(term.hidden_dims)
    return config


def crops(seed=0):
    """Views that share what the images show: the same smooth picture under different noise."""
    keys = jax.random.split(jax.random.key(seed))
    coarse = jax.random.normal(keys[0], (BATCH, 1, 4, 4, 3))
    picture = jax.image.resize(coarse, (BATCH, 1, 16, 16, 3), "cubic")
    noise = jax.random.normal(keys[1], (BATCH, 2, 16, 16, 3))
    return {
        "global_crops": picture + 0.3 * noise,
        "local_crops": jnp.zeros((BATCH, 0, 8, 8, 3)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("module", BOUNDS, ids=lambda m: m.__name__.split(".")[-1])
def test_a_step_in_bfloat16(module):
    """Loss and every tensor's gradient stay near those in float32."""
    config = config_of(module)
    found = precision.measure(config, [crops()])
    print(precision.table({module.__name__.split(".")[-1]: found}))
    assert found.loss_error() <= precision.LOSS
    cosine, tensor = found.least_cosine()
    assert cosine >= BOUNDS[module], f"{tensor}: {cosine}"
    heads = {f"head {name}" for name in build(config).loss.heads}
    assert set(found.parts()) == heads | {"patch_embed", "tokens", "norm", "blocks_0", "blocks_1"}


def test_parts_errors_and_what_misses_the_goal():
    g = np.array([3.0, 4.0])
    tensors = {
        "backbone/patch_embed/kernel": Tensor(g, g + np.array([0.0, 0.5])),
        "backbone/pos_embed": Tensor(g, 2.0 * g),
        "backbone/cls_token": Tensor(g, -g),
        "backbone/blocks_1/mlp/fc1/kernel": Tensor(g, g),
        "heads/dino/mlp_0/kernel": Tensor(g, 0.0 * g),
    }
    found = Found({"loss": (2.0, 2.1), "dino/loss": (2.0, 2.1)}, tensors)
    parts = found.parts()
    assert list(parts) == ["patch_embed", "tokens", "blocks_1", "head dino"]
    assert set(parts["tokens"]) == {"backbone/pos_embed", "backbone/cls_token"}
    assert tensors["backbone/patch_embed/kernel"].error == pytest.approx(0.1)
    assert tensors["backbone/pos_embed"].cosine == pytest.approx(1.0)
    assert found.least_cosine() == (pytest.approx(-1.0), "backbone/cls_token")
    assert precision.misses({"dino": found}) == [
        "dino: the loss differs by 5.0e-02, more than 0.01",
        "dino: 2 of 5 tensors below a cosine of 0.995, the least -1.0000: backbone/cls_token",
    ]
    good = Found({"loss": (2.0, 2.001)}, {"backbone/pos_embed": Tensor(g, g)})
    assert precision.misses({"dino": good}) == []
    assert "| dino   | tokens | 1.00000   | 0.0e+00        |" in precision.table({"dino": good})


def test_gradients_that_are_rounding_are_left_out():
    """A bias beside its kernel, the keys' part of qkv apart; a bias without a kernel stays."""
    kernel, tiny = np.ones(8), np.full(6, 1e-6)
    tree = {"attn": {"qkv": {"kernel": kernel, "bias": np.array([1.0, 1.0, 1e-7, 1e-7, 1.0, 1.0])}}}
    found = precision._gradients(tree | {"norm": {"scale": kernel, "bias": tiny}}, width=2)
    assert found["attn/qkv/bias"].tolist() == [1.0] * 4
    left_out = {name for name in found if precision._is_rounding(name, found)}
    assert left_out == {"attn/qkv/bias of keys", "norm/bias"}
    assert not precision._is_rounding("bias", {"bias": tiny})
