"""Features of the step for the family's losses: masked patches, anchor, stacked and shared heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close
from small_steps import step_on_crops

from dinotwins_jax.losses import make_loss
from dinotwins_jax.losses.byol import byol_loss
from dinotwins_jax.losses.dino import teacher_probabilities
from dinotwins_jax.losses.ibot import masked_cross_entropy
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.streams import MASKS
from dinotwins_jax.training.masks import draw_masks
from dinotwins_jax.training.optim import make_optimizer
from dinotwins_jax.training.state import create_state

VIT = VisionTransformer(
    embed_dim=48, depth=1, num_heads=3, patch_size=4, image_size=16, mask_token=True,
    num_register_tokens=2, init_std=0.2,
)  # fmt: skip
B, TEMP = 4, 0.05
HEAD = {"out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8}


def crops(step=0):
    keys = jax.random.split(jax.random.key(step), 2)
    return {
        "global_crops": jax.random.normal(keys[0], (B, 2, 16, 16, 3)),
        "local_crops": jax.random.normal(keys[1], (B, 1, 8, 8, 3)),
    }


def trained(terms, steps):
    """[(state, metrics) before any step and after each] of a training on `crops`."""
    loss, tx = make_loss(terms), make_optimizer()
    values = {"lr": 1e-2, "weight_decay": 0.0, "teacher_momentum": 0.5, "teacher_temp": TEMP}
    step = jax.jit(step_on_crops(VIT, loss, tx, values, seed=5))
    found = [(create_state(VIT, loss, tx, jax.random.key(0)), {})]
    for number in range(steps):
        found.append(step(found[-1][0], crops(number)))
    return found


def features(params, hidden=None):
    """(cls [B, 2, E], patches [B, 2, N, E]) of the first batch's global crops."""
    images = crops()["global_crops"].reshape(-1, 16, 16, 3)
    hidden = None if hidden is None else hidden.reshape(len(images), -1)
    out = jax.jit(VIT.apply)({"params": params}, images, hidden=hidden)
    return out.cls.reshape(B, 2, -1), out.patches.reshape(B, 2, 16, -1)


def test_the_mask_token_stands_in_for_hidden_patches():
    """A mask token equal to the embedding's bias gives the same as a black patch."""
    images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    apply = jax.jit(VIT.apply)
    params = jax.jit(VIT.init)(jax.random.key(0), images)["params"]
    bias = jax.random.normal(jax.random.key(2), (48,))
    params = params | {"patch_embed": params["patch_embed"] | {"bias": bias}}
    hidden = jnp.zeros((3, 16), bool).at[0, 5].set(True).at[2, 8:].set(True)
    pixels = jnp.repeat(jnp.repeat(hidden.reshape(3, 4, 4, 1), 4, 1), 4, 2)
    black = apply({"params": params}, jnp.where(pixels, 0.0, images))
    masked = apply({"params": params | {"mask_token": bias[None]}}, images, hidden=hidden)
    assert_close(masked.cls, black.cls, 1e-5)
    assert_close(masked.patches, black.patches, 1e-5)
    assert np.any(masked.cls != apply({"params": params}, images).cls)


@pytest.mark.slow
def test_ibot_s_head_sees_the_hidden_patches_of_both_networks():
    (state, _), (after, metrics) = trained({"ibot": HEAD | {"centering": "ema"}}, steps=1)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), MASKS), 0)
    masks = make_loss({"ibot": HEAD}).masks
    masked = jax.jit(lambda key: draw_masks(masks, (4, 4), key, jnp.arange(B), B))(key)
    assert int(masked.where.sum()) > 4
    head = make_loss({"ibot": HEAD}).heads["ibot"].module
    logits = [
        jax.jit(head.apply)(
            {"params": params["heads"]["ibot"]}, patches.reshape(-1, 48)[masked.row]
        )
        for params, patches in (
            (state.params, features(state.params["backbone"], masked.where)[1]),
            (state.teacher_params, features(state.teacher_params["backbone"])[1]),
        )
    ]
    targets = teacher_probabilities(logits[1], jnp.zeros(12), TEMP)
    expected = masked_cross_entropy(logits[0], targets, masked.weight, 2 * B, 0.1)
    assert_close(metrics["loss"], expected, 1e-5)
    assert np.any(after.params["backbone"]["mask_token"] != 0)  # it learns
    center = after.loss_state["ibot"]["center"]
    assert_close(center, 0.1 * logits[1][masked.weight > 0].mean(0), 1e-5)


@pytest.mark.slow
def test_a_shared_head_has_one_set_of_parameters():
    (state, _), (after, metrics) = trained(
        {"dino": HEAD, "ibot": {"out_dim": 12, "shared_head": "dino"}}, steps=1
    )
    assert set(state.params["heads"]) == set(state.teacher_params["heads"]) == {"dino"}
    (_, alone) = trained({"dino": HEAD}, steps=1)
    moved = [
        after.params["heads"]["dino"]["mlp_0"]["kernel"],
        alone[0].params["heads"]["dino"]["mlp_0"]["kernel"],
    ]
    assert np.any(moved[0] != moved[1])  # both losses pull
    assert np.isfinite(metrics["ibot/loss"])


@pytest.mark.slow
@pytest.mark.parametrize("norm_output", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_byol_s_predictor_sits_on_the_student_s_projector(norm_output):
    term = {"hidden_dim": 16, "out_dim": 8, "norm_output": norm_output}
    (state, _), (_, metrics) = trained({"byol": term}, steps=1)
    assert set(state.params["heads"]) == {"byol", "byol_predictor"}
    assert set(state.teacher_params["heads"]) == {"byol"}
    mlp = make_loss({"byol": term}).heads["byol"].module
    assert mlp.norm_output == norm_output

    def run(head, params, x):
        variables = {"params": params["heads"][head], "batch_stats": state.batch_stats[head]}
        views = [mlp.apply(variables, x[:, v], mutable=["batch_stats"])[0] for v in range(2)]
        return jnp.stack(views, axis=1)

    projected = run("byol", state.params, features(state.params["backbone"])[0])
    predicted = run("byol_predictor", state.params, projected)
    target = run("byol", state.teacher_params, features(state.teacher_params["backbone"])[0])
    assert_close(metrics["loss"], byol_loss(predicted, target), 1e-5)


@pytest.mark.slow
def test_the_anchor_is_the_teacher_of_its_time():
    gram = {"start_steps": 2, "refresh_steps": 2, "max_refreshes": 1}
    found = trained({"dino": HEAD, "gram": gram}, steps=7)

    def is_teacher_of(step, anchor):
        teacher = found[step][0].teacher_params["backbone"]
        same = jax.tree.map(np.array_equal, found[anchor][0].anchor_params, teacher)
        return all(jax.tree.leaves(same))

    expected = {0: 0, 1: 0, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 4}  # after so many steps: teacher of
    for anchor, step in expected.items():
        assert is_teacher_of(step, anchor)
        assert not is_teacher_of((step + 1) % 8, anchor)
    values = [float(metrics["gram/loss"]) for _, metrics in found[1:]]
    assert values[:2] == [0.0, 0.0] and all(v > 0 for v in values[2:])
