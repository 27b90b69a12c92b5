"""Photographs that a page may show: free licences only, attributed, one row each."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shrunk import shrunk

from dinotwins_jax.train import train
from experiments.docs.coco_pictures import attribution, draw, licences

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = Path(os.environ.get("DINOTWINS_DATA", ROOT.parent / "shared" / "data")) / "coco_sample"


def test_only_licences_that_allow_it_are_shown(tmp_path):
    records = [{"id": k, "file_name": f"{k}.jpg", "license": k} for k in range(1, 9)]
    records.append({"id": 9, "file_name": "unknown.jpg"})
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": records}))
    assert list(licences(path)) == ["4.jpg", "7.jpg", "8.jpg"]


def test_an_attribution_names_picture_page_and_licence():
    record = {"id": 30, "license": 4}
    record["flickr_url"] = "http://farm4.staticflickr.com/3377/3573516590_a1f6cf2cbd_z.jpg"
    assert attribution(record) == "[30](https://www.flickr.com/photo.gne?id=3573516590), CC BY 2.0"


@pytest.mark.slow
def test_a_run_is_drawn_on_free_pictures_of_the_sample(tmp_path):
    if not SAMPLE.is_dir():
        pytest.skip(f"no coco_sample in DINOTWINS_DATA ({SAMPLE.parent})")
    options = {"data__source": "coco", "data__dir": str(SAMPLE), "evals__tasks": ()}
    train(shrunk(total_steps=2, **options), tmp_path / "hybrid-seed0")
    runs = {"hybrid": tmp_path / "hybrid-seed0"}
    lines = draw(tmp_path / "shown.png", runs, SAMPLE, 3, "hybrid")
    free = licences(SAMPLE / "annotations" / "instances_val2017.json")
    assert len(set(lines)) == 3 and set(lines) <= {attribution(record) for record in free.values()}
    shown = np.asarray(Image.open(tmp_path / "shown.png").convert("RGB"))
    assert shown.shape[0] > 3 * 200 and shown.shape[1] > 3 * 200  # 3 rows of 3 panels
    assert shown.std() > 30
