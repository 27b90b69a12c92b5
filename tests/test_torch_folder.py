"""Folders of weights: exports, models that transformers and timm saved, snapshots of the hub, runs."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_export import model, write

from dinotwins_jax.models.torch_export import exported
from dinotwins_jax.models.torch_files import load_vit, read_state_dict
from dinotwins_jax.models.torch_folder import weights_file
from dinotwins_jax.pretrained import read_backbone

KEY = jax.random.key(0)


def equal(a, b):
    same = jax.tree.map(np.array_equal, a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


@pytest.mark.parametrize("target", ["timm", "dino", "hf"])
def test_an_exported_folder_starts_a_run_and_is_scored(tmp_path, target):
    vit, params = model("plain")
    write(tmp_path, vit, params, target)
    assert equal(read_backbone(str(tmp_path), vit, KEY), params)
    again, loaded = load_vit(tmp_path, like=vit)
    assert equal(loaded, params) and again.num_heads == 3


def test_heads_are_those_of_the_config_beside_the_weights(tmp_path):
    vit, params = model("plain")
    write(tmp_path, vit, params, "hf")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(
            ValueError, match=r"has 3 attention heads, this model 4: change config\."
        ):
            read_backbone(str(path), vit.clone(num_heads=4), KEY)


def hub(folder, tensors, names, config):
    """A cache folder of the hub: files are links of a snapshot into blobs/."""
    snapshot = folder / "snapshots" / "0a1b"
    for part in (snapshot, folder / "blobs", folder / "refs"):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text("0a1b")
    (folder / "blobs" / "c").write_text(json.dumps(config))
    (snapshot / "config.json").symlink_to("../../blobs/c")
    for k, name in enumerate(names):
        save_file(tensors, folder / "blobs" / f"{k}")
        (snapshot / name).symlink_to(f"../../blobs/{k}")
    return snapshot


@pytest.mark.parametrize("main", [True, False])
def test_a_snapshot_of_the_hub_and_its_cache_folder_are_read(tmp_path, main):
    vit, params = model("registers")
    tensors, config = exported(vit, params, "hf")
    snapshot = hub(tmp_path / "models--a--b", tensors, ["model.safetensors"], config)
    (snapshot / "pytorch_model.bin").write_bytes(b"the same model in another format")
    (snapshot / "training_args.bin").write_bytes(b"")
    if not main:
        (tmp_path / "models--a--b" / "refs" / "main").unlink()
    for path in (snapshot, tmp_path / "models--a--b"):
        assert weights_file(path) == snapshot / "model.safetensors"
        assert equal(read_backbone(str(path), vit, KEY), params)


@pytest.mark.parametrize(
    "name", ["vit.npz", "dino_deitsmall16.pth", "pytorch_model.bin", "open_clip.safetensors"]
)
def test_a_folder_with_one_file_of_any_name_is_that_file(tmp_path, name):
    (tmp_path / "README.md").write_text("a model")
    (tmp_path / name).write_bytes(b"")
    assert weights_file(tmp_path) == tmp_path / name
    assert weights_file(tmp_path / name) == tmp_path / name


WRONG = {
    "none": (["config.json"], r"no weights in .*: looked for model\.safetensors, pytorch_model\.bin or "
             r"one file of \.safetensors, .*; it holds config\.json"),
    "nothing": ([], "no weights in .*; it holds nothing"),
    "several": (["a.pth", "b.pth"], r"has several files of weights, a\.pth, b\.pth: give one of them"),
    "parts": (["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
              r"its weights are in several files \(model\.safetensors\.index\.json\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_folder_without_a_clear_choice_is_one_line(tmp_path, kind):
    names, message = WRONG[kind]
    for name in names:
        (tmp_path / name).write_text("{}")
    vit, _ = model("plain")
    for read in (
        weights_file,
        read_state_dict,
        load_vit,
        lambda p: read_backbone(str(p), vit, KEY),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            read(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    if kind == "none":
        with pytest.raises(ValueError, match="and it is not a run: config"):
            read_backbone(str(tmp_path), vit, KEY)


def test_a_run_with_weights_beside_its_checkpoints_is_asked_about(tmp_path):
    vit, params = model("plain")
    write(tmp_path, vit, params, "timm")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        ValueError, match=r"is a run with checkpoints, and holds model\.safetensors"
    ):
        read_backbone(str(tmp_path), vit, KEY)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "nonfinite_step3.npz").write_bytes(b"")  # of a run that stopped
    with pytest.raises(ValueError, match=r"is not the config of a run"):
        read_backbone(str(tmp_path), vit, KEY)


def test_a_config_that_is_no_object_is_one_line(tmp_path):
    vit, params = model("plain")
    write(tmp_path, vit, params, "timm")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json beside it is broken: it holds a list"):
        load_vit(tmp_path)


@pytest.mark.parametrize("name", ["plain", "registers", "rope"])
def test_what_transformers_saved_is_read_as_a_folder(tmp_path, name):
    """With the pooling layer of a ViTModel, which is not needed."""
    pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    vit, params = model(name)
    config = write(tmp_path / "ours", vit, params, "hf")
    theirs = getattr(hf, config["architectures"][0]).from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert equal(read_backbone(str(tmp_path / "theirs"), vit, KEY), params)


def test_what_timm_saved_is_read_as_a_folder(tmp_path):
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
    save_for_hf(theirs, tmp_path, safe_serialization="both")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "pytorch_model.bin", "config.json"} <= names
    vit, params = load_vit(tmp_path)
    assert (vit.embed_dim, vit.depth, vit.num_heads) == (192, 2, 3)
    np.testing.assert_array_equal(params["cls_token"], theirs.cls_token.detach().numpy())
