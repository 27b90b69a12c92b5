"""MS COCO (arXiv:1405.0312) in its standard directory, read from the instances JSON directly."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dinotwins_jax.data.base import ImageFiles, check_dir, check_split

SUPERSAMPLE = 5  # odd, so that a subpixel lies at the centre


class Coco(ImageFiles):
    """COCO images; for "train" and "test" with labels and masks of their objects.

    The directory holds one folder per image set (train2017/, val2017/) and
    annotations/instances_<set>.json. "pretrain" reads whole folders, sorted by name, and needs no
    annotations. "train" and "test" take the images that the JSON lists, sorted by id; one whose
    file is missing is a BadImage when it is read.

    class_names: the JSON's categories, sorted by id.
    labels: i32[len(self)], the category with the largest total annotated area in the image, crowds
      left out, as an index into class_names; -1 if there is none.
    multi_hot: bool[len(self), len(class_names)], the categories of all its objects, crowds left out.
    Both are None for "pretrain".

    Args:
      split: "pretrain", "train" or "test".
      dir: the COCO directory.
      pretrain_splits: image folders of "pretrain", such as ("train2017", "unlabeled2017").
      train_split, test_split: image sets of "train" and "test".
    Raises:
      FileNotFoundError: no such directory, image folder or annotation file, or an empty image
        folder.
      ValueError: the annotation file is not JSON, or not COCO instances.
    """

    def __init__(
        self,
        split: str,
        *,
        dir: str = "",
        pretrain_splits: Sequence[str] = ("train2017",),
        train_split: str = "train2017",
        test_split: str = "val2017",
    ):
        check_split(split)
        root = check_dir("coco", dir)
        self._json_path = None
        self._segmentations = None
        if split == "pretrain":
            names = [pretrain_splits] if isinstance(pretrain_splits, str) else pretrain_splits
            super().__init__([p for name in names for p in _list_images(_image_folder(root, name))])
            return
        name = test_split if split == "test" else train_split
        folder = _image_folder(root, name)
        self._json_path = root / "annotations" / f"instances_{name}.json"
        instances = _read_instances(self._json_path)
        with _naming(self._json_path):
            images = sorted(instances["images"], key=lambda image: image["id"])
            paths = [str(folder / image["file_name"]) for image in images]
            sizes = [(image["height"], image["width"]) for image in images]
            categories = sorted(instances["categories"], key=lambda category: category["id"])
            class_names = tuple(category["name"] for category in categories)
            labels, multi_hot = _labels(instances["annotations"], images, categories)
        self._sizes = np.array(sizes, np.int32).reshape(-1, 2)  # [len(self), (height, width)]
        super().__init__(paths, labels=labels, multi_hot=multi_hot, class_names=class_names)

    def masks(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The objects of image i, crowds left out, in the file's order.

        The annotation file is read again on the first call, so that training does not keep polygons in
        memory.

        Returns:
          bool[n, H, W] at the image's own size, and i32[n] indices into class_names.
        Raises:
          ValueError: the split is "pretrain", or a segmentation is compressed RLE.
        """
        if self._json_path is None:
            raise ValueError('no masks in split "pretrain" of COCO: use "train" or "test"')
        if self._segmentations is None:
            instances = _read_instances(self._json_path)
            with _naming(self._json_path):
                self._segmentations = _group_segmentations(instances)
        height, width = map(int, self._sizes[i])
        objects = self._segmentations[i]
        masks = np.zeros((len(objects), height, width), bool)
        for mask, (_, segmentation) in zip(masks, objects, strict=True):
            mask[:] = _rasterise(segmentation, height, width)
        return masks, np.array([category for category, _ in objects], np.int32)


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


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Converts a KeyError or TypeError in the block to a one-line ValueError that names the file."""
    try:
        yield
    except KeyError as err:
        raise ValueError(f"{path}: not COCO instances: an entry has no {err}") from None
    except (TypeError, AttributeError, ValueError) as err:
        raise ValueError(f"{path}: not COCO instances: {err}") from None


def _image_folder(root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
        raise FileNotFoundError(f"no folder {name} in the COCO directory {root}; it holds {there}")
    return root / name


def _list_images(folder: Path) -> list[str]:
    kinds = (".jpg", ".jpeg", ".png")
    paths = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in kinds)
    if not paths:
        raise FileNotFoundError(f"no .jpg or .png images in {folder}")
    return paths


def _read_instances(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            instances = json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"no annotation file {path}") from None
    except ValueError as err:  # bad JSON, or bad UTF-8 in it
        raise ValueError(f"{path}: not JSON: {err}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(instances, dict) or not isinstance(instances.get(key), list):
            raise ValueError(f"{path}: not COCO instances: no list {key!r} at the top level")
    return instances


def _rows(entries: list[dict], wanted: list[int], what: str) -> np.ndarray:
    """Index i64[n] of the entry with each wanted id."""
    row = {entry["id"]: k for k, entry in enumerate(entries)}
    rows = np.array([row.get(k, -1) for k in wanted], np.int64)
    if (rows < 0).any():
        unknown = wanted[int(np.argmin(rows))]
        raise ValueError(f"an annotation refers to {what} id {unknown}, which is not listed")
    return rows


def _labels(annotations: list, images: list, categories: list) -> tuple[np.ndarray, np.ndarray]:
    image = _rows(images, [a["image_id"] for a in annotations], "image")
    category = _rows(categories, [a["category_id"] for a in annotations], "category")
    area = np.array([a["area"] for a in annotations], np.float64)
    single = np.array([not a.get("iscrowd", 0) for a in annotations], bool)
    shape = (len(images), len(categories))
    return dominant_categories(image[single], category[single], area[single], shape)


def _group_segmentations(instances: dict[str, Any]) -> list[list[tuple[int, Any]]]:
    """Per image, in order of id: list of (category index, polygons f32[points, 2] or an RLE dict)."""
    images = sorted(instances["images"], key=lambda image: image["id"])
    categories = sorted(instances["categories"], key=lambda category: category["id"])
    single = [a for a in instances["annotations"] if not a.get("iscrowd", 0)]
    rows = _rows(images, [a["image_id"] for a in single], "image")
    kinds = _rows(categories, [a["category_id"] for a in single], "category")
    groups: list[list[tuple[int, Any]]] = [[] for _ in images]
    for annotation, row, kind in zip(single, rows, kinds, strict=True):
        shape = annotation["segmentation"]
        if isinstance(shape, dict):
            if not isinstance(shape["counts"], list):
                raise ValueError(
                    "compressed RLE segmentation: only polygons and uncompressed RLE are supported"
                )
        else:
            shape = [np.array(polygon, np.float32).reshape(-1, 2) for polygon in shape]
        groups[row].append((int(kind), shape))
    return groups


def _rasterise(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Mask bool[height, width] of a list of polygons (their union) or an uncompressed RLE dict."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)  # 0s, 1s, ... down the columns
        return runs.reshape(width, height).T
    # PIL also fills a polygon's outline, half a pixel too wide: draw it supersampled, then keep the
    # subpixel at each centre. COCO's coordinates start at a pixel's corner, PIL's at its centre.
    mask = np.zeros((height, width), bool)
    corners = np.concatenate([*segmentation, np.zeros((0, 2))])
    if not len(corners):
        return mask
    # Drawn within the object's box plus one pixel, not in the whole image.
    left, top = (max(int(low) - 1, 0) for low in corners.min(axis=0))
    right, bottom = (
        min(int(high) + 2, side)
        for high, side in zip(corners.max(axis=0), (width, height), strict=True)
    )
    if left >= right or top >= bottom:  # outside the image
        return mask
    canvas = Image.new("1", ((right - left) * SUPERSAMPLE, (bottom - top) * SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    for polygon in segmentation:
        points = polygon * SUPERSAMPLE - 0.5 - np.array([left, top], np.float32) * SUPERSAMPLE
        draw.polygon([tuple(point) for point in points.tolist()], fill=1)
    middle = SUPERSAMPLE // 2
    mask[top:bottom, left:right] = np.asarray(canvas)[middle::SUPERSAMPLE, middle::SUPERSAMPLE]
    return mask
