"""Probes on other data than the pretraining: what is opened, described, scored and kept apart."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from shrunk import shrunk

from dinotwins_jax.build import build_for_evaluation
from dinotwins_jax.configuration import config_of
from dinotwins_jax.data import has_probe_data, probe_section
from dinotwins_jax.data.describe import describe_run
from dinotwins_jax.evaluate import evaluate_run
from dinotwins_jax.evaluation import eval_view, picture_images
from dinotwins_jax.prepare import run as prepare
from dinotwins_jax.train import train
from dinotwins_jax.workdir import claim_workdir
from experiments.comparison.plan import make_configs

LARGE, SMALL = (40, 30), (70, 50)  # (width, height) of the pictures of each set


def picture(path, size, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def boxes(folder, count, seed):
    """A COCO folder of boxes without masks: a picture of each of two categories in turn."""
    images, annotations = [], []
    for k in range(count):
        picture(folder / f"{k}.png", SMALL, seed + k)
        images.append({"id": k, "file_name": f"{k}.png", "width": SMALL[0], "height": SMALL[1]})
        annotation = {"id": k, "image_id": k, "category_id": k % 2, "bbox": [5, 5, 20, 20]}
        annotations.append(annotation | {"area": 400})
    categories = [{"id": k, "name": name} for k, name in enumerate(("ant", "bee"))]
    found = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(a large set without labels, a small one with boxes)."""
    large, small = (tmp_path_factory.mktemp(name) for name in ("large", "small"))
    for k in range(30):
        picture(large / f"{k:02}.png", LARGE, k)
    boxes(small / "train", 16, 100)
    boxes(small / "valid", 8, 200)
    return large, small


@pytest.fixture
def config(sets):
    large, small = sets
    return shrunk(
        data__source="folder",
        data__dir=str(large),
        data__probe__source="coco",
        data__probe__dir=str(small),
        data__probe__coco__train_split="train",
        data__probe__coco__test_split="valid",
        evals__knn_k=(3,),
    )


def test_training_and_probes_open_their_own_data(config, sets):
    run = build_for_evaluation(config)
    train_source, test_source = run.probe_sources
    assert len(run.source) == 30 and run.source.labels is None
    assert len(train_source) == 16 and len(test_source) == 8
    assert train_source.class_names == ("ant", "bee")
    assert test_source.labels.tolist() == [0, 1] * 4
    assert all(Path(p).is_relative_to(sets[1]) for p in train_source.paths)


def test_the_canvas_of_evaluation_is_that_of_the_probes(config):
    """16 pixels of crop: photos get a canvas of 64, scenes of the demo one of their own size."""
    run = build_for_evaluation(config)
    assert run.canvas_size == eval_view(run, config).canvas_size == 64
    config.data.canvas_size = 32
    run = build_for_evaluation(config)
    assert run.canvas_size == 32 and eval_view(run, config).canvas_size == 64
    config.data.probe.canvas_size = 96
    assert (
        eval_view(run, config).canvas_size == picture_images(run, config, 2).view.canvas_size == 96
    )
    config.data.probe.source = ""
    config.data.probe.dir = ""
    assert eval_view(build_for_evaluation(config), config).canvas_size == 32


def test_both_sets_are_described(config):
    run = build_for_evaluation(config)
    assert describe_run(run.source, run.probe_sources, apart=True) == [
        "data: pretrain 30 images (no labels)",
        "  no classes: the images lie in no folders",
        "data: train 16 images, test 8 images of other data, for the probes",
        "  2 classes: ant, bee; 8 training images each",
    ]


def test_a_directory_without_a_source_is_refused(config):
    config.data.probe.source = ""
    with pytest.raises(
        ValueError, match=r"data\.probe\.dir is '.*small.*' without .*probe\.source"
    ):
        build_for_evaluation(config)


def test_the_section_of_the_probes_has_its_options_and_the_common_keys(config):
    config.data.max_pixels = 10**9
    section = probe_section(config.data.to_dict())
    assert section["source"] == "coco" and section["coco"]["test_split"] == "valid"
    assert section["max_pixels"] == 10**9 and "probe" not in section
    config.data.probe.update({"source": "", "dir": ""})
    same = {key: value for key, value in config.data.to_dict().items() if key != "probe"}
    assert probe_section(config.data.to_dict()) == same


def test_a_config_from_before_the_key_evaluates_and_goes_on(tmp_path):
    config = shrunk()
    before = config.to_dict()
    del before["data"]["probe"], before["data"]["folder"]["labels"]
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(before))
    old = config_of(tmp_path, opens_data=True)
    run = build_for_evaluation(old)
    assert not has_probe_data(old.data) and len(run.probe_sources[1]) == 20
    assert eval_view(run, old).canvas_size == run.canvas_size
    claim_workdir(tmp_path, config.to_dict())


def test_code_as_probe_source_of_a_received_run_is_refused(config, tmp_path):
    config.data.probe.source = "received:source"
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(
        ValueError, match=r"data source, 'received:source'.*data\.probe\.source=rec"
    ):
        config_of(tmp_path, opens_data=True)


def test_the_probes_may_change_when_a_run_goes_on(config, tmp_path):
    claim_workdir(tmp_path, config.to_dict())
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    config.data.probe.update({"source": "", "dir": ""})
    claim_workdir(tmp_path, config.to_dict())
    assert json.loads((tmp_path / "config.json").read_text())["data"]["probe"]["source"] == ""


def test_a_comparison_takes_it_from_the_command_line(sets):
    keys = {"data.probe.source": "folder", "data.probe.dir": str(sets[1])}
    for config in make_configs("coco", ("dino", "hybrid"), 0, {"config": keys}).values():
        assert probe_section(config.data.to_dict())["dir"] == str(sets[1])


def test_prepare_says_that_the_probes_are_not_part_of_it(sets, capsys):
    large, small = sets
    arguments = ["--config=hybrid:coco", "--dry_run", "--config.data.source=folder"]
    arguments += [f"--config.data.dir={large}", "--config.data.probe.source=coco"]
    assert prepare([*arguments, f"--config.data.probe.dir={small}"]) == 0
    out = capsys.readouterr().out
    assert "data: pretrain 30 images" in out and "prepare it by itself" in out


@pytest.mark.slow
def test_a_run_trains_on_one_set_and_is_scored_on_the_other(config, tmp_path, capsys):
    scores = train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "data: pretrain 30 images (no labels)" in out
    assert "data: train 16 images, test 8 images of other data, for the probes" in out
    assert set(scores["teacher"]) >= {"linear", "knn"} and "k3" in scores["teacher"]["knn"]
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("monitor/knn_top1" in json.loads(line) for line in log)
    report = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert evaluate_run(tmp_path / "run", tasks=["linear", "knn"]) == scores
    # Scores of other data go beside those of the run's.
    own = ConfigDict(json.loads((tmp_path / "run" / "config.json").read_text()))
    own.data.probe.coco.train_split = own.data.probe.coco.test_split = "train"
    evaluate_run(tmp_path / "run", own, ["knn"])
    (beside,) = (tmp_path / "run" / "evals").glob("*/scores.json")
    other = json.loads(beside.read_text())
    assert other["data"] != report["data"] and "linear" not in other["scores"]["teacher"]
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["data"] == report["data"]
