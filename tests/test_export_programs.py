"""Exports to ONNX and StableHLO: our features at any image size, from uint8 images, for any batch, in
onnxruntime and in a process that has JAX alone."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import relative_error
from jax import export as jax_export
from shrunk import shrunk
from test_export import MODELS, TINY, model

from dinotwins_jax.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from dinotwins_jax.export import export_run
from dinotwins_jax.models.onnx_graph import OPSET, onnx_model
from dinotwins_jax.models.stablehlo import PLATFORMS, stablehlo_program
from dinotwins_jax.models.vit import VisionTransformer

MOMENTS = IMAGENET_MEAN, IMAGENET_STD
SIZES = (32, 32), (48, 32)  # that of training, and another


def wide():
    """A model trained on 32 × 48 pixels."""
    vit, params = model("registers", image_size=(32, 48))
    params["pos_embed"] = np.float32(np.random.RandomState(2).normal(size=(1, 1 + 4 * 6, 48)))
    return vit, params


def images(size, channels=3):
    return np.random.RandomState(0).randint(0, 256, (3, *size, channels)).astype(np.uint8)


def assert_same(run, vit, params, size, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """run(images u8[b, h, w, C]) -> {"cls", "patches"} has the model's features, for 3 images and one."""
    u8 = images(size, len(mean))
    x = jnp.asarray((u8 / 255 - np.float64(mean)) / np.float64(std), jnp.float32)
    expected = jax.jit(vit.apply)({"params": params}, x)
    for batch in (1, 3):
        found = run(u8[:batch])
        assert relative_error(found["cls"], expected.cls[:batch]) < 1e-5
        assert relative_error(found["patches"], expected.patches[:batch]) < 1e-5


def onnx_session(data):
    """images -> features, in onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = ("cls", "patches")
    return lambda u8: dict(zip(names, session.run(names, {"images": u8}), strict=True))


CLEAN_PROCESS = """
import sys
from pathlib import Path
for name in ("dinotwins_jax", "flax", "ml_collections", "einops"):
    sys.modules[name] = None  # importing it is an error
import numpy as np
from jax import export
for name in sys.argv[1:]:
    program = export.deserialize(bytearray(Path(name).read_bytes()))
    images = np.load(f"{name}.npy")
    for batch in (1, 3):
        np.savez(f"{name}.{batch}.npz", **program.call(images[:batch]))
"""


@pytest.mark.slow
def test_stablehlo_runs_in_a_process_without_this_package(tmp_path):
    cases = {"wide": (*wide(), (32, 32)), "rope": (*model("rope, swiglu"), (48, 32))}
    for name, (vit, params, size) in cases.items():
        (tmp_path / name).write_bytes(stablehlo_program(vit, params, size, *MOMENTS))
        np.save(tmp_path / name, images(size))
    subprocess.run([sys.executable, "-I", "-c", CLEAN_PROCESS, *cases], cwd=tmp_path, check=True)
    for name, (vit, params, size) in cases.items():
        assert_same(
            lambda x, name=name: np.load(tmp_path / f"{name}.{len(x)}.npz"), vit, params, size
        )


def test_the_program_is_a_forward_pass_without_barriers_and_paths():
    vit, params = model("plain")
    data = stablehlo_program(vit, params, (32, 32), *MOMENTS)
    program = jax_export.deserialize(bytearray(data))
    assert program.platforms == PLATFORMS == ("cpu", "cuda", "tpu")
    assert str(program.in_avals[0]) == "uint8[b,32,32,3]"
    text = program.mlir_module()
    assert "barrier" not in text and text.count("stablehlo.exponential") == vit.depth
    assert b".py" not in data
    forward = jax.jit(lambda x: vit.apply({"params": params}, x).cls)
    traced = forward.trace(jnp.ones((1, 32, 32, 3))).lower().as_text()
    assert "barrier" in traced, "training and evaluation keep their barriers"


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "rope, swiglu"]


@pytest.mark.parametrize("name", ["wide", "rope, swiglu", *SLOW])
def test_onnxruntime_has_our_features_at_two_sizes(name):
    onnx = pytest.importorskip("onnx")
    vit, params = wide() if name == "wide" else model(name)
    for size in SIZES:
        data = onnx_model(vit, params, size, *MOMENTS)
        loaded = onnx.load_model_from_string(data)
        onnx.checker.check_model(loaded, full_check=True)
        assert [(o.domain, o.version) for o in loaded.opset_import] == [("", OPSET)]
        assert_same(onnx_session(data), vit, params, size)


@pytest.mark.parametrize("target", ["onnx", "stablehlo"])
def test_programs_take_as_many_channels_as_the_model(target):
    fields = {"in_channels": 4} if hasattr(VisionTransformer, "in_channels") else {}
    vit, size = VisionTransformer(**TINY | {"depth": 1}, **fields), (32, 32)
    shapes = jax.eval_shape(vit.init, jax.random.key(0), jnp.ones((1, *size, 4)))["params"]
    rng = np.random.RandomState(0)
    params = jax.tree.map(lambda s: np.float32(0.3 * rng.normal(size=s.shape)), shapes)
    moments = (0.1, 0.2, 0.3, 0.4), (0.3, 0.3, 0.2, 0.2)
    if target == "onnx":
        pytest.importorskip("onnx")
        run = onnx_session(onnx_model(vit, params, size, *moments))
    else:
        program = stablehlo_program(vit, params, size, *moments)
        run = jax_export.deserialize(bytearray(program)).call
    assert_same(run, vit, params, size, *moments)


def test_a_mask_token_is_not_in_the_programs():
    vit, params = model("plain")
    masked = params | {"mask_token": np.full((1, 48), 7.0, np.float32)}
    with_mask, without = (
        stablehlo_program(vit.clone(mask_token="mask_token" in p), p, (32, 32), *MOMENTS)
        for p in (masked, params)
    )
    assert with_mask == without
    pytest.importorskip("onnx")
    assert onnx_model(vit, masked, (32, 32), *MOMENTS) == onnx_model(
        vit, params, (32, 32), *MOMENTS
    )


def test_a_file_for_each_image_size(teacher_run, tmp_path):
    workdir, teacher = teacher_run
    config = shrunk(evals__resize=20)
    said = export_run(workdir, config, "stablehlo", tmp_path, image_sizes=[(16, 16), (32, 24)])
    names = {"model_16x16.stablehlo", "model_32x24.stablehlo"}
    assert all(name in said for name in names) and "of step 3, for stablehlo" in said
    assert {path.name for path in tmp_path.iterdir()} == {*names, "config.json", "README.md"}
    about = json.loads((tmp_path / "config.json").read_text())
    large = about["files"]["model_32x24.stablehlo"]
    assert large == {"images": ["b", 32, 24, 3], "cls": ["b", 48], "patches": ["b", 12, 48],
                     "resize": 40}  # fmt: skip
    assert about["dinotwins_jax"]["crop"] == [16, 16] and about["dinotwins_jax"]["resize"] == 20
    program = (tmp_path / "model_32x24.stablehlo").read_bytes()
    vit = VisionTransformer(**TINY | {"image_size": 16})
    assert_same(jax_export.deserialize(bytearray(program)).call, vit, teacher, (32, 24))
    export_run(workdir, config, "stablehlo", tmp_path)  # of the size of training
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model.stablehlo", "config.json", "README.md"}


@pytest.mark.parametrize(
    ("target", "sizes", "message"),
    [
        (
            "stablehlo",
            [(20, 16)],
            "--image_size: image size 20x16 is not a multiple of patch_size 8",
        ),
        ("stablehlo", [(0, 0)], "--image_size: image size 0x0"),
        ("timm", [(16, 16)], "--image_size is for onnx and stablehlo, not for --to=timm"),
    ],
)
def test_sizes_that_cannot_be_are_one_line_and_write_nothing(
    teacher_run, tmp_path, target, sizes, message
):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message) as error:
        export_run(teacher_run[0], shrunk(), target, out, image_sizes=sizes)
    assert "\n" not in str(error.value) and not out.exists()


@pytest.mark.parametrize(("target", "package"), [("onnx", "onnx"), ("stablehlo", "flatbuffers")])
def test_without_its_package_the_command_that_installs_it_is_named(
    teacher_run, tmp_path, monkeypatch, target, package
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"^--to={target} needs .*: pip install {package}$"):
        export_run(teacher_run[0], shrunk(), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
