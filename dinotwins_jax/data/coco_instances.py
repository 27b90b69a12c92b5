"""Reading and checking of a COCO instances JSON, as COCO and labelling tools write it.

Every error is one line with the file, the id of the image or annotation, the value, and what it must be.
"""

import json
import math
import os
import posixpath
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinotwins_jax.data.coco_masks import has_mask, mask_area, parse_mask, shown


class Instances(NamedTuple):
    """Images sorted by id, and the n objects of the file in its order, crowds left out."""

    files: list[str]  # of the images, relative to the image folder
    sizes: np.ndarray  # i32[images, 2] (height, width); 0, 0 where not given
    class_names: tuple[str, ...]  # the categories, sorted by id
    image: np.ndarray  # i64[n], index into files
    category: np.ndarray  # i64[n], index into class_names
    area: np.ndarray  # f64[n] pixels
    masked: np.ndarray  # bool[n], whether it has a mask
    boxes: (
        np.ndarray
    )  # f64[n, 4] x, y, width, height in pixels; NaN: none, or not needed beside a mask
    names: list[str]  # of the objects, for messages
    segmentations: list[Any]  # of the objects, as in the file

    def size(self, i: int) -> tuple[int, int] | None:
        """(height, width) of image i; None if not given."""
        height, width = self.sizes[i].tolist()
        return (height, width) if height else None


def read_instances(path: Path) -> Instances:
    """Reads an annotation file and checks all of it; no image is opened.

    Numbers may be strings or lists of one, ids strings or integers. The area is the annotation's, else
    that of its bbox, else of its mask. Of a crowd only the ids are checked.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not JSON, not COCO instances, or an invalid entry.
    """
    lists = _read_lists(path)
    images = _by_id(path, lists["images"], "image")
    if not images:
        raise ValueError(f"{path}: lists no images")
    files = [_file_name(path, name, entry) for _, name, entry in images]
    sizes = [_size(path, name, entry) for _, name, entry in images]
    categories = _categories(path, lists["categories"])
    image_row = {id: k for k, (id, _, _) in enumerate(images)}
    category_row = {id: k for k, id in enumerate(categories)}
    rows = []
    for k, entry in enumerate(lists["annotations"]):
        name = _entry_name(path, entry, k, "annotation")
        image = _row(path, name, entry, "image", image_row)
        category = _row(path, name, entry, "category", category_row)
        if _is_crowd(path, name, entry):
            continue
        segmentation = entry.get("segmentation")
        try:
            masked = has_mask(segmentation, sizes[image])
            area = _area(entry, sizes[image])
        except ValueError as err:
            raise ValueError(f"{path}: {name}: {err}") from None
        box = None if masked else _box(entry)
        box = box or (math.nan,) * 4
        rows.append((image, category, area, masked, box, name, segmentation))
    image, category, area, masked, boxes, names, segmentations = (
        zip(*rows, strict=True) if rows else [()] * 7
    )
    return Instances(
        files=files,
        sizes=np.array([size or (0, 0) for size in sizes], np.int32),
        class_names=tuple(categories.values()),
        image=np.array(image, np.int64),
        category=np.array(category, np.int64),
        area=np.array(area, np.float64),
        masked=np.array(masked, bool),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        names=list(names),
        segmentations=list(segmentations),
    )


def _read_lists(path: Path) -> dict[str, list]:
    try:
        with open(path, "rb") as file:
            instances = json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"no annotation file {path}") from None
    except (ValueError, RecursionError) as err:  # bad JSON, or bad UTF-8 in it
        raise ValueError(f"{path}: not JSON: {err}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(instances, dict) or not isinstance(instances.get(key), list):
            raise ValueError(f"{path}: not COCO instances: no list {key!r} at the top level")
    return instances


def _entry_name(path: Path, entry: Any, k: int, what: str) -> str:
    """Its name in messages, such as "annotation 17"; by position if it has no id."""
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {what} number {k} is {shown(entry)}: it must be an object {{…}}")
    id = entry.get("id")
    return f"{what} number {k}" if id is None else f"{what} {shown(id)}"


def _by_id(path: Path, entries: list, what: str) -> list[tuple[Any, str, dict]]:
    """(id, name in messages, entry) of images or categories, sorted by id."""
    found = []
    for k, entry in enumerate(entries):
        name = _entry_name(path, entry, k, what)
        found.append((_id(path, name, entry, "id"), name, entry))
    # Integers first: a file may have both.
    return sorted(found, key=lambda one: (isinstance(one[0], str), one[0]))


def _id(path: Path, name: str, entry: dict, key: str) -> int | str:
    """An id; "17" and 17.0 are 17, other strings stay."""
    id = entry.get(key)
    if type(id) is int:
        return id
    if isinstance(id, float) and id.is_integer():
        return int(id)
    if isinstance(id, str) and id:
        return int(id) if id.isdecimal() and str(int(id)) == id else id
    if key not in entry:
        raise ValueError(f"{path}: {name} has no {key!r}")
    raise ValueError(f"{path}: {name} has {key} {shown(id)}: it must be an integer or a string")


def _row(path: Path, name: str, entry: dict, what: str, rows: dict) -> int:
    id = _id(path, name, entry, f"{what}_id")
    if id not in rows:
        raise ValueError(f"{path}: {name} refers to {what} id {shown(id)}, which is not listed")
    return rows[id]


def _categories(path: Path, entries: list) -> dict[int | str, str]:
    """Id -> name, sorted by id."""
    names: dict[int | str, str] = {}
    for id, name, entry in _by_id(path, entries, "category"):
        value = entry.get("name")
        if not isinstance(value, str | int | float) or value == "":
            given = f"name {shown(value)}" if "name" in entry else "no 'name'"
            raise ValueError(f"{path}: {name} has {given}: it must be a string")
        if names.setdefault(id, str(value)) != str(value):
            raise ValueError(
                f"{path}: {name} is listed twice, as {names[id]!r} and as {str(value)!r}: ids of "
                "categories must be unique"
            )
    return names


def _file_name(path: Path, name: str, entry: dict) -> str:
    """Its file name. Raises ValueError unless it stays inside the image folder."""
    file = entry.get("file_name")
    if file is None:
        raise ValueError(f"{path}: {name} has no 'file_name'")
    if not isinstance(file, str) or not file or "\0" in file:
        raise ValueError(f"{path}: {name} has file_name {shown(file)}: it must be a file's name")
    plain = posixpath.normpath(file)
    if os.path.isabs(file) or plain in (".", "..") or plain.startswith("../"):
        raise ValueError(
            f"{path}: {name} has file_name {shown(file)}: it must be a path inside the image folder"
        )
    try:
        os.fsencode(file)  # "\udce9" stands for the byte e9, other surrogates for nothing
    except UnicodeEncodeError:
        raise ValueError(
            f"{path}: {name} has file_name {shown(file)}: no file can have this name"
        ) from None
    return file


def _size(path: Path, name: str, entry: dict) -> tuple[int, int] | None:
    """(height, width); None if one of them is missing, null, NaN or 0."""
    sides = []
    for key in ("height", "width"):
        side = entry.get(key)
        if type(side) is not int:
            side = _number(side)
        if side is None:
            side = 0
        if not 0 <= side < 2**31 or side != int(side):
            raise ValueError(
                f"{path}: {name} has {key} {shown(entry[key])}: it must be a whole number of pixels"
            )
        sides.append(int(side))
    return (sides[0], sides[1]) if all(sides) else None


def _is_crowd(path: Path, name: str, entry: dict) -> bool:
    crowd = entry.get("iscrowd", 0)
    value = crowd if type(crowd) in (int, bool) else _number(crowd)
    if value not in (None, 0, 1):
        raise ValueError(f"{path}: {name} has iscrowd {shown(crowd)}: it must be 0 or 1")
    return bool(value)


def _area(entry: dict, size: tuple[int, int] | None) -> float:
    """Area in pixels: the annotation's, else of its bbox, else of its mask."""
    area = entry.get("area")
    if type(area) is not float or not 0 <= area < math.inf:
        area = _number(area)
        if area is not None and not 0 <= area < math.inf:
            raise ValueError(f"area is {shown(entry['area'])}: it must be a number of at least 0")
    if area is not None:
        return area
    if (box := entry.get("bbox")) not in (None, []):
        sides = [_number(side) for side in box] if isinstance(box, list) else []
        if len(sides) != 4 or not all(s is not None and math.isfinite(s) for s in sides):
            raise ValueError(f"bbox is {shown(box)}: it must be [x, y, width, height]")
        if min(sides[2:]) < 0:
            raise ValueError(f"bbox is {shown(box)}: its width and height must not be negative")
        return sides[2] * sides[3]
    mask = parse_mask(entry.get("segmentation"), size)
    if mask is None:
        raise ValueError("no area, bbox or segmentation: one of them must say how large it is")
    return mask_area(mask)


def _box(entry: dict) -> list[float] | None:
    """[x, y, width, height] in pixels; None if it is missing, empty or no such list."""
    box = entry.get("bbox")
    numbers = [_number(number) for number in box] if isinstance(box, list) else []
    if len(numbers) != 4 or not all(n is not None and math.isfinite(n) for n in numbers):
        return None
    return numbers if min(numbers[2:]) > 0 else None


def _number(value: Any) -> float | None:
    """A number, also from a string or a list of one; None for null, NaN, "" or an empty list.

    Anything else is infinity, which no number here may be.
    """
    if isinstance(value, list) and len(value) <= 1:
        value = value[0] if value else None
    if value is None or value == "":
        return None
    try:
        number = math.inf if isinstance(value, bool | list | dict) else float(value)
    except (ValueError, OverflowError):
        number = math.inf
    return None if math.isnan(number) else number
