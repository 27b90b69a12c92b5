"""COCO annotation files as people have them: without masks, compressed, with odd or missing values."""

import io
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from dinotwins_jax.configs import base
from dinotwins_jax.data import make_source, source_options
from dinotwins_jax.data.base import BadImage, image_size
from dinotwins_jax.data.coco_masks import decode_counts, mask_area, parse_mask, rasterise

SIZE = (12, 16)  # height, width
SQUARES = {1: (2, 3, 5), 2: (7, 1, 4), 3: (0, 0, 12)}  # image id -> x, y, side
NAME = "annotations/instances_train2017.json"


def polygon(x, y, side):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def pixels(x, y, side):
    mask = np.zeros(SIZE, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def runs_of(mask):
    """Lengths of runs of 0s, 1s, … down the columns, one pixel after the other."""
    counts, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts, value = [*counts, 0], pixel
        counts[-1] += 1
    return counts


def compressed(counts):
    """COCO's text form, by two's complement in binary digits."""
    text = ""
    for k, count in enumerate(counts):
        number = count - counts[k - 2] if k > 2 else count
        groups = next(
            n for n in range(1, 8) if -(16 * 32 ** (n - 1)) <= number < 16 * 32 ** (n - 1)
        )
        bits = format(number % 32**groups, f"0{5 * groups}b")
        parts = [int(bits[at : at + 5], 2) for at in range(0, 5 * groups, 5)][::-1]
        text += "".join(chr(48 + p + (32 if i + 1 < groups else 0)) for i, p in enumerate(parts))
    return text


def instances():
    """Three images with one square each; two categories, the second of them of image 2."""
    return {
        "images": [
            {"id": k, "file_name": f"{k}.png", "height": SIZE[0], "width": SIZE[1]} for k in SQUARES
        ],
        "annotations": [
            {
                "id": 10 * k,
                "image_id": k,
                "category_id": 90 if k == 2 else 4,
                "area": float(side * side),
                "bbox": [x, y, side, side],
                "segmentation": polygon(x, y, side),
                "iscrowd": 0,
            }
            for k, (x, y, side) in SQUARES.items()
        ],
        "categories": [{"id": 4, "name": "ant"}, {"id": 90, "name": "bee"}],
    }


def write(root, values, name=NAME, folder="train2017"):
    (root / folder).mkdir(parents=True, exist_ok=True)
    for k in SQUARES:
        Image.new("RGB", SIZE[::-1], (k, 0, 0)).save(root / folder / f"{k}.png")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(values if isinstance(values, bytes) else json.dumps(values).encode())
    return root


def opened(root, values, **options):
    return make_source("coco", "train", dir=str(write(root, values)), **options)


def of_all(**values):
    """Instances whose annotations have these values; None: without the key."""
    made = instances()
    for annotation in made["annotations"]:
        annotation.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del annotation[key]
    return made


def check_labels(source):
    assert source.class_names == ("ant", "bee")
    np.testing.assert_array_equal(source.labels, [0, 1, 0])
    np.testing.assert_array_equal(source.multi_hot, [[1, 0], [0, 1], [1, 0]])


def check_masks(source):
    for i, square in enumerate(SQUARES.values()):
        masks, categories = source.masks(i)
        np.testing.assert_array_equal(masks, [pixels(*square)])
        np.testing.assert_array_equal(categories, [source.labels[i]])


# Objects without a mask


@pytest.mark.parametrize(
    "segmentation", [None, [], [[]], {}, [[1, 2]], [[1, 1, 5, 5]]], ids=lambda value: str(value)
)
def test_detection_only_files_have_labels_and_no_masks(tmp_path, segmentation):
    source = opened(tmp_path, of_all(segmentation=segmentation))
    check_labels(source)
    assert not hasattr(source, "masks") and not hasattr(pickle.loads(pickle.dumps(source)), "masks")


def test_objects_without_a_mask_have_boxes(tmp_path):
    source = opened(tmp_path, of_all(segmentation=[]))
    assert source.boxed.all() and not source.masked.any()
    for i, square in enumerate(SQUARES.values()):
        boxes, categories = source.boxes(i)
        np.testing.assert_array_equal(boxes, [pixels(*square)])
        np.testing.assert_array_equal(categories, [source.labels[i]])
    masked = opened(tmp_path, instances())
    assert masked.masked.all() and not masked.boxed.any()  # not read beside a mask


@pytest.mark.parametrize("box", [None, [], [1, 2, 3], [1, 2, 0, 4], [1, "x", 2, 2], "1 2 3 4"])
def test_an_object_without_a_proper_box_has_none(tmp_path, box):
    source = opened(tmp_path, of_all(segmentation=None, bbox=box))
    assert not source.boxed.any() and source.boxes(0)[0].shape[0] == 0


def test_boxes_beyond_the_picture_are_cut(tmp_path):
    source = opened(tmp_path, of_all(segmentation=None, bbox=[-3, -3, 8, 1000]))
    expected = np.zeros((1, *SIZE), bool)
    expected[:, :, :5] = True
    np.testing.assert_array_equal(source.boxes(0)[0], expected)


def test_a_null_segmentation_is_none(tmp_path):
    values = instances()
    for annotation in values["annotations"]:
        annotation["segmentation"] = None
    assert not hasattr(opened(tmp_path, values), "masks")


def test_an_object_without_a_mask_is_left_out_of_the_masks(tmp_path):
    values = instances()
    del values["annotations"][1]["segmentation"]
    values["annotations"].append(
        {"image_id": 1, "category_id": 90, "bbox": [0, 0, 9, 9], "segmentation": []}
    )
    source = opened(tmp_path, values)
    np.testing.assert_array_equal(source.labels, [1, 1, 0])  # by the bbox of 9 x 9, above 5 x 5
    assert hasattr(source, "masks") and source.masks(1)[0].shape == (0, *SIZE)
    np.testing.assert_array_equal(source.masks(0)[0], [pixels(*SQUARES[1])])
    np.testing.assert_array_equal(source.masks(0)[1], [0])
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.masks(2)[0], [pixels(*SQUARES[3])])


def test_masks_of_crowds_alone_are_none(tmp_path):
    rle = {"size": list(SIZE), "counts": [0, 192]}
    source = opened(tmp_path, of_all(segmentation=rle, iscrowd=1))
    assert not hasattr(source, "masks") and (source.labels == -1).all()


def test_no_annotations_at_all(tmp_path):
    source = opened(tmp_path, instances() | {"annotations": []})
    assert not hasattr(source, "masks") and not source.multi_hot.any()
    np.testing.assert_array_equal(source.labels, [-1, -1, -1])
    assert opened(tmp_path, instances() | {"annotations": [], "categories": []}).class_names == ()


def test_prepare_stores_no_masks_where_there_are_none(tmp_path):
    from dinotwins_jax.data import shards
    from dinotwins_jax.data.store import Settings, union

    source = opened(tmp_path / "coco", of_all(segmentation=None))
    store, settings = union({"test": source}), Settings(masks=("test",))
    shards.write(store, tmp_path / "out", settings, description={}, command="", workers=1)
    stored = make_source("array_record", "test", dir=str(tmp_path / "out"))
    assert not hasattr(stored, "masks")
    np.testing.assert_array_equal(stored.labels, source.labels)


# Run lengths


@pytest.mark.parametrize(
    ("text", "counts"),
    [  # as pycocotools 2.0 writes them
        ("61X12nN000`0", [6, 1, 40, 3, 6, 3, 6, 3, 22]),
        ("02710NS10", [0, 2, 7, 3, 7, 1, 42, 1]),
        ("", []),
    ],
)
def test_compressed_runs_of_pycocotools(text, counts):
    assert decode_counts(text).tolist() == counts and compressed(counts) == text


def test_compressed_runs_are_those_that_were_encoded():
    rng = np.random.default_rng(0)
    for k in range(200):
        counts = rng.integers(0, 10 ** rng.integers(1, 9), rng.integers(1, 40)).tolist()
        assert decode_counts(compressed(counts)).tolist() == counts, k


def test_masks_of_all_forms_are_the_same_squares(tmp_path):
    for form in (runs_of, lambda mask: compressed(runs_of(mask))):
        values = instances()
        for annotation, square in zip(values["annotations"], SQUARES.values(), strict=True):
            counts = form(pixels(*square))
            annotation["segmentation"] = {"size": list(SIZE), "counts": counts}
        source = opened(tmp_path, values)
        check_labels(source)
        check_masks(source)
    check_masks(opened(tmp_path, instances()))


@pytest.mark.parametrize(
    "form",
    [
        lambda p: p[0],  # one polygon alone
        lambda p: np.reshape(p[0], (-1, 2)).tolist(),  # its points
        lambda p: [np.reshape(p[0], (-1, 2)).tolist()],
        lambda p: [[str(x) for x in p[0]]],
        lambda p: [*p, [1, 1]],
    ],
)
def test_other_forms_of_a_polygon(form):
    mask = parse_mask(form(polygon(2, 3, 5)), SIZE)
    np.testing.assert_array_equal(rasterise(mask, *SIZE), pixels(2, 3, 5))
    assert mask_area(mask) == 25.0


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ({"size": [6, 8], "counts": [8, 40]}, r"size \[6, 8\], its picture \[12, 16\]"),
        ({"size": [16, 12], "counts": [100, 92]}, r"size \[16, 12\], its picture \[12, 16\]"),
        ({"size": [12, 16], "counts": [100, 91]}, "191 pixels in all, not 12 x 16"),
        ({"size": [12, 16], "counts": []}, "0 pixels in all, not 12 x 16"),
        ({"size": [12, 16], "counts": ""}, "0 pixels in all, not 12 x 16"),
        ({"size": [12, 16], "counts": [200, -8]}, r"counts \[200, -8\]: .* whole numbers"),
        ({"size": [12, 16], "counts": [1.5, 190.5]}, "whole numbers"),
        ({"size": [12, 16], "counts": [192, float("nan")]}, "whole numbers"),
        ({"size": [12, 16], "counts": compressed([200, 4, -12])}, "a run of -12 pixels"),
        ({"size": [12, 16], "counts": compressed([192])[:-1]}, "ends within a number"),
        ({"size": [12, 16], "counts": "12 3"}, "character ' ' at position 2"),
        ({"size": [12, 16], "counts": "1é"}, "character 'é' at position 1"),
        ({"size": [12, 16], "counts": "oooooooooo0"}, "a number of 11 characters at position 0"),
        ({"size": [12, 16]}, "no 'counts'"),
        ({"counts": [192]}, "no 'size'"),
        ({"size": [12], "counts": [192]}, r"size \[12\]: it must be \[height, width\]"),
        ({"size": "12x16", "counts": [192]}, "size '12x16'"),
        ([[1, 1, 5, 1, 5]], "polygon of 5 numbers"),
        ([[1, 1, 5, 1, 5, None]], "coordinate nan"),
        ([[1, 1, 5, 1, float("nan"), 5]], "coordinate nan"),
        ([[1, 1, 5, 1, 1e9, 5]], "coordinate 1000000000.0"),
        ([[1, 1, 5, 1, "left", 5]], "a polygon must be a list of numbers"),
        ([[1, 1, 5, 1, 5, 5], 7], "segmentation has 7: a polygon must be"),
        ([{"size": [12, 16], "counts": [192]}], "a polygon must be a list of numbers"),
        ("mask.png", "segmentation is 'mask.png': it must be a list of polygons or an RLE"),
        (True, "segmentation is True"),
    ],
)
def test_an_invalid_segmentation_is_one_line_when_opened(tmp_path, segmentation, said):
    values = instances()
    values["annotations"][1]["segmentation"] = segmentation
    with pytest.raises(
        ValueError, match=rf"instances_train2017\.json: annotation 20: .*{said}"
    ) as e:
        opened(tmp_path, values)
    assert "\n" not in str(e.value) and len(str(e.value)) < 250 + len(str(tmp_path))


# Numbers


@pytest.mark.parametrize("area", [[25.0], "25.0", 25, ["25"], None, float("nan"), [], ""], ids=str)
def test_odd_areas(tmp_path, area):
    values = instances()
    values["annotations"][0]["area"] = area
    rival = dict(values["annotations"][0], category_id=90, id=99)
    for other, label in ((24.0, 0), (26.0, 1)):  # the area is between these
        values["annotations"] = [*values["annotations"][:3], rival | {"area": other}]
        source = opened(tmp_path, values)
        assert source.labels[0] == label


@pytest.mark.parametrize("keys", [["area"], ["area", "bbox"]])
def test_a_missing_area_is_that_of_the_box_or_the_mask(tmp_path, keys):
    values = instances()
    first = values["annotations"][0]
    rle = {"size": list(SIZE), "counts": compressed(runs_of(pixels(*SQUARES[1])))}
    for segmentation in (first["segmentation"], rle):
        own = {k: v for k, v in first.items() if k not in keys} | {"segmentation": segmentation}
        for other, label in ((24.0, 0), (26.0, 1)):
            rival = dict(first, category_id=90, area=other)
            values["annotations"] = [own, rival]
            assert opened(tmp_path, values).labels[0] == label


def change(where, k, **given):
    """A change of one entry; None: without the key."""

    def apply(values):
        entry = values[where][k]
        for key, value in given.items():
            if value is None:
                del entry[key]
            else:
                entry[key] = value
        return values

    return apply


NO_AREA = {"area": None, "segmentation": None}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (change("annotations", 1, area="big"), "annotation 20: area is 'big': it must be a number"),
        (
            change("annotations", 1, area=-4.0),
            "annotation 20: area is -4.0: it must be a number of",
        ),
        (change("annotations", 1, area=[1, 2]), r"annotation 20: area is \[1, 2\]"),
        (change("annotations", 1, area=float("inf")), "annotation 20: area is inf"),
        (change("annotations", 1, area=True), "annotation 20: area is True"),
        (change("annotations", 1, bbox=None, **NO_AREA), "annotation 20: no area, bbox or segment"),
        (
            change("annotations", 1, bbox=[1, 2, 3], **NO_AREA),
            r"annotation 20: bbox is \[1, 2, 3\]",
        ),
        (
            change("annotations", 1, bbox=[1, 2, -3, 4], **NO_AREA),
            r"bbox is .*: its width and height must not be negative",
        ),
        (
            change("annotations", 1, bbox=[1, 2, "a", 4], **NO_AREA),
            r"bbox is .*: it must be \[x, y, width, height\]",
        ),
        (
            change("annotations", 1, bbox={"x": 1}, **NO_AREA),
            r"bbox is .*: it must be \[x, y, width, height\]",
        ),
        (change("annotations", 1, iscrowd="maybe"), "annotation 20 has iscrowd 'maybe'"),
        (change("annotations", 1, iscrowd=2), "annotation 20 has iscrowd 2: it must be 0 or 1"),
        (change("annotations", 1, image_id=None), "annotation 20 has no 'image_id'"),
        (change("annotations", 1, image_id=[2]), r"annotation 20 has image_id \[2\]: it must be"),
        (
            change("annotations", 1, image_id=77),
            "annotation 20 refers to image id 77, which is not",
        ),
        (
            change("annotations", 1, category_id=5),
            "annotation 20 refers to category id 5, which is",
        ),
        (change("annotations", 1, id=None, area="x"), "annotation number 1: area is 'x'"),
        (change("images", 1, id=None), "image number 1 has no 'id'"),
        (change("images", 1, id=True), "image True has id True: it must be an integer or a string"),
        (change("images", 1, height=-12), "image 2 has height -12: it must be a whole number"),
        (change("images", 1, width=16.5), "image 2 has width 16.5: it must be a whole number"),
        (change("images", 1, width="wide"), "image 2 has width 'wide': it must be a whole number"),
        (change("images", 1, file_name=None), "image 2 has no 'file_name'"),
        (change("images", 1, file_name=7), "image 2 has file_name 7: it must be a file's name"),
        (
            change("images", 1, file_name="a\0b"),
            "image 2 has file_name .*: it must be a file's name",
        ),
        (change("images", 1, file_name="\ud800.png"), "image 2 has file_name .*: no file can have"),
        (change("categories", 1, name=None), "category 90 has no 'name': it must be a string"),
        (change("categories", 1, name=["b"]), r"category 90 has name \['b'\]: it must be a string"),
        (change("categories", 1, id=4), "category 4 is listed twice, as 'ant' and as 'bee'"),
        (lambda v: v | {"images": [*v["images"], 5]}, "image number 3 is 5: it must be an object"),
        (
            lambda v: v | {"annotations": [[1]]},
            r"annotation number 0 is \[1\]: it must be an object",
        ),
        (lambda v: v | {"annotations": {}}, "no list 'annotations' at the top level"),
        (lambda v: v | {"images": []}, "lists no images"),
        (
            lambda v: json.dumps(v).replace("bee", "b\xe9").encode("latin-1"),
            "not JSON: 'utf-8' codec",
        ),
    ],
)
def test_an_invalid_entry_is_one_line_when_opened(tmp_path, changed, said):
    with pytest.raises(ValueError, match=rf"{NAME}: (.*: )?{said}") as error:
        opened(tmp_path, changed(instances()))
    assert "\n" not in str(error.value)


def test_strings_for_numbers_and_ids(tmp_path):
    values = instances()
    for image in values["images"]:
        image.update({key: str(image[key]) for key in ("id", "height", "width")})
    for annotation in values["annotations"]:
        annotation.update(category_id=float(annotation["category_id"]), iscrowd="0")
        annotation.update({key: str(annotation[key]) for key in ("image_id", "area")})
    source = opened(tmp_path, values)
    check_labels(source)
    check_masks(source)


def test_ids_of_letters_and_categories_without_objects(tmp_path):
    values = instances()
    values["categories"].append({"id": 0, "name": "insects", "supercategory": "none"})
    for image, annotation in zip(values["images"], values["annotations"], strict=True):
        image["id"] = annotation["image_id"] = f"img-{image['id']}"
    source = opened(tmp_path, values)
    assert source.class_names == ("insects", "ant", "bee")
    np.testing.assert_array_equal(source.labels, [1, 2, 1])
    check_masks(source)


def test_images_and_annotations_listed_twice(tmp_path):
    values = instances()
    values["images"].append(values["images"][0])
    values["annotations"].append(values["annotations"][0])
    source = opened(tmp_path, values)
    assert [os.path.basename(path) for path in source.paths] == ["1.png", "1.png", "2.png", "3.png"]
    assert sorted(source.masks(i)[0].shape[0] for i in range(4)) == [0, 1, 1, 2]


# Sizes


@pytest.mark.parametrize("size", [None, {}, {"height": 0, "width": 0}, {"height": 12}], ids=str)
def test_a_size_that_is_not_given_is_that_of_the_header(tmp_path, size):
    values = instances()
    for image in values["images"]:
        del image["height"], image["width"]
        image.update({"height": None, "width": None} if size is None else size)
    source = opened(tmp_path, values)
    check_labels(source)
    check_masks(source)
    (tmp_path / "train2017/2.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"2\.png: not an image that PIL can read") as error:
        source.masks(1)
    assert "\n" not in str(error.value)


def test_run_lengths_and_a_header_that_do_not_agree(tmp_path):
    values = instances()
    values["images"][1].update(height=None, width=None)
    values["annotations"][1]["segmentation"] = {"size": [6, 8], "counts": [8, 40]}
    source = opened(tmp_path, values)
    with pytest.raises(
        ValueError, match=rf"{NAME}: annotation 20: its RLE has size \[6, 8\], its pic"
    ):
        source.masks(1)


def test_the_size_of_a_rotated_photograph_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 12)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (16, 12)).save(tmp_path / "plain.jpg")
    assert image_size(tmp_path / "turned.jpg") == (16, 12)
    assert image_size(tmp_path / "plain.jpg") == (12, 16)
    file = io.BytesIO()
    Image.new("RGB", (16, 12)).save(file, "PNG")
    (tmp_path / "cut.png").write_bytes(file.getvalue()[:20])
    for name in ("cut.png", "missing.png"):
        with pytest.raises(BadImage, match=name):
            image_size(tmp_path / name)


# Files


@pytest.mark.parametrize("name", ["../../x.png", "/etc/x.png", "a/../../x.png", "..", "."])
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match=rf"{NAME}: image 2 has file_name '.*': .* inside the image f"
    ):
        opened(tmp_path, change("images", 1, file_name=name)(instances()))


def test_subfolders_and_bytes_that_are_not_utf8(tmp_path):
    names = {"sub/deep/1.png": b"sub/deep/1.png", "caf\udce9.png": b"caf\xe9.png"}
    values = instances()
    root = write(tmp_path, values)
    (root / "train2017/sub/deep").mkdir(parents=True)
    for image, (name, file) in zip(values["images"], names.items(), strict=False):
        image["file_name"] = name
        try:
            os.rename(
                root / f"train2017/{image['id']}.png", os.fsencode(root / "train2017") + b"/" + file
            )
        except OSError:
            pytest.skip("the file system takes UTF-8 alone")
    (root / NAME).write_text(json.dumps(values))
    source = make_source("coco", "train", dir=str(root))
    assert [source[i][0, 0, 0] for i in range(3)] == [1, 2, 3]
    pretrain = make_source("coco", "pretrain", dir=str(root))
    assert set(pretrain.paths) == set(source.paths)


def test_none_of_the_images_is_there(tmp_path):
    values = instances()
    for image in values["images"]:
        image["file_name"] = "train2017/" + image["file_name"]
    with pytest.raises(
        FileNotFoundError, match=r"none of the 3 images .*, such as train2017/1\.png"
    ):
        opened(tmp_path, values)


def test_annotations_beside_the_pictures(tmp_path):
    for folder in ("train", "valid"):
        write(tmp_path, instances(), f"{folder}/_annotations.coco.json", folder)
    options = {"train_split": "train", "test_split": "valid", "pretrain_splits": ("train",)}
    for split in ("train", "test"):
        source = make_source("coco", split, dir=str(tmp_path), **options)
        check_labels(source)
        check_masks(source)
    assert len(make_source("coco", "pretrain", dir=str(tmp_path), **options)) == 3
    # The usual place comes first.
    write(tmp_path, instances() | {"annotations": []}, "annotations/instances_valid.json", "valid")
    source = make_source("coco", "test", dir=str(tmp_path), **options)
    assert (source.labels == -1).all()


def test_annotation_files_by_key(tmp_path):
    (tmp_path / "set").mkdir()
    root = write(tmp_path / "set", instances(), "labels/mine.json", "images/all")
    write(tmp_path, instances() | {"annotations": []}, "elsewhere.json")
    assert source_options({"source": "coco", **base.get_config().data})["train_annotations"] == ""
    options = {
        "train_split": "images/all",
        "test_split": "images/all",
        "train_annotations": "labels/mine.json",
        "test_annotations": str(tmp_path / "elsewhere.json"),
    }
    check_labels(make_source("coco", "train", dir=str(root), **options))
    assert (make_source("coco", "test", dir=str(root), **options).labels == -1).all()
    options["test_annotations"] = "gone.json"
    with pytest.raises(FileNotFoundError, match=r"gone\.json \(data\.coco\.test_annotations\)"):
        make_source("coco", "test", dir=str(root), **options)
    del options["train_annotations"]
    with pytest.raises(
        FileNotFoundError,
        match=r"instances_all\.json or .*all/_annotations\.coco\.json: set data\.coco\.train_annotations",
    ):
        make_source("coco", "train", dir=str(root), **options)
