"""TensorFlow Datasets: written here in the format of `tfds build`, without TensorFlow, and read back."""

import io
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from dinotwins_jax.data import make_source
from dinotwins_jax.data.base import BadImage
from dinotwins_jax.data.pipeline import train_batches

tfds = pytest.importorskip("tensorflow_datasets")

CATEGORIES = ["person", "dog", "cat"]
# Of each image: (category, area, crowd) of its objects.
OBJECTS = {
    "train": [[], [(1, 50, False)], [(0, 30, False), (2, 20, False), (2, 15, False)]],
    "validation": [[(0, 900, True), (1, 5, False)], [(2, 0, False)]],
    "unlabeled": [[], []],
}


def jpeg(value):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (value, value, value)).save(file, "JPEG")
    return file.getvalue()


def write(root, features, splits):
    """splits: name -> examples."""
    from array_record.python.array_record_module import ArrayRecordWriter

    root.mkdir(parents=True)
    infos = []
    name = root.relative_to(root.parents[2]).parts[0]
    for split, examples in splits.items():
        records = [features.serialize_example(features.encode_example(e)) for e in examples]
        writer = ArrayRecordWriter(
            str(root / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1,uncompressed"
        )
        for record in records:
            writer.write(record)
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=root, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(records)],
                num_bytes=sum(map(len, records)),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=root,
        features=features,
        split_infos=infos,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,
    )


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    kinds = tfds.features
    features = kinds.FeaturesDict(
        {
            "image": kinds.Image(encoding_format="jpeg"),
            "image/id": np.int64,
            "objects": kinds.Sequence(
                {
                    "area": np.int64,
                    "is_crowd": np.bool_,
                    "label": kinds.ClassLabel(names=CATEGORIES),
                }
            ),
        }
    )

    def example(number, objects):
        rows = [{"area": a, "is_crowd": c, "label": k} for k, a, c in objects]
        return {"image": jpeg(40 * number), "image/id": number, "objects": rows}

    splits = {s: [example(*pair) for pair in enumerate(o)] for s, o in OBJECTS.items()}
    for version in ("1.1.0", "1.10.0"):  # the later one is the other in alphabetical order
        shown = splits if version == "1.10.0" else {s: e[:1] for s, e in splits.items()}
        write(root / "coco/2017" / version, features, shown)
    return root


def test_coco_as_built_by_tfds(coco):
    train = make_source("tfds", "train", dir=str(coco))
    assert len(train) == 3 and train.class_names == tuple(CATEGORIES)
    assert train.labels.tolist() == [-1, 1, 2] and train.labels.dtype == np.int32
    assert train.multi_hot.astype(int).tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert abs(int(train[2][0, 0, 0]) - 80) <= 1 and train[2].shape == (16, 24, 3)
    test = make_source("tfds", "test", dir=str(coco))
    assert test.labels.tolist() == [1, 2]  # the crowd does not count, an area of zero does
    pretrain = make_source(
        "tfds", "pretrain", dir=str(coco), pretrain_splits=("train", "unlabeled")
    )
    assert len(pretrain) == 5 and pretrain.labels is None and pretrain.multi_hot is None
    assert "tensorflow" not in sys.modules
    assert "train+unlabeled[4]" in pretrain.name(4) and "1.10.0" in pretrain.name(4)


def test_the_versions_own_directory(coco):
    assert len(make_source("tfds", "train", dir=str(coco / "coco/2017/1.1.0"))) == 1


def test_batches_and_pickles(coco):
    source = make_source("tfds", "pretrain", dir=str(coco))
    again = pickle.loads(pickle.dumps(source))
    expected, got = (
        next(train_batches(s, batch_size=3, canvas_size=32, seed=0)) for s in (source, again)
    )
    for key, array in expected.items():
        np.testing.assert_array_equal(array, got[key])
    assert sorted(expected["index"]) == [0, 1, 2] and (expected["bad"] == -1).all()


def test_a_class_label(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["a", "b"]),
        }
    )
    examples = [{"image": jpeg(10), "label": 1}, {"image": jpeg(20), "label": 0}]
    write(tmp_path / "letters/plain/1.0.0", features, {"train": examples})
    source = make_source("tfds", "train", dir=str(tmp_path), name="letters/plain")
    assert source.labels.tolist() == [1, 0] and source.class_names == ("a", "b")
    assert source.multi_hot is None


def changed(coco, tmp_path, change):
    root = tmp_path / "changed"
    shutil.copytree(coco / "coco/2017/1.10.0", root)
    change(root)
    return str(root)


def set_format(root):
    info = json.loads((root / "dataset_info.json").read_text())
    (root / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))


def test_faults_are_one_line(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no coco/2014 in .*file_format=array_record"):
        make_source("tfds", "train", dir=str(coco), name="coco/2014")
    with pytest.raises(ValueError, match=r"tfrecord format: build it with"):
        make_source("tfds", "train", dir=changed(coco, tmp_path, set_format))
    with pytest.raises(ValueError, match=r"val2017.*train.*validation"):
        make_source("tfds", "test", dir=str(coco), test_split="val2017")


def test_a_damaged_record_is_a_bad_image(coco, tmp_path):
    def damage(root):
        (path,) = root.glob("coco-train*")
        content = bytearray(path.read_bytes())
        place = content.index(b"\xff\xd8\xff")
        content[place : place + 40] = bytes(40)
        path.write_bytes(content)

    source = make_source("tfds", "train", dir=changed(coco, tmp_path, damage))
    with pytest.raises(BadImage, match=r"train\[0\]"):
        source[0]
    assert source[1].shape == (16, 24, 3)
