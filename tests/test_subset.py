"""A part of a labelled source: classes, images, and long tails."""

import pickle

import numpy as np
import pytest

from configs import hybrid
from dinotwins_jax.data import data_section, open_source, probe_section
from dinotwins_jax.data.base import gives_encoded, read_image
from dinotwins_jax.data.describe import describe
from dinotwins_jax.data.subset import class_sizes, subset

SCENES = {"source": "scenes", "dir": "", "scenes": {"num_train": 200, "num_test": 50, "size": 24}}


def opened(split, **options):
    return open_source(SCENES | {"subset": options}, split)


class Files:
    """Twelve images as files; the last two without a label."""

    class_names = ("a", "b", "c")
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, -1, -1], np.int32)

    def __len__(self):
        return 12

    def encoded(self, i):
        return bytes([i])

    def name(self, i):
        return f"file {i}"


def test_a_long_tail_is_exponential_from_the_first_class_to_the_last():
    sizes = class_sizes(np.full(10, 5000), 0, 100.0)
    assert sizes.tolist() == [
        5000,
        2997,
        1796,
        1077,
        645,
        387,
        232,
        139,
        83,
        50,
    ]  # the published ones
    assert sizes.sum() == 12_406
    assert class_sizes(np.full(10, 5000), 0, 1.0).tolist() == [5000] * 10
    assert class_sizes(np.array([30, 40, 2]), 4, 1.0).tolist() == [4, 4, 2]
    assert class_sizes(np.array([30, 40, 0]), 4, 100.0).tolist() == [4, 1, 0]


def test_pretrain_and_train_are_the_same_images_and_another_seed_draws_others():
    names = {
        (split, seed): [source.name(i).rpartition("/")[2] for i in range(len(source))]
        for split in ("pretrain", "train")
        for seed in (0, 1)
        for source in [opened(split, images=3, seed=seed)]
    }
    assert names["pretrain", 0] == names["train", 0] and len(set(names["train", 0])) == 30
    assert names["train", 0] != names["train", 1]
    smaller = opened("train", images=2)
    few = {smaller.name(i).rpartition("/")[2] for i in range(len(smaller))}
    assert few < set(names["train", 0])


def test_images_labels_and_objects_are_those_of_the_source():
    whole, part = opened("train"), opened("train", classes=4, images=5)
    places = {whole.name(i): i for i in range(len(whole))}
    assert (
        np.bincount(part.labels).tolist() == [5] * 4 and part.class_names == whole.class_names[:4]
    )
    for i in range(len(part)):
        at = places[part.name(i)]
        np.testing.assert_array_equal(part[i], whole[at])
        np.testing.assert_array_equal(read_image(part, i), part[i])
        assert part.labels[i] == whole.labels[at]
        (pixels, category), (all_pixels, every) = part.masks(i), whole.masks(at)
        np.testing.assert_array_equal(category, every[every < 4])
        np.testing.assert_array_equal(pixels, all_pixels[every < 4])
    assert not hasattr(part, "boxes") and part.default_canvas(16) == whole.default_canvas(16)
    assert pickle.loads(pickle.dumps(part)).name(3) == part.name(3)


def test_the_test_split_loses_only_the_classes_that_are_left_out():
    whole, part = opened("test"), opened("test", classes=4, images=1, long_tail=10.0)
    assert len(part) == int((whole.labels < 4).sum()) and part.labels.max() == 3
    assert len(opened("test", images=1, long_tail=100.0)) == len(whole)


def test_images_without_a_label_are_left_out_and_files_stay_files():
    part = subset(Files(), "train", {"images": 2}, "mine")
    assert np.bincount(part.labels).tolist() == [2, 2, 2]
    assert gives_encoded(part) and part.encoded(0) == bytes([int(part.name(0).split()[1])])
    assert part.notes == ("6 of 12 images by data.subset",)
    assert any("6 of 12 images by data.subset" in line for line in describe({"train": part}))
    everything = Files()
    assert subset(everything, "train", {}, "mine") is everything  # as in a config of before


def test_the_test_split_keeps_its_images_without_a_label():
    """They are pictures without any of the classes, on which a wrong label counts."""
    part = subset(Files(), "test", {"classes": 2}, "mine")
    assert part.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, -1, -1] and part.class_names == ("a", "b")


def test_what_cannot_be_chosen_is_named():
    with pytest.raises(ValueError, match=r"subset\.classes is 11: the data has 10 classes"):
        opened("train", classes=11)
    unlabelled = Files()
    unlabelled.labels = None
    with pytest.raises(ValueError, match="'mine' has no labels of split 'pretrain' to choose"):
        subset(unlabelled, "pretrain", {"images": 3}, "mine")


def test_other_data_of_the_probes_have_a_subset_of_their_own():
    config = hybrid.get_config("cifar10_lt")
    assert probe_section(data_section(config))["subset"]["long_tail"] == 100.0
    config.data.probe.source = "folder"
    assert probe_section(data_section(config))["subset"]["long_tail"] == 1.0
