"""Tests of dinotwins_jax.evals.knn."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from blobs import blobs
from refs_evals import knn_scores

from dinotwins_jax.evals import knn
from dinotwins_jax.evals.scores import top_k_accuracy

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("k", [1, 10, 20])
@pytest.mark.parametrize("blocks", [(256, 8192), (64, 70)])
def test_knn_reaches_the_official_accuracies(monkeypatch, k, blocks):
    monkeypatch.setattr(knn, "TEST_ROWS", blocks[0])
    monkeypatch.setattr(knn, "TRAIN_ROWS", blocks[1])
    data = np.load(GOLDEN / "knn.npz")
    num_classes = int(data["train_labels"].max()) + 1
    scores = knn.knn_classify(
        data["train"],
        data["train_labels"],
        data["test"],
        k,
        float(data["temperature"]),
        num_classes,
    )
    assert scores.shape == (len(data["test"]), num_classes)
    top1 = top_k_accuracy(scores, data["test_labels"], 1)
    top5 = top_k_accuracy(scores, data["test_labels"], min(5, k))
    assert top1 == pytest.approx(float(data[f"top1_k{k}"]), abs=1e-4)
    assert top5 == pytest.approx(float(data[f"top5_k{k}"]), abs=1e-4)


@pytest.mark.parametrize("blocks", [(256, 8192), (3, 5), (7, 1)])
@pytest.mark.parametrize("k", [1, 4, 1000])
def test_knn_equals_the_plain_loop(monkeypatch, k, blocks):
    monkeypatch.setattr(knn, "TEST_ROWS", blocks[0])
    monkeypatch.setattr(knn, "TRAIN_ROWS", blocks[1])
    rng = np.random.RandomState(0)
    train, test = rng.normal(size=(23, 6)), rng.normal(size=(7, 6))
    labels = rng.randint(-1, 4, 23)
    scores = knn.knn_classify(
        train_features=train,
        train_labels=labels,
        test_features=test,
        k=k,
        temperature=0.2,
        num_classes=5,
    )
    assert scores.dtype == jnp.float32
    expected = knn_scores(train, labels, test, k, 0.2, 5)
    np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=1e-6)


def test_knn_works_with_one_test_image_and_any_temperature():
    train, labels = blobs(12, 4, 3)
    scores = np.asarray(knn.knn_classify(train, labels, train[:1], 3, 1e-3, 3))
    assert np.isfinite(scores).all() and scores[0].argmax() == labels[0]
    assert knn.knn_classify(train, labels, train[:0], 3, 0.07, 3).shape == (0, 3)


def test_knn_errors_name_the_value():
    train, labels = blobs(12, 4, 3)
    with pytest.raises(ValueError, match="k=0"):
        knn.knn_classify(train, labels, train, 0, 0.07, 3)
    with pytest.raises(ValueError, match="temperature=0"):
        knn.knn_classify(train, labels, train, 1, 0, 3)
    with pytest.raises(ValueError, match="num_classes=2"):
        knn.knn_classify(train, labels, train, 1, 0.07, 2)
    with pytest.raises(ValueError, match="no labelled images"):
        knn.knn_classify(train, np.full(12, -1), train, 1, 0.07, 3)
    with pytest.raises(ValueError, match=r"test features \(12, 3\)"):
        knn.knn_classify(train, labels, train[:, :3], 1, 0.07, 3)
