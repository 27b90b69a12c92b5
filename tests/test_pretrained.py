"""Initial weights from PyTorch files or another run, and a backbone frozen until its heads adapt."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close, load, subset
from shrunk import shrunk

from configs import barlow_twins, dino
from dinotwins_jax.build import build
from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.models.torch_weights import vit_to_torch
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.pretrained import read_backbone, start_from
from dinotwins_jax.train import train
from dinotwins_jax.workdir import with_known_values

# Of the official ViT in tests/golden/vit_forward.npz.
TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 4}
KEY = jax.random.key(0)


@pytest.fixture
def official(tmp_path):
    """(a file of the official model's weights, the weights, its inputs and outputs)."""
    golden = load("vit_forward")
    weights = subset(golden, "w:")
    np.savez(tmp_path / "official.npz", **weights)
    return str(tmp_path / "official.npz"), weights, golden


@pytest.mark.parametrize(("name", "size"), [("native", 16), ("local", None), ("rect", None)])
def test_positions_fit_the_new_grid_as_the_official_model_makes_them(official, name, size):
    """A model with the grid of the images gives the same numbers without interpolation."""
    path, _, golden = official
    images = golden[f"x_{name}"]
    vit = VisionTransformer(**TINY, image_size=size or images.shape[1:3])
    params = read_backbone(path, vit, KEY)
    assert_close(vit.apply({"params": params}, images).cls, golden[f"cls_{name}"])


def test_registers_that_the_file_lacks_start_fresh_and_it_is_said(official, capfd):
    path, weights, _ = official
    vit = VisionTransformer(**TINY, image_size=16, num_register_tokens=2)
    params = read_backbone(path, vit, KEY)
    assert params["register_tokens"].shape == (1, 2, 48) and np.any(params["register_tokens"])
    np.testing.assert_array_equal(params["cls_token"], weights["cls_token"])
    assert f"{path} has no register_tokens: these start fresh" in capfd.readouterr().err


def test_heads_that_no_tensor_tells_are_doubted_where_they_are_unusual(tmp_path, capfd):
    vit = VisionTransformer(embed_dim=128, depth=1, num_heads=2, patch_size=8, image_size=16)
    params = vit.init(KEY, jnp.zeros((1, 16, 16, 3)))["params"]
    np.savez(tmp_path / "vit.npz", **vit_to_torch(params))
    assert equal(read_backbone(str(tmp_path / "vit.npz"), vit, KEY), params)
    assert "attention heads" not in capfd.readouterr().err
    read_backbone(str(tmp_path / "vit.npz"), vit.clone(num_heads=4), KEY)
    assert "assuming config.model's 4; DINO's" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("fields", "edit", "message"),
    [
        ({"patch_size": 8}, {}, r"patch_embed/kernel has shape \(4, 4, 3, 48\) there and \(8, 8, 3, 48\)"),
        ({"depth": 2}, {}, r"blocks_2/attn/proj/bias has shape \(48,\) there and none"),
        ({"depth": 4}, {}, r"blocks_3/attn/proj/bias has shape none there and \(48,\)"),
        ({"embed_dim": 24}, {}, r"blocks_0/attn/proj/bias has shape \(48,\) there and \(24,\)"),
        ({"layer_scale_init": 0.1}, {}, r"blocks_0/gamma1 has shape none there and \(48,\).*6 tensors"),
        ({}, {"register_tokens": np.zeros((1, 4, 48))}, r"register_tokens has shape \(1, 4, 48\) there"),
        ({}, {"pos_embed": np.zeros((1, 12, 48))}, r"pos_embed \(1, 12, 48\): not a class token and"),
        ({}, {"decoder.weight": np.zeros(3)}, "not a tensor of this ViT: decoder.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_both_shapes(official, tmp_path, fields, edit, message):
    _, weights, _ = official
    np.savez(tmp_path / "edited.npz", **weights | edit)
    vit = VisionTransformer(**TINY | fields, image_size=16)
    with pytest.raises(ValueError, match=message) as error:
        read_backbone(str(tmp_path / "edited.npz"), vit, KEY)
    text = str(error.value)
    assert text.startswith("config.init_from: ") and "\n" not in text and "edited.npz" in text


OPTIONS = {
    **{"evals__tasks": (), "evals__pictures": 0, "evals__monitor_every_epochs": 0.0},
    **{"optim__warmup_epochs": 0.0, "checkpoint__keep": 4},
}


def state_of(config, workdir, step):
    run = build(with_known_values(config, workdir))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(run.placement.abstract(jax.eval_shape(run.fresh_state)), step)[0]


def equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.slow
def test_a_run_starts_from_another_ones_teacher_and_warms_up_its_heads(tmp_path, capfd):
    """The backbone is bit for bit frozen for two of four steps, then trains; heads train at once."""
    first, second = tmp_path / "first", tmp_path / "second"
    other = shrunk(barlow_twins, total_steps=2, views__global_size=24, **OPTIONS)
    train(other, first)
    config = shrunk(
        dino,
        init_from=str(first),
        views__num_local=0,
        optim__freeze_backbone_epochs=7.0,  # half of the demo's 14
        checkpoint__every_epochs=3.5,  # a quarter
        **OPTIONS,
    )
    train(config, second)
    assert "without init_from" not in capfd.readouterr().err

    run = build(config)
    start = read_backbone(str(first), run.backbone, KEY)
    there = state_of(other, first, 2)
    teacher = there.teacher_params["backbone"]
    assert start["pos_embed"].shape == (1, 5, 48) and teacher["pos_embed"].shape == (1, 10, 48)
    assert equal(start["blocks_1"], teacher["blocks_1"])
    assert not equal(teacher["blocks_1"], there.params["backbone"]["blocks_1"])

    heads = run.fresh_state().params["heads"]
    states = {step: state_of(config, second, step) for step in (1, 2, 3)}
    for step, state in states.items():
        assert equal(state.params["backbone"], start) == (step <= 2)
        assert not equal(state.params["heads"]["dino"], heads["dino"])
    # m x + (1 - m) x rounds: the teacher's backbone is the start's but for that.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
        states[2].teacher_params["backbone"],
        start,
    )
    moments = [np.any(x) for x in jax.tree.leaves(states[2].opt_state) if x.shape == (48, 144)]
    assert moments and not any(moments)  # of the backbone's qkv kernels

    # The baseline of evaluation stays what it is without init_from.
    assert equal(run.random_backbone(), build(shrunk()).random_backbone())
    assert equal(run.trained_backbone(), start) and not equal(run.random_backbone(), start)

    # In its own workdir the checkpoint counts, and the weights that it started from need not be there.
    last = state_of(config, second, 4)
    for step in (3, 4):
        shutil.rmtree(second / "checkpoints" / str(step))
    shutil.rmtree(first)
    train(config, second)
    assert equal(state_of(config, second, 4), last)


def test_a_state_that_is_split_over_devices_starts_from_weights_too(tmp_path):
    config = shrunk(mesh__data=1, mesh__fsdp=2)
    random = build(config).random_backbone()
    config.init_from = str(tmp_path / "vit.npz")
    weights = jax.tree.map(lambda x: x + 1.0, random)
    np.savez(tmp_path / "vit.npz", **vit_to_torch(weights))
    run = build(config)
    state = start_from(run.placement.init(run.fresh_state), run.trained_backbone())
    for network in (state.params, state.teacher_params):
        assert equal(network["backbone"], weights)
    kernel = state.params["backbone"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (48, 96)
    assert jnp.shape(kernel) == (48, 192)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.npz", "no file of weights"),
        ("run.txt", "weights are one of .safetensors, .npz"),
        ("", "is not a run: config.json or"),
        ("empty", r"no intact checkpoint in .*empty"),
        ("heads", "it has 6 attention heads, this model 3: change config.model.num_heads"),
    ],
)
def test_weights_that_cannot_be_read_are_one_line_before_anything_is_written(
    tmp_path, path, message
):
    for name, heads in (("empty", 3), ("heads", 6)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        config = {"model": {"num_heads": heads, "patch_size": 8}, "views": {"global_size": 16}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    config = shrunk(init_from=f"{tmp_path}/{path}")
    with pytest.raises((ValueError, OSError), match=message) as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value) and str(error.value).startswith("config.init_from: ")
    assert not (tmp_path / "run").exists()
