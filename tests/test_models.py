"""Backbones, heads and their PyTorch names against the official code's numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refs
from golden_files import assert_close, assert_trees_close, load, subset

from dinotwins_jax.models import VARIANTS, create_vit
from dinotwins_jax.models.block import drop_path
from dinotwins_jax.models.heads import BarlowProjector, DINOHead, cosine_logits, l2_normalise
from dinotwins_jax.models.torch_weights import (
    barlow_projector_from_torch,
    dino_head_from_torch,
    vit_from_torch,
    vit_to_torch,
)
from dinotwins_jax.models.vit import VisionTransformer

TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 4, "image_size": 16}


@pytest.fixture(scope="module")
def golden_vit():
    golden = load("vit_forward")
    return golden, vit_from_torch(subset(golden, "w:"))


@pytest.mark.parametrize("size", ["native", "local", "rect"])
def test_vit_forward_equals_official(golden_vit, size):
    golden, params = golden_vit
    out = VisionTransformer(**TINY).apply(
        {"params": params}, golden[f"x_{size}"], return_attention=True
    )
    assert_close(out.cls, golden[f"cls_{size}"])
    tokens = np.concatenate([out.cls[:, None], out.patches], axis=1)
    assert_close(tokens, golden[f"tokens_{size}"])
    assert_close(out.attention, golden[f"attn_{size}"])


def test_vit_gradients_equal_official(golden_vit):
    golden, params = golden_vit
    vit = VisionTransformer(**TINY)

    def f(p):
        return jnp.sum(vit.apply({"params": p}, golden["x_native"]).cls ** 2)

    grads = vit_to_torch(jax.grad(f)(params))
    for name in subset(golden, "grad_"):
        assert_close(grads[name], golden[f"grad_{name}"], 1e-5, name)


def test_torch_names_round_trip(golden_vit):
    golden, params = golden_vit
    weights = subset(golden, "w:")
    back = vit_to_torch(params)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    wrapped = {f"module.backbone.{k}": v for k, v in weights.items()}
    assert_trees_close(vit_from_torch(wrapped), params, 0.0)


def test_registers_and_layer_scale_round_trip_and_keep_patches_in_place():
    vit = VisionTransformer(**TINY, num_register_tokens=4, layer_scale_init=1e-5)
    images = jnp.ones((2, 16, 16, 3))
    params = jax.jit(vit.init)(jax.random.key(0), images)["params"]
    out = vit.apply({"params": params}, images, return_attention=True)
    assert out.patches.shape == (2, 16, 48) and out.attention.shape == (2, 3, 21, 21)
    assert_trees_close(vit_from_torch(vit_to_torch(params)), params, 0.0)


def test_torch_weights_name_what_is_wrong(golden_vit):
    weights = subset(golden_vit[0], "w:")
    missing = {k: v for k, v in weights.items() if k != "blocks.1.mlp.fc1.weight"}
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        vit_from_torch(missing)
    with pytest.raises(ValueError, match="rope"):
        vit_from_torch(weights | {"rope.periods": np.ones(3)})
    with pytest.raises(ValueError, match=r"cls_token.*\(1, 1, 7\)"):
        vit_from_torch(weights | {"cls_token": np.ones((1, 1, 7))})


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_dino_head_equals_official(norm_last_layer):
    golden = load(f"dino_head_norm_last_{norm_last_layer}")
    params = dino_head_from_torch(subset(golden, "w:"))
    sizes = [int(golden[n]) for n in ("out_dim", "hidden_dim", "bottleneck_dim")]
    head = DINOHead(*sizes, norm_last_layer=norm_last_layer)
    logits, pullback = jax.vjp(lambda p, x: head.apply({"params": p}, x), params, golden["x"])
    assert_close(logits, golden["logits"])
    grads, grad_x = pullback(jnp.asarray(golden["upstream"]))
    assert_close(grad_x, golden["grad_x"])
    assert_close(grads["last_layer"]["weight_v"], golden["grad_weight_v"])


def test_dino_head_has_no_weight_g_unless_it_is_trained():
    def names(norm_last_layer):
        head = DINOHead(8, 8, 8, norm_last_layer=norm_last_layer)
        return set(head.init(jax.random.key(0), jnp.ones((1, 4)))["params"]["last_layer"])

    assert names(True) == {"weight_v"} and names(False) == {"weight_v", "weight_g"}


def test_a_head_without_weight_norm_ends_in_a_plain_linear_layer():
    """Logits and gradients of <x / |x|, w_k>, with the norms of x and of the prototypes w_k far from 1."""
    rng = np.random.default_rng(0)
    head = DINOHead(7, 6, 4, weight_norm=False)
    x = np.float32(rng.normal(size=(5, 3)))
    params = jax.jit(head.init)(jax.random.key(0), x)["params"]
    assert {k: v.shape for k, v in params["last_layer"].items()} == {"weight": (7, 4)}
    params = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)
    upstream = rng.normal(size=(5, 7))
    logits, pullback = jax.vjp(lambda p: head.apply({"params": p}, x), params)
    weight, unit, expected = np.float64(params["last_layer"]["weight"]), [], np.empty((5, 7))
    for n, row in enumerate(np.float64(x)):
        for layer in range(3):
            dense = params[f"mlp_{layer}"]
            row = row @ np.float64(dense["kernel"]) + np.float64(dense["bias"])
            if layer < 2:
                row = np.array([0.5 * v * (1 + math.erf(v / 2**0.5)) for v in row])
        unit.append(row / np.sqrt(np.sum(row**2)))
        for k in range(7):
            expected[n, k] = np.sum(unit[-1] * weight[k])
    assert_close(logits, expected)
    assert_close(pullback(jnp.float32(upstream))[0]["last_layer"]["weight"], upstream.T @ unit)


def test_a_plain_last_layer_starts_as_the_layers_before_it():
    head = DINOHead(4096, 64, 64, weight_norm=False)
    params = jax.jit(head.init)(jax.random.key(0), jnp.ones((1, 4)))["params"]
    for weight in (params["last_layer"]["weight"], params["mlp_1"]["kernel"]):
        np.testing.assert_allclose(np.std(weight), 0.02, rtol=0.03)


def test_dino_head_with_batch_norm_equals_a_plain_reference():
    rng = np.random.default_rng(0)
    shapes = {"mlp.0": (6, 5), "mlp.1": (6,), "mlp.3": (6, 6), "mlp.4": (6,), "mlp.6": (4, 6)}
    weights = {f"{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": rng.normal(size=shape[:1]) for name, shape in shapes.items()}
    weights |= {"last_layer.weight_v": rng.normal(size=(7, 4))}
    weights |= {"last_layer.weight_g": np.ones((7, 1))}
    params = dino_head_from_torch(weights)
    del params["last_layer"]["weight_g"]
    x = rng.normal(size=(9, 5)).astype(np.float32)
    head = DINOHead(7, 6, 4, use_bn=True)
    fresh = jax.jit(head.init)(jax.random.key(0), x)
    assert jax.tree.structure(fresh["params"]) == jax.tree.structure(params)
    logits, updated = head.apply(
        {"params": params, "batch_stats": fresh["batch_stats"]}, x, mutable=["batch_stats"]
    )
    assert_close(logits, refs.dino_head_with_batch_norm(weights, x))
    assert set(updated["batch_stats"]) == {"bn_0", "bn_1"}


def test_a_projector_with_normed_output_is_the_plain_one_standardised_view_by_view():
    x = jax.random.normal(jax.random.key(0), (2, 6, 5)) + jnp.arange(2.0)[:, None, None]
    plain, normed = BarlowProjector((16, 8)), BarlowProjector((16, 8), norm_output=True)
    variables = normed.init(jax.random.key(1), x)
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(
        plain.init(jax.random.key(1), x)["params"]
    )
    z = plain.apply(variables, x, mutable=["batch_stats"])[0]
    ours, stats = normed.apply(variables, x, mutable=["batch_stats"])
    z = np.float64(z)
    expected = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
    assert_close(ours, expected, 1e-5)
    running = np.zeros(8)
    for view in z:
        running = 0.9 * running + 0.1 * view.mean(0)
    assert_close(stats["batch_stats"]["bn_1"]["mean"], running, 1e-5)
    variables = variables | stats
    z = np.float64(plain.apply(variables, x, train=False, mutable=["batch_stats"])[0])
    last = stats["batch_stats"]["bn_1"]
    expected = (z - last["mean"]) / np.sqrt(last["var"] + 1e-5)
    assert_close(normed.apply(variables, x, train=False), expected, 1e-5)


def test_barlow_projector_equals_official():
    golden = load("barlow_projector")
    params, stats = barlow_projector_from_torch(subset(golden, "w:"))
    projector = BarlowProjector((48, 48, 48))

    def run(x):
        variables = {"params": params, "batch_stats": stats}
        return projector.apply(variables, x, train=True, mutable=["batch_stats"])

    y, pullback, updated = jax.vjp(run, golden["x"], has_aux=True)
    assert_close(y, golden["y"])
    assert_close(pullback(jnp.asarray(golden["upstream"]))[0], golden["grad_x"])
    after = updated["batch_stats"]["bn_0"]
    assert_close(after["mean"], golden["running_mean_after"])
    assert_close(after["var"], golden["running_var_after"])


@pytest.mark.parametrize("eps", [1e-12, 1e-8])
@pytest.mark.parametrize("size", [0.0, 0.1])
def test_l2_normalise_is_linear_below_eps(size, eps):
    """x / eps with a gradient of 1 / eps, at zero too, as PyTorch's normalize."""
    upstream = jnp.array([[1.0, -2.0, 0.5]])
    x = jnp.full((1, 3), size * eps)
    y, pull_back = jax.vjp(lambda x: l2_normalise(x, eps), x)
    np.testing.assert_allclose(y, size, rtol=1e-6)
    np.testing.assert_allclose(pull_back(upstream)[0], upstream / eps, rtol=1e-6)


@pytest.mark.parametrize("plain", [False, True])
def test_a_prototype_of_zeros_has_logits_of_zero(plain):
    """And finite gradients, where weight normalisation would divide 0 by 0."""
    product = cosine_logits.fun if plain else cosine_logits
    x = l2_normalise(jax.random.normal(jax.random.key(0), (5, 4)))
    v = jax.random.normal(jax.random.key(1), (3, 4)).at[1].set(0.0)
    logits, pull_back = jax.vjp(lambda x, v: product(x, v, jnp.float32), x, v)
    assert not np.any(logits[:, 1])
    np.testing.assert_allclose(logits[:, 0], x @ v[0] / jnp.linalg.norm(v[0]), rtol=1e-5)
    assert all(np.all(np.isfinite(grad)) for grad in pull_back(jnp.ones_like(logits)))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    y = np.asarray(drop_path(x, jax.random.key(1), 0.25, jnp.arange(4000)))
    per_sample = y.reshape(4000, -1)
    assert np.all((per_sample == 0).all(1) | np.isclose(per_sample, 1 / 0.75).all(1))
    # 4,000 draws: the standard deviation of the kept fraction is 0.007.
    assert abs((per_sample[:, 0] > 0).mean() - 0.75) < 0.03


def test_drop_path_of_a_sample_does_not_depend_on_its_batch():
    x = jnp.ones((8, 1, 1))
    whole = drop_path(x, jax.random.key(0), 0.5, jnp.arange(8))
    halves = [drop_path(x[:4], jax.random.key(0), 0.5, jnp.arange(4) + o) for o in (0, 4)]
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))


def test_drop_path_is_linear_over_the_blocks_or_uniform():
    def rates(**options):
        vit = VisionTransformer(**TINY, drop_path_rate=0.3, **options)
        params = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
        return [block.drop_path_rate for block in vit.bind({"params": params}).blocks]

    np.testing.assert_allclose(rates(), [0.0, 0.15, 0.3])
    assert rates(drop_path_uniform=True) == [0.3, 0.3, 0.3]


@pytest.mark.slow
def test_drop_path_acts_in_training_only_and_ramps_linearly():
    vit = VisionTransformer(**TINY, drop_path_rate=0.9)
    images = jax.random.normal(jax.random.key(0), (16, 16, 16, 3))
    params = jax.jit(vit.init)(jax.random.key(1), images)["params"]
    quiet = vit.apply({"params": params}, images).cls
    rngs = {"drop_path": jax.random.key(2)}
    noisy = vit.apply({"params": params}, images, train=True, rngs=rngs).cls
    assert float(jnp.max(jnp.abs(quiet - noisy))) > 1e-3
    assert [b.drop_path_rate for b in vit.bind({"params": params}).blocks] == [0.0, 0.45, 0.9]


def test_intermediate_layers_end_with_the_output(golden_vit):
    golden, params = golden_vit
    vit = VisionTransformer(**TINY)
    layers = vit.apply({"params": params}, golden["x_native"], n=2, method="intermediate_layers")
    assert len(layers) == 2
    assert_close(layers[-1][0], golden["cls_native"])


def test_bfloat16_compute_keeps_float32_parameters_and_outputs(golden_vit):
    golden, params = golden_vit
    vit = VisionTransformer(**TINY, dtype=jnp.bfloat16)
    assert all(
        p.dtype == jnp.float32
        for p in jax.tree.leaves(vit.init(jax.random.key(0), golden["x_native"]))
    )
    out = vit.apply({"params": params}, golden["x_native"], return_attention=True)
    assert out.cls.dtype == out.attention.dtype == jnp.float32
    assert_close(out.cls, golden["cls_native"], 3e-2)  # 8 bits of mantissa, three blocks


def test_a_branch_that_is_scaled_by_1e_5_is_not_rounded_away_in_bfloat16():
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    vit = VisionTransformer(**TINY, layer_scale_init=1e-5)
    params = jax.jit(vit.init)(jax.random.key(0), images)["params"]

    def branch(vit):
        """What the first block adds."""

        def added(params):
            before, after = (
                vit.apply({"params": params}, images, block, method="embed_until")
                for block in range(2)
            )
            return after - before

        return jax.jit(added)(params)

    exact, half = branch(vit), branch(vit.clone(dtype=jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert float(jnp.linalg.norm(half - exact) / jnp.linalg.norm(exact)) < 0.05


@pytest.mark.slow
def test_init_std_reaches_every_dense_layer_and_token():
    params = VisionTransformer(**TINY, init_std=0.5).init(
        jax.random.key(0), jnp.ones((1, 16, 16, 3))
    )["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if leaf.ndim > 1 and "patch_embed" not in name:
            # Down to 48 draws a leaf: a sample's standard deviation is within a tenth of it.
            assert abs(float(jnp.std(leaf)) - 0.5) < 0.2, name


def test_sizes_that_do_not_fit_are_named():
    vit = VisionTransformer(**TINY)
    with pytest.raises(ValueError, match=r"18x16 is not a multiple of patch_size 4"):
        jax.jit(vit.init)(jax.random.key(0), jnp.ones((1, 18, 16, 3)))
    with pytest.raises(ValueError, match=r"vit_smal.*vit_small"):
        create_vit("vit_smal")


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8), ("vit_large", 303.3)],
)
def test_variants_have_the_published_sizes(name, millions):
    vit = create_vit(name)
    assert set(VARIANTS[name]) == {"embed_dim", "depth", "num_heads"}
    shapes = jax.eval_shape(vit.init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert abs(count / 1e6 - millions) < 0.06
