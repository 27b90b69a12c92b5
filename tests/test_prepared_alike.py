"""Data read directly and data that were prepared: the same labels, splits, names, notes and batches."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_coco_files import of_all, runs_of, write
from test_coco_files import pixels as square
from test_folder_files import write as picture

from dinotwins_jax.data import open_source, shards
from dinotwins_jax.data.base import SPLITS, BadImage
from dinotwins_jax.data.describe import describe
from dinotwins_jax.data.pipeline import BadImageLog, train_batches
from dinotwins_jax.data.store import Settings, union

TWO = "annotations/instances_val2017.json"


def coco(root, values):
    write(root, values)
    return write(root, values, TWO, "val2017")


def rle(root):
    values = of_all()
    for annotation in values["annotations"]:
        box = (int(x) for x in annotation["bbox"][:3])
        mask = square(*box)
        annotation["segmentation"] = {"size": list(mask.shape), "counts": runs_of(mask)}
    return coco(root, values)


def folders(root, *names, count=3):
    for name in names:
        picture(root / name, count)
    return root


def with_files(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def half(root):
    folders(root, "ant", "bee", count=4)
    whole = (root / "ant" / "0.png").read_bytes()
    return with_files(root, {"bee/0.png": b"", "bee/x.png": whole[:60], "ant/y.jpg": b"<html>"})


def odd_modes(root):
    folders(root, "ant", "bee", count=4)
    wide = np.arange(192, dtype=np.uint16).reshape(12, 16) * 300
    Image.fromarray(wide).save(root / "ant" / "wide.png")
    Image.fromarray(wide.astype(np.uint8)).save(root / "bee" / "grey.png")
    return root


def latin1(root):
    folders(root, "ant", "bee")
    Path(root / "ant" / "0.png").rename(Path(f"{root}/ant/caf\udce9.png"))
    return root


CASES = {
    "coco, boxes only": lambda root: coco(root, of_all(segmentation=None)),
    "coco, empty segmentations": lambda root: coco(root, of_all(segmentation=[])),
    "coco, polygons": lambda root: coco(root, of_all()),
    "coco, run lengths": rle,
    "coco, no areas": lambda root: coco(root, of_all(area=None)),
    "classes": lambda root: folders(root, "ant", "bee"),
    "no classes": lambda root: folders(root, "."),
    "splits": lambda root: folders(root, "train/ant", "train/bee", "valid/ant", "valid/bee"),
    "splits in capitals": lambda root: folders(root, "TRAIN/a", "TRAIN/b", "Test/a", "Test/b"),
    "stray pictures": lambda root: picture(folders(root, "ant", "bee") / "cover.png") or root,
    "broken pictures": half,
    "16 bits and grey": odd_modes,
    "names in latin-1": latin1,
}


def batches(source):
    """Indices that three training steps read, and what they say of unreadable pictures."""
    stream = train_batches(source, batch_size=2, canvas_size=32, seed=0)
    log = BadImageLog(source)
    found = [next(stream) for _ in range(3)]
    for batch in found:
        log.add(batch)
    stream.close()
    return found


@pytest.mark.parametrize("case", CASES)
def test_prepared_data_are_as_data_read_directly(tmp_path, monkeypatch, case):
    monkeypatch.setattr("dinotwins_jax.data.workers.run", _here)  # no process for three pictures
    root, out = CASES[case](tmp_path / "data"), tmp_path / "out"
    kind = "coco" if case.startswith("coco") else "folder"
    data, prepared = (
        {"source": k, "dir": str(d)} for k, d in ((kind, root), ("array_record", out))
    )
    direct = {split: open_source(data, split) for split in SPLITS}
    shards.write(union(direct), out, Settings(), description={}, command="")
    stored = {split: open_source(prepared, split) for split in SPLITS}
    for split, source in direct.items():
        theirs, kept = stored[split], [i for i in range(len(source)) if readable(source, i)]
        assert [theirs.name(k) for k in range(len(theirs))] == [source.name(i) for i in kept]
        assert theirs.class_names == source.class_names
        for name in ("labels", "multi_hot"):
            ours, other = getattr(source, name, None), getattr(theirs, name, None)
            assert (ours is None) == (other is None), name
            if ours is not None:
                np.testing.assert_array_equal(other, np.asarray(ours)[kept])
        lost = len(source) - len(kept)
        said = (
            (f"{lost} unreadable when prepared: left out, listed in manifest.json",) if lost else ()
        )
        assert theirs.notes == (*getattr(source, "notes", ()), *said)
        assert [theirs[k].shape for k in range(len(theirs))] == [source[i].shape for i in kept]
    assert hasattr(direct["test"], "masks") == hasattr(stored["test"], "masks")
    if hasattr(direct["test"], "masks"):
        for i in range(len(direct["test"])):
            for ours, other in zip(direct["test"].masks(i), stored["test"].masks(i), strict=True):
                np.testing.assert_array_equal(ours, other)
    if case != "broken pictures":
        assert describe(stored) == describe(direct)
        pairs = zip(batches(direct["pretrain"]), batches(stored["pretrain"]), strict=True)
        for ours, other in pairs:
            np.testing.assert_array_equal(ours["index"], other["index"])
            np.testing.assert_array_equal(ours["size"], other["size"])


def readable(source, i):
    try:
        return source[i] is not None
    except BadImage:
        return False


def _here(function, tasks, shared, workers, args):
    """workers.run in this process."""
    for key, items in tasks:
        function(key, items, pickle.loads(shared), lambda: None, *args)
