"""The generated scenes: reproducible, labelled only by texture and outline."""

import numpy as np
import pytest

from dinotwins_jax.data import make_source
from dinotwins_jax.data.scenes import Scenes


def pictures(source):
    return np.stack([source[i] for i in range(len(source))])


def test_a_scene_depends_on_seed_split_and_index_alone():
    a, b = Scenes("pretrain", num_train=6), Scenes("train", num_train=6)
    backwards = [b[i] for i in reversed(range(6))][::-1]
    np.testing.assert_array_equal(pictures(a), np.stack(backwards))
    np.testing.assert_array_equal(a.labels, b.labels)
    for other in (Scenes("train", num_train=6, seed=1), Scenes("test", num_test=6)):
        assert not np.array_equal(pictures(a), pictures(other))
    fewer = Scenes("train", num_train=3)
    np.testing.assert_array_equal(pictures(fewer), pictures(a)[:3])


def test_the_scenes_of_pretraining_are_drawn_once_for_the_probes_too():
    drawn, again = Scenes("pretrain", num_train=3, seed=7), Scenes("train", num_train=3, seed=7)
    assert again[2] is drawn[2]
    for other in (Scenes("test", num_train=3, num_test=3, seed=7), Scenes("train", num_train=3)):
        assert not np.array_equal(other[2], drawn[2])
    assert Scenes("train", num_train=3, seed=7, size=32)[2].shape == (32, 32, 3)
    kept = drawn[2]
    del drawn, again  # nothing is kept for nobody
    assert Scenes("train", num_train=3, seed=7)[2] is not kept


def test_pictures_masks_and_labels_agree():
    source = Scenes("train", num_train=40, size=48)
    for i in range(len(source)):
        image, (masks, categories) = source[i], source.masks(i)
        assert image.shape == (48, 48, 3) and image.dtype == np.uint8
        assert masks.shape == (len(categories), 48, 48) and masks.dtype == bool
        assert masks.sum(0).max() <= 1  # every pixel belongs to one object at most
        areas = masks.sum((1, 2))
        assert areas.argmax() == len(areas) - 1 and categories[-1] == source.labels[i]
        assert 0.1 * 48**2 < areas[-1] < 0.95 * 48**2
    assert len(set(source.class_names)) == 10


def test_an_object_looks_unlike_what_lies_behind_it():
    """The texture's contrast is visible inside the mask."""
    source = Scenes("train", num_train=30)
    ratio = []
    for i in range(30):
        grey = source[i].astype(float).mean(-1)
        edges = np.hypot(*np.gradient(grey))
        inside = source.masks(i)[0].any(0)
        ratio.append(edges[inside].mean() / edges[~inside].mean())
    assert np.median(ratio) > 1.5


def centroid_accuracy(train, train_labels, test, test_labels):
    centroids = np.stack([train[train_labels == c].mean(0) for c in range(10)])
    distance = ((test[:, None] - centroids) ** 2).sum(-1)
    return (distance.argmin(1) == test_labels).mean()


def test_colours_and_raw_pixels_say_little_about_the_label():
    train, test = Scenes("train", num_train=1000), Scenes("test", num_test=500)
    x, z = pictures(train), pictures(test)

    def histogram(images):
        bins = (images // 32).reshape(len(images), -1, 3) + np.arange(3) * 8
        return np.stack([np.bincount(b.ravel(), minlength=24) for b in bins]) / bins.shape[1]

    def pixels(images):
        return images[:, ::4, ::4].reshape(len(images), -1) / 255.0

    for features in (histogram, pixels):
        accuracy = centroid_accuracy(features(x), train.labels, features(z), test.labels)
        assert accuracy < 0.25, (features.__name__, accuracy)  # chance is 0.10 ± 0.013


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 8}, "size is 8"), ({"num_test": 0}, "got 0"), ({"sides": 3}, "sides")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_source("scenes", "test", **options)
