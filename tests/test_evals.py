"""Tests of dinotwins_jax.evals: knn, splits, linear, attention."""

import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from refs_evals import knn_scores, softmax_regression

from dinotwins_jax.evals import attention, knn, linear, splits

GOLDEN = Path(__file__).parent / "golden"


def blobs(num_images, dim, num_classes, *, spread=0.5, seed=0):
    """Features around one random corner per class, balanced labels; corners do not depend on seed."""
    corners = np.random.RandomState(99).normal(size=(num_classes, dim))
    rng = np.random.RandomState(seed)
    labels = np.arange(num_images, dtype=np.int32) % num_classes
    noise = rng.normal(size=(num_images, dim))
    return (corners[labels] + spread * noise).astype(np.float32), labels


# knn


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
    top1 = knn.top_k_accuracy(scores, data["test_labels"], 1)
    top5 = knn.top_k_accuracy(scores, data["test_labels"], min(5, k))
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


def test_top_k_accuracy_counts_ties_once_nan_never_and_leaves_unlabelled_out():
    scores = [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [np.nan, 0.0, 0.0], [5.0, 4.0, 3.0]]
    assert knn.top_k_accuracy(scores, [0, 0, 1, -1], 1) == 100.0
    assert knn.top_k_accuracy(scores, [1, 2, 0, -1], 1) == 0.0
    assert knn.top_k_accuracy(scores, [1, 2, 0, 2], 2) == 25.0
    assert knn.top_k_accuracy(scores, [1, 2, 0, 2], 5) == 75.0


# splits


def test_stratified_indices_counts():
    labels = np.repeat([0, 1, 2, -1], [40, 5, 1, 30])
    chosen = splits.stratified_indices(labels, 0.1, seed=3)
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen]).tolist() == [4, 1, 1]  # -1 would raise in bincount
    more = splits.stratified_indices(labels, 0.1, seed=3, minimum=3)
    assert np.bincount(labels[more]).tolist() == [4, 3, 1]
    everything = splits.stratified_indices(labels, 1.0, seed=3)
    np.testing.assert_array_equal(everything, np.flatnonzero(labels >= 0))


def test_stratified_indices_are_frozen_nested_and_independent_between_classes():
    labels = np.arange(60) % 3
    chosen = splits.stratified_indices(labels, 0.1, seed=0)
    # Written down once: a published split must never change with a library.
    assert chosen.tolist() == [14, 22, 30, 35, 46, 48]
    assert set(chosen) < set(splits.stratified_indices(labels, 0.3, seed=0))
    assert chosen.tolist() != splits.stratified_indices(labels, 0.1, seed=1).tolist()
    without_class_0 = np.where(labels == 0, -1, labels)
    np.testing.assert_array_equal(
        splits.stratified_indices(without_class_0, 0.1, seed=0), chosen[labels[chosen] != 0]
    )


def test_holdout_is_a_stratified_partition():
    labels = np.repeat([0, 1, 2, 3, -1], [20, 3, 2, 1, 4])
    indices = np.arange(len(labels))[::-1]
    fit, held = splits.holdout(labels, indices, 0.2, seed=0)
    assert np.bincount(labels[held], minlength=4).tolist() == [4, 1, 1, 0]
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, held])), np.flatnonzero(labels >= 0))
    again = splits.holdout(labels, indices[::-1], 0.2, seed=0)
    np.testing.assert_array_equal(held, again[1])


def test_split_errors_name_the_value():
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"fraction={fraction}"):
            splits.stratified_indices(np.zeros(4, int), fraction, 0)
    with pytest.raises(ValueError, match=r"fraction=1.0 held out"):
        splits.holdout(np.zeros(4, int), np.arange(4), 1.0, 0)
    with pytest.raises(ValueError, match="no labelled images"):
        splits.stratified_indices(np.full(4, -1), 0.5, 0)


# linear


def test_sgd_equals_the_plain_loop():
    features, labels = blobs(17, 5, 3, spread=2.0)
    order = linear.batch_order(np.arange(17), steps=12, batch_size=4, seed=1)
    weight = np.random.RandomState(2).normal(0, 0.01, (3, 5)).astype(np.float32)
    rates = np.array([0.01, 0.3], np.float32)
    weights, biases = linear.sgd(features, labels, order, weight, rates, 0.9)
    for row, rate in enumerate(rates):
        expected = softmax_regression(features, labels, order, weight.T, float(rate), 0.9)
        np.testing.assert_allclose(weights[row].T, expected[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(biases[row], expected[1], rtol=1e-4, atol=1e-5)


def test_batch_order_visits_every_image_once_a_pass():
    indices = np.array([3, 5, 8, 9, 12])
    order = linear.batch_order(indices, steps=5, batch_size=3, seed=0).ravel()
    for start in range(0, 15, 5):
        assert sorted(order[start : start + 5]) == indices.tolist()


def test_linear_probe_reaches_the_optimum_on_separable_features():
    train, train_labels = blobs(120, 16, 4, spread=0.2)
    test, test_labels = blobs(80, 16, 4, spread=0.2, seed=1)
    result = linear.linear_probe(train, train_labels, test, test_labels, num_classes=4)
    assert result["top1"] == result["top5"] == result["holdout_top1"] == 100.0
    assert result["learning_rate"] in linear.LEARNING_RATES
    assert (result["num_train"], result["num_test"]) == (120, 80)
    assert result["protocol"] == "linear-sgd-cached-v1"


def test_linear_probe_learning_rate_matters_and_ties_go_to_the_smaller():
    train, labels = blobs(90, 8, 3, spread=0.2)
    settings = {"num_classes": 3, "epochs": 2}  # two steps: too few for the small rates
    alone = {
        rate: linear.fit_linear_probe(
            train, labels, learning_rates=(rate,), **settings
        ).holdout_top1
        for rate in linear.LEARNING_RATES
    }
    best = [rate for rate, top1 in alone.items() if top1 == max(alone.values())]
    assert 1 < len(best) < len(alone)  # there are ties, and the rate does matter
    shuffled = linear.LEARNING_RATES[::-1]
    probe = linear.fit_linear_probe(train, labels, learning_rates=shuffled, **settings)
    assert (probe.learning_rate, probe.holdout_top1) == (min(best), alone[min(best)])


def test_test_labels_never_choose_the_learning_rate_or_the_weights(monkeypatch):
    train, train_labels = blobs(90, 8, 3, spread=3.0)
    test, test_labels = blobs(60, 8, 3, spread=3.0, seed=1)
    scored = []

    def spy(scores, labels, k):
        if len(labels) == 60 and k == 1:
            scored.append(np.asarray(scores))
        return knn.top_k_accuracy(scores, labels, k)

    monkeypatch.setattr(linear, "top_k_accuracy", spy)
    results = [
        linear.linear_probe(train, train_labels, test, labels, num_classes=3, epochs=20)
        for labels in (test_labels, (test_labels + 1) % 3)
    ]
    assert results[0]["top1"] > 50.0 > results[1]["top1"]
    assert results[0]["learning_rate"] == results[1]["learning_rate"]
    assert results[0]["holdout_top1"] == results[1]["holdout_top1"]
    assert len(scored) == 2  # once a probe: the test set is scored by no other learning rate
    np.testing.assert_array_equal(scored[0], scored[1])


def test_linear_probe_ignores_scale_constant_dimensions_unlabelled_and_missing_classes():
    train, train_labels = blobs(90, 8, 3, spread=0.2)
    test, test_labels = blobs(60, 8, 3, spread=0.2, seed=1)

    def disguise(features, constant):
        rows = np.full((len(features), 1), constant, np.float32)
        return np.concatenate([features * 1000.0 + 7.0, rows], axis=1)

    train_labels, test_labels = train_labels + 1, test_labels + 1  # class 0 and 4 have no image
    train_labels[::9] = -1
    test_labels[::7] = -1
    result = linear.linear_probe(
        disguise(train, 0.1), train_labels, disguise(test, 0.2), test_labels, num_classes=5
    )
    assert result["top1"] == 100.0
    assert result["num_train"] == (train_labels >= 0).sum()
    assert result["num_test"] == (test_labels >= 0).sum()


def test_linear_probe_with_one_image_a_class_has_nothing_to_hold_out():
    train, labels = blobs(3, 8, 3)
    result = linear.linear_probe(train, labels, train, labels, num_classes=3, epochs=20)
    assert result["holdout_top1"] is None
    assert result["top1"] == 100.0


def test_linear_probe_splits_sums_up_its_splits_and_compiles_once():
    train, train_labels = blobs(200, 8, 4, spread=2.0)
    test, test_labels = blobs(100, 8, 4, spread=2.0, seed=1)
    before = linear.sgd._cache_size()
    result = linear.linear_probe_splits(
        train, train_labels, test, test_labels, num_classes=4, fraction=0.1, epochs=20
    )
    assert linear.sgd._cache_size() - before == 2  # the selection and the final fit
    top1 = [split["top1"] for split in result["splits"]]
    assert [split["split_seed"] for split in result["splits"]] == [0, 1, 2, 3, 4]
    assert all(split["num_train"] == 20 for split in result["splits"])
    assert len(set(top1)) > 1
    assert result["top1_mean"] == pytest.approx(np.mean(top1))
    assert result["top1_std"] == pytest.approx(np.std(top1, ddof=1))
    assert result["fraction"] == 0.1


def test_linear_probe_errors_name_the_value():
    train, labels = blobs(12, 4, 3)
    with pytest.raises(ValueError, match="no labelled images"):
        linear.linear_probe(train, np.full(12, -1), train, labels, num_classes=3)
    with pytest.raises(ValueError, match=r"learning_rates=\(\)"):
        linear.linear_probe(train, labels, train, labels, num_classes=3, learning_rates=())
    with pytest.raises(ValueError, match="test set: label 2 does not fit num_classes=2"):
        linear.linear_probe(train, labels % 2, train, labels, num_classes=2)
    with pytest.raises(ValueError, match="split_seeds"):
        linear.linear_probe_splits(
            train, labels, train, labels, num_classes=3, fraction=0.5, split_seeds=()
        )


# attention


@pytest.mark.parametrize("keep", [60, 30])
def test_mass_mask_equals_the_official_code(keep):
    data = np.load(GOLDEN / "attention_mass.npz")
    for maps in (data["attention"], jnp.asarray(data["attention"] * 7.0)):
        np.testing.assert_array_equal(
            attention.mass_mask(maps, keep=keep / 100), data[f"mask_{keep}"]
        )


def test_mass_mask_keeps_the_fewest_patches_with_that_mass():
    maps = np.array([[[0.1, 0.5], [0.25, 0.15]], [[0.0, 0.0], [0.0, 0.0]]])
    expected = [[[False, True], [True, False]], [[False, False], [False, False]]]
    assert attention.mass_mask(maps, keep=0.6).tolist() == expected
    for keep in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"keep={keep}"):
            attention.mass_mask(maps, keep=keep)


def test_cls_attention_skips_class_token_and_registers():
    full = np.arange(2 * 3 * 9 * 9, dtype=np.float32).reshape(2, 3, 9, 9)
    maps = attention.cls_attention(full, (2, 3), num_prefix_tokens=3)
    assert maps.shape == (2, 3, 2, 3)
    for b, head, row, column in np.ndindex(2, 3, 2, 3):
        assert maps[b, head, row, column] == full[b, head, 0, 3 + 3 * row + column]
    with pytest.raises(ValueError, match=r"attention has 9 tokens.* tokens: 7"):
        attention.cls_attention(full, (2, 3))


def test_outline_is_the_border_of_the_mask():
    mask = np.zeros((3, 4), bool)
    mask[1, 1:3] = True
    sides = {((1, 1), (2, 1)), ((2, 1), (3, 1)), ((1, 2), (2, 2)), ((2, 2), (3, 2))}
    assert set(attention._edges(mask)) == sides | {((1, 1), (1, 2)), ((3, 1), (3, 2))}


def test_attention_grid_writes_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.RandomState(0)
    images = rng.randint(0, 255, (2, 32, 48, 3), np.uint8)
    maps = rng.rand(2, 8, 2, 3)
    path = tmp_path / "attention.png"
    attention.attention_grid(path, images, maps, titles=["one", "two"])
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    # 9 columns (six of the eight heads) of 1.5 x 1 inch at 150 dpi, two rows, and margins.
    assert 9 * 225 < width < 9 * 240 and 2 * 150 < height < 2 * 240
    with pytest.raises(ValueError, match="1 titles for 2 images"):
        attention.attention_grid(path, images, maps, titles=["one"])
    with pytest.raises(ValueError, match=r"images \(1, 32, 48, 3\)"):
        attention.attention_grid(path, images[:1], maps)
