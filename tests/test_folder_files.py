"""Folders of images as people have them: splits, stray and odd files, runs beside the images."""

import contextlib
import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinotwins_jax.data import listing, make_source, open_source, shards
from dinotwins_jax.data.base import EXTENSIONS, SPLITS, BadImage, decode_image, printable
from dinotwins_jax.data.describe import describe
from dinotwins_jax.data.pipeline import BadImageLog, train_batches
from dinotwins_jax.data.store import Settings, check_ours, identify, union
from dinotwins_jax.evals.outputs import PICTURES
from dinotwins_jax.files import replace_text

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)


def write(path, count=1):
    """Writes `path`, or count images into it."""
    files = [path] if path.suffix else [path / f"{k}.png" for k in range(count)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(file)


def opened(root, **options):
    return {split: make_source("folder", split, dir=str(root), **options) for split in SPLITS}


def names(source, root):
    return [Path(path).relative_to(root).as_posix() for path in source.paths]


def text(root):
    return "\n".join(describe(opened(root)))


# Splits


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize(
    "test", ["valid", "Validation", "val", "test", "Testing", "dev", "eval", "VAL"]
)
def test_split_folders_are_no_classes(tmp_path, train, test):
    for kind in ("ant", "bee"):
        write(tmp_path / train / kind, 2)
        write(tmp_path / test / kind, 1)
    sources = opened(tmp_path)
    assert {s: len(source) for s, source in sources.items()} == {
        "pretrain": 4,
        "train": 4,
        "test": 2,
    }
    assert all(source.class_names == ("ant", "bee") for source in sources.values())
    assert sources["test"].labels.tolist() == [0, 1]
    assert names(sources["test"], tmp_path) == [f"{test}/ant/0.png", f"{test}/bee/0.png"]
    assert f"splits: {train}/ and {test}/ (test)" in text(tmp_path)


def test_validation_is_taken_before_test_and_the_rest_is_named(tmp_path):
    for split in ("train", "Test", "valid"):
        for kind in ("ant", "bee"):
            write(tmp_path / split / kind, 2)
    write(tmp_path / "cover.png")
    write(tmp_path / "unlabeled", 3)
    sources = opened(tmp_path)
    assert {n.split("/")[0] for n in names(sources["test"], tmp_path)} == {"valid"}
    assert "images not used: 4 Test/, 3 unlabeled/, 1 beside them" in text(tmp_path)
    shutil.rmtree(tmp_path / "valid")
    (tmp_path / "valid").mkdir()  # an empty one does not count beside a full one
    assert {n.split("/")[0] for n in names(opened(tmp_path)["test"], tmp_path)} == {"Test"}


def test_splits_without_classes_and_of_a_pattern(tmp_path):
    write(tmp_path / "train", 3)
    write(tmp_path / "valid", 2)
    for root in (tmp_path, f"{tmp_path}/**/*.png"):
        sources = opened(root)
        assert [len(source) for source in sources.values()] == [3, 3, 2]
        assert all(source.labels is None for source in sources.values())


def test_classes_of_training_images_alone(tmp_path):
    for kind in ("ant", "bee"):
        write(tmp_path / "train" / kind, 2)
    write(tmp_path / "test", 2)
    sources = opened(tmp_path)
    assert sources["train"].labels.tolist() == [0, 0, 1, 1] and sources["test"].labels is None
    assert "test has no labels" in text(tmp_path)


def test_a_split_folder_alone_is_the_root(tmp_path):
    for kind in ("ant", "bee"):
        write(tmp_path / "train" / kind, 5)
    sources = opened(tmp_path)
    assert [len(source) for source in sources.values()] == [8, 8, 2]
    assert sources["train"].class_names == ("ant", "bee")


def test_a_class_may_be_called_train(tmp_path):
    for kind in ("bus", "car", "train"):
        write(tmp_path / kind, 2)
    assert opened(tmp_path)["train"].class_names == ("bus", "car", "train")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train/a", "Training/a", "val/a"), r"two training folders, Training/ and train/"),
        (("val/a", "test/a"), r"has test/ and val/ but no train/"),
    ],
)
def test_unclear_splits_are_refused(tmp_path, folders, message):
    for folder in folders:
        write(tmp_path / folder, 2)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


def test_a_split_without_images_is_refused(tmp_path):
    write(tmp_path / "train" / "a", 2)
    (tmp_path / "valid").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images under .*valid; looked for \.jpg"):
        opened(tmp_path)


# Stray images


def test_stray_images_keep_the_classes(tmp_path):
    for kind in ("ant", "bee"):
        write(tmp_path / kind, 10)
    before = opened(tmp_path)
    write(tmp_path / "cover.png")
    write(tmp_path / "logo.jpg")
    sources = opened(tmp_path)
    assert sources["test"].paths == before["test"].paths
    for split in ("pretrain", "train"):
        source = sources[split]
        stray = [n for n, k in zip(names(source, tmp_path), source.labels, strict=True) if k < 0]
        assert stray == ["cover.png", "logo.jpg"] and len(source) == 18
        kept = [p for p, k in zip(source.paths, source.labels, strict=True) if k >= 0]
        assert kept == before[split].paths
    assert "2 images beside the class folders, such as cover.png" in text(tmp_path)
    assert "train 18 images (16 labelled)" in text(tmp_path)


def test_stray_images_of_given_splits(tmp_path):
    for split in ("train", "valid"):
        for kind in ("ant", "bee"):
            write(tmp_path / split / kind, 2)
        write(tmp_path / split / "cover.png")
    sources = opened(tmp_path)
    assert sources["pretrain"].labels.tolist() == [0, 0, 1, 1, -1]
    assert sources["test"].labels.tolist() == [0, 0, 1, 1]
    assert "such as cover.png: of valid/ left out" in text(tmp_path)


def test_mostly_stray_images_are_unlabelled_and_the_reason_is_said(tmp_path):
    for kind in ("old", "new"):
        write(tmp_path / kind, 2)
    for k in range(4):
        write(tmp_path / f"{k}.png")
    assert all(s.labels is None and len(s) == 8 for s in opened(tmp_path).values())
    assert "no classes: 4 of 8 images lie beside the folders" in text(tmp_path)


# Names that are not UTF-8


@pytest.fixture
def latin1(tmp_path):
    """Class folders, one of which and one of whose files have names that are not UTF-8."""
    root = tmp_path / "images"
    for kind in ("ant", "bee", "wasp"):
        write(root / kind, 5)
    try:
        os.rename(os.fsencode(root / "ant/0.png"), os.fsencode(root / "ant") + b"/caf\xe9.png")
        os.rename(os.fsencode(root / "bee"), os.fsencode(root) + b"/b\xeae")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    return root


def test_names_that_are_not_utf8(latin1, tmp_path, capsys):
    sources = opened(latin1)
    assert sorted(map(len, sources.values())) == [3, 12, 12]
    assert sources["train"].class_names == ("ant", r"b\udceae", "wasp")
    odd = [p for s in ("train", "test") for p in sources[s].paths if printable(p) != p]
    assert len(odd) == 6 and all(p.encode(errors="surrogateescape") for p in odd)
    lines = describe(pickle.loads(pickle.dumps(sources)))
    "\n".join(lines).encode()  # strict, as stdout is
    store = union(sources)
    first = identify(store, Settings())
    assert first == identify(union(opened(latin1)), Settings())
    broken = next(p for p in sources["train"].paths if "\udcea" in p)
    Path(broken).write_bytes(b"broken")
    out = tmp_path / "out"
    manifest = shards.write(
        store, out, Settings(), description={"dir": str(latin1)}, command="", workers=1
    )
    assert [entry["name"] for entry in manifest["skipped"]] == [broken]
    assert json.loads((out / "manifest.json").read_text())["skipped"][0]["name"] == broken
    prepared = {split: make_source("array_record", split, dir=str(out)) for split in SPLITS}
    assert prepared["train"].name(0) == sources["train"].name(0)
    assert prepared["train"].class_names == sources["train"].class_names
    index = sources["train"].paths.index(broken)
    with pytest.raises(BadImage) as caught:
        sources["train"][index]
    assert r"b\udceae" in str(caught.value) and str(caught.value).encode()
    BadImageLog(sources["train"]).add({"bad": np.array([index])})
    assert "Error" not in capsys.readouterr().err


def test_texts_and_prepared_data_with_such_names(tmp_path):
    replace_text(tmp_path / "report.html", "caf\udce9 é")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == r"caf\udce9 é"
    with pytest.raises(ValueError, match=r"caf\\udce9: its name is not UTF-8"):
        check_ours(tmp_path / "caf\udce9")


# Extensions


@pytest.mark.skipif(".avif" not in EXTENSIONS, reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path):
    write(tmp_path / "a.AVIF")
    write(tmp_path / "b.avif")
    source = make_source("folder", "pretrain", dir=str(tmp_path))
    assert len(source) == 2 and source[0].shape == PIXELS.shape
    assert abs(source[0].mean() - PIXELS.mean()) < 10


def test_files_passed_over_are_counted(tmp_path):
    write(tmp_path / "a", 2)
    write(tmp_path / "b", 2)
    for name in ("a/1.heic", "b/2.HEIC", "b/3.heic", "notes.txt", "a/README", ".hidden"):
        (tmp_path / name).write_text("x")
    assert "passed over: 3 .heic, 1 without extension, 1 .txt" in text(tmp_path)
    assert "passed over: 3 .heic" in text(f"{tmp_path}/*/*")
    for k in range(9):
        (tmp_path / f"x.{k}").write_text("x")
    assert "6 of other kinds" in text(tmp_path)


def test_description_of_classes(tmp_path):
    for kind, count in {"ant": 40, "bee": 10, "wasp": 5}.items():
        write(tmp_path / kind, count)
    lines = describe(opened(tmp_path))
    assert lines[0] == "data: pretrain 44 images, train 44 images, test 11 images"
    assert lines[1].startswith("  3 classes: ant, bee, wasp; ")
    assert lines[1].endswith(" (ant) training images")
    assert 3 <= len(lines) <= 6


def test_twenty_four_images_open(tmp_path):
    for kind in ("ant", "bee"):
        write(tmp_path / kind, 12)
    assert [len(s) for s in opened(tmp_path, test_fraction=0.25).values()] == [18, 18, 6]


# Large images


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)


def photo(path, side, **options):
    shades = np.linspace(0, 255, side).astype(np.uint8)
    pixels = np.broadcast_to(shades[:, None, None], (side, side, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, **options)
    return path


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_jpeg_is_read_at_a_reduced_scale(tmp_path, small_limit, rotated):
    exif = Image.Exif()
    exif[0x0112] = 3 if rotated else 1  # 3: upside down
    path = photo(tmp_path / "a.jpg", 160, exif=exif)
    image = decode_image(path, max_side=20)
    assert image.shape == (20, 20, 3)
    assert (image[0].mean() > image[-1].mean()) == rotated


@pytest.mark.parametrize(("name", "max_side"), [("a.png", 20), ("rotated.jpg", None)])
def test_an_image_that_is_too_large_names_the_key(tmp_path, small_limit, name, max_side):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = photo(tmp_path / name, 160, exif=exif)
    with pytest.raises(BadImage, match=rf"{name}: .*25600.*config\.data\.max_pixels"):
        decode_image(path, max_side=max_side)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_max_pixels_reaches_every_reader(tmp_path, small_limit, num_workers):
    for k in range(4):
        photo(tmp_path / f"{k}.png", 160)
    data = {"source": "folder", "dir": str(tmp_path), "max_pixels": 30000}
    source = open_source(data, "pretrain")
    threads = threading.active_count()
    batches = train_batches(source, batch_size=4, canvas_size=16, seed=0, num_workers=num_workers)
    with contextlib.closing(batches):
        assert (next(batches)["bad"] < 0).all()
    end = time.monotonic() + 20  # the limit is the process', and threads read ahead
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.01)
    data["max_pixels"] = 20000
    with pytest.raises(BadImage, match="max_pixels"):
        open_source(data, "pretrain")[0]


# One listing


@pytest.fixture
def scans(monkeypatch):
    """Folders listed, in order."""
    done, scandir = [], os.scandir
    monkeypatch.setattr(
        listing.os, "scandir", lambda folder: done.append(str(folder)) or scandir(folder)
    )
    return done


def test_three_splits_share_one_listing(tmp_path, scans):
    for kind in ("ant", "bee"):
        write(tmp_path / kind, 2)
    opened(tmp_path)
    assert len(scans) == 3  # the root and two folders, once each
    opened(tmp_path)
    assert len(scans) == 6  # once a round, and nothing is kept for long
    assert not listing._kept


@pytest.mark.parametrize("pattern", ["", "/*/*.png"])
def test_changes_between_two_splits_are_seen(tmp_path, pattern):
    write(tmp_path / "a", 2)
    write(tmp_path / "b", 2)
    os.utime(tmp_path / "b", ns=(0, 0))
    assert len(make_source("folder", "pretrain", dir=f"{tmp_path}{pattern}")) == 3
    write(tmp_path / "b" / "9.png")
    train, test = (make_source("folder", s, dir=f"{tmp_path}{pattern}") for s in ("train", "test"))
    assert len(train) + len(test) == 5


def test_a_long_listing_reports_itself(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a", 3)
    opened(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(listing, "_PATIENCE", 0.0)
    opened(tmp_path)
    out, err = capsys.readouterr()
    assert err == f"listing {tmp_path}: 1 files\n" and not out


def test_an_unreadable_folder_is_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "a", 2)
    (tmp_path / "lost+found").mkdir()
    scandir = os.scandir

    def refused(folder):
        if str(folder).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(listing.os, "scandir", refused)
    assert "lost+found/ (not readable)" in text(tmp_path)


# Runs beside the images


def test_run_pictures_are_those_of_a_run():
    assert tuple(f"{name}.png" for name in PICTURES) == listing.RUN_PICTURES


def test_outputs_beside_the_images_change_nothing(tmp_path):
    for kind in ("ant", "bee"):
        write(tmp_path / kind, 10)
    before = opened(tmp_path)
    for run in ("runs/x", "runs/y"):
        write(tmp_path / run / "attention.png")
    (tmp_path / "runs/x/checkpoints").mkdir()
    (tmp_path / "runs/x/config.json").write_text("{}")
    (tmp_path / "runs/y/metrics.jsonl").write_text("")
    write(tmp_path / "runs/.compiled/z.png")
    for folder, weights in (("export", "model.safetensors"), ("onnx", "model.onnx")):
        write(tmp_path / folder / "sample.png")
        for name in ("config.json", weights):
            (tmp_path / folder / name).write_text("{}")
    write(tmp_path / "shards" / "crops.png")
    for name in ("manifest.json", "splits.npz"):
        (tmp_path / "shards" / name).write_text("{}")
    after = opened(tmp_path)
    for split in SPLITS:
        assert after[split].paths == before[split].paths
        assert after[split].class_names == ("ant", "bee")
        assert opened(f"{tmp_path}/**/*.png")[split].paths == before[split].paths
    said = text(tmp_path)
    assert "export/ (exported weights), onnx/ (exported weights), runs/x/ (a run), 2 more" in said


def test_a_run_in_the_image_folder_itself(tmp_path):
    for k in range(3):
        write(tmp_path / f"{k}.png")
    before = opened(tmp_path)["pretrain"].paths
    for name in PICTURES:
        write(tmp_path / f"{name}.png")
    write(tmp_path / "checkpoints" / "x.png")
    (tmp_path / "config.json").write_text("{}")
    for root in (tmp_path, f"{tmp_path}/*.png"):
        assert opened(root)["pretrain"].paths == before


def test_the_description_in_the_docs(tmp_path):
    for kind in ("ant", "bee"):
        for k in range(40):
            write(tmp_path / kind / f"{k:04}.jpg")
    write(tmp_path / "cover.jpg")
    for name in ("1.heic", "2.heic", "ant/3.heic", "notes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs/x/metrics.jsonl").write_text("")
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    assert "".join(f"    {line}\n" for line in describe(opened(tmp_path))) in page
