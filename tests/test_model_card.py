"""The model card and the preprocessing of exports: what they say is true of the run, and their code gives
its features."""

import ast
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from golden_files import relative_error
from ml_collections import ConfigDict
from PIL import Image
from run_scores import SCORES
from shrunk import shrunk
from test_export import MODELS, model

from dinotwins_jax.augment.multi_crop import center_view
from dinotwins_jax.data.decode import fit_canvas
from dinotwins_jax.evals.features import checksum
from dinotwins_jax.export import export_run
from dinotwins_jax.exports.targets import TARGETS
from dinotwins_jax.exports.usage import code
from dinotwins_jax.models.torch_export import exported
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.preprocessing import Preprocessing, preprocessing_of, timm_transform

CONFIG = {"evals__resize": 20}


def card_of(workdir, tmp_path, target="timm", **options):
    export_run(workdir, shrunk(**CONFIG | options), target, tmp_path / "out")
    return (tmp_path / "out" / "README.md").read_text()


@pytest.fixture
def workdir(teacher_run, tmp_path):
    """A copy of the run, to write to."""
    return Path(shutil.copytree(teacher_run[0], tmp_path / "my run"))


def blocks(card):
    return re.findall(r"```python\n(.*?)```", card, re.S)


def test_the_card_says_what_the_model_is_and_how_it_was_trained(workdir, tmp_path):
    options = {"data__dir": "/home/somebody/secret/pictures/**/*.jpg", "data__source": "folder"}
    card = card_of(workdir, tmp_path, **options, init_from="/home/somebody/vits/start.pth")
    for text in ("# my run", "width 48, 2 blocks, 3 heads, patches of 8 × 8 pixels", "66,192 parameters",
                 "Barlow Twins (weight 0.3) + DINO (weight 1.0)", "folder, pictures: 60 training images",
                 "step 3 of 4, batches of 8 images, adamw", "weights of start.pth", "16 × 16 pixels",
                 "Short side 20 pixels, bicubic", "(0.485, 0.456, 0.406)"):  # fmt: skip
        assert text in card, text
    assert "somebody" not in card and str(tmp_path) not in card
    assert "judged" not in card and "None of these weights" in card


def test_the_front_matter_is_what_the_hub_reads(workdir, tmp_path):
    yaml = pytest.importorskip("yaml")
    for target, library in (("hf", "transformers"), ("stablehlo", "jax"), ("dino", None)):
        _, text, _ = card_of(workdir, tmp_path, target).split("---\n", 2)
        found = yaml.safe_load(text)
        assert found.get("library_name") == library
        assert found["pipeline_tag"] == "image-feature-extraction" and found["license"] == "unknown"
        assert {"dino", "barlow-twins", "self-supervised-learning"} <= set(found["tags"])


def test_scores_of_the_same_weights_are_on_the_card_with_their_protocols(
    teacher_run, workdir, tmp_path
):
    report = {"step": 3, "weights": checksum(teacher_run[1]), "scores": SCORES,
              "sets": {"train": 60, "test": 20, "classes": 10}}  # fmt: skip
    (workdir / "scores.json").write_text(json.dumps(report))
    card = card_of(workdir, tmp_path)
    assert "78.4 ± 0.5" in card and "random weights" in card and "- k-NN: p3" in card
    assert "scored with 60 labelled and 20 test images of 10 classes" in card
    probe = {"data__probe__source": "folder", "data__probe__dir": "/data/few"}
    export_run(workdir, shrunk(**probe), "timm", tmp_path / "probe")
    card = (tmp_path / "probe" / "README.md").read_text()
    assert "scored with folder, few: 60 labelled and 20 test images of 10 classes" in card
    for other in ({"step": 4}, {"weights": "of another training"}):
        (workdir / "scores.json").write_text(json.dumps(report | other))
        assert "78.4" not in card_of(workdir, tmp_path)
    (workdir / "scores.json").write_text("[1")
    assert "None of these weights" in card_of(workdir, tmp_path)


def test_an_edited_card_is_kept_unless_overwrite_is_given(workdir, tmp_path):
    config, out = shrunk(), tmp_path / "out"
    export_run(workdir, config, "timm", out)
    export_run(workdir, config, "timm", out)  # as it was written
    edited = (out / "README.md").read_text().replace("license: unknown", "license: cc0-1.0")
    (out / "README.md").write_text(edited)
    with pytest.raises(ValueError, match=r"holds something else \(README\.md\).*--overwrite"):
        export_run(workdir, config, "dino", out)
    assert (out / "README.md").read_text() == edited
    export_run(workdir, config, "timm", out, overwrite=True)
    assert "cc0" not in (out / "README.md").read_text()


def test_files_of_an_earlier_target_are_removed_and_others_kept(workdir, tmp_path):
    out = tmp_path / "out"
    export_run(workdir, shrunk(), "hf", out)
    assert (out / "preprocessor_config.json").is_file()
    (out / "notes.txt").write_text("mine")
    export_run(workdir, shrunk(), "timm", out, overwrite=True)
    names = {path.name for path in out.iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md", "notes.txt"}


def test_the_config_of_an_export_holds_the_preprocessing(workdir, tmp_path):
    for target in ("timm", "hf", "dino"):
        card_of(workdir, tmp_path, target)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        said = config["dinotwins_jax"]
        assert (said["resize"], said["crop"], said["in_channels"]) == (20, [16, 16], 3), target
        assert said["mean"] == [0.485, 0.456, 0.406] and said["std"] == [0.229, 0.224, 0.225]
        assert said["image_size"] == 16


def test_an_export_by_a_config_has_the_numbers_of_the_run_s_window(workdir, tmp_path):
    run, config = shrunk(data__window__mode="set"), shrunk(data__window__mode="set")
    run.data.window.range = (10, 4000)
    (workdir / "config.json").write_text(json.dumps(run.to_dict()))
    export_run(workdir, config, "timm", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["dinotwins_jax"]
    assert said["window"]["range"] == [10, 4000]


def test_the_code_of_every_target_is_python(tmp_path):
    views = {3: Preprocessing(40, (32, 32), (0.5,) * 3, (0.2,) * 3)}
    views |= {c: Preprocessing(72, (32, 64), (0.5,) * c, (0.2,) * c) for c in (1, 4)}
    for name in MODELS:
        vit, params = model(name)
        for target in TARGETS:
            if target == "timm" and "rope" in name:
                continue
            weights = target in ("timm", "dino", "hf")
            config = exported(vit, params, target)[1] if weights else {}
            for view in views.values():
                text = code(target, vit, view, config, "model.file")
                assert blocks(text) and "$" not in text
                for block in blocks(text):
                    tree = ast.parse(block)
                    names = {n.asname or n.name for i in ast.walk(tree)
                             if isinstance(i, ast.Import | ast.ImportFrom) for n in i.names}  # fmt: skip
                    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
                    assert names <= used, f"{target} imports {names - used} in vain"


@pytest.mark.parametrize("target", ["timm", "hf", "onnx", "stablehlo"])
def test_the_code_of_the_card_gives_the_features_of_evaluation(
    target, teacher_run, tmp_path, monkeypatch
):
    """Up to what rounding the resized picture to 8 bits changes, which the other codes do."""
    needs = {"timm": ("torch", "timm"), "hf": ("torch", "transformers"), "stablehlo": ()}
    for name in needs.get(target, ("onnx", "onnxruntime")):
        pytest.importorskip(name)
    workdir, teacher = teacher_run
    config = shrunk(**CONFIG)
    export_run(workdir, config, target, tmp_path)
    y, x, c = np.mgrid[:48, :64, :3]
    picture = np.uint8(128 + 90 * np.sin(y / 5 + c) * np.cos(x / 7 - c))
    Image.fromarray(picture).save(tmp_path / "picture.jpg", quality=95)
    canvas, size = fit_canvas(np.asarray(Image.open(tmp_path / "picture.jpg")), 64)
    pre = preprocessing_of(config)
    view = center_view(canvas[None], size[None], resize=pre.resize, crop=pre.crop)
    vit = VisionTransformer(embed_dim=48, depth=2, num_heads=3, patch_size=8, image_size=16)
    expected = vit.apply({"params": teacher}, view)
    monkeypatch.chdir(tmp_path)
    for block in blocks((tmp_path / "README.md").read_text()):
        found = {}
        exec(block, found)
        cls = found["cls"] if "cls" in found else np.array(found["tokens"])[:, 0]
        assert relative_error(np.asarray(cls), expected.cls) < 0.02
        if "patches" in found:
            assert relative_error(np.asarray(found["patches"]), expected.patches) < 0.02


def test_an_export_loads_with_this_package_by_its_card(teacher_run, tmp_path, monkeypatch):
    """The features of evaluation, whose pixels are not rounded after the resize."""
    config = shrunk(**CONFIG)
    export_run(teacher_run[0], config, "dino", tmp_path)
    y, x, c = np.mgrid[:48, :64, :3]
    picture = np.uint8(128 + 90 * np.sin(y / 5 + c) * np.cos(x / 7 - c))
    Image.fromarray(picture).save(tmp_path / "picture.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(blocks((tmp_path / "README.md").read_text())[-1], found)
    pre = preprocessing_of(config)
    canvas, size = fit_canvas(np.asarray(Image.open("picture.jpg")), 64)
    view = center_view(canvas[None], size[None], resize=pre.resize, crop=pre.crop)
    vit = VisionTransformer(embed_dim=48, depth=2, num_heads=3, patch_size=8, image_size=16)
    expected = vit.apply({"params": teacher_run[1]}, view)
    assert relative_error(np.asarray(found["patches"]), expected.patches) < 0.02


def test_transformers_pixels_are_ours(teacher_run, tmp_path):
    pytest.importorskip("torch")
    hf, config = pytest.importorskip("transformers"), shrunk(**CONFIG)
    export_run(teacher_run[0], config, "hf", tmp_path)
    processor, pre = hf.AutoImageProcessor.from_pretrained(tmp_path), preprocessing_of(config)
    for height, width in ((48, 64), (60, 40)):
        y, x, c = np.mgrid[:height, :width, :3]
        picture = np.uint8(128 + 90 * np.sin(y / 5 + c) * np.cos(x / 7 - c))
        canvas, size = fit_canvas(picture, 64)
        view = center_view(canvas[None], size[None], resize=pre.resize, crop=pre.crop)
        pixels = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
        difference = np.abs(pixels.numpy().transpose(0, 2, 3, 1) - np.asarray(view))
        assert difference.max() * max(pre.std) < 1e-2


def test_timm_resolves_the_transform_of_evaluation(teacher_run, tmp_path):
    pytest.importorskip("torch")
    timm, data = pytest.importorskip("timm"), pytest.importorskip("timm.data")
    export_run(teacher_run[0], shrunk(**CONFIG), "timm", tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    found = data.resolve_model_data_config(theirs)
    assert tuple(found["input_size"]) == (3, 16, 16) and found["interpolation"] == "bicubic"
    resize, crop, *_ = data.create_transform(**found).transforms
    assert (resize.size, tuple(crop.size)) == (20, (16, 16))


def test_timms_share_gives_the_short_side_back():
    """timm resizes to floor(crop / crop_pct)."""
    for resize in range(16, 520, 7):
        for crop in range(16, resize + 1, 5):
            pre = Preprocessing(resize, (crop, crop), (0.5,) * 3, (0.5,) * 3)
            assert math.floor(crop / timm_transform(pre)["crop_pct"]) == resize


def test_another_size_sees_the_same_share_of_the_picture():
    pre = Preprocessing(256, (224, 224), (0.5,) * 3, (0.5,) * 3)
    assert pre.at((224, 224)) is pre
    assert pre.at((448, 448)).resize == 512 and pre.at((448, 448)).crop == (448, 448)
    assert pre.at((224, 448)).resize == 512
    narrow = Preprocessing(224, (224, 224), (0.5,) * 3, (0.5,) * 3).at((96, 160))
    assert narrow.resize == 160


def test_moments_of_other_numbers_of_channels_are_one_for_all():
    config = shrunk()
    config.model.in_channels = 2
    pre = preprocessing_of(config)
    assert pre.mean == pytest.approx([0.449, 0.449]) and pre.std == pytest.approx([0.226, 0.226])
    config.data.mean, config.data.std = (0.1, 0.2), (0.3, 0.4)
    assert preprocessing_of(config)[2:4] == ((0.1, 0.2), (0.3, 0.4))
    assert pre.channels == 2


def test_the_window_of_wide_samples_is_on_the_card_and_in_the_config(workdir, tmp_path):
    config = shrunk()
    config.data.window = ConfigDict({"mode": "", "range": (0, 4095)})
    assert preprocessing_of(config).window is None  # off
    config.data.window.mode = "fixed"
    export_run(workdir, config, "timm", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["dinotwins_jax"]
    assert said["window"] == {"mode": "fixed", "range": [0, 4095]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "wider samples by the window mode fixed, range (0, 4095)" in card


def test_a_data_directory_that_is_no_utf8_has_a_card(teacher_run, tmp_path):
    config = shrunk(data__dir=os.fsdecode(b"/data/pictures\xe9"))
    export_run(teacher_run[0], config, "timm", tmp_path)
    export_run(teacher_run[0], config, "dino", tmp_path)  # the card counts as unchanged
    assert "scenes, pictures\\udce9: 60" in (tmp_path / "README.md").read_text()


def test_a_config_that_lacks_a_key_is_one_line(workdir, tmp_path):
    config = shrunk()
    del config.optim.lr
    with pytest.raises(ValueError, match=r"config\.json is of another version"):
        export_run(workdir, config, "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = shrunk()
    del config.init_from, config.loss.dino.weight
    export_run(workdir, config, "timm", tmp_path / "out")
    assert "DINO (weight 1.0)" in (tmp_path / "out" / "README.md").read_text()
