"""Whole runs on pictures of one 12-bit channel and of four bands."""

import json
import pickle

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from shrunk import shrunk
from wide_files import files, tiff

from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.data.base import read_image
from dinotwins_jax.evaluate import evaluate_run
from dinotwins_jax.export import export_run
from dinotwins_jax.files import read_config
from dinotwins_jax.logs.progress import Progress
from dinotwins_jax.models.torch_files import load_vit
from dinotwins_jax.train import train


def pictures(folder, bands):
    """Two classes of 12-bit pictures: a bright square in the first or in the last half of the picture."""
    rng = np.random.default_rng(0)
    contents = []
    for k in range(40):
        pixels = rng.integers(0, 1800, (24, 24, bands)).astype(np.uint16)
        pixels[4:16, 12 * (k % 2) : 12 * (k % 2) + 12, k % bands] = 4000
        contents.append(tiff(pixels))
    return files(folder, contents)


CASES = {
    "tiff_12bit": (1, {"mode": "set"}),
    "tiff_4band": (4, {"mode": "fixed", "range": (0, 4095)}),
}


def config_of(case, folder):
    channels, window = CASES[case]
    config = shrunk(
        total_steps=20,
        data__source="folder",
        data__dir=str(folder),
        model__in_channels=channels,
        log__every_steps=5,
        evals__tasks=("linear", "knn", "finetune", "attention", "pca"),
    )
    config.data.window.update(window)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_interrupted_resumed_evaluated_exported_and_read_back(
    case, tmp_path, monkeypatch, capfd
):
    """The numbers after the interruption, and the features after the export, are equal."""
    pictures(tmp_path / "data", CASES[case][0])
    config, workdir = config_of(case, tmp_path / "data"), tmp_path / "run"
    with monkeypatch.context() as patch:
        advance = Progress.advance

        def interrupt(self, step):
            if step == 13:
                raise KeyboardInterrupt
            advance(self, step)

        patch.setattr(Progress, "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config, workdir)
    scores = train(config, workdir)
    assert train(config, tmp_path / "whole") == scores
    with Checkpoints(workdir, read_only=True) as one, Checkpoints(tmp_path / "whole") as other:
        (a, _), (b, _) = one.restore_teacher(), other.restore_teacher()
    jax.tree.map(np.testing.assert_array_equal, a, b)
    said = capfd.readouterr()
    channels = CASES[case][0]
    assert f"read as {channels} channel" in said.out and "window " in said.out
    assert f"config.model.in_channels is {channels}: views.saturation and views.hue" in said.err
    for name in ("attention.png", "pca.png", "neighbours.png", "report.html"):
        assert (workdir / name).stat().st_size > 1000

    stored = ConfigDict(read_config(workdir / "config.json"))
    low, high = stored.data.window.range
    assert 0 <= low < 100 and 3000 < high <= 4095
    assert evaluate_run(workdir, tasks=["knn"])["teacher"]["knn"] == scores["teacher"]["knn"]

    for target in ("timm", "dino", "hf"):
        export_run(workdir, stored, target, tmp_path / target)
        vit, params = load_vit(tmp_path / target / "model.safetensors")
        assert vit.in_channels == channels
        jax.tree.map(np.testing.assert_array_equal, params, a)
        images = np.random.default_rng(0).normal(size=(2, 16, 16, channels)).astype(np.float32)
        ours = vit.clone(num_heads=3).apply({"params": params}, images)
        theirs = vit.clone(num_heads=3).apply({"params": a}, images)
        np.testing.assert_array_equal(ours.cls, theirs.cls)
        text = json.loads((tmp_path / target / "config.json").read_text())
        assert text["dinotwins_jax"]["window"]["range"] == list(stored.data.window.range)
        assert len(text["dinotwins_jax"]["mean"]) == channels


@pytest.mark.slow
def test_decoding_processes_read_what_threads_read(tmp_path):
    """The reading travels to them with the source."""
    from dinotwins_jax.data import data_section, open_source
    from dinotwins_jax.data.pipeline import train_batches

    pictures(tmp_path / "data", 4)
    config = config_of("tiff_4band", tmp_path / "data")
    source = open_source(data_section(config), "pretrain")
    assert read_image(pickle.loads(pickle.dumps(source)), 0).shape == (24, 24, 4)
    options = {"batch_size": 8, "canvas_size": 24, "seed": 0}
    threads, processes = (train_batches(source, **options, num_workers=n) for n in (0, 1))
    try:
        for _ in range(3):
            one, other = next(threads), next(processes)
            np.testing.assert_array_equal(one["image"], other["image"])
            assert one["image"].shape == (8, 24, 24, 4) and one["image"].max() > 240
    finally:
        threads.close()
        processes.close()
