"""MS COCO (arXiv:1405.0312) and data of labelling tools in its format, read from the JSON directly."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dinotwins_jax.data.base import EXTENSIONS, ImageFiles, check_dir, check_split, image_size
from dinotwins_jax.data.coco_instances import read_instances
from dinotwins_jax.data.coco_masks import parse_mask, rasterise

BESIDE = "_annotations.coco.json"  # of labelling tools, in the folder of the pictures


class Coco(ImageFiles):
    """COCO images; for "train" and "test" with labels and masks of their objects.

    The directory holds one folder per image set (train2017/, val2017/) and
    annotations/instances_<set>.json, or <set>/_annotations.coco.json. "pretrain" reads whole folders,
    sorted by name, and needs no annotations. "train" and "test" take the images that the JSON lists,
    sorted by id; one whose file is missing is a BadImage when it is read.

    class_names: the JSON's categories, sorted by id.
    labels: i32[len(self)], the category with the largest total annotated area in the image, crowds
      left out, as an index into class_names; -1 if there is none.
    multi_hot: bool[len(self), len(class_names)], the categories of all its objects, crowds left out.
    masked, boxed: bool[len(self)], whether an object of the image has a mask; a box and no mask.
    All four are None for "pretrain".

    Args:
      split: "pretrain", "train" or "test".
      dir: the COCO directory.
      pretrain_splits: image folders of "pretrain", such as ("train2017", "unlabeled2017").
      train_split, test_split: image sets of "train" and "test".
      train_annotations, test_annotations: their annotation files, absolute or relative to dir; "": the
        usual places.
    Raises:
      FileNotFoundError: no such directory, image folder or annotation file, an empty image folder, or
        one that has none of the images listed.
      ValueError: the annotation file is not JSON, not COCO instances, or has an invalid entry.
    """

    def __init__(
        self,
        split: str,
        *,
        dir: str = "",
        pretrain_splits: Sequence[str] = ("train2017",),
        train_split: str = "train2017",
        test_split: str = "val2017",
        train_annotations: str = "",
        test_annotations: str = "",
    ):
        check_split(split)
        root = check_dir("coco", dir)
        self._json_path = self.masked = self.boxed = None
        self._objects = None
        if split == "pretrain":
            names = [pretrain_splits] if isinstance(pretrain_splits, str) else pretrain_splits
            super().__init__([p for name in names for p in _list_images(_image_folder(root, name))])
            return
        name = test_split if split == "test" else train_split
        given = test_annotations if split == "test" else train_annotations
        folder = _image_folder(root, name)
        self._json_path = _annotation_file(root, name, given, split)
        instances = read_instances(self._json_path)
        paths = [str(folder / file) for file in instances.files]
        if not any(os.path.exists(path) for path in paths):
            raise FileNotFoundError(
                f"{folder} has none of the {len(paths)} images that {self._json_path} lists, such as "
                f"{instances.files[0]}"
            )
        shape = (len(paths), len(instances.class_names))
        labels, multi_hot = dominant_categories(
            instances.image, instances.category, instances.area, shape
        )
        self.masked = np.zeros(len(paths), bool)
        self.masked[instances.image[instances.masked]] = True
        there = ~np.isnan(instances.boxes[:, 0])
        self._boxes = instances.image[there], instances.category[there], instances.boxes[there]
        self._box_sizes = instances.sizes
        self.boxed = np.bincount(self._boxes[0], minlength=len(paths)) > 0
        super().__init__(
            paths, labels=labels, multi_hot=multi_hot, class_names=instances.class_names
        )

    @property
    def masks(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """masks(i): the objects of image i that have a mask, crowds left out, in the file's order.

        The annotation file is read again on the first call, so that training does not keep polygons in
        memory. An image whose size the file lacks has that of its header.

        Returns (of the call):
          bool[n, H, W] at the image's own size, and i32[n] indices into class_names.
        Raises:
          AttributeError: no object of the split has a mask, so that hasattr works.
          ValueError (of the call): the split is "pretrain", or the header cannot be read or does not
            agree with an RLE.
        """
        if self.masked is not None and not self.masked.any():
            raise AttributeError(f"{self._json_path}: no object has a mask")
        return self._masks

    def boxes(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """boxes(i): as masks(i), of the objects without a mask, each a filled box."""
        if self._json_path is None:
            raise ValueError('no boxes in split "pretrain" of COCO: use "train" or "test"')
        image, category, boxes = self._boxes
        here = np.flatnonzero(image == i)
        height, width = self._box_sizes[i].tolist()
        if not height:
            height, width = image_size(self.paths[i])
        filled = np.zeros((len(here), height, width), bool)
        for pixels, (x, y, w, h) in zip(filled, boxes[here], strict=True):
            rows, columns = (
                slice(max(round(a), 0), max(round(b), 0)) for a, b in ((y, y + h), (x, x + w))
            )
            pixels[rows, columns] = True
        return filled, category[here].astype(np.int32)

    def _masks(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if self._json_path is None:
            raise ValueError('no masks in split "pretrain" of COCO: use "train" or "test"')
        if self._objects is None:
            self._sizes, self._objects = _group_objects(self._json_path)
        objects = self._objects[i]
        height, width = self._sizes[i] or image_size(self.paths[i])
        masks = np.zeros((len(objects), height, width), bool)
        for pixels, (_, mask, name) in zip(masks, objects, strict=True):
            try:
                pixels[:] = rasterise(mask, height, width)
            except ValueError as err:  # an RLE, and the file lacks the image's size
                raise ValueError(f"{self._json_path}: {name}: {err}") from None
        return masks, np.array([category for category, _, _ in objects], np.int32)


def dominant_categories(
    image: np.ndarray, category: np.ndarray, area: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Image labels from the objects in each image.

    Args:
      image, category, area: i64[n], i64[n], f64[n]: image, category and area (any unit) of each object.
      shape: (images, categories).
    Returns:
      labels i32[images], the category with the largest total area, -1 without objects, and
      multi_hot bool[images, categories], whether the image has an object of the category.
    """
    total, present = np.zeros(shape), np.zeros(shape, bool)
    np.add.at(total, (image, category), area)
    present[image, category] = True  # an object of area 0 counts too
    if not shape[1]:
        return np.full(shape[0], -1, np.int32), present
    best = np.argmax(np.where(present, total, -1.0), axis=1)
    return np.where(present.any(axis=1), best, -1).astype(np.int32), present


def _image_folder(root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
        raise FileNotFoundError(f"no folder {name} in the COCO directory {root}; it holds {there}")
    return root / name


def _annotation_file(root: Path, name: str, given: str, split: str) -> Path:
    """The annotation file of an image set: the one given, or the first of the usual places."""
    if given:
        path = root / Path(given).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no annotation file {path} (data.coco.{split}_annotations)")
        return path
    usual = root / "annotations" / f"instances_{Path(name).name}.json"
    beside = root / name / BESIDE
    for path in (usual, beside):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no annotation file {usual} or {beside}: set data.coco.{split}_annotations"
    )


def _list_images(folder: Path) -> list[str]:
    """All images in the folder and its subfolders but hidden ones, sorted by path."""
    paths = []
    for at, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(at, f) for f in files if f.lower().endswith(EXTENSIONS)]
    if not paths:
        raise FileNotFoundError(f"no images in {folder}")
    return sorted(paths)


def _group_objects(path: Path) -> tuple[list, list[list[tuple]]]:
    """Per image: its size or None, and (category index, mask, name) of its objects with a mask."""
    instances = read_instances(path)
    sizes = [instances.size(i) for i in range(len(instances.files))]
    objects: list[list[tuple]] = [[] for _ in sizes]
    for k in np.flatnonzero(instances.masked):
        i = int(instances.image[k])
        mask = parse_mask(instances.segmentations[k], sizes[i])
        objects[i].append((int(instances.category[k]), mask, instances.names[k]))
    return sizes, objects
