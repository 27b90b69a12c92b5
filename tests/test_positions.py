"""Learned positions on other grids: the three rules, found in weights, kept in runs, exports and `load`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close, load, subset
from shrunk import shrunk
from test_export import images, model, write

import dinotwins_jax as dt
from configs import dino
from dinotwins_jax.build import build, build_for_evaluation
from dinotwins_jax.evaluate import _from_torch
from dinotwins_jax.models.positions import interpolate_pos_embed, interpolation_matrix
from dinotwins_jax.models.torch_export import exported, interpolation_in
from dinotwins_jax.models.torch_files import load_vit
from dinotwins_jax.models.torch_weights import vit_from_torch
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.pretrained import read_backbone, with_position_interpolation
from dinotwins_jax.workdir import claim_workdir, with_known_values

# Of the official DINOv2 with registers in tests/golden/dinov2_registers_hub.npz.
HUB = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "num_register_tokens": 2}
SIZES = ("32x32", "48x24", "16x16")  # stored, not square, smaller
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(a file of weights with the hub's names, the golden arrays)."""
    golden = load("dinov2_registers_hub")
    path = tmp_path_factory.mktemp("hub") / "dinov2_reg.npz"
    np.savez(path, **subset(golden, "w."))
    return str(path), golden


@pytest.mark.parametrize(("name", "rule"), [("v1", "dino"), ("reg", "antialias")])
@pytest.mark.parametrize("side", [16, 32])
def test_interpolation_equals_pytorch_s(name, rule, side):
    golden = load("positions_antialias")
    found = interpolate_pos_embed(golden["pos"], (37, 37), (side, side), rule)
    assert_close(found, golden[f"{name}.{side}"], 1e-6)


@pytest.mark.parametrize("rule", ["dino", "antialias", "size"])
def test_a_constant_stays_a_constant(rule):
    for source, target in ((4, 7), (7, 4), (5, 1), (1, 3)):
        np.testing.assert_allclose(interpolation_matrix(source, target, rule).sum(1), 1.0)
    for same in ("antialias", "size"):
        np.testing.assert_allclose(interpolation_matrix(5, 5, same), np.eye(5), atol=1e-12)


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="is 'linear': choose dino, antialias or size"):
        interpolation_matrix(4, 8, "linear")
    with pytest.raises(ValueError, match="position_interpolation is 'linear': choose dino or"):
        VisionTransformer(**HUB, position_interpolation="linear").init(KEY, jnp.ones((1, 8, 8, 3)))


@pytest.mark.parametrize("size", SIZES)
def test_released_registers_give_the_official_features_at_any_size(hub, size):
    """By `load`, and as `init_from` of a model with the grid of the images."""
    path, golden = hub
    image = np.float32(golden[f"{size}.image"])
    loaded = dt.load(_with_heads(path), position_interpolation=None)
    assert loaded.module.position_interpolation == "antialias"
    started = VisionTransformer(
        **HUB, image_size=image.shape[1:3], layer_scale_init=1.0, position_interpolation="antialias"
    )
    params = read_backbone(path, started, KEY)
    for vit, weights in ((loaded.module, loaded.params), (started, params)):
        found = jax.jit(vit.apply)({"params": weights}, image)
        assert_close(found.cls, golden[f"{size}.cls"], 1e-5)
        assert_close(found.patches, golden[f"{size}.patches"], 1e-5)


def _with_heads(path: str):
    """The folder of a file, with a config.json that states the heads, which no tensor does."""
    from pathlib import Path

    file = Path(path).with_name("config.json")
    file.write_text(json.dumps({"hidden_size": 24, "num_attention_heads": 3}))
    return file.parent


def small(path, size, **model):
    """A config on scenes that starts from the hub's weights."""
    config = shrunk(dino)
    config.init_from, config.views.global_size = path, size
    config.model.update({**HUB, "layer_scale_init": 1.0, **model})
    return config


@pytest.mark.parametrize("size", [16, 48])
def test_a_run_takes_the_rule_of_its_initial_weights_and_keeps_it(hub, size, tmp_path):
    path, golden = hub
    run = build(small(path, size))
    assert run.config.model.position_interpolation == "antialias"
    assert run.backbone.position_interpolation == "antialias"
    params = run.trained_backbone()
    if size == 16:
        found = jax.jit(run.backbone.apply)({"params": params}, np.float32(golden["16x16.image"]))
        assert_close(found.cls, golden["16x16.cls"], 1e-5)
    claim_workdir(tmp_path, run.config.to_dict())
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    gone = small("/nowhere/weights.npz", size)
    resumed = with_known_values(gone, tmp_path)  # the file is not needed again
    assert with_position_interpolation(resumed).model.position_interpolation == "antialias"
    with pytest.raises(ValueError, match=r"config\.init_from: no file of weights: /nowhere"):
        with_position_interpolation(gone)


def test_the_key_comes_before_the_file_and_dino_s_rule_is_the_default(hub):
    path, _ = hub
    chosen = build(small(path, 16, position_interpolation="size"))
    assert chosen.backbone.position_interpolation == "size"
    fresh = shrunk(dino)
    assert fresh.model.position_interpolation is None
    assert build_for_evaluation(fresh).backbone.position_interpolation == "dino"
    assert with_position_interpolation(fresh).model.position_interpolation == "dino"
    del fresh.model.position_interpolation  # a config of before
    assert with_position_interpolation(fresh) is fresh


def test_a_run_s_rule_starts_another_run(hub, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for section, rule in (({"position_interpolation": "size"}, "size"), ({}, "dino")):
        (tmp_path / "config.json").write_text(json.dumps({"model": section}))
        config = shrunk(dino)
        config.init_from = str(tmp_path)
        assert with_position_interpolation(config).model.position_interpolation == rule


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_of_released_registers_is_official(hub, size):
    path, golden = hub
    config = shrunk(dino)
    config.evals.n_last_blocks = 1
    config.model.update(HUB)
    run, weights = _from_torch(build_for_evaluation(config), config, path)
    image = np.float32(golden[f"{size}.image"])
    found = jax.jit(run.backbone.apply)({"params": weights.teacher}, image)
    assert_close(found.cls, golden[f"{size}.cls"], 1e-5)
    run, _ = _from_torch(build_for_evaluation(config), config, path, "size")
    assert run.backbone.position_interpolation == "size"


@pytest.mark.parametrize(
    ("name", "target", "there"),
    [
        ("plain", "timm", "antialias"),
        ("registers", "timm", "antialias"),
        ("plain", "hf", "size"),
        ("scaled", "hf", "size"),
        ("registers", "hf", "antialias"),
        ("plain", "dino", "dino"),
        ("rope", "hf", ""),
    ],
)
def test_names_and_settings_tell_the_rule(tmp_path, name, target, there):
    """What other code does with an export at other sizes; read back as it was trained, and by the names of
    its tensors alone as that code does it."""
    vit, params = model(name)
    config = write(tmp_path, vit, params, target)
    assert interpolation_in(target, vit, config) == there
    assert load_vit(tmp_path, like=vit)[0].position_interpolation == "dino"
    theirs = {key: value for key, value in config.items() if key != "dinotwins_jax"}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    assert load_vit(tmp_path, like=vit)[0].position_interpolation == (there or "dino")


@pytest.mark.parametrize("rule", ["antialias", "size"])
def test_an_export_keeps_the_rule(tmp_path, rule):
    vit, params = model("plain", position_interpolation=rule)
    config = write(tmp_path, vit, params, "dino")
    arguments = config["arguments"]
    assert config["class"] == "dinov2.models.vision_transformer.DinoVisionTransformer"
    assert arguments["interpolate_offset"] == 0.0
    assert arguments["interpolate_antialias"] == (rule == "antialias")
    again, loaded = load_vit(tmp_path)
    np.testing.assert_array_equal(
        again.apply({"params": loaded}, images(48)).cls,
        vit.apply({"params": params}, images(48)).cls,
    )


def test_timm_and_transformers_resample_as_interpolation_in_says(tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    for target, rules in (
        ("timm", ("plain", "registers")),
        ("hf", ("plain", "scaled", "registers")),
    ):
        for name in rules:
            vit, params = model(name)
            folder = tmp_path / f"{target}_{name}"
            config = write(folder, vit, params, target)
            theirs = vit.clone(position_interpolation=interpolation_in(target, vit, config))
            picture = torch.tensor(images(48)).permute(0, 3, 1, 2)
            with torch.no_grad():
                if target == "timm":
                    found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(
                        picture
                    )
                else:
                    net = transformers.AutoModel.from_pretrained(folder).eval()
                    more = {"interpolate_pos_encoding": True} if name == "plain" else {}
                    found = net(picture, **more).last_hidden_state[:, 0]
            ours = theirs.apply({"params": params}, images(48)).cls
            assert_close(found.numpy(), ours, 1e-5, f"{target} {name}")
            own = vit.apply({"params": params}, images(48)).cls
            assert np.linalg.norm(own - ours) > 1e-4 * np.linalg.norm(own)  # it matters


def test_old_weights_of_ours_keep_dino_s_rule(tmp_path):
    vit, params = model("registers")
    config = write(tmp_path, vit, params, "dino")
    del config["dinotwins_jax"]["position_interpolation"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_vit(tmp_path)[0].position_interpolation == "dino"
    assert exported(vit, params, "dino")[1]["arguments"]["interpolate_offset"] == 0.1
    assert vit_from_torch(exported(vit, params, "dino")[0]).keys() == params.keys()
