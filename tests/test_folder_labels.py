"""Labels of a folder from a table: CSV and JSON lines as people have them; what becomes of each image."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinotwins_jax.data import make_source, shards
from dinotwins_jax.data.base import SPLITS
from dinotwins_jax.data.describe import describe
from dinotwins_jax.data.labels import read_labels
from dinotwins_jax.data.store import Settings, union

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
TEN = [f"{k}.png" for k in range(10)]


def write(root, names=TEN):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(path)


def csv_file(root, *lines, name="labels.csv", encoding="utf-8"):
    (root / name).write_text("\n".join(lines) + "\n", encoding=encoding)
    return name


def json_file(root, *rows, name="labels.jsonl"):
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def opened(root, labels="labels.csv", **options):
    options["labels"] = labels
    return {split: make_source("folder", split, dir=str(root), **options) for split in SPLITS}


def found(source, root):
    """{name: labels} by multi_hot if there is one, else {name: label}; None for none."""
    names = [Path(path).relative_to(root).as_posix() for path in source.paths]
    classes = np.array([*source.class_names, None], object)
    if source.multi_hot is None:
        return dict(zip(names, classes[source.labels].tolist(), strict=True))
    return {n: set(classes[:-1][hot]) for n, hot in zip(names, source.multi_hot, strict=True)}


def text(root, labels="labels.csv"):
    return "\n".join(describe(opened(root, labels)))


# What the labels become


def test_a_csv_replaces_class_folders(tmp_path):
    names = [f"{k % 3}/{k}.png" for k in range(10)]
    write(tmp_path, names)
    csv_file(
        tmp_path, "path,label", *(f"{n},{'odd' if k % 2 else 'even'}" for k, n in enumerate(names))
    )
    sources = opened(tmp_path, test_fraction=0.3)
    assert [len(source) for source in sources.values()] == [7, 7, 3]
    assert all(source.class_names == ("even", "odd") for source in sources.values())
    assert all(source.multi_hot is None for source in sources.values())
    labels = {n: k for s in ("train", "test") for n, k in found(sources[s], tmp_path).items()}
    assert labels == {n: "odd" if k % 2 else "even" for k, n in enumerate(names)}
    assert sources["pretrain"].paths == sources["train"].paths
    said = text(tmp_path)
    assert "labels: labels.csv, 10 rows" in said and "test: 20% of the labelled images" in said
    assert "passed over" not in said  # the table is no picture, and is used


def test_json_lines_give_the_same(tmp_path):
    write(tmp_path)
    labels = ["ant", "bee"] * 5
    csv_file(tmp_path, "path,label", *(f"{n},{k}" for n, k in zip(TEN, labels, strict=True)))
    rows = [{"path": n, "label": k} for n, k in zip(TEN, labels, strict=True)]
    json_file(tmp_path, *rows)
    for split, source in opened(tmp_path).items():
        other = make_source("folder", split, dir=str(tmp_path), labels="labels.jsonl")
        assert found(source, tmp_path) == found(other, tmp_path)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_several_labels_are_multi_hot_and_the_first_is_dominant(tmp_path, kind):
    write(tmp_path)
    of = {n: [["bee", "ant"], ["cow"], []][k % 3] for k, n in enumerate(TEN)}
    split = {n: "val" if k > 5 else "train" for k, n in enumerate(TEN)}
    if kind == "csv":
        name = csv_file(
            tmp_path, "labels,path,split", *(f"{' | '.join(of[n])},{n},{split[n]}" for n in TEN)
        )
    else:
        rows = ({"path": n, "labels": of[n], "split": split[n]} for n in TEN)
        name = json_file(tmp_path, *rows)
    sources = opened(tmp_path, name)
    assert all(source.class_names == ("ant", "bee", "cow") for source in sources.values())
    for part in ("train", "test"):
        expected = {n: set(of[n]) for n in TEN if (split[n] == "val") == (part == "test")}
        assert found(sources[part], tmp_path) == expected
    # 0.png has bee, then ant; an image of no class keeps its row: it is a negative of all classes.
    assert sources["train"].labels.tolist() == [1, 2, -1, 1, 2, -1]
    assert sources["pretrain"].multi_hot is None and len(sources["pretrain"]) == 6


def test_images_without_a_label_are_trained_on_and_never_tested(tmp_path):
    write(tmp_path)
    csv_file(tmp_path, "path,label", "0.png,", *(f"{n},{k % 2}" for k, n in enumerate(TEN[2:])))
    sources = opened(tmp_path, test_fraction=0.5)
    unlabelled = {"0.png", "1.png"}  # an empty cell, and no row
    pretrain = found(sources["pretrain"], tmp_path)
    assert {n for n, label in pretrain.items() if label is None} == unlabelled
    assert len(pretrain) == 6 and len(sources["train"]) == len(sources["test"]) == 4
    for part in ("train", "test"):
        assert not unlabelled & set(found(sources[part], tmp_path))
    assert "2 images without a label, such as 0.png: in pretrain only" in text(tmp_path)


def test_splits_of_the_table_come_before_folders(tmp_path):
    names = [f"{part}/{k}.png" for part in ("train", "val") for k in range(4)]
    write(tmp_path, [*names, "extra/0.png"])
    words = ["Train", "test", "val", "training"] * 2
    csv_file(
        tmp_path,
        "path,label,split",
        *(f"{n},{k % 2},{w}" for k, (n, w) in enumerate(zip(names, words, strict=True))),
    )
    sources = opened(tmp_path)
    assert set(found(sources["test"], tmp_path)) == {"train/2.png", "val/2.png"}
    trained = {"train/0.png", "train/3.png", "val/0.png", "val/3.png"}
    assert set(found(sources["train"], tmp_path)) == trained
    assert set(found(sources["pretrain"], tmp_path)) == trained | {"extra/0.png"}
    assert "splits: of the table, train and val (test); images not used: 2 test" in text(tmp_path)


def test_splits_of_folders_hold_where_the_table_has_none(tmp_path):
    names = [f"{part}/{k}.png" for part in ("train", "valid") for k in range(4)]
    write(tmp_path, [*names, "extra/0.png"])
    rows = [f"{n},{k % 2}" for k, n in enumerate(names)]
    del rows[-1], rows[3]
    csv_file(tmp_path, "path,label", *rows)
    sources = opened(tmp_path)
    assert [len(source) for source in sources.values()] == [4, 3, 3]
    assert found(sources["test"], tmp_path) == {f"valid/{k}.png": str(k % 2) for k in range(3)}
    assert "splits: train/ and valid/ (test); images not used: 1 extra/" in text(tmp_path)


def test_a_class_without_training_images_is_named(tmp_path):
    write(tmp_path)
    rows = (f"{n},{'ant' if k % 2 else 'bee'},train" for k, n in enumerate(TEN[:8]))
    csv_file(tmp_path, "path,label,split", *rows, "8.png,Bee,test", "9.png,ant,test")
    assert opened(tmp_path)["test"].labels.tolist() == [0, 1]
    assert "1 class of test without a training image, such as Bee" in text(tmp_path)


# Paths


@pytest.mark.parametrize(
    ("place", "path"),
    [
        (".", "pictures/a/{}.png"),
        (".", "./pictures//a/{}.png"),
        (".", "pictures\\a\\{}.png"),
        (".", "{root}/pictures/a/{}.png"),
        ("pictures", "a/{}.png"),  # relative to the table's folder
        ("pictures", "pictures/a/{}.png"),  # to data.dir all the same
        ("elsewhere", "../pictures/a/{}.png"),
    ],
)
def test_paths_of_every_kind(tmp_path, place, path):
    write(tmp_path, [f"pictures/a/{k}.png" for k in range(4)])
    (tmp_path / place).mkdir(exist_ok=True)
    rows = (f"{path.format(k, root=tmp_path)},{k % 2}" for k in range(4))
    csv_file(tmp_path / place, "path,label", *rows)
    for table in (f"{place}/labels.csv", str(tmp_path / place / "labels.csv")):
        sources = opened(tmp_path, table)
        assert len(sources["train"]) + len(sources["test"]) == 4
    pattern = make_source(
        "folder", "train", dir=f"{tmp_path}/**/*.png", labels=f"{place}/labels.csv"
    )
    assert found(pattern, tmp_path) == found(sources["train"], tmp_path)


def test_a_path_outside_the_folder_is_no_image_of_it(tmp_path):
    write(tmp_path / "inside")
    write(tmp_path, ["secret.png"])
    csv_file(tmp_path / "inside", "path,label", *(f"{n},{n[0]}" for n in TEN), "../secret.png,x")
    assert "1 row without an image, such as line 12: ../secret.png" in text(tmp_path / "inside")


# Files as people have them


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_encodings_and_delimiters(tmp_path, encoding, delimiter):
    names = ["café.png", *TEN]
    write(tmp_path, names)
    lines = [
        [" Path ", "Label", "Age"],
        *([n, "größe" if k % 2 else "x, y", "7"] for k, n in enumerate(names)),
    ]
    rows = [delimiter.join(f'"{c}"' if "," in c else c for c in line) for line in lines]
    csv_file(tmp_path, *rows, "", encoding=encoding)
    sources = opened(tmp_path)
    assert sources["train"].class_names == ("größe", "x, y")
    assert found(sources["pretrain"], tmp_path) | found(sources["test"], tmp_path) == {
        n: "größe" if k % 2 else "x, y" for k, n in enumerate(names)
    }
    said = text(tmp_path)
    assert "columns passed over: 'age'" in said
    assert ("not UTF-8: read as Latin-1" in said) == (encoding == "latin-1")


def test_a_row_without_an_image_and_one_written_twice_are_counted(tmp_path):
    write(tmp_path)
    rows = [f"{n},{k % 2}" for k, n in enumerate(TEN)]
    csv_file(tmp_path, "path,label", *rows, "gone.png,0", "lost.png,1", rows[3])
    assert sum(len(opened(tmp_path)[s]) for s in ("train", "test")) == 10
    said = text(tmp_path)
    assert "2 rows without an image, such as line 12: gone.png" in said
    assert "1 row written twice" in said


ANY = ("0.png,a", "1.png,b")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "no rows"),
        (("path,label",), "no rows"),
        (("file,label", *ANY), "line 1: no 'path', only 'file', 'label'"),
        (("path,class", *ANY), "line 1: no 'label' and no 'labels': it must have one .* 'class'"),
        (("path,label,labels", "0.png,a,b"), "line 1: both 'label' and 'labels'"),
        (("path,path,label", "0.png,a,b"), "line 1: two columns 'path'"),
        (("path,label", "0.png,a", "", "1.png"), "line 4: 1 cells, the first line has 2"),
        (("path,label", "0.png,a", ",b"), 'line 3: path "": it must be the name of a file'),
        (("path,label", '"0.png,a'), "line 2: not CSV: unexpected end of data"),
        (("path,label", "0.png,a", "1.png,b", "0.png,b"), "line 4: 0.png has another label .* line 2"),
        (("path,label", "x.png,a", "y.png,b"), "none of its 2 rows is an image .* line 2: x.png"),
        (("path,label", "0.png,a", "1.png,a"), "at least two classes are needed, it has only 'a'"),
        (("path,label", "0.png,", "1.png,a"), "labels of 1 image, at least two are needed"),
        (("path,label,split", "0.png,a,fold1"), "line 2: split 'fold1': it must be train, val or"),
        (("path,label,split", "0.png,a,val", "1.png,b,test"), "rows of val and test but none of train"),
        (("path,label,split", "0.png,a,train", "1.png,,val"), "no test image has a label"),
    ],
)  # fmt: skip
def test_a_csv_that_is_wrong_is_refused_with_its_line(tmp_path, lines, message):
    write(tmp_path)
    csv_file(tmp_path, *lines)
    where = re.escape(f"{tmp_path}/labels.csv")
    with pytest.raises((ValueError, OSError), match=f"^{where}(:|,) {message}") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: "),
        ("[1]", "it must be an object"),
        ('{"label": "a"}', "no 'path', only 'label'"),
        ('{"path": 7, "label": "a"}', "path 7: it must be the name of a file"),
        ('{"path": "1.png", "label": 1.5}', "label 1.5: it must be a string or an integer"),
        ('{"path": "1.png", "label": true}', "label true: it must be a string or an integer"),
        ('{"path": "1.png", "labels": ["a"]}', "it has 'path', 'labels', the first line 'path', 'label'"),
        ('{"path": "1.png", "label": "a", "split": 1}', "it has 'path', 'label', 'split', the first"),
    ],
)  # fmt: skip
def test_json_lines_that_are_wrong_are_refused_with_their_line(tmp_path, line, message):
    (tmp_path / "l.jsonl").write_text('{"path": "0.png", "label": 1}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"l.jsonl, line 3: {message}"):
        read_labels(tmp_path / "l.jsonl")


def test_labels_must_be_a_list_and_the_file_of_a_known_kind(tmp_path):
    json_file(tmp_path, {"path": "0.png", "labels": "a|b"})
    with pytest.raises(ValueError, match=r'line 1: labels "a\|b": it must be a list'):
        read_labels(tmp_path / "labels.jsonl")
    with pytest.raises(ValueError, match=r"labels\.xlsx: labels are read from \.csv, \.tsv"):
        read_labels(tmp_path / "labels.xlsx")
    write(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no file of labels .*gone\.csv \(data\.folder\.labels\)"
    ):
        opened(tmp_path, "gone.csv")


def test_prepared_data_keep_labels_and_splits(tmp_path):
    write(tmp_path / "in")
    rows = [{"path": n, "labels": [["a", "b"], ["b"]][k % 2]} for k, n in enumerate(TEN[1:])]
    json_file(tmp_path / "in", *rows)
    sources = opened(tmp_path / "in", "labels.jsonl")
    shards.write(
        union(sources), tmp_path / "out", Settings(), description={}, command="", workers=1
    )
    for split, source in sources.items():
        prepared = make_source("array_record", split, dir=str(tmp_path / "out"))
        assert prepared.class_names == source.class_names
        assert [prepared.name(k) for k in range(len(prepared))] == source.paths
        np.testing.assert_array_equal(prepared.labels, source.labels)
        np.testing.assert_array_equal(prepared.multi_hot, source.multi_hot)
