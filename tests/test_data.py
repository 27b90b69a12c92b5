"""Image sources: decoding, COCO, folders, CIFAR-10, and lookup by name."""

import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinotwins_jax.data import make_source
from dinotwins_jax.data.base import BadImage, canvas_for_photos, decode_image

REAL_DATA = Path(
    os.environ.get("DINOTWINS_DATA", Path(__file__).resolve().parents[1] / "../shared/data")
)


def real(name):
    if not (REAL_DATA / name).is_dir():
        pytest.skip(f"no {name} in DINOTWINS_DATA ({REAL_DATA})")
    return str(REAL_DATA / name)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def flat(mode, color, size=(5, 3)):
    return Image.new(mode, size, color)


def write_image(path, value=128, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


# Decoding


@pytest.mark.parametrize(
    ("image", "format", "expected"),
    [
        (flat("RGB", (10, 20, 30)), "PNG", (10, 20, 30)),
        (flat("L", 77), "PNG", (77, 77, 77)),
        (flat("1", 1), "PNG", (255, 255, 255)),
        (flat("LA", (77, 9)), "PNG", (77, 77, 77)),
        (flat("RGBA", (10, 20, 30, 9)), "PNG", (10, 20, 30)),
        (flat("RGB", (255, 0, 0)).convert("P"), "PNG", (255, 0, 0)),
        (flat("CMYK", (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.fromarray(np.full((3, 5), 65535, np.uint16)), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((3, 5), 257 * 100, np.uint16)), "PNG", (100, 100, 100)),
        (Image.fromarray(np.full((3, 5), 257 * 100, np.int32)), "TIFF", (100, 100, 100)),
    ],
    ids=["RGB", "L", "1", "LA", "RGBA", "P", "CMYK", "I;16 white", "I;16", "I"],
)
def test_every_mode_becomes_rgb(image, format, expected):
    pixels = decode_image(encoded(image, format))
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 5, 3)
    np.testing.assert_array_equal(pixels, np.broadcast_to(expected, (3, 5, 3)))


def test_cmyk_jpeg_is_not_inverted():
    pixels = decode_image(encoded(flat("CMYK", (0, 255, 255, 0), (16, 16)), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255  # one bright quarter, top left
    stored = {  # how a camera with this orientation would have stored the upright picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(file), upright)


def test_draft_reduces_large_jpegs_but_never_below_max_side():
    ramp = np.tile(np.linspace(0, 255, 400, dtype=np.uint8), (100, 1))
    file = encoded(Image.fromarray(ramp), "JPEG", quality=95)
    assert decode_image(file, max_side=100).shape == (25, 100, 3)
    assert decode_image(file, max_side=101).shape == (50, 200, 3)
    assert decode_image(file, max_side=201).shape == (100, 400, 3)
    assert decode_image(file).shape == (100, 400, 3)
    small = decode_image(file, max_side=100)[:, :, 0].astype(float)
    assert np.abs(small - ramp.reshape(25, 4, 100, 4).mean((1, 3))).max() < 4


def test_one_pixel_wide_jpeg_with_draft():
    assert decode_image(encoded(flat("RGB", 0, (1, 300)), "JPEG"), max_side=32).shape[1] == 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "0 bytes"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"<html>no such page</html>", "not an image"),
        (None, "No such file"),
    ],
    ids=["empty", "truncated", "html", "missing"],
)
def test_broken_files_name_the_file_and_the_reason(tmp_path, damage, reason):
    path = tmp_path / "broken.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    if damage is not None:
        path.write_bytes(damage(encoded(Image.fromarray(noise), "JPEG")))
    with pytest.raises(BadImage, match=reason) as caught:
        decode_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # worker processes send it so
    assert (again.name, again.reason) == (str(path), caught.value.reason)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_and_float_pixels_are_refused(monkeypatch):
    with pytest.raises(BadImage, match="floating-point"):
        decode_image(encoded(flat("F", 0.5), "TIFF"), name="f.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="limit of 100"):
        decode_image(encoded(flat("L", 0, (11, 10))), name="bomb.png")
    with pytest.raises(BadImage, match="bomb"):
        decode_image(encoded(flat("L", 0, (50, 50))), name="bomb.png")


def test_canvas_for_photos():
    assert [canvas_for_photos(s) for s in (224, 32, 112, 7)] == [640, 96, 320, 32]


# Lookup by name


class Echo:
    """A user's source, found as "tests' module:Echo"."""

    def __init__(self, split, *, dir="", shade=0):
        self.args = (split, dir, shade)


def test_make_source_takes_a_users_factory():
    sys.modules.setdefault("echo_module", sys.modules[__name__])
    assert make_source("echo_module:Echo", "test", dir="d", shade=3).args == ("test", "d", 3)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "cocoa",
            {},
            "unknown data source 'cocoa'.*scenes, coco, folder, cifar10, array_record, tfds.*mean 'coco'",
        ),
        ("no_such_pkg.mod:f", {}, "no module named 'no_such_pkg'"),
        ("dinotwins_jax.data.folder:Foldr", {}, "no 'Foldr'; did you mean 'Folder'"),
        ("folder", {"test_fractoin": 0.1}, "test_fractoin.*test_fraction"),
        ("folder", {}, "needs dir"),
        ("folder", {"dir": "x", "test_fraction": 1.0}, "test_fraction is 1.0"),
    ],
)
def test_make_source_errors(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_source(name, "train", **kwargs)


def test_unknown_split():
    with pytest.raises(ValueError, match=r"'val'.*pretrain, train, test"):
        make_source("folder", "val", dir=".")


# COCO


@pytest.fixture
def coco_dir(tmp_path):
    """Four images with ids out of order, and two categories."""
    for k in (1, 2, 3, 4):
        write_image(tmp_path / f"train2017/{k:012d}.jpg", 20 * k, size=(10, 8))
    write_image(tmp_path / "unlabeled2017/000000000009.jpg")
    square = [[2, 1, 5, 1, 5, 4, 2, 4]]
    two_parts = [[0, 0, 2, 0, 2, 2, 0, 2], [6, 6, 8, 6, 8, 8, 6, 8]]

    def annotation(image_id, category_id, area, segmentation, iscrowd=0):
        return {
            "id": len(annotations),
            "image_id": image_id,
            "category_id": category_id,
            "area": area,
            "segmentation": segmentation,
            "iscrowd": iscrowd,
        }

    annotations = []
    crowd = {"counts": [0, 80], "size": [8, 10]}
    for entry in (
        (1, 18, 9.0, square),  # image 1: one dog of 9, two cats of 5 + 5, and a huge crowd of dogs
        (1, 7, 5.0, two_parts),
        (1, 7, 5.0, square),
        (1, 18, 80.0, crowd, 1),
        (2, 18, 0.0, square),  # image 2: one dog of area zero; image 3: nothing; image 4: a crowd
        (4, 7, 80.0, crowd, 1),
    ):
        annotations.append(annotation(*entry))
    instances = {
        "images": [
            {"id": k, "file_name": f"{k:012d}.jpg", "height": 8, "width": 10} for k in (3, 1, 4, 2)
        ],
        "annotations": annotations,
        "categories": [{"id": 18, "name": "dog"}, {"id": 7, "name": "cat"}],
    }
    (tmp_path / "annotations").mkdir()
    write_instances(tmp_path, instances)
    return tmp_path


def write_instances(root, instances):
    text = instances if isinstance(instances, str) else json.dumps(instances)
    (root / "annotations/instances_train2017.json").write_text(text)


def read_instances(root):
    return json.loads((root / "annotations/instances_train2017.json").read_text())


def test_coco_labels_are_the_largest_total_area_without_crowds(coco_dir):
    source = make_source("coco", "train", dir=str(coco_dir))
    assert source.class_names == ("cat", "dog")
    assert source.labels.dtype == np.int32
    np.testing.assert_array_equal(source.labels, [0, 1, -1, -1])
    # Every category but those of crowds alone; an object of area zero is there all the same.
    np.testing.assert_array_equal(source.multi_hot, [[1, 1], [0, 1], [0, 0], [0, 0]])
    assert source.multi_hot.dtype == bool
    assert [Path(source.name(i)).stem[-1] for i in range(4)] == ["1", "2", "3", "4"]
    assert source[2].shape == (8, 10, 3) and source[2][0, 0, 0] == 60
    assert source.default_canvas(224) == 640


def test_coco_masks_cover_the_polygons_exactly(coco_dir):
    masks, categories = make_source("coco", "train", dir=str(coco_dir)).masks(0)
    square, parts = np.zeros((2, 8, 10), bool)
    square[1:4, 2:5] = True
    parts[0:2, 0:2] = parts[6:8, 6:8] = True
    np.testing.assert_array_equal(masks, [square, parts, square])
    np.testing.assert_array_equal(categories, [1, 0, 0])


def test_coco_masks_of_run_lengths_and_of_nothing(coco_dir):
    instances = read_instances(coco_dir)
    instances["annotations"][4]["segmentation"] = {"counts": [8, 3, 69], "size": [8, 10]}
    write_instances(coco_dir, instances)
    source = make_source("coco", "train", dir=str(coco_dir))
    expected = np.zeros((8, 10), bool)
    expected[:3, 1] = True  # column-major: the second column's first three
    np.testing.assert_array_equal(source.masks(1)[0], expected[None])
    assert source.masks(2)[0].shape == (0, 8, 10) and source.masks(2)[1].shape == (0,)


def test_coco_pretrain_needs_no_annotations(coco_dir):
    folders = ("train2017", "unlabeled2017")
    (coco_dir / "annotations/instances_train2017.json").unlink()
    source = make_source("coco", "pretrain", dir=str(coco_dir), pretrain_splits=folders)
    assert [Path(p).stem[-1] for p in source.paths] == ["1", "2", "3", "4", "9"]
    assert source.labels is None and source.multi_hot is None and source.class_names == ()
    assert len(make_source("coco", "pretrain", dir=str(coco_dir))) == 4
    with pytest.raises(ValueError, match="pretrain"):
        source.masks(0)


def test_coco_missing_image_is_a_bad_image_when_read(coco_dir):
    (coco_dir / "train2017/000000000002.jpg").unlink()
    source = make_source("coco", "train", dir=str(coco_dir))
    assert len(source) == 4 and source[0].shape == (8, 10, 3)
    with pytest.raises(BadImage, match=r"000000000002\.jpg: No such file"):
        source[1]
    with pytest.raises(BadImage, match=r"000000000002\.jpg: No such file"):
        source.encoded(1)
    assert decode_image(source.encoded(0)).shape == (8, 10, 3)


def drop(key):
    return lambda d: {k: v for k, v in d.items() if k != key}


def unknown_image(d):
    d["annotations"][2]["image_id"] = 555
    return d


def no_area(d):
    del d["annotations"][2]["area"], d["annotations"][2]["segmentation"]
    return d


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: '{"images": [', "not JSON"),
        (lambda d: "[]", "no list 'images'"),
        (drop("images"), "no list 'images'"),
        (drop("annotations"), "no list 'annotations'"),
        (drop("categories"), "no list 'categories'"),
        (unknown_image, "image id 555"),
        (no_area, "annotation 2: no area, bbox or segmentation"),
    ],
)
def test_coco_annotation_errors_are_one_line(coco_dir, change, message):
    write_instances(coco_dir, change(read_instances(coco_dir)))
    with pytest.raises(ValueError, match=message) as caught:
        make_source("coco", "train", dir=str(coco_dir))
    assert "instances_train2017.json" in str(caught.value) and "\n" not in str(caught.value)


def test_coco_missing_paths(coco_dir):
    with pytest.raises(FileNotFoundError, match=r"no such directory: .*/nowhere"):
        make_source("coco", "train", dir=str(coco_dir / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no folder val2017.*annotations, train2017, unl"):
        make_source("coco", "test", dir=str(coco_dir))
    (coco_dir / "annotations/instances_train2017.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*instances_train2017\.json"):
        make_source("coco", "train", dir=str(coco_dir))
    (coco_dir / "unlabeled2017/000000000009.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no images in .*unlabeled2017"):
        make_source("coco", "pretrain", dir=str(coco_dir), pretrain_splits="unlabeled2017")


def test_real_coco_sample():
    root = real("coco_sample")
    train, test = (make_source("coco", split, dir=root) for split in ("train", "test"))
    assert (len(train), len(test), len(train.class_names)) == (286, 80, 80)
    assert train.class_names == test.class_names and train.class_names[0] == "person"
    both = ("train2017", "unlabeled2017")
    assert len(make_source("coco", "pretrain", dir=root, pretrain_splits=both)) == 2286
    instances = json.loads(Path(root, "annotations/instances_val2017.json").read_text())
    images = sorted(image["id"] for image in instances["images"])
    assert len(instances["annotations"]) == 709
    for i in (0, 1, 40):
        objects = [
            a for a in instances["annotations"] if a["image_id"] == images[i] and not a["iscrowd"]
        ]
        masks, categories = test.masks(i)
        assert masks.shape == (len(objects), *test[i].shape[:2])
        areas = np.array([a["area"] for a in objects])
        np.testing.assert_allclose(masks.sum((1, 2)), areas, rtol=0.05, atol=15)
        total = np.bincount(categories, areas, minlength=80)
        assert test.labels[i] == total.argmax()
        assert np.flatnonzero(test.multi_hot[i]).tolist() == sorted(set(categories.tolist()))


# Folders


def test_folder_with_class_folders_holds_out_a_seeded_part(tmp_path):
    for kind in ("cat", "dog"):
        for k in range(10):
            write_image(tmp_path / kind / "deep" / f"{k}.png", k)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    write_image(tmp_path / ".cache" / "hidden.png")
    train = make_source("folder", "train", dir=str(tmp_path))
    test = make_source("folder", "test", dir=str(tmp_path))
    assert train.class_names == ("cat", "dog") and (len(train), len(test)) == (16, 4)
    assert not set(train.paths) & set(test.paths)
    assert make_source("folder", "pretrain", dir=str(tmp_path)).paths == train.paths
    assert make_source("folder", "test", dir=str(tmp_path), seed=1).paths != test.paths
    for source in (train, test):
        expected = [["cat", "dog"].index(Path(p).parts[-3]) for p in source.paths]
        np.testing.assert_array_equal(source.labels, expected)


def test_folder_without_classes_is_unlabelled_and_whole(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "x" / "b.JPG")
    write_image(tmp_path / "y" / "c.webp")
    for split in ("pretrain", "train", "test"):
        source = make_source("folder", split, dir=str(tmp_path))
        assert len(source) == 3 and source.labels is None and source.class_names == ()


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_folder_with_given_splits(tmp_path, held_out):
    for kind in ("cat", "dog"):
        write_image(tmp_path / "train" / kind / "1.png")
    write_image(tmp_path / held_out / "dog" / "2.png")
    assert len(make_source("folder", "pretrain", dir=str(tmp_path))) == 2
    test = make_source("folder", "test", dir=str(tmp_path))
    assert test.labels.tolist() == [1] and test.class_names == ("cat", "dog")
    write_image(tmp_path / held_out / "emu" / "3.png")
    with pytest.raises(ValueError, match="'emu'"):
        make_source("folder", "test", dir=str(tmp_path))


def test_folder_without_images_names_the_extensions(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no images under .*\.jpg \.jpeg \.png"):
        make_source("folder", "train", dir=str(tmp_path))


def test_folder_survives_a_link_back_up(tmp_path):
    write_image(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert len(make_source("folder", "pretrain", dir=str(tmp_path))) == 1


def test_folder_takes_a_pattern(tmp_path):
    for kind in ("cat", "dog"):
        for k in range(5):
            write_image(tmp_path / kind / "deep" / f"{k}.jpg", k)
        write_image(tmp_path / kind / "6.png")
        (tmp_path / kind / "7.jpg.txt").write_text("not an image")
    (tmp_path / "cat" / "deep" / "up").symlink_to(tmp_path)

    def names(split, pattern):
        paths = make_source("folder", split, dir=f"{tmp_path}/{pattern}").paths
        return [Path(p).relative_to(tmp_path).as_posix() for p in paths]

    train, test = (names(split, "**/*.jpg") for split in ("train", "test"))
    assert sorted(train + test) == [
        f"{kind}/deep/{k}.jpg" for kind in ("cat", "dog") for k in range(5)
    ]
    assert len(test) == 2 and names("pretrain", "**/*.jpg") == train
    source = make_source("folder", "train", dir=f"{tmp_path}/**/*.jpg")
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [int(name.startswith("dog")) for name in train]
    assert names("pretrain", "cat/*") == ["cat/6.png"] == names("test", "c[a-b]t/?.png")
    assert make_source("folder", "train", dir=f"{tmp_path}/*/*.png").class_names == ("cat", "dog")
    with pytest.raises(FileNotFoundError, match=r"no images match .*\*\.webp; looked for \.jpg"):
        names("train", "**/*.webp")


def test_a_folder_with_wildcards_in_its_name_is_a_folder(tmp_path):
    write_image(tmp_path / "[raw] what?" / "1.png")
    write_image(tmp_path / "r" / "2.png")
    root = tmp_path / "[raw] what?"
    assert make_source("folder", "train", dir=str(root)).paths == [str(root / "1.png")]
    assert make_source("folder", "train", dir=f"{root}/*.png").paths == [str(root / "1.png")]
    with pytest.raises(FileNotFoundError, match="no such directory"):
        make_source("folder", "train", dir=str(root / "nowhere"))


# CIFAR-10


def write_cifar(root, files, labels, changes=None):
    arrays = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array(labels, np.uint8),
    }
    np.savez(
        root / "train.npz", **{k: v for k, v in (arrays | (changes or {})).items() if v is not None}
    )
    (root / "classes.txt").write_text("airplane\nautomobile\nbird\n")


def test_cifar10_decodes_the_bytes_between_offsets(tmp_path):
    files = [encoded(flat("L", 50 * k, (32, 32)), "JPEG") for k in range(3)]
    files[1] = files[1][:200]
    write_cifar(tmp_path, files, [2, 0, 1])
    source = make_source("cifar10", "train", dir=str(tmp_path))
    assert source.labels.dtype == np.int32 and source.labels.tolist() == [2, 0, 1]
    assert source.class_names == ("airplane", "automobile", "bird")
    assert source[2].shape == (32, 32, 3) and abs(int(source[2].mean()) - 100) <= 1
    with pytest.raises(BadImage, match=r"train\.npz\[1\]"):
        source[1]
    with pytest.raises(IndexError):
        source[3]
    with pytest.raises(FileNotFoundError, match=r"no test\.npz"):
        make_source("cifar10", "test", dir=str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": None}, "no array 'offsets'"),
        ({"offsets": np.array([0, 1])}, "offsets do not fit"),
        ({"labels": np.array([0, 1, 3])}, "label 3"),
    ],
)
def test_cifar10_errors(tmp_path, changes, message):
    write_cifar(tmp_path, [b"abc"] * 3, [0, 1, 2], changes)
    with pytest.raises(ValueError, match=message):
        make_source("cifar10", "train", dir=str(tmp_path))


def test_real_cifar10():
    source = make_source("cifar10", "test", dir=real("cifar10"))
    assert len(source) == 10_000 and len(source.class_names) == 10
    assert source[9_999].shape == (32, 32, 3) and np.bincount(source.labels).tolist() == [1000] * 10
    assert source.default_canvas(224) == 32
