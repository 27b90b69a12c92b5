"""Tests of dinotwins_jax.evals.scores."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from dinotwins_jax.evals.scores import f1_scores, mean_average_precision, top_k_accuracy


def test_top_k_accuracy_counts_ties_once_nan_never_and_leaves_unlabelled_out():
    scores = [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [np.nan, 0.0, 0.0], [5.0, 4.0, 3.0]]
    assert top_k_accuracy(scores, [0, 0, 1, -1], 1) == 100.0
    assert top_k_accuracy(scores, [1, 2, 0, -1], 1) == 0.0
    assert top_k_accuracy(scores, [1, 2, 0, 2], 2) == 25.0
    assert top_k_accuracy(scores, [1, 2, 0, 2], 5) == 75.0


def yes_or_no(num_images=60, classes=6, seed=0):
    rng = np.random.RandomState(seed)
    targets = rng.uniform(size=(num_images, classes)) < np.linspace(0.05, 0.6, classes)
    targets[:, 2] = False  # a class without a positive
    scores = np.round(rng.normal(size=targets.shape) + targets, 1)  # many equal scores
    return scores.astype(np.float32), targets


def test_mean_average_precision_is_scikit_learns():
    scores, targets = yes_or_no()
    present = [c for c in range(6) if targets[:, c].any()]
    expected = np.mean([average_precision_score(targets[:, c], scores[:, c]) for c in present])
    assert mean_average_precision(scores, targets) == pytest.approx(100 * expected)
    assert mean_average_precision(targets.astype(float), targets) == 100.0


def test_f1_is_scikit_learns():
    scores, targets = yes_or_no()
    yes = scores > 0.5
    yes[:, 0] = False  # a class that is never predicted
    present = targets.any(axis=0)
    found = f1_scores(yes, targets)
    macro = f1_score(targets[:, present], yes[:, present], average="macro", zero_division=0)
    micro = f1_score(targets, yes, average="micro", zero_division=0)
    assert found == {
        "f1_macro": pytest.approx(100 * macro),
        "f1_micro": pytest.approx(100 * micro),
    }


def test_errors_name_shapes_nan_and_the_lack_of_positives():
    with pytest.raises(ValueError, match=r"\(2, 3\) and targets \(2, 2\)"):
        mean_average_precision(np.zeros((2, 3)), np.zeros((2, 2), bool))
    with pytest.raises(ValueError, match="1 of 6 scores are NaN"):
        mean_average_precision(np.array([[0, 1, np.nan], [0, 1, 2]]), np.ones((2, 3), bool))
    for function in (mean_average_precision, f1_scores):
        with pytest.raises(ValueError, match="no positive among 2 images"):
            function(np.zeros((2, 3)), np.zeros((2, 3), bool))
