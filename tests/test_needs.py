"""What a data set can be scored for, known before anything is computed."""

from types import SimpleNamespace

import numpy as np
import pytest

from dinotwins_jax.evals import TASKS
from dinotwins_jax.evals.needs import served


class Objects:
    """Labelled test images, of which some have masks or boxes; counts how many are read."""

    def __init__(self, labels=(0, 1, 1, 0, 1), **objects):
        self.labels, self.read = np.array(labels), 0
        for kind, images in objects.items():
            setattr(self, kind, lambda i, images=images: self.of(i in images))

    def __len__(self):
        return len(self.labels)

    def of(self, there):
        self.read += 1
        return np.full((1, 4, 4), there), np.zeros(1, np.int32)


def asked(test=None, train_labels=(0, 1, -1, 1), tasks=TASKS, knn_k=(2, 3), **options):
    labels = None if train_labels is None else np.array(train_labels)
    test = test or Objects(masks=range(5))
    options = {"draws": True} | options
    return served(tasks, SimpleNamespace(labels=labels), test, knn_k=knn_k, **options)


def test_data_with_labels_and_masks_serve_all():
    found = asked()
    assert found.tasks == list(TASKS) and found.left_out == {} and found.lines == []
    assert found.objects == "masks" and found.knn_k == (2, 3)


def test_data_without_labels_leave_out_what_needs_them():
    found = asked(train_labels=None, tasks=("finetune", "linear", "pca"))
    assert found.tasks == ["pca"]
    assert found.lines == ["left out: linear, finetune, because the data has no labels"]
    found = asked(test=Objects([-1, -1], masks=(0, 1)), tasks=("knn",))
    assert found.left_out == {"knn": "no test image has a label"}


@pytest.mark.parametrize(
    ("draws", "line"),
    [
        (True, "attention and segmentation are drawn, not scored, because the data has no masks"),
        (False, "left out: attention, segmentation, because the data has no masks"),
    ],
)
def test_data_without_masks_are_drawn(draws, line):
    found = asked(test=Objects(), draws=draws)
    assert found.lines == [line] and found.objects == ""
    assert found.left_out == dict.fromkeys(("attention", "segmentation"), "the data has no masks")
    (one,) = asked(test=Objects(), tasks=("attention",)).lines
    assert one == "attention is drawn, not scored, because the data has no masks"
    assert asked(test=Objects(), tasks=("knn",)).lines == []


def test_a_standard_error_needs_two_images_with_a_mask():
    found = asked(test=Objects(masks=(3,)), tasks=("attention",))
    reason = "1 of the 5 test images used have a mask, at least 2 are needed"
    assert found.left_out == {"attention": reason} and reason in found.lines[0]
    assert asked(test=Objects(masks=(0, 3)), tasks=("attention",)).objects == "masks"
    first = asked(test=Objects(masks=(0, 3)), tasks=("attention",), mask_images=3)
    assert first.left_out["attention"].startswith("1 of the 3 test images")


def test_no_more_masks_are_read_than_needed():
    test = Objects(masks=range(5))
    asked(test=test, tasks=("attention",))
    assert test.read == 2
    known = Objects(masks=range(5))
    known.masked = np.array([True, False, True, False, False])
    assert asked(test=known, tasks=("segmentation",)).objects == "masks" and known.read == 0
    asked(test=known, tasks=("knn",))
    assert known.read == 0


def test_a_damaged_mask_is_left_to_the_task():
    def damaged(i):
        raise ValueError(f"record {i} is damaged")

    test = Objects()
    test.masks = damaged
    assert asked(test=test, tasks=("attention",)).tasks == ["attention"]


def test_boxes_serve_where_there_are_no_masks():
    found = asked(test=Objects(boxes=(1, 2)), tasks=("attention", "segmentation"))
    assert found.tasks == ["attention", "segmentation"] and found.left_out == {}
    assert found.objects == "boxes"
    assert found.lines == [
        "attention and segmentation: scored against boxes, by pointing and CorLoc alone, because the "
        "data has no masks"
    ]
    assert asked(test=Objects(boxes=(1,)), tasks=("attention",)).objects == ""
    assert asked(test=Objects(boxes=(1, 2), masks=(0, 1)), tasks=("attention",)).objects == "masks"


def test_numbers_of_neighbours_above_the_training_images_are_left_out():
    found = asked(knn_k=(2, 3, 4, 10), tasks=("knn",))
    assert found.knn_k == (2, 3) and found.tasks == ["knn"]
    assert found.lines == [
        "left out: k-NN with k 4, 10, because the data has 3 training images with a label"
    ]
    found = asked(knn_k=(10, 20), tasks=("knn", "linear"))
    assert found.tasks == ["linear"]
    assert found.left_out == {
        "knn": "config.evals.knn_k (10, 20) is more than the 3 training images with a label"
    }
