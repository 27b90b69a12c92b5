"""Whole runs on data that serve only some scores: said at the start, the rest scored, exit code 0."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from shrunk import shrunk

from dinotwins_jax.train import train

pytestmark = pytest.mark.slow
ALL = ("linear", "knn", "fewshot", "finetune", "attention", "segmentation", "pca")


def picture(path, colour, rng, at=4, side=12):
    pixels = rng.randint(0, 120, (24, 24, 3)).astype(np.uint8)
    pixels[at : at + side, at : at + side, colour] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def folder(root, **counts):
    """Class folders; each class has a square of its own colour."""
    rng = np.random.RandomState(0)
    for colour, (name, count) in enumerate(counts.items()):
        for k in range(count):
            picture(root / name / f"{k:03}.png", colour, rng)
    return {"data__source": "folder", "data__dir": str(root)}


def coco(root, images=12, **annotation):
    """Two image sets of squares, without masks."""
    rng = np.random.RandomState(0)
    for split in ("train2017", "val2017"):
        listed, objects = [], []
        for k in range(1, images + 1):
            at = int(rng.randint(0, 12))
            picture(root / split / f"{k}.png", k % 2, rng, at)
            listed.append({"id": k, "file_name": f"{k}.png", "height": 24, "width": 24})
            objects.append({"id": k, "image_id": k, "category_id": k % 2, "bbox": [at, at, 12, 12]})
            objects[-1] |= annotation
        names = [{"id": 0, "name": "ant"}, {"id": 1, "name": "bee"}]
        (root / "annotations").mkdir(exist_ok=True)
        values = {"images": listed, "annotations": objects, "categories": names}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(values))
    return {"data__source": "coco", "data__dir": str(root)}


def run(tmp_path, capsys, options, **more):
    """(scores.json, what was printed before the first step, and after the last)."""
    settings = {"evals__tasks": ALL, "evals__finetune_epochs": 1, "evals__monitor_every_epochs": 0}
    settings |= {"evals__finetune_fraction": 0.5, "total_steps": 1, "log__every_steps": 1}
    train(shrunk(**options | settings | more), tmp_path / "run")
    before, _, after = capsys.readouterr().out.partition("step 1/1")
    return json.loads((tmp_path / "run" / "scores.json").read_text()), before, after


@pytest.mark.parametrize("annotation", [{}, {"segmentation": []}])
def test_detection_only_coco_is_drawn_and_scored_by_its_boxes(tmp_path, capsys, annotation):
    options = coco(tmp_path / "data", **annotation)
    report, before, after = run(tmp_path, capsys, options)
    line = (
        "attention and segmentation: scored against boxes, by pointing and CorLoc alone, because "
    )
    assert line in before and line in after and report["left_out"] == {} == report["failed"]
    scores = report["scores"]["teacher"]
    assert scores["attention boxes"].keys() == {
        *("protocol", "images", "pointing", "pointing_sem", "corloc", "corloc_sem")
    }
    assert scores["attention boxes"]["protocol"] == "attention-box-v1"
    assert scores["segmentation boxes"].keys() == {"protocol", "images", "corloc", "corloc_sem"}
    assert not {"attention", "segmentation"} & scores.keys()
    # The middle of the picture lies in most of the squares.
    assert report["scores"]["centre box"]["attention boxes"]["pointing"] > 50
    assert "pointing at boxes" in after
    assert {"attention", "segmentation", "pca"} <= {
        p.stem for p in (tmp_path / "run").glob("*.png")
    }
    assert report["classes"]["linear"].keys() == {"ridge 50%", "multilabel ridge 50%"}


def test_unbalanced_classes_have_balanced_accuracies_and_a_row_each(tmp_path, capsys):
    options = folder(tmp_path / "data", ant=60, bee=12, wasp=6)
    report, before, after = run(tmp_path, capsys, options, evals__knn_k=(5, 500))
    assert "left out: k-NN with k 500, because" in before
    assert "drawn, not scored, because the data has no masks" in before
    assert report["failed"] == {} and set(report["left_out"]) == {"attention", "segmentation"}
    scores = report["scores"]["teacher"]
    for part in (scores["linear"]["sgd 50%"], scores["fewshot"]["shots5"], scores["finetune"]):
        assert 0 <= part["balanced_mean"] <= 100 and "balanced_std" in part
    rows = report["classes"]["knn"]["k5"]
    assert [row["class"] for row in rows] == ["ant", "bee", "wasp"]
    assert rows[0]["support"] > rows[1]["support"] > 0
    recalls = [row["recall"] for row in rows if row["support"]]
    assert scores["knn"]["k5"]["balanced"] == pytest.approx(np.mean(recalls))
    assert "k-NN, k=5, balanced" in after and "ridge 50%, balanced" in after
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Scores by class" in page and "<td>wasp</td>" in page


def test_a_few_pictures_are_scored_and_reported(tmp_path, capsys):
    options = folder(tmp_path / "data", ant=12, bee=12)
    report, before, after = run(tmp_path, capsys, options, evals__knn_k=(100, 200))
    assert "left out: knn, because config.evals.knn_k (100, 200) is more than the" in before
    assert report["failed"] == {} and set(report["left_out"]) == {"knn", *ALL[4:6]}
    assert {"linear", "fewshot", "finetune"} <= report["scores"]["teacher"].keys()
    named = re.search(r"^evaluation: (.+)$", after, re.MULTILINE)[1].split(", ")
    assert {"linear", "fewshot"} <= set(named) and not {"knn", *ALL[4:6]} & set(named)
    assert (tmp_path / "run" / "report.html").is_file()
