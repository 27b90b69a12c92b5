"""Prepared data: contents, reading, and resuming interrupted work."""

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinotwins_jax import prepare
from dinotwins_jax.data import make_source, shards
from dinotwins_jax.data.base import BadImage
from dinotwins_jax.data.pipeline import train_batches
from dinotwins_jax.data.store import Settings, union

REPOSITORY = Path(__file__).parent.parent
SMALL = Settings(short_side=20, images_per_shard=4)


def photo(seed, size=(48, 32)):
    """Smooth blobs of one tint, which JPEG stores accurately."""
    light = np.random.default_rng(seed).integers(60, 200, (4, 6, 1))
    coarse = Image.fromarray((light + np.array([0, 20, -20])).astype(np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def coco(tmp_path):
    """Six images of train2017, one of them broken, two of them with objects; two of val2017."""
    root = tmp_path / "coco"
    for name, ids in (("train2017", range(6)), ("val2017", range(6, 8))):
        (root / name).mkdir(parents=True)
        for k in ids:
            photo(k).save(root / name / f"{k}.jpg", quality=95)
    (root / "train2017/3.jpg").write_bytes(b"")
    (root / "annotations").mkdir()
    square = [[8, 4, 24, 4, 24, 20, 8, 20]]
    for name, ids, objects in (
        ("train2017", range(6), [(0, 5, square), (3, 5, square), (4, 9, square), (4, 5, square)]),
        ("val2017", (6, 7), [(6, 9, square)]),
    ):
        instances = {
            "images": [{"id": k, "file_name": f"{k}.jpg", "height": 32, "width": 48} for k in ids],
            "annotations": [
                {"image_id": i, "category_id": c, "area": 256.0 + c, "segmentation": s}
                for i, c, s in objects
            ],
            "categories": [{"id": 5, "name": "dog"}, {"id": 9, "name": "cat"}],
        }
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(instances))
    return root


def sources(root, name="coco"):
    return {
        split: make_source(name, split, dir=str(root)) for split in ("pretrain", "train", "test")
    }


def write(root, out, settings=SMALL, **options):
    store = union(sources(root))
    return shards.write(store, out, settings, description={}, command="again", workers=1, **options)


@pytest.fixture
def prepared(coco, tmp_path):
    write(coco, tmp_path / "out")
    return tmp_path / "out"


def test_a_reader_gets_what_the_source_has(coco, prepared):
    for split, source in sources(coco).items():
        stored = make_source("array_record", split, dir=str(prepared))
        kept = [i for i in range(len(source)) if not source.name(i).endswith("/3.jpg")]
        assert [stored.name(i) for i in range(len(stored))] == [source.name(i) for i in kept]
        assert stored.class_names == source.class_names
        for mine, theirs in ((stored.labels, source.labels), (stored.multi_hot, source.multi_hot)):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                np.testing.assert_array_equal(mine, theirs[kept])
        for i, k in enumerate(kept):
            assert stored[i].shape == (20, 30, 3)
            exact = Image.fromarray(source[k]).resize((30, 20), Image.Resampling.LANCZOS)
            assert np.abs(stored[i].astype(int) - np.asarray(exact)).mean() < 3
    assert make_source("array_record", "train", dir=str(prepared)).default_canvas(224) == 32


def test_every_image_is_stored_once(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["images"] == 7 and [s["records"] for s in manifest["shards"]] == [3, 4]
    assert {k: v["images"] for k, v in manifest["splits"].items()} == {
        "pretrain": 5,
        "train": 5,
        "test": 2,
    }
    (skipped,) = manifest["skipped"]
    assert skipped["name"].endswith("3.jpg") and skipped["reason"] == "empty, 0 bytes"
    assert sorted(p.name for p in prepared.iterdir()) == sorted(
        ["manifest.json", "splits.npz", "masks-test-00000-of-00001.array_record"]
        + [f"images-0000{k}-of-00002.array_record" for k in range(2)]
    )


def test_masks_are_those_of_the_source_at_the_stored_size(coco, prepared):
    source, stored = (make_source(n, "test", dir=str(d)) for n, d in
                      (("coco", coco), ("array_record", prepared)))  # fmt: skip
    masks, categories = stored.masks(0)
    assert masks.shape == (1, 20, 30) and categories.tolist() == [1]
    whole = source.masks(0)[0][0]
    assert abs(masks.mean() - whole.mean()) < 0.02
    np.testing.assert_array_equal(
        np.argwhere(masks[0])[0], [2, 5]
    )  # whose centres are at (4.0, 8.8)
    assert stored.masks(1)[0].shape == (0, 20, 30)
    assert not hasattr(make_source("array_record", "train", dir=str(prepared)), "masks")


def test_small_jpegs_keep_their_bytes_and_all_else_becomes_a_jpeg(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    photo(0, (24, 20)).save(folder / "a.jpg", quality=70)
    photo(1, (24, 20)).save(folder / "b.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    photo(2, (24, 20)).save(folder / "c.jpg", exif=rotated)
    photo(3, (24, 20)).convert("CMYK").save(folder / "d.jpg")
    photo(4, (10, 8)).save(folder / "e.png")
    store = union({"pretrain": make_source("folder", "pretrain", dir=str(folder))})
    manifest = shards.write(store, tmp_path / "out", SMALL, description={}, command="", workers=1)
    stored = make_source("array_record", "pretrain", dir=str(tmp_path / "out"))
    assert manifest["verbatim"] == 1 and stored.encoded(0) == (folder / "a.jpg").read_bytes()
    assert all(stored.encoded(i)[:3] == b"\xff\xd8\xff" for i in range(5))
    assert [stored[i].shape[:2] for i in range(5)] == [
        (20, 24),
        (20, 24),
        (24, 20),
        (20, 24),
        (8, 10),
    ]
    for i in (1, 2, 3, 4):
        original = make_source("folder", "pretrain", dir=str(folder))[i]
        assert np.abs(stored[i].astype(int) - original).mean() < 4


def test_training_batches_and_pickles(prepared):
    source = make_source("array_record", "pretrain", dir=str(prepared))
    again = pickle.loads(pickle.dumps(source))
    batch = next(train_batches(source, batch_size=5, canvas_size=32, seed=0))
    same = next(train_batches(again, batch_size=5, canvas_size=32, seed=0))
    np.testing.assert_array_equal(batch["image"], same["image"])
    assert sorted(batch["index"]) == list(range(5)) and batch["size"].tolist() == [[20, 30]] * 5


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_bytes_depend_on_the_source_alone(coco, prepared, tmp_path):
    store = union(sources(coco))
    shards.write(store, tmp_path / "two", SMALL, description={}, command="another", workers=2)
    assert contents(tmp_path / "two") == contents(prepared)
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    write(coco, prepared)  # complete already: nothing is written
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_other_settings_or_another_source_are_refused(coco, prepared):
    with pytest.raises(ValueError, match=r"begun with short_side 20, now it is 24.*--overwrite"):
        write(coco, prepared, SMALL._replace(short_side=24))
    photo(9).save(coco / "train2017/3.jpg")
    with pytest.raises(ValueError, match=r"source files"):
        write(coco, prepared)
    manifest = write(coco, prepared, SMALL._replace(short_side=24), overwrite=True)
    assert manifest["images"] == 8 and not manifest["skipped"]
    assert make_source("array_record", "train", dir=str(prepared))[0].shape == (24, 36, 3)


def test_a_directory_of_something_else_is_left_alone(coco):
    with pytest.raises(ValueError, match=r"holds other files, such as annotations"):
        write(coco, coco)
    with pytest.raises(ValueError, match=r"holds other files"):
        write(coco, coco, overwrite=True)


def test_a_manifest_of_something_else_is_left_alone(coco, tmp_path):
    out = tmp_path / "web"
    out.mkdir()
    for text in ('{"name": "an app"}', "[1]"):
        (out / "manifest.json").write_text(text)
        (out / "images-a.json").write_text("{}")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=r"holds other files, such as images-a.json"):
                write(coco, out, overwrite=overwrite)
        assert (out / "manifest.json").read_text() == text


@pytest.mark.parametrize("removed", range(5))
def test_overwriting_may_be_killed_anywhere(coco, prepared, monkeypatch, removed):
    """After the removal of any files the next start completes the same bytes."""
    expected = contents(prepared)
    real, left = Path.unlink, [removed]

    def unlink(path, missing_ok=False):
        if path.parent == prepared and path.suffix != ".tmp":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        real(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            write(coco, prepared, overwrite=True)
    write(coco, prepared, overwrite=(prepared / "manifest.json").exists())
    assert contents(prepared) == expected


def test_the_same_files_by_another_path_are_the_same(coco, prepared, monkeypatch):
    monkeypatch.chdir(coco.parent)
    store = union(sources(Path(coco.name)))
    shards.write(store, prepared, SMALL, description={}, command="", workers=1)  # not refused
    photo(9).save(coco / "train2017/1.jpg")
    with pytest.raises(ValueError, match="source files"):
        shards.write(store, prepared, SMALL, description={}, command="", workers=1)


def test_images_of_the_same_name_are_refused(coco):
    source = make_source("coco", "pretrain", dir=str(coco))
    source.paths[4] = source.paths[1]
    with pytest.raises(ValueError, match=r"split 'pretrain': two images have the name '.*1.jpg'"):
        union({"pretrain": source})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: path.unlink(), FileNotFoundError, r"images-00001.*is missing: copy it again"),
        (lambda path: os.truncate(path, 100), ValueError, r"images-00001.*has 100 bytes, not \d+"),
    ],
)
def test_a_missing_or_cut_shard_shows_at_once(prepared, damage, error, message):
    damage(prepared / "images-00001-of-00002.array_record")
    with pytest.raises(error, match=message) as caught:
        make_source("array_record", "pretrain", dir=str(prepared))
    assert "\n" not in str(caught.value)


def test_a_damaged_record_is_a_bad_image(prepared):
    path = prepared / "images-00001-of-00002.array_record"
    content = bytearray(path.read_bytes())
    place = content.index(b"\xff\xd8\xff") + 100
    content[place : place + 8] = b"notajpeg"
    path.write_bytes(content)
    source = make_source("array_record", "pretrain", dir=str(prepared))
    broken = []
    for i in range(len(source)):
        try:
            source[i]
        except BadImage as error:
            broken.append(str(error))
    assert len(broken) == 1 and "4.jpg" in broken[0] and "damaged" in broken[0]


def test_what_is_no_prepared_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest.json.*dinotwins_jax.prepare"):
        make_source("array_record", "train", dir=str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": "something"}')
    with pytest.raises(ValueError, match=r"not the manifest of prepared data"):
        make_source("array_record", "train", dir=str(tmp_path))


# The command, its interruptions


def command(root, out, *more):
    options = [f"--config.data.dir={root}", "--config.data.source=folder", "--workers=2"]
    arguments = ["--short_side=64", "--images_per_shard=8", f"--out={out}", *more]
    start = [sys.executable, "-m", "dinotwins_jax.prepare", "--config=configs/hybrid.py:coco"]
    return [*start, *options, *arguments]


def run(*args):
    return subprocess.run(
        command(*args), cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Photos slow enough to be interrupted, and the uninterrupted result."""
    root = tmp_path_factory.mktemp("large")
    (root / "images").mkdir()
    for k in range(64):
        photo(k, (1500, 1000)).save(root / f"images/{k:02}.jpg", quality=90)
    done = run(root / "images", root / "unbroken")
    assert done.returncode == 0, done.stderr
    return root, contents(root / "unbroken")


def wait_for_shards(out, count, process):
    while process.poll() is None and len(list(out.glob("images-*.json"))) < count:
        time.sleep(0.005)


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the workers")
@pytest.mark.parametrize("victim", ["all", "worker"])
def test_killed_work_goes_on_to_the_same_bytes(large, tmp_path, victim):
    root, unbroken = large
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(root / "images", out),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_shards(out, 2, process)
    if victim == "all":
        process.kill()
        process.wait(60)
    else:
        workers = [p for p in children(process.pid) if b"spawn_main" in
                   Path(f"/proc/{p}/cmdline").read_bytes()]  # fmt: skip
        os.kill(workers[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
        assert "a worker process died" in line and "Traceback" not in errors
    for path in out.glob("images-*.array_record"):  # a final name is a whole shard
        assert path.read_bytes() == unbroken[path.name]
    with pytest.raises(
        FileNotFoundError, match=r"is unfinished; to continue: python -m dinotwins_jax"
    ):
        make_source("array_record", "train", dir=str(out))
    started = {path: path.stat().st_mtime_ns for path in out.glob("images-*.json")}
    time.sleep(0.5)  # orphans of the killed parent see it and stop
    done = run(root / "images", out)
    assert done.returncode == 0, done.stderr
    assert started and contents(out).keys() == unbroken.keys()
    assert {k: v for k, v in contents(out).items() if k != "manifest.json"} == {
        k: v for k, v in unbroken.items() if k != "manifest.json"
    }
    assert json.loads(contents(out)["manifest.json"]) == json.loads(unbroken["manifest.json"])


def test_ctrl_c_is_one_line(large, tmp_path):
    root, _ = large
    out = tmp_path / "out"
    process = subprocess.Popen(
        # A shell that starts tests in the background has SIGINT ignored, which a child inherits.
        ["env", "--default-signal=INT", *command(root / "images", out)],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_shards(out, 1, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "error: interrupted: the same command goes on from here" in errors


@pytest.mark.slow
def test_dry_run_and_crop_sheet_write_nothing_else(large, tmp_path):
    root, _ = large
    sheet, out = tmp_path / "crops.png", tmp_path / "out"
    views = ["--config.views.global_size=32", "--config.views.local_size=16"]
    done = run(root / "images", out, "--dry_run", f"--crop_sheet={sheet}", *views)
    assert done.returncode == 0, done.stderr
    assert "in all: 64 images" in done.stdout and "shards: 8, 0 of them done" in done.stdout
    assert re.search(r"size: about [\d.]+ [kM]B of [\d.]+ [kM]B", done.stdout)
    assert os.listdir(tmp_path) == ["crops.png"]
    with Image.open(io.BytesIO(sheet.read_bytes())) as image:
        width, height = image.size
    # A row: 64 pixels for the image, two globals of 32, eight locals of 16 in columns of one.
    assert height >= 8 * 32 + 7 * 4 and width >= 64 + 2 * 36


def test_a_part_of_the_data_is_in_the_crop_sheet_and_in_the_command(tmp_path, capsys):
    """Two pictures of forty, so the eight of the sheet repeat them."""
    out, sheet = tmp_path / "out", tmp_path / "crops.png"
    arguments = ["--config=hybrid:cifar10_lt", "--config.data.source=scenes", f"--out={out}"]
    data = {"scenes.num_train": 40, "scenes.num_test": 4, "scenes.size": 24}
    data |= {"subset.classes": 2, "subset.images": 1}
    arguments += [f"--config.data.{key}={value}" for key, value in data.items()]
    arguments += [f"--crop_sheet={sheet}", "--config.views.num_local=0", "--workers=1"]
    assert prepare.run(arguments) == 0
    (line,) = [t for t in capsys.readouterr().out.splitlines() if t.startswith("to train:")]
    assert line.endswith(
        f"--config=hybrid:cifar10_lt --config.data.source=array_record --config.data.dir={out} "
        "--config.data.subset.classes=2 --config.data.subset.images=1"
    )
    assert len(make_source("array_record", "pretrain", dir=str(out))) == 40
    rows = np.asarray(Image.open(sheet)).astype(int)  # 36 pixels each, the image in the first 64
    images = {rows[top : top + 32, :64].tobytes() for top in range(0, 8 * 36, 36)}
    assert len(images) == 2


def test_a_part_that_cannot_be_chosen_is_refused_before_the_work(coco, tmp_path, capsys):
    arguments = ["--config=hybrid:coco", f"--config.data.dir={coco}", f"--out={tmp_path / 'out'}"]
    assert prepare.run([*arguments, "--config.data.subset.images=1"]) == 2
    assert "data source 'coco' has no labels of split 'pretrain'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--quality=99"], "quality is 99"),
        (["--short_side=-1"], "short_side is -1"),
        (["--masks=val"], "masks of split 'val'"),
        (["--config.data.dir=/no/such/place"], "no such directory: /no/such/place"),
    ],
)
def test_bad_flags_are_one_line(large, tmp_path, more, message):
    root, _ = large
    done = run(root / "images", tmp_path / "out", *more)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error:") and message in line
