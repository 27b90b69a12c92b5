"""Tests of dinotwins_jax.evals.scores."""

import numpy as np

from dinotwins_jax.evals.scores import top_k_accuracy


def test_top_k_accuracy_counts_ties_once_nan_never_and_leaves_unlabelled_out():
    scores = [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [np.nan, 0.0, 0.0], [5.0, 4.0, 3.0]]
    assert top_k_accuracy(scores, [0, 0, 1, -1], 1) == 100.0
    assert top_k_accuracy(scores, [1, 2, 0, -1], 1) == 0.0
    assert top_k_accuracy(scores, [1, 2, 0, 2], 2) == 25.0
    assert top_k_accuracy(scores, [1, 2, 0, 2], 5) == 75.0
