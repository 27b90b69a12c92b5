"""Tests of dinotwins_jax.evals.fewshot."""

import numpy as np
import pytest
from blobs import blobs
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

from dinotwins_jax.evals import fewshot


def test_few_shot_equals_nearest_centroid_of_scikit_learn():
    (x, y), (z, t) = blobs(60, 6, 4, spread=1.5), blobs(200, 6, 4, spread=1.5, seed=1)
    result = fewshot.few_shot(x, y, z, t, num_classes=4, shots=(2, 5), split_seeds=(0, 7))
    assert result["protocol"] == "fewshot-nearest-mean-v1" and result["num_test"] == 200
    center = x.mean(axis=0)
    for n in (2, 5):
        accuracies = []
        for seed, split in zip((0, 7), result[f"shots{n}"]["splits"], strict=True):
            drawn = fewshot.shot_indices(y, n, seed)
            model = NearestCentroid().fit(normalize(x[drawn] - center), y[drawn])
            guesses = model.predict(normalize(z - center))
            accuracies.append(100 * np.mean(guesses == t))
            assert split == {
                "split_seed": seed,
                "top1": pytest.approx(accuracies[-1]),
                "balanced": pytest.approx(100 * balanced_accuracy_score(t, guesses)),
                "num_train": 4 * n,
            }
        assert result[f"shots{n}"]["top1_mean"] == pytest.approx(np.mean(accuracies))
        assert result[f"shots{n}"]["top1_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert 30 < result["shots2"]["top1_mean"] < result["shots5"]["top1_mean"] < 100


def test_shots_are_frozen_nested_and_at_most_all_a_class_has():
    labels = np.repeat([0, 1, 2, -1], [20, 3, 1, 10])[np.random.RandomState(0).permutation(34)]
    one, five = (fewshot.shot_indices(labels, n, seed=3) for n in (1, 5))
    assert np.bincount(labels[one]).tolist() == [1, 1, 1]
    assert np.bincount(labels[five]).tolist() == [5, 3, 1]
    assert set(one) < set(five)
    # Written down once: a published draw must never change with a library.
    assert fewshot.shot_indices(np.arange(60) % 3, 2, seed=0).tolist() == [14, 22, 30, 35, 46, 48]
    assert fewshot.shot_indices(labels, 5, seed=4).tolist() != five.tolist()


def test_a_class_without_training_image_is_missed_and_unlabelled_images_center():
    x = np.array([[0.0, 1.0], [0.0, -1.0], [6.0, 0.0]])
    y = np.array([0, 1, -1])
    options = {"num_classes": 3, "shots": (1,), "split_seeds": (0,)}
    seen = fewshot.few_shot(x, y, x[:2], y[:2], **options)
    assert seen["shots1"]["top1_mean"] == 100.0 and seen["shots1"]["top1_std"] == 0.0
    missed = fewshot.few_shot(x, y, x[:2], np.array([0, 2]), **options)
    assert missed["shots1"]["top1_mean"] == 50.0
    # (5, 2) lies nearer the first image's direction, but on the other side of the center (2, 0).
    scores = fewshot.nearest_mean_scores(
        x[:2], y[:2], np.array([[5.0, 2.0]]), center=x.mean(axis=0), num_classes=3
    )
    z, w = np.array([3, 2]) / 13**0.5, np.array([[-2, 1], [-2, -1]]) / 5**0.5
    np.testing.assert_allclose(scores, [[*(w @ z - 0.5), -np.inf]])


def test_few_shot_errors_name_the_value():
    x, y = blobs(12, 4, 3)
    with pytest.raises(ValueError, match=r"shots=\(0,\)"):
        fewshot.few_shot(x, y, x, y, num_classes=3, shots=(0,))
    with pytest.raises(ValueError, match=r"split_seeds=\(\)"):
        fewshot.few_shot(x, y, x, y, num_classes=3, split_seeds=())
    with pytest.raises(ValueError, match="test set: label 2"):
        fewshot.few_shot(x, np.minimum(y, 1), x, y, num_classes=2)
    with pytest.raises(ValueError, match="no labelled images"):
        fewshot.few_shot(x, np.full(12, -1), x, y, num_classes=3)
