"""The convolutional stem: numbers and gradients of plain loops, and its way through runs and exports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close
from refs_backbone import conv_stem, slope
from shrunk import shrunk
from test_export import TINY
from test_export_programs import MOMENTS, assert_same, onnx_session

from configs import barlow_twins
from dinotwins_jax.features.loading import load
from dinotwins_jax.models.channels import channels_of, with_channels
from dinotwins_jax.models.onnx_graph import onnx_model
from dinotwins_jax.models.stem import ConvStem, stem_widths
from dinotwins_jax.models.torch_export import exported
from dinotwins_jax.models.torch_weights import vit_to_torch
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.pretrained import read_backbone
from dinotwins_jax.train import train

KEY = jax.random.key(0)


def filled(module, *shape):
    """Random values for all parameters."""
    shapes = jax.eval_shape(module.init, KEY, jnp.ones(shape))["params"]
    rng = np.random.RandomState(0)
    return jax.tree.map(lambda s: np.float32(0.3 * rng.normal(size=s.shape)), shapes)


def stem_vit(**fields):
    vit = VisionTransformer(**TINY | {"depth": 1, "stem": "conv"} | fields)
    return vit, filled(vit, 1, vit.image_size, vit.image_size, 3)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_values_and_gradients_are_those_of_plain_loops(size, plain):
    stem = ConvStem(embed_dim=6, patch_size=4, plain_gradients=plain)
    params, rng = filled(stem, 1, *size, 3), np.random.RandomState(1)
    images = np.float32(rng.normal(size=(2, *size, 3)))
    expected = np.stack([conv_stem(image, params) for image in images])
    assert expected.shape == (2, size[0] * size[1] // 16, 6)
    assert_close(stem.apply({"params": params}, images), expected)

    weights = rng.normal(size=expected.shape)
    grads = jax.grad(lambda p: jnp.sum(stem.apply({"params": p}, images) * weights))(params)
    for path in (
        ("conv_0", "kernel"),
        ("conv_0", "bias"),
        ("conv_1", "kernel"),
        ("kernel",),
        ("bias",),
    ):
        leaf, grad = params, grads
        for name in path:
            leaf, grad = leaf[name], grad[name]

        def value(x, path=path):
            *outer, last = path
            inner = (params[outer[0]] if outer else params) | {last: x}
            of = params | {outer[0]: inner} if outer else inner
            return sum(np.sum(conv_stem(i, of) * w) for i, w in zip(images, weights, strict=True))

        direction = rng.normal(size=leaf.shape)
        assert_close(np.sum(grad * direction), slope(value, np.float64(leaf), direction), 1e-4)


def test_kernel_gradients_of_bfloat16_are_summed_in_float32():
    images = jnp.ones((2, 8, 8, 3), jnp.bfloat16)
    stem = ConvStem(embed_dim=6, patch_size=4, dtype=jnp.bfloat16)
    params = filled(stem, 1, 8, 8, 3)
    text = (
        jax.jit(jax.grad(lambda p: stem.apply({"params": p}, images).sum())).lower(params).as_text()
    )
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 5 and not any("bf16" in line for line in convolutions)


def test_channels_double_up_to_the_width():
    assert stem_widths(384, 16) == [48, 96, 192, 384]  # of the paper's ViT-4GF
    assert stem_widths(128, 4) == [64, 128] and stem_widths(128, 4, growth=4) == [32, 128]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 14, "image_size": 28}, "patch_size 14 is not 2, 4, 8, 16"),
        ({"patch_size": 1, "image_size": 8}, "patch_size 1 is not 2, 4, 8, 16"),
        ({"embed_dim": 66, "patch_size": 16}, "embed_dim 66 is not a multiple of 8"),
        (
            {"stem": "conv4", "embed_dim": 24},
            "4-fold 2 times: embed_dim 24 is not a multiple of 16",
        ),
        ({"stem": "convolution"}, "stem is 'convolution': choose linear or conv or conv4"),
    ],
)
def test_sizes_that_cannot_be_halved_are_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message):
        stem_vit(**fields)


@pytest.mark.parametrize("target", ["timm", "dino", "hf"])
def test_codes_without_such_a_stem_are_refused_and_the_others_named(target):
    vit, params = stem_vit()
    with pytest.raises(
        ValueError, match=f"--to={target} has no stem=conv; --to=onnx and --to=stable"
    ):
        exported(vit, params, target)
    with pytest.raises(ValueError, match="convolutional stem"):
        vit_to_torch(params)


@pytest.mark.parametrize("stem", ["conv", "conv4"])
def test_onnx_has_its_features(stem):
    pytest.importorskip("onnx")
    vit, params = stem_vit(stem=stem)
    assert_same(onnx_session(onnx_model(vit, params, (48, 32), *MOMENTS)), vit, params, (48, 32))


def test_grey_pictures_give_what_they_gave_as_colours():
    vit, params = stem_vit()
    grey = with_channels(params, 1)
    assert channels_of(params) == 3 and channels_of(grey) == 1
    image = np.float32(np.random.RandomState(0).normal(size=(1, 32, 32, 1)))
    expected = vit.apply({"params": params}, np.repeat(image, 3, axis=-1)).cls
    assert_close(vit.clone(in_channels=1).apply({"params": grey}, image).cls, expected)


@pytest.mark.slow
def test_a_run_trains_is_loaded_and_starts_another(tmp_path, capfd):
    workdir = tmp_path / "run"
    without = {"evals__tasks": (), "evals__monitor_every_epochs": 0.0}
    train(
        shrunk(barlow_twins, model__stem="conv", model__depth=1, total_steps=2, **without), workdir
    )
    model = load(workdir)
    assert set(model.params["patch_embed"]) == {"conv_0", "conv_1", "conv_2", "kernel", "bias"}
    again = read_backbone(str(workdir), model.module, KEY)
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, model.params))
    grey = read_backbone(str(workdir), model.module.clone(in_channels=1), KEY)
    assert channels_of(grey) == 1 and f"{workdir} has 3 channels" in capfd.readouterr().err
    with pytest.raises(ValueError, match="patch_embed"):
        read_backbone(str(workdir), model.module.clone(stem="linear"), KEY)
