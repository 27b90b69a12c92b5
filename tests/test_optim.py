"""Schedules and optimisers against the official arrays, and AdamW against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import refs
from golden_files import assert_close, load

from dinotwins_jax.models.torch_weights import vit_to_torch
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.schedules import cosine_schedule, teacher_temp_schedule
from dinotwins_jax.training.optim import (
    adamw,
    clip_per_module,
    clip_per_parameter,
    decay_mask,
    labels,
    lars,
    lr_scales,
    make_optimizer,
)


@pytest.mark.parametrize("i", range(4))
def test_cosine_schedule_equals_the_official_array(i):
    golden = load("schedules")
    base, final, total, warmup, start = golden[f"args_{i}"]
    schedule = cosine_schedule(base, final, int(total), int(warmup), start)
    values = jax.vmap(schedule)(jnp.arange(int(total)))
    np.testing.assert_allclose(values, golden[f"values_{i}"], rtol=1e-7, atol=1e-12)
    assert float(schedule(10**6)) == float(values[-1])


def test_teacher_temp_warms_up_linearly_then_stays():
    per_step = teacher_temp_schedule(0.04, 0.07, 4)
    expected = [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    np.testing.assert_allclose([per_step(s) for s in range(6)], expected, rtol=1e-6)
    per_epoch = teacher_temp_schedule(0.04, 0.07, 8, steps_per_update=2)
    np.testing.assert_allclose(
        [per_epoch(s) for s in range(10)], np.repeat(expected[:5], 2), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosine_schedule(1, 0, 10, 11), "warmup_steps 11.*total_steps 10"),
        (lambda: cosine_schedule(1, 0, 0), "total_steps 0"),
        (lambda: teacher_temp_schedule(0.0, 0.07, 3), "must be positive"),
        (lambda: make_optimizer("adam"), "unknown optimizer 'adam'"),
        (lambda: make_optimizer(clip_mode="norm"), "unknown clip_mode 'norm'"),
        (lambda: make_optimizer(frozen_last_layer="0"), "unknown frozen_last_layer '0'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_lars_equals_official_over_five_steps():
    golden = load("lars")
    tx = lars(
        float(golden["momentum"]),
        float(golden["eta"]),
        float(golden["lr_bias"] / golden["lr_kernel"]),
    )
    params = {"kernel": jnp.asarray(golden["kernel_0"]), "bias": jnp.asarray(golden["bias_0"])}
    state = tx.init(params)
    for i in range(5):
        grads = {"kernel": golden[f"grad_kernel_{i}"], "bias": golden[f"grad_bias_{i}"]}
        decay = float(golden["weight_decay"])
        updates, state = tx.update(
            grads, state, params, lr=float(golden["lr_kernel"]), weight_decay=decay
        )
        params = optax.apply_updates(params, updates)
        assert_close(params["kernel"], golden[f"kernel_{i + 1}"])
        assert_close(params["bias"], golden[f"bias_{i + 1}"])


def random_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"fc": {"kernel": (4, 3), "bias": (3,)}, "norm": {"scale": (4,)}}
    shapes |= {
        "cls_token": (1, 1, 4),
        "head": {"last_layer": {"weight_v": (5, 2), "weight_g": (5, 1)}},
    }
    return jax.tree.map(
        lambda s: jnp.float32(rng.normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def test_adamw_equals_the_plain_loop():
    params, reference = random_tree(0), jax.tree.map(np.float64, random_tree(0))
    tx = adamw()
    state, memory = tx.init(params), {}
    for i in range(4):
        grads, lr, decay = random_tree(i + 1), 0.01 * (i + 1), 0.1 * i
        updates, state = tx.update(grads, state, params, lr=lr, weight_decay=decay)
        params = optax.apply_updates(params, updates)
        mask = decay_mask(reference)
        reference = refs.adamw_step(reference, grads, mask, memory, i + 1, lr, decay)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(reference), strict=True):
        assert_close(ours, theirs, 1e-5)


def test_decay_leaves_out_biases_and_vectors_only():
    assert decay_mask(random_tree(0)) == {
        "fc": {"kernel": True, "bias": False},
        "norm": {"scale": False},
        "cls_token": True,
        "head": {"last_layer": {"weight_v": True, "weight_g": True}},
    }
    found = labels(random_tree(0))
    assert set(jax.tree.leaves(found["head"])) == {"last_layer"} and found["cls_token"] == "rest"


def test_clip_is_per_tensor_and_leaves_small_ones_alone():
    grads = {"big": jnp.full((4,), 3.0), "small": jnp.full((4,), 0.1)}  # norms 6 and 0.2
    clipped, _ = clip_per_parameter(3.0).update(grads, optax.EmptyState())
    assert_close(clipped["big"], np.full(4, 3.0 * 3 / (6 + 1e-6)), 1e-6)
    np.testing.assert_array_equal(clipped["small"], grads["small"])
    both, _ = make_optimizer(clip=3.0, clip_mode="global").update(
        grads,
        make_optimizer(clip=3.0, clip_mode="global").init(grads),
        grads,
        lr=1.0,
        weight_decay=0.0,
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(both))


def test_global_clip_scales_all_tensors_alike():
    grads = {"a": jnp.full((4,), 3.0), "b": jnp.full((4,), 4.0)}  # global norm 10
    tx = make_optimizer("lars", clip=5.0, clip_mode="global", momentum=0.0, bias_lr_ratio=1.0)
    updates, _ = tx.update(grads, tx.init(grads), grads, lr=1.0, weight_decay=0.0)
    assert_close(updates["a"], -0.5 * grads["a"], 1e-5)
    assert_close(updates["b"], -0.5 * grads["b"], 1e-5)


def test_per_module_clip_equals_a_loop_over_the_modules():
    """Backbone, and each head, at most at the norm by itself; a small one is left alone."""
    rng = np.random.default_rng(0)

    def module(scale):
        sizes = {"a": (3, 4), "b": (5,)}
        return {k: np.float32(scale * rng.normal(size=size)) for k, size in sizes.items()}

    grads = {"backbone": {"blocks_0": module(2.0), "norm": module(1.0)},
             "heads": {"dino": module(3.0), "ibot": module(0.1)}}  # fmt: skip
    clipped, _ = clip_per_module(3.0).update(grads, optax.EmptyState())
    for path in (("backbone",), ("heads", "dino"), ("heads", "ibot")):
        given, ours = grads, clipped
        for name in path:
            given, ours = given[name], ours[name]
        squares = 0.0
        for leaf in jax.tree.leaves(given):
            for value in leaf.reshape(-1):
                squares += float(value) ** 2
        coefficient = 3.0 / (squares**0.5 + 1e-6)
        assert (coefficient < 1) == (path[-1] != "ibot")
        for theirs, of_ours in zip(jax.tree.leaves(given), jax.tree.leaves(ours), strict=True):
            assert_close(of_ours, theirs * min(coefficient, 1.0), 1e-6)


def test_a_last_layer_at_rate_zero_keeps_its_moments_up_to_date():
    """Fixed bit for bit for two steps; then a step whose moments know all three gradients, as the loop."""
    tx = make_optimizer(
        clip=0.0, freeze_last_layer_steps=2, frozen_last_layer="zero_rate", betas=(0.8, 0.95)
    )
    params = random_tree(0)
    state, memory, reference = tx.init(params), {}, params
    for i in range(3):
        grads = random_tree(9 + i)
        rates = jax.tree.map(
            lambda group, i=i: 0.0 if group == "last_layer" and i < 2 else 0.1, labels(params)
        )
        updates, state = tx.update(grads, state, params, lr=0.1, weight_decay=0.5)
        params = optax.apply_updates(params, updates)
        reference = adamw_loop(reference, grads, rates, memory, i + 1, 0.5, (0.8, 0.95))
        last = params["head"]["last_layer"]["weight_v"]
        same = np.array_equal(last, random_tree(0)["head"]["last_layer"]["weight_v"])
        assert same == (i < 2)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(reference), strict=True):
        assert_close(ours, theirs, 1e-5)


def adamw_loop(params, grads, rates, memory, count, decay, betas):
    """AdamW element by element, in float64; rates: of each leaf."""
    mask, b1, b2 = jax.tree.leaves(decay_mask(params)), *betas
    leaves = (jax.tree.leaves(tree) for tree in (params, grads, rates))
    found = []
    for number, (p, g, rate) in enumerate(zip(*leaves, strict=True)):
        p, g = np.float64(p), np.float64(g)
        m, v = memory.setdefault(number, (np.zeros_like(g), np.zeros_like(g)))
        new = np.empty_like(p)
        for at in np.ndindex(p.shape):
            m[at] = b1 * m[at] + (1 - b1) * g[at]
            v[at] = b2 * v[at] + (1 - b2) * g[at] ** 2
            kept = p[at] * (1 - rate * decay) if mask[number] else p[at]
            root = (v[at] / (1 - b2**count)) ** 0.5
            new[at] = kept - rate * m[at] / (1 - b1**count) / (root + 1e-8)
        found.append(new)
    return jax.tree.unflatten(jax.tree.structure(params), found)


def test_frozen_last_layer_is_skipped_wholly():
    """While frozen: no update, no decay. After: bias correction starts from its own first step."""
    tx = make_optimizer(clip=0.0, freeze_last_layer_steps=2)
    params, state = random_tree(0), None
    state = tx.init(params)
    for i in range(3):
        updates, state = tx.update(random_tree(9), state, params, lr=0.1, weight_decay=0.5)
        moved = float(jnp.abs(updates["head"]["last_layer"]["weight_v"]).max())
        assert (moved > 0) == (i == 2)
        assert float(jnp.abs(updates["fc"]["kernel"]).max()) > 0
    grads = random_tree(9)["head"]["last_layer"]["weight_v"]
    first_step = -0.1 * (np.sign(grads) + 0.5 * params["head"]["last_layer"]["weight_v"])
    assert_close(updates["head"]["last_layer"]["weight_v"], first_step, 1e-4)


def vit_and_head():
    """Parameters as a run has them: a backbone of depth 3 with registers, and a head."""
    vit = VisionTransformer(
        **{"embed_dim": 8, "depth": 3, "num_heads": 2, "patch_size": 4, "image_size": 8},
        **{"num_register_tokens": 2, "layer_scale_init": 0.1},
    )
    shapes = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(0)
    backbone = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), shapes)
    return {"backbone": backbone, "heads": {"dino": random_tree(0)["head"]}}


def dinov2_rate(name, decay, patch_embed):
    """The rate of DINOv2's parameter groups, by the names and the rules of PyTorch's side."""
    group = 4  # depth + 1: norm
    if name.startswith(("pos_embed", "patch_embed", "cls_token", "register_tokens")):
        group = 0
    elif name.startswith("blocks."):
        group = int(name.split(".")[1]) + 1
    return decay ** (4 - group) * (patch_embed if "patch_embed" in name else 1.0)


def test_adamw_with_layer_decay_equals_the_loop_over_groups():
    """Each tensor, by its PyTorch name, at its own learning rate, which scales decay and update."""
    params = vit_and_head()
    options = {"layer_decay": 0.7, "patch_embed_lr_mult": 0.2}
    tx = make_optimizer(clip=0.0, freeze_last_layer_steps=1, **options)
    state = tx.init(params)
    torch, memory = vit_to_torch(params["backbone"]), {}
    for t in range(1, 4):
        grads = jax.tree.map(lambda p, t=t: jnp.sin(p * 50 + t), params)
        updates, state = jax.jit(tx.update)(grads, state, params, lr=0.01 * t, weight_decay=0.3)
        for name, g in vit_to_torch(grads["backbone"]).items():
            decays = {name: float(g.ndim > 1 and not name.endswith(".bias"))}
            rate = 0.01 * t * dinov2_rate(name, 0.7, 0.2)
            own = memory.setdefault(name, {})
            torch |= refs.adamw_step(
                {name: np.float64(torch[name])}, {name: g}, decays, own, t, rate, 0.3
            )
        params = optax.apply_updates(params, updates)
    for name, ours in vit_to_torch(params["backbone"]).items():
        assert_close(ours, torch[name], 1e-4)  # 1 - 0.999^t has four digits in float32
    assert {float(x) for x in jax.tree.leaves(lr_scales(params, 0.7, 0.2)["heads"])} == {1.0}


def test_lars_scales_its_steps_by_layer():
    """LARS is linear in the rate: each tensor's step is that without layer decay, times its factor."""
    params = vit_and_head()
    grads = jax.tree.map(jnp.cos, params)
    steps = []
    for options in ({}, {"layer_decay": 0.5, "patch_embed_lr_mult": 0.2}):
        tx = make_optimizer("lars", clip=0.0, **options)
        updates, _ = tx.update(grads, tx.init(params), params, lr=0.2, weight_decay=0.1)
        steps.append(vit_to_torch(updates["backbone"]))
    for name, plain in steps[0].items():
        assert_close(steps[1][name], plain * dinov2_rate(name, 0.5, 0.2), 1e-5)


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_a_predictor_has_its_own_rate(name):
    """The first step of each tensor, decay included, times its factor; projector and backbone have 1."""
    params = vit_and_head()
    params["heads"] = {
        head: random_tree(i)["head"] for i, head in enumerate(("byol", "byol_predictor"))
    }
    grads, scalars = jax.tree.map(jnp.cos, params), {"lr": 0.2, "weight_decay": 0.1}
    steps = []
    for options in ({}, {"predictor_lr_mult": 10.0}):
        tx = make_optimizer(name, clip=0.0, **options)
        steps.append(tx.update(grads, tx.init(params), params, **scalars)[0])
    plain, ours = steps
    plain["heads"]["byol_predictor"] = jax.tree.map(
        lambda x: 10.0 * x, plain["heads"]["byol_predictor"]
    )
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), ours, plain)


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_a_frozen_backbone_is_skipped_wholly(name):
    """Bit for bit unchanged for two steps, despite decay; then its first step. Heads train at once."""
    params = vit_and_head()
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params)
    frozen = make_optimizer(name, clip=0.0, freeze_backbone_steps=2, freeze_last_layer_steps=1)
    plain = make_optimizer(name, clip=0.0)
    state, scalars = frozen.init(params), {"lr": 0.1, "weight_decay": 0.5}
    first, _ = plain.update(grads, plain.init(params), params, **scalars)
    for step in range(3):
        updates, state = frozen.update(grads, state, params, **scalars)
        heads = jax.tree.leaves(updates["heads"])
        assert all((float(jnp.abs(u).max()) > 0) == (step >= 1) for u in heads)
        if step < 2:
            assert not any(np.any(u) for u in jax.tree.leaves(updates["backbone"]))
    jax.tree.map(np.testing.assert_array_equal, updates["backbone"], first["backbone"])
