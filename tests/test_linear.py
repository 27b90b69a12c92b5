"""Tests of dinotwins_jax.evals.linear."""

import jax.numpy as jnp
import numpy as np
import pytest
from blobs import blobs
from golden_files import assert_close, load
from refs_evals import softmax_regression
from refs_probes import sigmoid_regression

from dinotwins_jax.evals import linear
from dinotwins_jax.evals import scores as scores_module
from dinotwins_jax.evals.scores import label_ranks


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


def test_sgd_equals_pytorch_s():
    """Rates are for 256 images, as there; the batches have 128."""
    golden = load("linear_sgd")
    x, labels, order = golden["x"], np.int32(golden["y"]), np.int32(golden["order"])
    rates = np.float32([0.01, 0.1]) * order.shape[1] / 256
    weights, biases = linear.sgd(x, labels, order, golden["w0"], rates, np.float32(0.9))
    for row, rate in enumerate(("0.01", "0.1")):
        assert_close(weights[row], golden[f"w{rate}"], 1e-5)
        assert_close(biases[row], golden[f"b{rate}"], 1e-5)


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
        rate: linear.fit_linear_probe(train, labels, learning_rates=(rate,), **settings).holdout
        for rate in linear.LEARNING_RATES
    }
    best = [rate for rate, top1 in alone.items() if top1 == max(alone.values())]
    assert 1 < len(best) < len(alone)  # there are ties, and the rate does matter
    shuffled = linear.LEARNING_RATES[::-1]
    probe = linear.fit_linear_probe(train, labels, learning_rates=shuffled, **settings)
    assert (probe.learning_rate, probe.holdout) == (min(best), alone[min(best)])


def test_test_labels_never_choose_the_learning_rate_or_the_weights(monkeypatch):
    train, train_labels = blobs(90, 8, 3, spread=3.0)
    test, test_labels = blobs(60, 8, 3, spread=3.0, seed=1)
    scored = []

    def spy(scores, labels):
        if len(labels) == 60:
            scored.append(np.asarray(scores))
        return label_ranks(scores, labels)

    monkeypatch.setattr(scores_module, "label_ranks", spy)
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


# several labels an image


def several(num_images, dim=12, classes=5, seed=0):
    """Features whose signs say which of the classes an image shows; the last class is rare."""
    rng = np.random.RandomState(seed)
    features = rng.normal(size=(num_images, dim)).astype(np.float32)
    shows = features[:, :classes] + 0.5 * rng.normal(size=(num_images, classes)) > 0.5
    shows[:, -1] = np.arange(num_images) % 17 == 0
    return features, shows


def test_multi_label_sgd_equals_the_plain_loop():
    features, labels = several(19)
    order = linear.batch_order(np.arange(19), steps=9, batch_size=4, seed=1)
    weight = np.random.RandomState(2).normal(0, 0.01, (5, 12)).astype(np.float32)
    rates = jnp.array([0.3, 2.0])
    weights, biases = linear.sgd(features, labels, order, weight, rates, jnp.float32(0.9))
    for w, b, rate in zip(weights, biases, (0.3, 2.0), strict=True):
        expected = sigmoid_regression(features, labels, order, weight, rate, 0.9)
        np.testing.assert_allclose(w, expected[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(b, expected[1], rtol=1e-4, atol=1e-5)


def test_multi_label_probe_learns_what_there_is_to_learn():
    (x, y), (z, t) = several(300), several(200, seed=1)
    result = linear.linear_probe_splits(
        x, y, z, t, num_classes=5, fraction=0.5, split_seeds=(0, 1), epochs=30
    )
    assert result["protocol"] == "multilabel-sgd-cached-v1"
    informative = linear.linear_probe(x, y[:, :4], z, t[:, :4], num_classes=4, epochs=30)
    assert informative["map"] > 75.0 and informative["f1_micro"] > 60.0
    assert result["map_mean"] < informative["map"]  # the rare class is noise
    assert {"map_std", "f1_macro_mean", "f1_micro_std"} <= set(result) and "top1_mean" not in result


def test_with_all_labels_all_draws_are_one():
    x, y = blobs(40, 6, 4, spread=2.0)
    result = linear.linear_probe_splits(
        x, y, x, y, num_classes=4, fraction=1.0, split_seeds=(0, 1, 2), epochs=2
    )
    assert result["top1_std"] == 0.0 and [s["split_seed"] for s in result["splits"]] == [0, 1, 2]


@pytest.mark.parametrize("labels", ["one", "several"])
def test_fewer_images_than_columns_give_the_probe_of_all_columns(monkeypatch, labels):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(12, 40)).astype(np.float32)
    truth = np.arange(12) % 3 if labels == "one" else rng.random((12, 3)) < 0.5

    def fit():
        return linear.fit_linear_probe(features, truth, num_classes=3, epochs=20, batch_size=4)

    short = fit()
    monkeypatch.setattr(linear, "_in_their_span", lambda x, weight: (x, weight, lambda w: w))
    whole = fit()
    assert short.learning_rate == whole.learning_rate and short.holdout == whole.holdout
    np.testing.assert_allclose(short.weight, whole.weight, atol=2e-6)
    np.testing.assert_allclose(short.bias, whole.bias, atol=2e-6)
