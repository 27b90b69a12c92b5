"""Exported weights: back into our own model bit by bit, and into timm and transformers, where they are
installed, to the same features. The command writes whole files or none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close
from shrunk import shrunk

from dinotwins_jax.export import export_run
from dinotwins_jax.models.torch_export import exported
from dinotwins_jax.models.torch_files import load_vit
from dinotwins_jax.models.torch_names import common
from dinotwins_jax.models.torch_weights import vit_from_torch
from dinotwins_jax.models.vit import VisionTransformer

ROOT = Path(__file__).parent.parent
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "image_size": 32}
SCALED = {"num_register_tokens": 4, "layer_scale_init": 0.5}
MODELS = {
    "plain": {"mlp_ratio": 2.0},
    "scaled": {"layer_scale_init": 0.5},
    "registers": SCALED,
    "swiglu": SCALED | {"ffn": "swiglu"},
    "rope": SCALED | {"positions": "rope", "norm_eps": 1e-5},
    "rope, swiglu": SCALED | {"positions": "rope", "ffn": "swiglu"},
}


def model(name, **fields):
    """(vit, params) with random values for all parameters, so that a missing one is noticed."""
    vit = VisionTransformer(**TINY | MODELS[name] | fields)
    shapes = jax.eval_shape(vit.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))["params"]
    rng = np.random.RandomState(0)
    return vit, jax.tree.map(lambda s: np.float32(0.3 * rng.normal(size=s.shape)), shapes)


def images(side=32):
    return np.float32(np.random.RandomState(1).normal(size=(2, side, side, 3)))


def write(directory, vit, params, target):
    """Exports given parameters as the command does."""
    from safetensors.numpy import save_file

    tensors, config = exported(vit, params, target)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return config


CASES = [
    (name, target)
    for name in MODELS
    for target in ("timm", "dino", "hf")
    if not (target == "timm" and "rope" in name)
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_exported_weights_come_back_bit_by_bit(name, target, tmp_path):
    vit, params = model(name)
    write(tmp_path, vit, params, target)
    again, loaded = load_vit(tmp_path / "model.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for field in ("num_heads", "ffn", "positions", "num_register_tokens", "norm_eps", "mlp_ratio"):
        assert getattr(again, field) == getattr(vit, field), field


@pytest.mark.parametrize(
    ("name", "fields", "target", "message"),
    [
        (
            "rope",
            {},
            "timm",
            "timm's plain ViT has no rotary positions; --to=hf and --to=dino have",
        ),
        ("plain", {"norm_eps": 1e-5}, "timm", "timm's plain ViT has no norm_eps but 1e-6"),
        (
            "scaled",
            {"norm_eps": 1e-5},
            "dino",
            r"dinov2 has no norm_eps but \(1e-06,\), here it is",
        ),
        (
            "plain",
            {"image_size": (32, 64)},
            "dino",
            r"dino has no .* not square: \[32, 64\] pixels",
        ),
        (
            "scaled",
            {"mlp_ratio": 2.5},
            "hf",
            "transformers' Dinov2 has no mlp_ratio 2.5, but whole",
        ),
        ("plain", {}, "flax", "--to is 'flax': choose timm or dino or hf"),
    ],
)
def test_what_a_target_cannot_hold_is_one_line(name, fields, target, message):
    vit, params = model(name, **fields)
    with pytest.raises(ValueError, match=message) as error:
        exported(vit, params, target)
    assert "\n" not in str(error.value)


def test_chunks_masks_and_other_dialects_are_read():
    """Names of DINOv2's big models, DINOv3's masked key bias, timm's DINOv3 and its ViTs without positions
    of prefix tokens."""
    vit, params = model("rope, swiglu")
    weights, _ = exported(vit, params, "dino")
    chunked = {
        name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): value
        for name, value in weights.items()
    }
    mask = np.repeat([1.0, 0.0, 1.0], 48)
    bias = np.where(mask == 1, weights["blocks.1.attn.qkv.bias"], np.nan)
    chunked |= {"blocks.1.1.attn.qkv.bias": bias, "blocks.1.1.attn.qkv.bias_mask": mask}
    chunked |= {"local_cls_norm.weight": np.ones(48), "mask_token": np.ones((1, 48))}
    found = vit_from_torch(chunked)
    expected = params["blocks_1"]["attn"]["qkv"]["bias"] * np.float32(mask)
    np.testing.assert_array_equal(found["blocks_1"]["attn"]["qkv"]["bias"], expected)
    np.testing.assert_array_equal(found["register_tokens"], params["register_tokens"])
    np.testing.assert_array_equal(found["blocks_0"]["mlp"]["w12"]["kernel"],
                                  params["blocks_0"]["mlp"]["w12"]["kernel"])  # fmt: skip

    eva = {name: value for name, value in weights.items() if "rope" not in name}
    eva["reg_token"] = eva.pop("storage_tokens")
    for old, new in (("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"), (".w1.", ".fc1_g."),
                     (".w2.", ".fc1_x."), (".w3.", ".fc2.")):  # fmt: skip
        eva = {name.replace(old, new): value for name, value in eva.items()}
    for i in (0, 1):
        q, _, v = np.split(eva.pop(f"blocks.{i}.attn.qkv.bias"), 3)
        eva |= {f"blocks.{i}.attn.q_bias": q, f"blocks.{i}.attn.v_bias": v}
    found = vit_from_torch(eva)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    np.testing.assert_array_equal(found["blocks_1"]["attn"]["qkv"]["bias"], expected)
    np.testing.assert_array_equal(found["blocks_0"]["gamma2"], params["blocks_0"]["gamma2"])

    vit, params = model("registers")
    weights, _ = exported(vit, params, "timm")
    weights["pos_embed"] = weights["pos_embed"][:, 5:]  # timm's no_embed_class
    found = vit_from_torch(weights)
    np.testing.assert_array_equal(found["pos_embed"][:, 1:], params["pos_embed"][:, 1:])
    assert not found["pos_embed"][:, 0].any()


def test_tensors_that_do_not_fit_are_named():
    vit, params = model("rope")
    weights, _ = exported(vit, params, "hf")
    name = "layer.1.attention.k_proj.weight"
    with pytest.raises(ValueError, match=r"no tensor 'blocks\.1\.attn\.k\.weight'"):
        common({n: w for n, w in weights.items() if n != name})
    with pytest.raises(ValueError, match=r"'blocks\.1\.attn\.k\.weight' has shape \(40, 48\)"):
        common(weights | {name: weights[name][:40]})
    with pytest.raises(ValueError, match=r"not a tensor of this ViT: layer_norm_of_mine"):
        vit_from_torch(weights | {"layer_norm_of_mine": np.ones(3)})
    weights, _ = exported(vit, params, "dino")
    periods = weights["rope_embed.periods"]
    with pytest.raises(ValueError, match=r"'rope_embed\.periods' .* those of base 100"):
        vit_from_torch(weights | {"rope_embed.periods": periods * 1.1})
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn\.qkv\.bias_mask' is not a mask"):
        vit_from_torch(weights | {"blocks.0.attn.qkv.bias_mask": np.full(144, np.nan)})
    with pytest.raises(ValueError, match="no tensor 'pos_embed'"):
        vit_from_torch({n: w for n, w in weights.items() if "periods" not in n})


@pytest.mark.parametrize(
    ("name", "target", "there"),
    [
        ("plain", "dino", None),
        ("plain", "hf", None),
        ("scaled", "timm", None),
        ("scaled", "dino", "mask_token"),
        ("scaled", "hf", "embeddings.mask_token"),
    ],
)
def test_a_mask_token_goes_where_there_is_a_place_for_it(name, target, there):
    vit, params = model(name)
    token = np.full((1, 48), 7.0, np.float32)
    for given, value in ((params, 0.0), (params | {"mask_token": token}, 7.0)):
        tensors, _ = exported(vit, given, target)
        found = {n: float(w.mean()) for n, w in tensors.items() if "mask_token" in n}
        assert found == ({there: value} if there else {})


def test_heads_are_as_wide_as_dinov3s_periods_say(tmp_path):
    vit, params = model("rope", num_heads=2)
    np.savez(tmp_path / "vit.npz", **exported(vit, params, "dino")[0])
    assert load_vit(tmp_path / "vit.npz")[0].num_heads == 2


@pytest.mark.parametrize("name", ["plain", "scaled", "registers", "swiglu"])
def test_timm_loads_the_export_and_has_the_same_features(name, tmp_path):
    pytest.importorskip("torch")
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    vit, params = model(name)
    write(tmp_path, vit, params, "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        x = torch.tensor(images().transpose(0, 3, 1, 2))
        tokens = theirs.forward_features(x).numpy()
        cls = theirs(x).numpy()
    ours = vit.apply({"params": params}, images())
    assert_close(ours.cls, cls, 1e-5)
    assert_close(ours.patches, tokens[:, 1 + vit.num_register_tokens :], 1e-5)


@pytest.mark.parametrize("name", ["registers", "rope"])
def test_timm_reads_the_official_names(name):
    """DINOv2's into its ViT, DINOv3's into its Eva, by timm's own conversion of the released files."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    from timm.models import eva, vision_transformer

    vit, params = model(name)
    params["blocks_0"]["attn"]["qkv"]["bias"][48:96] = 0  # timm's DINOv3 has no bias of keys
    params["blocks_1"]["attn"]["qkv"]["bias"][48:96] = 0
    weights, _ = exported(vit, params, "dino")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    arch = "vit_small_patch16_dinov3_qkvb" if name == "rope" else "vit_small_patch14_reg4_dinov2"
    theirs = timm.create_model(arch, num_classes=0, **sizes).eval()
    read = (eva if name == "rope" else vision_transformer).checkpoint_filter_fn
    weights = {n: torch.tensor(w) for n, w in weights.items()}
    theirs.load_state_dict(read(weights, theirs), strict=True)
    with torch.no_grad():
        tokens = theirs.forward_features(torch.tensor(images().transpose(0, 3, 1, 2))).numpy()
    ours = vit.apply({"params": params}, images())
    assert_close(ours.cls, tokens[:, 0], 1e-5)
    assert_close(ours.patches, tokens[:, 5:], 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_export_and_has_the_same_features(name, tmp_path):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vit, params = model(name)
    config = write(tmp_path, vit, params, "hf")
    kind = getattr(hf, config["architectures"][0])
    theirs, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    sides = (
        (32, 48) if "rope" in name else (32,)
    )  # no two codes interpolate learned positions alike
    for side in sides:
        with torch.no_grad():
            x = torch.tensor(images(side).transpose(0, 3, 1, 2))
            found = theirs.eval()(x)
        tokens = found.last_hidden_state.numpy()
        assert torch.equal(found.pooler_output, found.last_hidden_state[:, 0])
        ours = vit.apply({"params": params}, images(side))
        assert_close(ours.cls, tokens[:, 0], 1e-5)
        assert_close(ours.patches, tokens[:, 1 + vit.num_register_tokens :], 1e-5)
    # And what transformers writes is read.
    theirs.save_pretrained(tmp_path / "theirs")
    again, loaded = load_vit(tmp_path / "theirs" / "model.safetensors")
    assert again.num_heads == 3 and again.norm_eps == vit.norm_eps
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.fixture
def workdir(teacher_run):
    return teacher_run


def test_the_teacher_of_a_run_is_exported(workdir, tmp_path):
    workdir, teacher = workdir
    export_run(workdir, shrunk(), "dino", tmp_path)
    vit, params = load_vit(tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params, teacher)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["arguments"]["embed_dim"] == vit.embed_dim == 48
    said = config["dinotwins_jax"]
    assert (said["run"], said["step"], said["num_heads"]) == ("run", 3, 3)
    assert len(said["mean"]) == len(said["std"]) == 3


def test_a_failed_export_leaves_the_earlier_one(workdir, tmp_path, monkeypatch):
    workdir, _ = workdir
    export_run(workdir, shrunk(), "timm", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"model.safetensors", "config.json", "README.md"}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        export_run(workdir, shrunk(), "hf", tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_command_says_what_is_wrong_in_one_line(workdir, tmp_path):
    def command(*flags):
        done = subprocess.run(
            [sys.executable, "-m", "dinotwins_jax.export", *flags],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr.strip()

    rc, _, error = command(f"--workdir={tmp_path / 'none'}", "--to=timm")
    assert rc == 2 and error.startswith("error: no run in") and "\n" not in error
    rc, out, _ = command(f"--workdir={workdir[0]}", "--to=hf", f"--out={tmp_path / 'out'}")
    assert rc == 0 and "of step 3, for hf" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "vit"
