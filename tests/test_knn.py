"""Tests of dinotwins_jax.evals.knn."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blobs import blobs
from refs_evals import knn_multilabel_scores, knn_scores
from sklearn.metrics import average_precision_score

from dinotwins_jax.evals import knn
from dinotwins_jax.evals.scores import class_scores, single_label_scores, top_k_accuracy

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


def test_the_same_small_program_serves_any_number_of_images(monkeypatch):
    monkeypatch.setattr(knn, "TEST_ROWS", 16)
    monkeypatch.setattr(knn, "TRAIN_ROWS", 64)
    lowered, step = {}, knn._nearer

    def watch(*blocks):
        shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(blocks))
        if shapes not in lowered:
            lowered[shapes] = step.lower(*blocks).compile().memory_analysis()
        return step(*blocks)

    monkeypatch.setattr(knn, "_nearer", watch)
    largest = []
    for size in (1, 4):
        train, labels = blobs(300 * size, 8, 3)
        knn.knn_scores(train, labels, train[: 40 * size], labels[: 40 * size], num_classes=3)
        largest.append(max(memory.temp_size_in_bytes for memory in lowered.values()))
    assert len(lowered) == 1 and largest[0] == largest[1]
    # A few float32 arrays of 16 x (64 + 200) similarities, where all of them would take 3 MB.
    assert largest[0] < 8 * 4 * 16 * (64 + 200)


def test_knn_scores_of_every_k_equal_knn_classify(monkeypatch):
    monkeypatch.setattr(knn, "TRAIN_ROWS", 50)
    (x, y), (z, t) = blobs(120, 4, 8, spread=1.0), blobs(70, 4, 8, spread=1.0, seed=1)
    y[::7], t[::9] = -1, -1
    result = knn.knn_scores(x, y, z, t, ks=(1, 3, 20, 500), temperature=0.1, num_classes=8)
    assert result.pop("protocol") == "knn-cosine-T0.1-v1"
    assert list(result) == ["k1", "k3", "k20", "k500"]
    for name, found in result.items():
        k = int(name[1:])
        votes = knn.knn_classify(x, y, z, k, 0.1, 8)
        assert found == {
            "top1": top_k_accuracy(votes, t, 1),
            "top5": top_k_accuracy(votes, t, min(5, k)),
            "balanced": single_label_scores(votes, t, {"top1": 1})["balanced"],
        }
    assert result["k1"]["top1"] == result["k1"]["top5"] < result["k20"]["top5"]
    assert knn.knn_scores(x, y, z, t, num_classes=8)["protocol"] == "knn-cosine-T0.07-v1"
    options = {"ks": (3, 20), "temperature": 0.1, "num_classes": 8}
    found = knn.knn_scores(x, y, z, t, classes_of=20, **options)
    assert "classes" not in found["k3"]
    expected = class_scores(knn.knn_classify(x, y, z, 20, 0.1, 8), t)
    assert found["k20"] == result["k20"] | {"classes": expected}


@pytest.mark.parametrize("temperature", [0.2, 1e-3])
def test_multi_label_knn_equals_the_plain_loop_and_scikit_learn(monkeypatch, temperature):
    monkeypatch.setattr(knn, "TEST_ROWS", 16)
    monkeypatch.setattr(knn, "TRAIN_ROWS", 30)
    rng = np.random.RandomState(0)
    train, test = rng.normal(size=(70, 4)) + 1, rng.normal(size=(41, 4)) + 1
    labels, test_labels = (x @ rng.normal(size=(4, 3)) > 0.5 for x in (train, test))
    votes = {}
    monkeypatch.setattr(
        knn.scores, "mean_average_precision", spy(votes, knn.scores.mean_average_precision)
    )
    result = knn.knn_scores(
        train, labels, test, test_labels, ks=(5, 40), temperature=temperature, num_classes=3
    )
    assert result.pop("protocol") == f"knn-cosine-T{temperature:g}-multilabel-v1"
    if temperature == 0.2:  # at 1e-3 the plain loop's votes overflow
        for k, found in zip((5, 40), votes["seen"], strict=True):
            expected = knn_multilabel_scores(train, labels, test, k, temperature)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    for (name, found), scores in zip(result.items(), votes["seen"], strict=True):
        assert name in ("k5", "k40") and np.isfinite(scores).all()
        expected = 100 * average_precision_score(test_labels, scores, average="macro")
        assert found == {"map": pytest.approx(expected, abs=1e-3)}


def spy(record, function):
    """Wraps the function to record its first arguments in record["seen"]."""

    def wrapped(first, *others):
        record.setdefault("seen", []).append(first)
        return function(first, *others)

    return wrapped


def test_knn_scores_errors_name_the_value():
    x, y = blobs(12, 4, 3)
    multi_hot = np.eye(3, dtype=bool)[y]
    with pytest.raises(ValueError, match="ks is empty"):
        knn.knn_scores(x, y, x, y, ks=(), num_classes=3)
    with pytest.raises(ValueError, match="k=0"):
        knn.knn_scores(x, y, x, y, ks=(5, 0), num_classes=3)
    with pytest.raises(ValueError, match=r"training labels \(12, 3\) and test labels \(12,\)"):
        knn.knn_scores(x, multi_hot, x, y, num_classes=3)
    with pytest.raises(ValueError, match=r"labels \(12, 3\) must be \[M, C\] = \[12, 4\]"):
        knn.knn_scores(x, multi_hot, x, multi_hot, num_classes=4)
    with pytest.raises(ValueError, match="no test images"):
        knn.knn_scores(x, y, x[:0], y[:0], num_classes=3)
