"""Tests of dinotwins_jax.evals.finetune, finetune_step and the two halves of the backbone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refs_evals import adamw_trajectory

from dinotwins_jax.evals import finetune, finetune_step
from dinotwins_jax.evals.finetune import fine_tune
from dinotwins_jax.evals.linear import linear_probe
from dinotwins_jax.models.vit import VisionTransformer

QUICK = {"epochs": 6, "batch_size": 20, "learning_rates": (1e-3, 3e-3)}


@functools.cache
def make_backbone(**fields):
    backbone = VisionTransformer(
        embed_dim=48, depth=2, num_heads=3, patch_size=8, image_size=16, **fields
    )
    return backbone, jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]


def same_sign(num_images, seed, classes=2):
    """Noisy images, labelled by whether their halves differ in sign: not linear in the pixels."""
    rng = np.random.RandomState(seed)
    bits = rng.randint(2, size=(num_images, 2))
    images = (
        rng.normal(size=(num_images, 2, 8, 16, 3)) + 0.3 * (2 * bits - 1)[..., None, None, None]
    )
    return images.reshape(num_images, 16, 16, 3).astype(np.float32), bits[:, 0] ^ bits[:, 1]


def views_of(images, batch=60):
    def views(indices):
        for start in range(0, len(indices), batch):
            some = indices[start : start + batch]
            yield images[some], some

    return views


@pytest.fixture(scope="module")
def toy():
    backbone, params = make_backbone()
    return backbone, params, same_sign(300, 0), same_sign(300, 1)


def tune(toy, test_labels=None, **settings):
    backbone, params, (x, y), (z, t) = toy
    labels = t if test_labels is None else test_labels
    options = {"num_classes": 2, "fraction": 0.2, "split_seeds": (0, 1), **QUICK, **settings}
    return fine_tune(backbone, params, views_of(x), y, views_of(z), labels, **options)


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"num_register_tokens": 2, "layer_scale_init": 0.1, "dtype": jnp.bfloat16},
            id="registers, LayerScale, bfloat16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_two_halves_of_the_backbone_are_the_whole(block, fields):
    backbone, params = make_backbone(**fields)
    images = np.random.RandomState(0).normal(size=(3, 16, 24, 3)).astype(np.float32)
    variables = {"params": params}
    tokens = backbone.apply(variables, images, block, method="embed_until")
    assert tokens.shape == (3, 1 + 6 + backbone.num_register_tokens, 48)
    whole = backbone.apply(variables, images)
    halves = backbone.apply(variables, tokens, block, method="finish_from")
    np.testing.assert_array_equal(halves.cls, whole.cls)
    np.testing.assert_array_equal(halves.patches, whole.patches)


def test_finish_from_drops_paths_as_the_whole_does_and_names_a_wrong_block():
    backbone, params = make_backbone(drop_path_rate=0.5)
    images = np.random.RandomState(0).normal(size=(6, 16, 16, 3)).astype(np.float32)
    variables, rngs = {"params": params}, {"drop_path": jax.random.key(3)}
    tokens = backbone.apply(variables, images, 1, method="embed_until")
    halves = backbone.apply(variables, tokens, 1, train=True, method="finish_from", rngs=rngs)
    whole = backbone.apply(variables, images, train=True, rngs=rngs)  # block 0 has rate 0
    np.testing.assert_array_equal(halves.cls, whole.cls)
    assert not np.array_equal(whole.cls, backbone.apply(variables, images).cls)
    for block in (-1, 3):
        with pytest.raises(ValueError, match=f"block={block} must be in 0 .. depth=2"):
            backbone.apply(variables, images, block, method="embed_until")


@pytest.mark.parametrize("blocks", [1, 2])
def test_gradients_on_cached_tokens_equal_those_through_the_whole_backbone(toy, blocks):
    backbone, params, (x, _), _ = toy
    x, labels = x[:8], np.arange(8) % 3
    trainable = finetune_step.split_params(backbone, params, blocks, 3)
    kernel = np.random.RandomState(0).normal(size=(48, 3)).astype(np.float32)
    trainable["head"]["kernel"] = jnp.asarray(kernel)  # at 0 nothing would reach the blocks

    def whole(params):
        logits = backbone.apply({"params": params}, x).cls @ kernel
        return -jax.nn.log_softmax(logits)[jnp.arange(8), labels].mean()

    tokens, _ = finetune.cache_tokens(
        backbone, params, views_of(x, 3), np.arange(8), 2 - blocks, np.dtype(np.float32)
    )

    def part(trainable):
        logits = finetune_step.head_logits(backbone, params, trainable, tokens[:, 0])
        return finetune_step.loss(logits, labels)

    expected = jax.jit(jax.grad(whole))(params)
    found = jax.jit(jax.grad(part))(trainable)["backbone"]
    assert sorted(found) == [*(f"blocks_{i}" for i in range(2 - blocks, 2)), "norm"]

    def check(a, b):
        # Rounding is relative to a tensor's largest entry; of some the exact value is 0.
        largest = float(np.abs(b).max())
        assert largest > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest)

    for name, gradients in found.items():
        jax.tree.map(check, gradients, expected[name])


def test_multi_label_loss_equals_the_formula():
    logits = np.random.RandomState(0).normal(size=(5, 3))
    labels = np.random.RandomState(1).rand(5, 3) > 0.6
    p = 1 / (1 + np.exp(-logits))
    expected = -np.mean(np.where(labels, np.log(p), np.log(1 - p)))
    found = finetune_step.loss(jnp.asarray(logits), jnp.asarray(labels))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_adamw_steps_with_layer_decay_equal_plain_numpy(toy):
    backbone, params, *_ = toy
    start = finetune_step.split_params(backbone, params, 2, 3)
    scale = {"blocks_0": 0.65**2, "blocks_1": 0.65, "norm": 1.0, "head": 1.0}
    rng = np.random.RandomState(0)
    gradients = [jax.tree.map(lambda p: rng.normal(size=p.shape), start) for _ in range(3)]
    rates = [1e-3, 3e-3, 2e-3]
    trainable, state = start, optax.scale_by_adam().init(start)
    step = jax.jit(finetune_step.adamw_step)
    for g, rate in zip(gradients, rates, strict=True):
        trainable, state = step(trainable, g, state, rate, 0.65, 0.05)

    def check(path, p, found, *g):
        names = [key.key for key in path]
        factor = scale[names[1] if names[0] == "backbone" else "head"]
        decay = 0.05 if names[-1] == "kernel" else 0.0
        expected = adamw_trajectory(p, g, [factor * rate for rate in rates], decay)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=str(names))

    jax.tree_util.tree_map_with_path(check, start, trainable, *gradients)


def test_rate_rises_linearly_and_falls_as_a_cosine():
    factors = finetune_step.rate_factors(100, 0.1)
    np.testing.assert_allclose(factors[:11], [*np.arange(1, 11) / 10, 1.0])
    assert factors[55] == pytest.approx(0.5) and 0 < factors[-1] < 1e-3
    assert finetune_step.rate_factors(1, 0.1).tolist() == [1.0]


def test_cache_holds_images_and_mirror_images_in_order_without_the_unreadable(toy):
    backbone, params, (x, _), _ = toy
    asked = np.array([3, 5, 8, 13])

    def views(indices):
        assert indices is asked
        yield x[[13, 5]], np.array([13, 5])  # any order; 8 cannot be read
        yield x[[3]], np.array([3])

    tokens, found = finetune.cache_tokens(backbone, params, views, asked, 1, np.dtype(np.float16))
    assert found.tolist() == [3, 5, 13] and tokens.dtype == np.float16
    for side, images in enumerate([x[found], x[found][:, :, ::-1]]):
        exact = backbone.apply({"params": params}, images, 1, method="embed_until")
        np.testing.assert_allclose(tokens[:, side], exact, rtol=1e-3, atol=1e-4)
    huge = jax.tree.map(lambda p: p * 1e6, params)
    with pytest.raises(ValueError, match="overflow cache_dtype float16"):
        finetune.cache_tokens(backbone, huge, views, asked, 1, np.dtype(np.float16))


@pytest.mark.slow
def test_fine_tuning_learns_what_the_frozen_features_do_not_tell(toy):
    backbone, params, (x, y), (z, t) = toy
    before = jax.tree.map(np.array, params)
    features = [np.asarray(backbone.apply({"params": params}, images).cls) for images in (x, z)]
    linear = linear_probe(features[0], y, features[1], t, num_classes=2)["top1"]
    result = tune(toy, fraction=1.0, split_seeds=(0,), epochs=25)
    assert linear < 65 and result["top1_mean"] > 85
    assert result["protocol"] == "finetune-last1-v1"
    assert result["num_test"] == 300 and result["recipe"]["epochs"] == 25
    (split,) = result["splits"]
    assert split["num_train"] == 300 and split["holdout_top1"] > 85 and split["split_seed"] == 0
    assert result["top1_mean"] == split["top1"] and result["top1_std"] == 0.0
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.slow
def test_test_labels_decide_nothing_and_float16_tokens_change_no_score(toy):
    result, t = tune(toy), toy[3][1]
    other = tune(toy, test_labels=1 - t, cache_dtype=np.float32)
    for one, two in zip(result["splits"], other["splits"], strict=True):
        assert one["top1"] == pytest.approx(100 - two["top1"])
        for name in ("split_seed", "learning_rate", "holdout_top1", "num_train"):
            assert one[name] == two[name]
    one, two = (split["top1"] for split in result["splits"])
    assert result["top1_mean"] == pytest.approx((one + two) / 2)
    assert result["top1_std"] == pytest.approx(abs(one - two) / 2**0.5)
    assert [split["num_train"] for split in result["splits"]] == [60, 60]


@pytest.mark.slow
def test_only_labelled_images_are_asked_for_and_one_image_a_class_selects_on_itself(toy):
    backbone, params, (x, y), (z, t) = toy
    asked = {}

    def record(name, images):
        def views(indices):
            asked[name] = indices
            return views_of(images)(indices)

        return views

    y, t = np.where(np.arange(300) < 250, -1, y), np.where(np.arange(300) < 10, t, -1)
    options = {"num_classes": 2, "fraction": 1e-3, "split_seeds": (0,), **QUICK}
    sources = (record("train", x), y, record("test", z), t)
    (split,) = fine_tune(backbone, params, *sources, **options)["splits"]
    assert split["num_train"] == 2 and split["holdout_top1"] is None
    assert len(asked["train"]) == 2 and (y[asked["train"]] >= 0).all()
    assert asked["test"].tolist() == list(range(10))


def test_multi_label_fine_tuning_beats_chance(toy):
    backbone, params, (x, y), (z, t) = toy
    multi_hot = [np.stack([labels == 1, labels == 0], axis=1) for labels in (y, t)]
    sources = (views_of(x), multi_hot[0], views_of(z), multi_hot[1])
    options = {
        **QUICK,
        "epochs": 25,
        "learning_rates": (3e-3,),
        "fraction": 1.0,
        "split_seeds": (0,),
    }
    result = fine_tune(backbone, params, *sources, num_classes=2, **options)
    assert result["protocol"] == "finetune-last1-multilabel-v1"
    assert result["map_mean"] == result["splits"][0]["map"] > 85
    assert "holdout_map" in result["splits"][0] and "top1_mean" not in result


def test_fine_tune_errors_name_the_value(toy):
    for settings, message in [
        ({"blocks": 3}, r"blocks=3 to train must be in 1 .. depth=2"),
        ({"split_seeds": ()}, "split_seeds is empty"),
        ({"learning_rates": (0.0,)}, r"learning_rates=\(0.0,\)"),
        ({"num_classes": 1}, "label 1 does not fit num_classes=1"),
        ({"fraction": 1.5}, r"fraction=1.5"),
        ({"test_labels": np.zeros((300, 2), bool)}, r"test labels \(300, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            tune(toy, **settings)
