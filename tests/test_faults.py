"""Broken and unusual image files: each works or is reported in one line, and nothing hangs."""

import io
import json
import multiprocessing
import os
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image

from dinotwins_jax.augment.multi_crop import image_keys, make_multi_crop
from dinotwins_jax.data import make_source
from dinotwins_jax.data.base import BadImage
from dinotwins_jax.data.pipeline import BadImageLog, train_batches

CANVAS = 32


def picture(mode="RGB", size=(40, 30)):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


ODD = {  # readable, all of them
    "plain.jpg": lambda path: picture().save(path),
    "progressive.jpg": lambda path: picture().save(path, progressive=True),
    "grey.jpg": lambda path: picture("L").save(path),
    "cmyk.jpg": lambda path: picture("CMYK").save(path),
    "palette.png": lambda path: picture("P").save(path),
    "transparent.png": lambda path: picture("RGBA").save(path),
    "sixteen_bit.png": lambda path: Image.fromarray(np.full((30, 40), 40000, np.uint16)).save(path),
    "rotated.jpg": lambda path: picture().save(path, exif=rotated()),
    "one_wide.jpg": lambda path: picture(size=(1, 300)).save(path),
    "one_high.png": lambda path: picture(size=(300, 1)).save(path),
    "one_pixel.png": lambda path: picture(size=(1, 1)).save(path),
    "wrong_name.png": lambda path: picture().save(path, "JPEG"),
}
BROKEN = {
    "truncated.jpg": lambda path: path.write_bytes(encoded(picture())[:600]),
    "truncated.png": lambda path: path.write_bytes(encoded(picture(), "PNG")[:600]),
    "zero.jpg": lambda path: path.write_bytes(b""),
    "page.jpg": lambda path: path.write_bytes(b"<html>not found</html>"),
    "header.jpg": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF"),
}


def encoded(image, format="JPEG"):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


@pytest.fixture
def odd_folder(tmp_path):
    for name, write in (ODD | BROKEN).items():
        write(tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_odd_files_train_and_broken_ones_are_named(odd_folder, num_workers, caplog):
    source = make_source("folder", "pretrain", dir=str(odd_folder))
    total = len(ODD | BROKEN)
    batches = train_batches(
        source, batch_size=total, canvas_size=CANVAS, seed=0, num_workers=num_workers
    )
    batch = next(batches)
    batches.close()
    log = BadImageLog(source, limit=0.5)
    log.add(batch)
    assert {os.path.basename(source.name(i)) for i in log.indices} == set(BROKEN)
    lines = [r.getMessage() for r in caplog.records if "unreadable image" in r.getMessage()]
    assert len(lines) == len(BROKEN) and not any("\n" in line for line in lines)
    assert set(batch["index"]) == set(range(total)) - set(log.indices)

    multi_crop = jax.jit(make_multi_crop(global_size=16, local_size=8, num_local=2))
    crops = multi_crop(batch["image"], batch["size"], image_keys(jax.random.key(0), batch["place"]))
    assert all(np.isfinite(views).all() for views in crops.values())
    assert all(np.abs(views).max() < 3 for views in crops.values())


def test_an_annotation_that_names_a_missing_file(tmp_path):
    """The run continues with the next image; the file is reported once."""
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    picture().save(tmp_path / "train2017/1.jpg")
    images = [{"id": k, "file_name": f"{k}.jpg", "height": 30, "width": 40} for k in (1, 2)]
    instances = {"images": images, "annotations": [], "categories": []}
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(instances))
    source = make_source("coco", "train", dir=str(tmp_path))
    with pytest.raises(BadImage, match=r"2\.jpg: No such file"):
        source[1]
    batch = next(train_batches(source, batch_size=2, canvas_size=CANVAS, seed=0))
    assert set(batch["index"]) == {0} and sorted(batch["bad"]) == [-1, 1]


@pytest.mark.slow
def test_a_killed_worker_is_one_line_and_the_stream_goes_on(tmp_path):
    for k in range(4):
        picture().save(tmp_path / f"{k}.jpg")
    source = make_source("folder", "pretrain", dir=str(tmp_path))
    batches = train_batches(source, batch_size=2, canvas_size=CANVAS, seed=0, num_workers=1)
    next(batches)
    state = batches.get_state()
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    start = time.perf_counter()
    with pytest.raises(ChildProcessError, match=r"exit code -9.*num_workers, now 1") as error:
        for _ in range(1000):  # a few batches are ready already
            state = batches.get_state()
            next(batches)
    assert time.perf_counter() - start < 60 and "\n" not in str(error.value)
    batches.set_state(state)  # new workers, the same place
    unbroken = train_batches(source, batch_size=2, canvas_size=CANVAS, seed=0)
    unbroken.set_state(state)
    np.testing.assert_array_equal(next(batches)["index"], next(unbroken)["index"])
    batches.close()
