"""Padded attention equals plain attention, and a run gets the implementation that its devices have."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrunk import shrunk

from dinotwins_jax.backbone import make_backbone
from dinotwins_jax.build import build, for_evaluation
from dinotwins_jax.devices.attention import attention_for
from dinotwins_jax.features.loading import load
from dinotwins_jax.models.attention import ATTENTION, attend_padded
from dinotwins_jax.models.layers import attend
from dinotwins_jax.models.vit import VisionTransformer

# cuDNN's path with XLA in the place of its kernel.
on_cpu = partial(attend_padded, implementation="xla")
VIT = VisionTransformer(
    embed_dim=24,
    depth=2,  # drop path grows from 0 in the first block
    num_heads=3,
    patch_size=4,
    image_size=16,
    init_std=0.2,
    drop_path_rate=0.5,
)
IMAGES = np.float32(np.random.RandomState(0).normal(size=(3, 16, 16, 3)))
ROPE = {"positions": "rope", "num_register_tokens": 2, "layer_scale_init": 0.5}
slow = pytest.mark.slow


def close(ours, plain):
    """The difference of every float32 array is at most 1e-6 of its counterpart, by their norms."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        a, b = np.float64(a), np.float64(b)
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def with_gradients(f, *inputs):
    """f's value and the gradients of a random combination of its numbers."""

    def combined(*inputs):
        y = f(*inputs)
        return jnp.vdot(np.random.RandomState(9).normal(size=y.shape), y), y

    (_, y), gradients = jax.jit(
        jax.value_and_grad(combined, tuple(range(len(inputs))), has_aux=True)
    )(*inputs)
    return y, gradients


@pytest.mark.parametrize(
    ("queries", "keys"),
    [(197, 197), (37, 37), (1, 197), *(pytest.param(*n, marks=slow) for n in [(38, 38), (3, 8)])],
)
def test_padded_attention_is_plain_attention(queries, keys):
    """Values and gradients of q, k and v: nothing of the padding reaches them."""
    rng = np.random.RandomState(0)
    q, k, v = (np.float32(rng.normal(size=(2, 3, n, 8))) for n in (queries, keys, keys))
    ours, plain = (with_gradients(of, 3.0 * q, k, v) for of in (on_cpu, attend))
    close(ours, plain)
    assert all(np.linalg.norm(gradient) > 1.0 for gradient in plain[1])


@pytest.mark.parametrize(
    ("options", "patches"),
    [
        pytest.param(ROPE, True, id="rope, registers, LayerScale"),
        pytest.param({"num_register_tokens": 3}, False, id="class token alone, registers"),
        pytest.param({}, True, id="17 tokens", marks=slow),
        pytest.param(ROPE, False, id="class token alone, rope", marks=slow),
        pytest.param({"remat": True}, True, id="remat", marks=slow),
    ],
)
def test_a_backbone_on_padded_attention_is_the_plain_one(monkeypatch, options, patches):
    """A training batch with drop path: features and the gradients of all parameters."""
    monkeypatch.setitem(ATTENTION, "cudnn", on_cpu)
    params = jax.jit(VIT.clone(**options).init)(jax.random.key(0), IMAGES)["params"]

    def features(attention, params):
        out = VIT.clone(attention=attention, **options).apply(
            {"params": params},
            IMAGES,
            train=True,
            patches=patches,
            rngs={"drop_path": jax.random.key(2)},
        )
        tokens = [out.cls[:, None], out.patches] if patches else [out.cls[:, None]]
        return jnp.concatenate(tokens, axis=1)

    close(*(with_gradients(partial(features, of), params) for of in ("cudnn", "xla")))


def test_attention_maps_are_those_of_the_plain_backbone(monkeypatch):
    """Of every block, and of the last one alone."""
    monkeypatch.setitem(ATTENTION, "cudnn", on_cpu)
    variables = jax.jit(VIT.init)(jax.random.key(0), IMAGES)

    def maps(vit):
        last = vit.apply(variables, IMAGES, return_attention=True).attention
        return vit.apply(variables, IMAGES, method="attentions"), last

    ours = jax.jit(partial(maps, VIT.clone(attention="cudnn")))()
    close(ours, jax.jit(partial(maps, VIT))())
    np.testing.assert_array_equal(ours[0][-1], ours[1])


def gpu(capability: str):
    return SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability=capability)


CPU = SimpleNamespace(platform="cpu", device_kind="a CPU")
HALF, FULL = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
RUNS = [  # devices, options that differ, the implementation, what the refusal of cudnn says
    ([gpu("9.0")], {}, "cudnn", None),
    ([gpu("8.0"), gpu("8.0")], {}, "cudnn", None),
    ([gpu("12.0")], {}, "cudnn", None),
    ([gpu("9.0")], {"head_dim": 256}, "cudnn", None),
    (
        [gpu("8.6")],
        {"head_dim": 256},
        "xla",
        "multiple of 8 up to 128, embed_dim / num_heads is 256",
    ),
    (
        [gpu("10.0")],
        {"head_dim": 136},
        "xla",
        "multiple of 8 up to 128, embed_dim / num_heads is 136",
    ),
    ([gpu("9.0")], {"head_dim": 20}, "xla", "multiple of 8 up to 256, embed_dim / num_heads is 20"),
    ([gpu("9.0")], {"dtype": FULL}, "xla", "config.model.dtype bfloat16, which is float32"),
    ([gpu("9.0")], {"plain_gradients": True}, "xla", "config.model.plain_gradients is True"),
    ([gpu("7.5")], {}, "xla", r"compute capability 8.0 \(Ampere\) or newer, here is a GPU \(7.5\)"),
    ([gpu("9.0"), gpu("7.0")], {}, "xla", r"here is a GPU \(7.0\)"),
    ([gpu("gfx942")], {}, "xla", "or newer, here is a GPU"),
    ([CPU], {}, "xla", "here is a CPU"),
]


@pytest.mark.parametrize(("devices", "options", "found", "refusal"), RUNS)
def test_auto_is_cudnn_exactly_where_cudnn_is_accepted(devices, options, found, refusal):
    model = {"dtype": HALF, "head_dim": 64} | options
    assert attention_for(devices, "auto", **model) == found
    assert attention_for(devices, "xla", **model) == "xla"
    if refusal is None:
        assert attention_for(devices, "cudnn", **model) == "cudnn"
        return
    with pytest.raises(ValueError, match=rf"config.model.attention is 'cudnn': .*{refusal}"):
        attention_for(devices, "cudnn", **model)


def test_the_default_is_plain_attention_on_a_cpu():
    config = shrunk()
    assert config.model.attention == "auto" and build(config).backbone.attention == "xla"
    config.model.dtype = "bfloat16"
    assert make_backbone(config).attention == "xla"


def test_cudnn_is_refused_where_it_cannot_train():
    config = shrunk()
    config.model.attention, config.model.dtype = "cudnn", "bfloat16"
    with pytest.raises(
        ValueError, match=r"attention is 'cudnn': .*, here is cpu: choose auto or xla"
    ):
        build(config)


def test_weights_trained_with_cudnn_are_used_on_any_devices(teacher_run, tmp_path):
    """By evaluation and by `load`, from a config.json that names cudnn."""
    workdir = shutil.copytree(teacher_run[0], tmp_path / "run")
    config = shrunk()
    config.model.attention, config.model.dtype = "cudnn", "bfloat16"
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    assert make_backbone(for_evaluation(config)).attention == "xla"
    model = load(workdir)
    assert model.module.attention == "xla" and model.module.dtype == jnp.bfloat16
