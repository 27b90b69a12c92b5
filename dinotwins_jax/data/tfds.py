"""TensorFlow Datasets, prebuilt with --file_format=array_record, read without TensorFlow."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dinotwins_jax.data.base import BadImage, EncodedImages, canvas_for_photos, check_split
from dinotwins_jax.data.coco import dominant_categories
from dinotwins_jax.logs.terminal import image_bar

DEFAULT_DIR = "~/tensorflow_datasets"  # where TFDS puts its data


class Tfds(EncodedImages):
    """A data set with the feature "image" and, for labels, "label" or COCO's "objects".

    labels are read from all records on first access, without decoding images; with "objects" they
    are the category of the largest total area, crowds left out, as in Coco. No masks.
    Thread-safe and picklable.

    Args:
      split: "pretrain" (labels are not read), "train" or "test".
      dir: the directory of all TFDS data, or that of the version, which holds features.json.
      name: of the data set, such as "coco/2017" or "imagenet2012"; its latest version is used.
      pretrain_splits, train_split, test_split: names of its splits.
    Raises:
      FileNotFoundError: no such data set.
      ValueError: not in array_record format, no such split, or no feature "image".
    """

    def __init__(
        self,
        split: str,
        *,
        dir: str = "",
        name: str = "coco/2017",
        pretrain_splits: Sequence[str] = ("train",),
        train_split: str = "train",
        test_split: str = "validation",
    ):
        check_split(split)
        import tensorflow_datasets as tfds  # takes half a second

        parts = [pretrain_splits] if isinstance(pretrain_splits, str) else list(pretrain_splits)
        self._part = {"pretrain": "+".join(parts), "train": train_split, "test": test_split}[split]
        self._has_labels = split != "pretrain"
        root = _version_dir(Path(dir or DEFAULT_DIR).expanduser(), name)
        self._root = str(root)
        try:
            builder = tfds.builder_from_directory(root)
            features = builder.info.features
            if "image" not in features:
                raise ValueError(f"no feature 'image', only {', '.join(features)}")
            self._records = builder.as_data_source(
                split=self._part, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except NotImplementedError:
            raise ValueError(
                f"{root} is in {builder.info.file_format.value} format: build it with "
                "tfds build --file_format=array_record"
            ) from None
        except ValueError as error:
            raise ValueError(f"{root}: {error}") from None
        self._kind, self.class_names = _label_kind(features)

    def __len__(self) -> int:
        return len(self._records)

    def encoded(self, i: int) -> bytes:
        """The stored image. Raises BadImage if the record is damaged."""
        try:
            return self._records[i]["image"]
        except RuntimeError as error:  # from array_record: a block's checksum is wrong
            raise BadImage(self.name(i), f"its record is damaged: {str(error)[:200]}") from None

    def name(self, i: int) -> str:
        return f"{self._root}/{self._part}[{i}]"

    def default_canvas(self, global_size: int) -> int:
        return canvas_for_photos(global_size)

    @property
    def labels(self) -> np.ndarray | None:
        """i32[len(self)], -1 for none; None if the data have no labels."""
        return self._scanned[0]

    @property
    def multi_hot(self) -> np.ndarray | None:
        """bool[len(self), len(class_names)]; None without the feature "objects"."""
        return self._scanned[1]

    @functools.cached_property
    def _scanned(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not self._has_labels or self._kind is None:
            return None, None
        if self._kind == "label":
            return np.array([record["label"] for record in self._all()], np.int32), None
        rows, categories, areas = [], [], []
        for i, record in enumerate(self._all()):
            objects = record["objects"]
            crowds = objects.get("is_crowd", [False] * len(objects["label"]))
            for category, area, crowd in zip(
                objects["label"], objects["area"], crowds, strict=True
            ):
                if not crowd:
                    rows.append(i)
                    categories.append(category)
                    areas.append(area)
        shape = (len(self), len(self.class_names))
        index = [np.array(column, np.int64) for column in (rows, categories)]
        return dominant_categories(*index, np.array(areas, np.float64), shape)

    def _all(self):
        with image_bar() as bar:
            for i in bar.track(range(len(self)), description=f"labels of {self._part}"):
                yield self._records[i]


def _version_dir(root: Path, name: str) -> Path:
    """The directory that holds features.json: root itself, or the latest version of `name` in it."""
    if (root / "features.json").is_file():
        return root
    found = [path.parent for path in (root / name).glob("*/features.json")]
    if not found:
        raise FileNotFoundError(
            f"data source 'tfds': no {name} in {root}: expected {root / name}/<version>/"
            "features.json, as tfds build --file_format=array_record writes it"
        )
    return max(
        found, key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")]
    )


def _label_kind(features) -> tuple[str | None, tuple[str, ...]]:
    """("label", "objects" or None, names of the classes)."""
    if "label" in features and hasattr(features["label"], "names"):
        return "label", tuple(features["label"].names)
    objects = getattr(dict(features.items()).get("objects"), "feature", {})  # of a Sequence
    if "label" in objects and "area" in objects:
        return "objects", tuple(objects["label"].names)
    return None, ()
