"""PyTorch weight files, read without PyTorch. The golden ones were written by torch.save 2.13."""

import json
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import GOLDEN, load

from dinotwins_jax.models.torch_export import exported
from dinotwins_jax.models.torch_files import load_vit, read_state_dict, vit_fields
from dinotwins_jax.models.torch_weights import vit_to_torch
from dinotwins_jax.models.vit import VisionTransformer

FIELDS = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
    "patch_size": 8,
    "image_size": 24,
    "mlp_ratio": 2.0,
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_tensors_of_every_kind_equal_torchs(suffix):
    """Half, bfloat16, transposed and strided views, parameters, integers, an empty tensor: bit for bit."""
    expected = load("torch_tensors")
    found = read_state_dict(GOLDEN / f"torch_tensors.{suffix}")
    assert set(found) == set(expected) - ({"empty"} if suffix == "safetensors" else set())
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        np.testing.assert_array_equal(tensor.astype(np.float32), expected[name], name)
    assert found["half"].dtype == np.float16 and found["bf16"].dtype.name == "bfloat16"


def test_of_a_training_checkpoint_the_teachers_backbone_is_taken():
    found = read_state_dict(GOLDEN / "torch_dino_checkpoint.pth")
    assert set(found) == {"backbone.cls_token"}
    np.testing.assert_array_equal(found["backbone.cls_token"], np.full((1, 1, 2), 3.0))


def test_an_optimiser_with_numpy_scalars_does_not_keep_the_teacher_from_loading():
    """main_dino.py sets lr and weight decay of AdamW from numpy schedules; torch.save pickles those."""
    found = read_state_dict(GOLDEN / "torch_dino_optimizer.pth")
    np.testing.assert_array_equal(found["backbone.cls_token"], [[[0.0, 1.0]]])
    assert set(found) == {"backbone.cls_token"}


@pytest.mark.parametrize("extra", [{}, {"num_register_tokens": 2, "layer_scale_init": 0.1}])
def test_a_vit_comes_back_with_its_sizes_and_outputs(tmp_path, extra):
    vit = VisionTransformer(**FIELDS, **extra)
    images = jax.random.normal(jax.random.key(1), (2, 24, 24, 3))
    params = jax.jit(vit.init)(jax.random.key(0), images)["params"]
    np.savez(tmp_path / "vit.npz", **vit_to_torch(params))
    again, loaded = load_vit(tmp_path / "vit.npz")
    expected = FIELDS | extra | ({"layer_scale_init": 1.0} if extra else {})
    assert {name: getattr(again, name) for name in expected} == expected
    ours, theirs = (
        jax.jit(of.apply)({"params": weights}, images).cls
        for of, weights in ((again, loaded), (vit, params))
    )
    np.testing.assert_array_equal(ours, theirs)


class Evil:
    def __reduce__(self):
        return eval, ("print('owned')",)


def zipped(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return path


def test_a_pickle_that_asks_for_more_is_refused_and_not_run(tmp_path, capsys):
    path = zipped(tmp_path / "evil.pth", pickle.dumps({"a": Evil()}))
    with pytest.raises(
        ValueError, match=r"evil\.pth: its pickle refers to builtins\.eval"
    ) as error:
        read_state_dict(path)
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def tensor_of(offset, size, stride) -> bytes:
    """A pickle of {"x": tensor over a storage of four floats}, as torch.save writes one."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
    )
    view = b"J" + struct.pack("<i", offset) + numbers(size) + numbers(stride) + b"\x89Nt"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return b"\x80\x02}(" + text("x") + rebuild + storage + view + b"Ru."


@pytest.mark.parametrize(
    ("offset", "size", "stride", "expected"),
    [
        (1, (2,), (2,), [1.0, 3.0]),
        (0, (2, 2), (1, 2), [[0.0, 2.0], [1.0, 3.0]]),
        (2, (3,), (1,), None),
        (-1, (1,), (1,), None),
        (0, (2,), (-8,), None),
        (0, (2, 2), (4096, -4096), None),
    ],
)
def test_no_view_reads_outside_its_storage(tmp_path, offset, size, stride, expected):
    path = zipped(tmp_path / "view.pth", tensor_of(offset, size, stride))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", np.arange(4, dtype="<f4").tobytes())
    if expected is None:
        with pytest.raises(ValueError, match=r"view\.pth is broken"):
            read_state_dict(path)
    else:
        np.testing.assert_array_equal(read_state_dict(path)["x"], expected)


def broken(tmp_path, suffix):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes((GOLDEN / f"torch_tensors.{suffix}").read_bytes()[:300])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "none.pth", r"no file of weights: .*none\.pth"),
        (lambda d: d / "weights.h5", r"weights\.h5: weights are one of .*\.pth.*, not '\.h5'"),
        (lambda d: broken(d, "pth"), "not a zip file: truncated, or older than PyTorch 1.6"),
        (lambda d: broken(d, "safetensors"), r"broken\.safetensors is broken"),
        (lambda d: broken(d, "npz"), r"broken\.npz is broken"),
        (lambda d: zipped(d / "list.pth", pickle.dumps([1])), "holds a list, not a dictionary"),
        (lambda d: zipped(d / "no.pth", pickle.dumps({"epoch": 1})), "no tensors .* it has epoch"),
    ],
)
def test_unusable_files_are_named(tmp_path, make, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        read_state_dict(make(tmp_path))
    assert "\n" not in str(error.value)


def test_other_architectures_are_named(tmp_path):
    vit = VisionTransformer(**FIELDS)
    params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, 24, 24, 3)))["params"]
    weights = vit_to_torch(params)
    without = {name: w for name, w in weights.items() if "fc1" not in name}
    with pytest.raises(ValueError, match=r"no tensor 'blocks\.0\.mlp\.fc1\.weight'"):
        vit_fields(without)
    np.savez(tmp_path / "flat.npz", **weights | {"pos_embed": np.zeros((1, 9, 64))})
    with pytest.raises(ValueError, match=r"pos_embed \(1, 9, 64\): not a class token and a square"):
        load_vit(tmp_path / "flat.npz")
    np.savez(tmp_path / "more.npz", **weights, fc_extra=np.zeros(3))
    with pytest.raises(ValueError, match=r"more\.npz: not a tensor of this ViT: fc_extra"):
        load_vit(tmp_path / "more.npz")


@pytest.mark.slow
def test_heads_of_another_width_are_those_of_a_model_like_it(tmp_path):
    vit = VisionTransformer(**FIELDS | {"embed_dim": 80, "num_heads": 5})
    params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, 24, 24, 3)))["params"]
    np.savez(tmp_path / "narrow.npz", **vit_to_torch(params))
    assert load_vit(tmp_path / "narrow.npz", like=vit)[0].num_heads == 5
    vit = VisionTransformer(**FIELDS | {"embed_dim": 75, "num_heads": 3})
    params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, 24, 24, 3)))["params"]
    np.savez(tmp_path / "odd.npz", **vit_to_torch(params))
    with pytest.raises(ValueError, match=r"odd\.npz: width 75 is not a multiple of 64"):
        load_vit(tmp_path / "odd.npz")


def test_heads_and_shapes_are_never_guessed(tmp_path):
    vit = VisionTransformer(**FIELDS | {"embed_dim": 96, "num_heads": 3})
    params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, 24, 24, 3)))["params"]
    np.savez(tmp_path / "narrow.npz", **vit_to_torch(params))
    with pytest.raises(ValueError, match=r"narrow\.npz: width 96 is not a multiple of 64"):
        load_vit(tmp_path / "narrow.npz")
    vit = VisionTransformer(**FIELDS)
    params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, 24, 24, 3)))["params"]
    other = vit_to_torch(params) | {"blocks.0.mlp.fc2.weight": np.zeros((64, 96), np.float32)}
    np.savez(tmp_path / "other.npz", **other)
    with pytest.raises(ValueError, match=r"other\.npz: params.*fc2.*shape \(96, 64\)"):
        load_vit(tmp_path / "other.npz")


def test_the_sides_of_an_export_that_is_not_square_come_from_its_config(tmp_path):
    vit = VisionTransformer(embed_dim=48, depth=1, num_heads=3, patch_size=8, image_size=(16, 32))
    params = jax.jit(vit.init)(jax.random.key(0), jnp.zeros((1, 16, 32, 3)))["params"]
    tensors, config = exported(vit, params, "timm")
    np.savez(tmp_path / "model.npz", **tensors)
    with pytest.raises(ValueError, match="not a class token and a square grid"):
        load_vit(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, _ = load_vit(tmp_path)
    assert found.image_size == (16, 32) and found.num_heads == 3
