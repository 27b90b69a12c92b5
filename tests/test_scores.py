"""Tests of dinotwins_jax.evals.scores."""

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_recall_fscore_support,
    recall_score,
)

from dinotwins_jax.evals.scores import (
    class_scores,
    f1_scores,
    is_unbalanced,
    mean_average_precision,
    single_label_scores,
    top_k_accuracy,
)


def test_top_k_accuracy_counts_ties_once_nan_never_and_leaves_unlabelled_out():
    scores = [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [np.nan, 0.0, 0.0], [5.0, 4.0, 3.0]]
    assert top_k_accuracy(scores, [0, 0, 1, -1], 1) == 100.0
    assert top_k_accuracy(scores, [1, 2, 0, -1], 1) == 0.0
    assert top_k_accuracy(scores, [1, 2, 0, 2], 2) == 25.0
    assert top_k_accuracy(scores, [1, 2, 0, 2], 5) == 75.0


def unbalanced(num_images=225, seed=0):
    """Scores and labels of five classes: one has most images, one is never predicted, one has none."""
    rng = np.random.RandomState(seed)
    labels = rng.choice(4, num_images, p=[0.8, 0.12, 0.05, 0.03])
    scores = np.round(rng.normal(size=(num_images, 5)) + 1.5 * np.eye(5)[labels], 1)  # many ties
    scores[:, 3] = -9.0
    labels[::20] = -1
    return scores, labels


def test_balanced_accuracy_is_scikit_learns_and_a_plain_loops():
    scores, labels = unbalanced()
    known = labels >= 0
    predicted = scores.argmax(axis=1)
    found = single_label_scores(scores, labels, {"top1": 1})
    recalls = []
    for c in range(4):
        images = [i for i in range(len(labels)) if labels[i] == c]
        recalls.append(sum(predicted[i] == c for i in images) / len(images))
    assert found["balanced"] == pytest.approx(100 * np.mean(recalls))
    expected = recall_score(labels[known], predicted[known], labels=range(4), average="macro")
    assert found["balanced"] == pytest.approx(100 * expected)
    assert found["top1"] == top_k_accuracy(scores, labels, 1) > found["balanced"]
    same = np.arange(40) % 5
    equal = single_label_scores(scores[:40], same, {"top1": 1})
    assert equal["balanced"] == pytest.approx(equal["top1"])


def test_scores_by_class_are_scikit_learns():
    scores, labels = unbalanced()
    known = labels >= 0
    precision, recall, f1, support = precision_recall_fscore_support(
        labels[known], scores[known].argmax(axis=1), labels=range(5), zero_division=np.nan
    )
    found = class_scores(scores, labels)
    assert found["support"] == support.tolist() and support[4] == 0
    assert found["recall"][:4] == pytest.approx(100 * recall[:4]) and found["recall"][4] is None
    # never predicted: no precision, no image recalled
    assert found["precision"][3] is None and found["recall"][3] == 0.0 and np.isnan(precision[3])
    rest = [0, 1, 2, 4]
    assert [found["precision"][c] for c in rest] == pytest.approx(100 * precision[rest])
    assert found["f1"][:4] == pytest.approx(100 * f1[:4]) and found["f1"][4] is None


def test_average_precision_by_class():
    scores, targets = yes_or_no()
    found = class_scores(scores, targets)
    assert found["support"] == targets.sum(axis=0).tolist()
    assert found["average_precision"][2] is None
    for c in (0, 1, 3, 4, 5):
        expected = average_precision_score(targets[:, c], scores[:, c])
        assert found["average_precision"][c] == pytest.approx(100 * expected)


def test_unbalanced_is_half_as_many_images_again():
    assert is_unbalanced(np.repeat([0, 1, 3, -1], [200, 20, 5, 500]))
    assert is_unbalanced(np.repeat([0, 2], [3, 2])) and not is_unbalanced(np.repeat([0, 2], [4, 3]))
    assert not is_unbalanced(np.array([5, 5])) and not is_unbalanced(np.full(3, -1))


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
