"""The public API on a run, its exports and its weights: load, features, embed, train by name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from shrunk import SHRUNK, shrunk

import dinotwins_jax as dt
from configs import dino
from dinotwins_jax.data import open_source
from dinotwins_jax.data.base import BadImage
from dinotwins_jax.embed import run as embed_command
from dinotwins_jax.evaluate import evaluate_run
from dinotwins_jax.export import export_run
from dinotwins_jax.features.files import read_features
from dinotwins_jax.features.model import Model
from dinotwins_jax.models.torch_weights import vit_to_torch
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.train import train

RUN = {"total_steps": 2, "evals__tasks": (), "evals__monitor_every_epochs": 0.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run of embedded pictures."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(shrunk(dino, **RUN), workdir)
    return workdir


@pytest.fixture(scope="module")
def model(run):
    return dt.load(run)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eleven pictures of several sizes and modes, in folders, and one that is broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k in range(11):
        mode = ("RGB", "L", "RGBA")[k % 3]
        size = (20 + 3 * k, 50 - 2 * k, *{"RGB": (3,), "L": (), "RGBA": (4,)}[mode])
        where = folder / f"part{k % 2}"
        where.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, size, np.uint8), mode).save(where / f"{k:02d}.png")
    (folder / "part0" / "broken.png").write_bytes(b"\x89PNG nothing")
    return folder


def readable(pictures):
    return sorted(p for p in pictures.rglob("*.png") if p.name != "broken.png")


def test_importing_the_package_imports_no_jax():
    code = (
        "import dinotwins_jax, sys; assert {'load', 'train', 'embed'} <= set(dir(dinotwins_jax)); "
    )
    code += "assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        dt.lode  # noqa: B018


def test_features_are_those_of_evaluation_to_the_bit(run, model):
    evaluate_run(run, tasks=["knn"])
    found = model([source_of(run)[i] for i in range(20)]).cls
    cached = [np.load(file)["features"] for file in sorted((run / "features").glob("*.npz"))]
    (cached,) = (x for x in cached if len(x) == 20 and np.array_equal(x[:, :48], found))
    embedded = dt.embed(model, split="test", tokens=("cls", "mean_patch"))
    np.testing.assert_array_equal(cached[:, :48], embedded["cls"])
    np.testing.assert_allclose(cached[:, 48:], embedded["mean_patch"], atol=1e-6)


def source_of(run):
    return open_source(json.loads((run / "config.json").read_text())["data"], "test")


def test_any_kind_of_picture_gives_the_same_features(model, pictures):
    paths = readable(pictures)
    found = model(paths)
    assert found.cls.shape == (11, 48) and found.patches.shape == (11, 4, 48)
    assert found.cls.dtype == found.patches.dtype == np.float32
    opened = [Image.open(p) for p in paths]
    arrays = [np.asarray(Image.open(p).convert("RGB")) for p in paths]
    mixed = [str(paths[0]), opened[1], *arrays[2:5], *paths[5:]]
    for images in (opened, arrays, mixed, (p for p in paths)):
        np.testing.assert_array_equal(model(images).cls, found.cls)
    grey = next(k for k, image in enumerate(opened) if image.mode == "L")
    one = model(np.asarray(opened[grey]), batch_size=16)
    np.testing.assert_array_equal(one.cls, found.cls[grey : grey + 1])
    same_size = np.stack([arrays[0]] * 2)
    np.testing.assert_array_equal(model(same_size, batch_size=16).cls[1], found.cls[0])


def test_the_parts_go_on_in_jax(model, pictures):
    path = readable(pictures)[0]
    view = model.preprocess(path)
    assert view.shape == (16, 16, 3) and view.dtype == np.float32
    output = model.module.apply({"params": model.params}, view[None], return_attention=True)
    np.testing.assert_allclose(output.cls, model(path).cls, atol=1e-5)
    maps = model.attention(path)
    assert maps.shape == (1, 3, 2, 2) and (maps.sum(axis=(2, 3)) < 1).all()
    np.testing.assert_allclose(output.attention[:, :, 0, 1:].reshape(1, 3, 2, 2), maps, atol=1e-6)
    assert model.config.model.embed_dim == 48


def test_arrays_of_other_libraries_and_of_names_are_pictures_too(model, pictures):
    """A jax.Array is one picture, not a sequence of its rows; names are those that embed returns."""
    pixels = np.asarray(Image.open(readable(pictures)[0]).convert("RGB"))
    expected = model(pixels).cls
    for images in (jnp.asarray(pixels), jnp.asarray(pixels)[None], [jnp.asarray(pixels)]):
        np.testing.assert_array_equal(model(images).cls, expected)
    opened = Image.open(readable(pictures)[0])  # decoded once, although threads want it at once
    assert len(model([opened] * 64, batch_size=64).cls) == 64
    found = dt.embed(model, pictures, batch_size=16)
    np.testing.assert_array_equal(model(found["names"], batch_size=16).cls, found["cls"])


def test_pictures_as_large_as_the_run_s_are_read(model, tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("RGB", (60, 60)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage, match="3600 pixels"):
        model(path)
    config = model.config.copy_and_resolve_references()
    config.data.max_pixels = 4000
    larger = Model(model.module, model.params, model.view, config=config)
    assert larger.max_pixels == 4000
    assert larger(path).cls.shape == (1, 48)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert len(dt.embed(larger, tmp_path)["names"]) == 1


def test_only_files_are_embedded_into_a_file(model, pictures, tmp_path):
    """A second start knows files by their names and times, arrays by nothing."""
    paths = readable(pictures)
    with pytest.raises(ValueError, match="image 1 is a ndarray: only paths"):
        dt.embed(model, [paths[0], np.zeros((8, 8, 3), np.uint8)], tmp_path / "a.npz")
    with pytest.raises(ValueError, match="no images"):
        dt.embed(model, [], tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())
    found = dt.embed(model, paths[:3], tmp_path / "a.npz")
    assert found["names"].tolist() == list(map(str, paths[:3]))


def test_a_broken_picture_and_other_things_are_named(model, pictures, tmp_path):
    with pytest.raises(BadImage, match=r"broken\.png: not an image"):
        model([readable(pictures)[0], pictures / "part0" / "broken.png"])
    with pytest.raises(BadImage, match=r"none\.jpg: No such file"):
        model(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match=r"image 0 is float64.* must be uint8"):
        model(np.zeros((1, 8, 8, 3)))
    with pytest.raises(TypeError, match="image 1 is a int"):
        model([readable(pictures)[0], 3])
    with pytest.raises(ValueError, match="no images"):
        model([])
    with pytest.raises(ValueError, match="batch_size is 0"):
        model(readable(pictures), batch_size=0)


@pytest.mark.parametrize("target", ["timm", "dino", "hf"])
def test_an_exported_folder_loads_too(run, model, pictures, target, tmp_path):
    export_run(run, model.config, target, tmp_path / target)
    paths = readable(pictures)
    there = dt.load(tmp_path / target)
    assert there.view[:2] == model.view[:2]
    np.testing.assert_allclose(there(paths).cls, model(paths).cls, atol=1e-5)


def test_a_file_alone_gets_the_official_preprocessing_and_a_warning(pictures, tmp_path, capfd):
    vit = VisionTransformer(embed_dim=64, depth=1, num_heads=1, patch_size=8, image_size=16)
    params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, 16, 16, 3)))["params"]
    np.savez(tmp_path / "weights.npz", **vit_to_torch(params))
    found = dt.load(tmp_path / "weights.npz")
    assert found.view[:2] == (18, 16) and found.config is None
    assert "does not state its preprocessing: short side to 18 pixels" in capfd.readouterr().err
    output = vit.apply({"params": params}, found.preprocess(readable(pictures)[0])[None])
    np.testing.assert_allclose(found(readable(pictures)[0]).cls, output.cls, atol=1e-5)
    with pytest.raises(ValueError, match="is not a run: it has no data"):
        dt.embed(found, split="test")


def test_what_is_no_model_is_said_in_a_line(run, tmp_path):
    for source, message in (
        (tmp_path / "none", "no run, folder or file of weights"),
        (tmp_path, "no run with checkpoints, and no weights in"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            dt.load(source)
    with pytest.raises(ValueError, match=r"choose latest, best .* steps"):
        dt.load(run, checkpoint=7)
    with pytest.raises(ValueError, match="is not a run"):
        dt.load(tmp_path / "a.npz", checkpoint="best")
    assert dt.load(run, checkpoint=2).identity == dt.load(run).identity


@pytest.mark.parametrize("name", ["features.npz", "features.parquet", "features"])
def test_embed_leaves_out_what_is_broken_and_goes_on_after_a_stop(
    model, pictures, tmp_path, name, monkeypatch
):
    monkeypatch.setattr("dinotwins_jax.features.embedding.SHARD_BYTES", 4 * 48 * 4)
    options = {"tokens": ("cls", "mean_patch", "patches"), "batch_size": 4}
    whole = dt.embed(model, pictures, **options)
    out, batches = tmp_path / name, model.batches

    def stopped(*args, **rest):
        for found in batches(*args, **rest):
            if rest["indices"].start == 8:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(model, "batches", stopped)
    with pytest.raises(KeyboardInterrupt):
        dt.embed(model, pictures, out, **options)
    assert not out.exists() or not out.suffix
    computed = []
    monkeypatch.setattr(
        model, "batches", lambda *a, **k: computed.append(k["indices"]) or batches(*a, **k)
    )
    found = dt.embed(model, pictures, out, **options)
    assert computed == [range(8, 12)]
    assert found.keys() == whole.keys()
    for key in whole:
        assert found[key].dtype.kind == whole[key].dtype.kind
        np.testing.assert_array_equal(found[key], whole[key])
    assert found["left_out"].tolist() == [str(pictures / "part0" / "broken.png")]
    assert found["patches"].dtype == np.float16 and len(found["names"]) == 11
    np.testing.assert_array_equal(found["cls"], model(found["names"].tolist(), batch_size=4).cls)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.parts"))


def test_embed_says_what_is_wrong(run, model, pictures, tmp_path, capsys):
    def error(*arguments):
        assert embed_command([f"--workdir={run}", *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    out = f"--out={tmp_path / 'a.npz'}"
    (tmp_path / "empty").mkdir()
    assert "either --images or --split" in error(out)
    assert "no images under" in error(out, f"--images={tmp_path / 'empty'}")
    assert "no such folder, file or pattern" in error(out, f"--images={tmp_path / 'none'}")
    assert "choose from cls, mean_patch, patches" in error(out, "--split=test", "--tokens=cls,cl")
    assert "a file .npz or .parquet" in error(f"--out={tmp_path / 'a.csv'}", "--split=test")
    (tmp_path / "folder.npz").mkdir()
    assert "that is a directory" in error(
        f"--out={tmp_path / 'folder.npz'}", "--split=test", "--overwrite"
    )
    assert "no such directory" in error(f"--out={tmp_path / 'no' / 'a.npz'}", "--split=test")
    assert embed_command([f"--workdir={run}", out, f"--images={pictures}"]) == 0
    assert "11 images, 1 left out" in capsys.readouterr().out
    assert "is there already" in error(out, f"--images={pictures}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert "holds something else (thesis.tex)" in error(
        f"--out={tmp_path / 'mine'}", "--split=test"
    )
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"no")
    assert "none of 1 images" in error(
        f"--out={tmp_path / 'b.npz'}", f"--images={tmp_path / 'bad'}"
    )
    np.savez(tmp_path / "cache.npz", features=np.zeros((2, 3)), indices=np.arange(2))
    with pytest.raises(ValueError, match="holds no features"):
        read_features(tmp_path / "cache.npz")


def test_data_that_have_moved_are_embedded(run, tmp_path, capsys):
    def embed(*changes):
        out = f"--out={tmp_path / 'a.npz'}"
        code = embed_command([f"--workdir={run}", "--split=test", out, "--overwrite", *changes])
        return code, capsys.readouterr()

    assert embed("--config.data.scenes.num_test=7")[0] == 0
    assert len(read_features(tmp_path / "a.npz")["names"]) == 7
    for changes, message in (
        ("--config.data.window.mode=picture", "keys of the data alone"),
        ("--config.evals.resize=32", "keys of the data alone"),
        ("--config=dino:demo", "embed takes the run's own config"),
    ):
        code, said = embed(changes)
        assert code == 2 and message in said.err and said.err.count("\n") == 1


def test_labels_of_the_run_s_own_data(run, model):
    found = dt.embed(run, split="test")
    source = open_source(model.config.data.to_dict(), "test")
    np.testing.assert_array_equal(found["labels"], source.labels)
    assert tuple(found["class_names"]) == source.class_names


@pytest.mark.parametrize("name", [None, "predicted.npz", "predicted.parquet"])
def test_a_probe_of_the_run_s_labels_predicts(run, model, pictures, tmp_path, name):
    file = tmp_path / "probe.npz"
    train, test = (
        dt.embed(model, split=s, tokens=("cls", "mean_patch")) for s in ("train", "test")
    )
    classifier = dt.probe(train, tokens=("cls", "mean_patch"), out=file)
    assert classifier.model == model.identity and classifier.score(test)["images"] == 20
    paths = readable(pictures)
    found = model.predict(paths, file)
    assert found.probabilities.shape == (11, len(classifier.class_names))
    options = {"tokens": ("cls", "mean_patch"), "classifier": file}
    written = dt.embed(model, pictures, name and tmp_path / name, **options)
    np.testing.assert_array_equal(written["prediction"], found.labels)
    np.testing.assert_allclose(written["probabilities"], found.probabilities, atol=1e-5)
    assert tuple(written["predicted_names"]) == classifier.class_names
    with pytest.raises(ValueError, match="takes mean_patch: add it to tokens"):
        dt.embed(model, pictures, classifier=file)
    other = classifier._replace(model="0" * 64)
    with pytest.raises(ValueError, match="features of another model"):
        model.predict(paths, other)


def test_the_examples_of_the_api_page_run(run, pictures, tmp_path, monkeypatch):
    """Every Python block of docs/api.md but the one that trains, in one namespace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "hybrid").symlink_to(run)
    (tmp_path / "pictures").symlink_to(pictures)
    Image.open(readable(pictures)[0]).convert("RGB").save(tmp_path / "a.jpg")
    Image.open(readable(pictures)[1]).save(tmp_path / "b.png")
    page = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {}
    for block in blocks[:-1]:
        exec(block, names)
    assert names["features"].cls.shape == (2, 48) and names["output"].cls.shape == (1, 48)
    assert len(names["arrays"]["names"]) == 11 and "dt.train(" in blocks[-1]


@pytest.mark.slow
def test_train_by_name(tmp_path):
    changes = SHRUNK | {
        "total_steps": 2,
        "evals.tasks": ("knn",),
        "evals.monitor_every_epochs": 0.0,
    }
    changes |= {f"loss.dino.{key}": 32 for key in ("out_dim", "hidden_dim", "bottleneck_dim")}
    changes |= {"loss.barlow_twins.hidden_dims": (32, 32, 32)}
    scores = dt.train("hybrid:demo", tmp_path / "run", **changes)
    assert scores["teacher"]["knn"]["k5"]["top1"] >= 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch_size"] == 8
    with pytest.raises(ValueError, match=r"no key 'lrr'; did you mean 'lr'"):
        dt.train("hybrid:demo", tmp_path / "other", **{"optim.lrr": 1e-3})
    with pytest.raises(ValueError, match=r"optim\.lr .*'fast'"):
        dt.train("hybrid:demo", tmp_path / "other", **{"optim.lr": "fast"})
    assert jax.local_device_count() == 8
