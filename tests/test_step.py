"""The training step: official trajectories and the order of updates."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close, load, relative_error, subset
from small_steps import step_on_crops

from dinotwins_jax.losses import HeadSpec, make_loss
from dinotwins_jax.models.torch_weights import (
    barlow_projector_from_torch,
    dino_head_from_torch,
    vit_from_torch,
)
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.training.objective import project
from dinotwins_jax.training.optim import make_optimizer
from dinotwins_jax.training.state import create_state, ema_update, teacher_part

VIT = VisionTransformer(embed_dim=48, depth=2, num_heads=3, patch_size=4, image_size=16)


def table(values):
    values = jnp.asarray(values, jnp.float32)
    return lambda step: values[step]


def split_params(weights):
    """(params, batch_stats) from the golden file's names of one network."""
    params = {
        "backbone": vit_from_torch(subset(weights, "backbone.")),
        "heads": {"dino": dino_head_from_torch(subset(weights, "head."))},
    }
    del params["heads"]["dino"]["last_layer"]["weight_g"]  # norm_last_layer: fixed at 1
    stats = {}
    if projector := subset(weights, "projector."):
        params["heads"]["barlow_twins"], stats["barlow_twins"] = barlow_projector_from_torch(
            projector
        )
    return jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, stats)


def without_key_bias(params):
    """Leaves out the key part of every qkv bias: its gradient is zero up to rounding."""

    def drop(path, leaf):
        names = [p.key for p in path]
        return np.delete(leaf, np.s_[48:96]) if names[-2:] == ["qkv", "bias"] else np.asarray(leaf)

    return jax.tree_util.tree_map_with_path(drop, params)


@functools.cache
def trajectory(name):
    """Runs the official steps of one golden file with ours: (golden, metrics, centers, final state)."""
    golden = load(name)
    params, stats = split_params(golden_network(golden, "student", "0"))
    terms = {"dino": {"out_dim": 96, "hidden_dim": 64, "bottleneck_dim": 32}}
    if "barlow_twins" in params["heads"]:
        widths = tuple(
            k["kernel"].shape[1] for n, k in params["heads"]["barlow_twins"].items() if "dense" in n
        )
        terms["barlow_twins"] = {"weight": float(golden["barlow_weight"]), "hidden_dims": widths}
    loss = make_loss(terms)
    tx = make_optimizer(
        clip=float(golden["clip"]), freeze_last_layer_steps=int(golden["freeze_steps"])
    )
    schedules = {
        "lr": table(golden["lr"]),
        "weight_decay": table(golden["wd"]),
        "teacher_momentum": table(golden["momentum"]),
        "teacher_temp": table(golden["teacher_temp"]),
    }
    step = jax.jit(step_on_crops(VIT, loss, tx, schedules))
    state = create_state(VIT, loss, tx, jax.random.key(0))
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    state = state.replace(
        params=params,
        teacher_params=teacher_part(params, loss.heads),
        batch_stats=stats,
        opt_state=tx.init(params),
    )
    metrics, centers = [], []
    for i in range(int(golden["steps"])):
        crops = {"global_crops": golden[f"global_{i}"], "local_crops": golden[f"local_{i}"]}
        state, m = step(state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), crops))
        metrics.append(jax.device_get(m))
        centers.append(np.asarray(state.loss_state["dino"]["center"]))
    return golden, metrics, centers, state


def golden_network(golden, network, moment):
    """Weights of "student" or "teacher" at moment "0" or "N"; the projector has a prefix of its own."""
    projector = {f"projector.{k}": v for k, v in subset(golden, f"projector{moment}:").items()}
    return subset(golden, f"{network}{moment}:") | (projector if network == "student" else {})


@pytest.mark.parametrize(
    "name",
    ["dino_trajectory", pytest.param("hybrid_trajectory", marks=pytest.mark.slow)],
)
def test_trajectory_equals_official(name):
    golden, metrics, centers, state = trajectory(name)
    for key, ours in {
        "losses": "loss",
        "dino_losses": "dino/loss",
        "barlow_losses": "barlow_twins/loss",
    }.items():
        if len(golden[key]):
            np.testing.assert_allclose(
                [m[ours] for m in metrics], golden[key], rtol=1e-4, err_msg=key
            )
    assert_close(centers[-1], golden["centers"][-1], 1e-4)
    assert_close(centers[0], golden["centers"][0], 1e-5)
    for network, ours in {"student": state.params, "teacher": state.teacher_params}.items():
        expected, stats = split_params(golden_network(golden, network, "N"))
        ours, expected = without_key_bias(ours), without_key_bias(expected)
        for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
            value = functools.reduce(lambda tree, p: tree[p.key], path, ours)
            assert_close(value, leaf, 1e-4, f"{network}{jax.tree_util.keystr(path)}")
        for layer, running in stats.get("barlow_twins", {}).items():
            for moment, value in running.items():
                assert_close(state.batch_stats["barlow_twins"][layer][moment], value, 1e-4)


def test_ema_turns_the_right_way():
    new = ema_update({"a": jnp.float32(1.0)}, {"a": jnp.float32(2.0)}, momentum=0.9)
    assert_close(new["a"], 1.1, 1e-6)


@pytest.mark.slow
def test_teacher_follows_the_updated_student():
    """With momentum 0 the teacher must be the student after the optimiser, not before it."""
    golden = load("dino_trajectory")
    _, _, _, state = small_step(golden, momentum=0.0)
    for ours, theirs in zip(
        jax.tree.leaves(state.teacher_params["backbone"]),
        jax.tree.leaves(state.params["backbone"]),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def small_step(golden, momentum):
    loss = make_loss({"dino": {"out_dim": 96, "hidden_dim": 64, "bottleneck_dim": 32}})
    tx = make_optimizer()
    values = {"lr": 1e-2, "weight_decay": 0.04, "teacher_momentum": momentum, "teacher_temp": 0.04}
    step = step_on_crops(VIT, loss, tx, values)
    before = create_state(VIT, loss, tx, jax.random.key(0))
    crops = {"global_crops": golden["global_0"], "local_crops": golden["local_0"]}
    after, metrics = jax.jit(step)(
        before, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), crops)
    )
    moved = relative_error(
        after.params["backbone"]["cls_token"], before.params["backbone"]["cls_token"]
    )
    assert moved > 1e-3
    return step, metrics, before, after


def test_patch_tokens_that_a_loss_does_not_declare_are_one_clear_error():
    tx, values = make_optimizer(), {"lr": 0.0, "weight_decay": 0.0, "teacher_momentum": 0.9}
    crops = {"global_crops": jnp.ones((2, 2, 16, 16, 3)), "local_crops": jnp.ones((2, 0, 8, 8, 3))}

    def outputs(patches):
        loss = make_loss({"mine": {"fn": "fork:patchwise", "patches": patches}})
        state = jax.eval_shape(lambda: create_state(VIT, loss, tx, jax.random.key(0)))
        return jax.eval_shape(step_on_crops(VIT, loss, tx, values), state, crops)

    assert "mine/loss" in outputs(("student", "teacher"))[1]
    for patches in ((), ("student",)):
        with pytest.raises(ValueError, match=r"config\.loss\.mine reads patch tokens .*teacher"):
            outputs(patches)


def test_a_head_gets_train_where_it_says_so():
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3)(x) + (1.0 if train else 0.0)

    def outputs(**options):
        spec = HeadSpec(Head(), teacher=False, **options)
        params = Head().init(jax.random.key(0), jnp.zeros((2, 4)))["params"]
        features = {"cls": jnp.ones((2, 2, 4))}
        return project({"mine": spec}, {"mine": params}, {}, features, None)[0]["mine"]

    assert outputs(takes_train=True).shape == (2, 2, 3)
    assert_close(outputs(takes_train=True) - outputs(), np.ones((2, 2, 3)), 1e-6)
