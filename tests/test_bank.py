"""The bank of probes: agreement with scikit-learn, selection on training labels only."""

import numpy as np
import pytest
from blobs import blobs
from sklearn.linear_model import LogisticRegression, Ridge

from dinotwins_jax.evals import bank, protocol, solvers


def problem(multi, num_images=80, dim=7, seed=0):
    """(features f32[M, D] standardised, labels) that no linear classifier gets all right."""
    rng = np.random.RandomState(seed)
    x = rng.normal(size=(num_images, dim)) * rng.uniform(0.2, 3.0, dim)
    noisy = x[:, :3] + rng.normal(size=(num_images, 3))
    labels = noisy > 0.4 if multi else noisy.argmax(axis=1).astype(np.int32)
    return x, labels


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("dim", [7, 120])  # primal, and dual
def test_ridge_is_scikit_learns(multi, dim):
    x, labels = problem(multi, dim=dim)
    targets = solvers.targets_of(labels, 3)
    rates = (10.0, 0.3, 1e-3)
    weights, biases = solvers.ridge(x, targets, rates)
    alone = [
        np.concatenate(parts)
        for parts in zip(*(solvers.ridge(x, targets, (r,)) for r in rates), strict=True)
    ]
    np.testing.assert_allclose(alone[0], weights, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(alone[1], biases, rtol=1e-6, atol=1e-9)
    for weight, bias, rate in zip(weights, biases, rates, strict=True):
        expected = Ridge(alpha=rate * len(x), solver="svd").fit(x, targets)
        np.testing.assert_allclose(weight.T, expected.coef_, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(bias, expected.intercept_, rtol=1e-7, atol=1e-9)


def test_logistic_is_scikit_learns():
    """To 1e-4 of the largest weight: both stop at a gradient of 1e-7."""
    x, labels = problem(False)
    rates = (1.0, 0.03, 1e-3)
    weights, biases = solvers.logistic(x, labels, 3, rates)
    for weight, bias, rate in zip(weights, biases, rates, strict=True):
        expected = LogisticRegression(C=1 / (rate * len(x)), tol=1e-8, max_iter=5000).fit(x, labels)
        scale = np.abs(expected.coef_).max()
        np.testing.assert_allclose(weight.T, expected.coef_, atol=1e-4 * scale)
        centred = expected.intercept_ - expected.intercept_.mean()  # softmax leaves their mean free
        np.testing.assert_allclose(bias - bias.mean(), centred, atol=1e-4 * scale)


def test_multi_label_logistic_is_one_scikit_learn_a_class():
    x, labels = problem(True)
    weights, biases = solvers.logistic(x, labels, 3, (0.1,))
    for c in range(3):
        expected = LogisticRegression(C=1 / (0.1 * len(x)), tol=1e-8, max_iter=5000)
        expected.fit(x, labels[:, c])
        np.testing.assert_allclose(weights[0][:, c], expected.coef_[0], atol=1e-4)
        np.testing.assert_allclose(biases[0][c], expected.intercept_[0], atol=1e-4)


@pytest.mark.parametrize("solver", bank.SOLVERS)
@pytest.mark.parametrize("multi", [False, True])
def test_the_bank_picks_the_informative_features(solver, multi):
    (x, y), (z, t) = problem(multi, 200), problem(multi, 100, seed=1)
    noise = np.random.RandomState(5).normal(size=(300, 7)).astype(np.float32)
    train, test = {"noise": noise[:200], "good": x}, {"noise": noise[200:], "good": z}
    result = bank.bank_probe_splits(
        train, y, test, t, num_classes=3, solver=solver, fraction=0.5, split_seeds=(0, 1)
    )
    assert {split["features"] for split in result["splits"]} == {"good"}
    assert result["protocol"] == f"{solver}-bank{'-multilabel' if multi else ''}-v1"
    metric = "map" if multi else "top1"
    assert "classes" not in result
    assert result[f"{metric}_mean"] > 55.0 and len(result["splits"][0]["bank"]["good"]) == 9


def test_the_score_is_that_of_the_refitted_probe():
    (x, y), (z, t) = problem(False, 60), problem(False, 50, seed=1)
    result = bank.bank_probe({"x": x}, y, {"x": z}, t, num_classes=3)
    mean, std = x.mean(axis=0), x.std(axis=0)
    model = Ridge(alpha=result["regularisation"] * len(x), solver="svd")
    model.fit((x - mean) / std, solvers.targets_of(y, 3))
    right = model.predict((z - mean) / std).argmax(axis=1) == t
    assert result["top1"] == pytest.approx(100 * right.mean())


@pytest.mark.parametrize("multi", [False, True])
def test_scores_by_class_are_those_of_the_first_draw(multi):
    (x, y), (z, t) = problem(multi, 200), problem(multi, 100, seed=1)
    options = {"num_classes": 3, "fraction": 0.5, "split_seeds": (4, 1), "per_class": True}
    result = bank.bank_probe_splits({"x": x}, y, {"x": z}, t, **options)
    classes = result.pop("classes")
    first = bank.bank_probe_splits({"x": x}, y, {"x": z}, t, **options | {"split_seeds": (4,)})
    assert classes == first["classes"]
    known = t if multi else t[t >= 0]
    assert classes["support"] == [
        int((known[:, c] if multi else known == c).sum()) for c in range(3)
    ]
    mean = np.mean(classes["average_precision" if multi else "recall"])
    assert mean == pytest.approx(first[f"{'map' if multi else 'balanced'}_mean"])
    assert all("classes" not in split for split in result["splits"])


def test_test_labels_choose_nothing(monkeypatch):
    (x, y), (z, t) = problem(False, 90), problem(False, 60, seed=1)
    scored = []
    final = bank.final_scores
    monkeypatch.setattr(
        bank, "final_scores", lambda s, *rest: scored.append(np.array(s)) or final(s, *rest)
    )
    results = [
        bank.bank_probe({"x": x}, y, {"x": z}, labels, num_classes=3) for labels in (t, (t + 1) % 3)
    ]
    assert results[0]["top1"] != results[1]["top1"]
    np.testing.assert_array_equal(scored[0], scored[1])
    assert results[0]["bank"] == results[1]["bank"]


def test_equal_scores_go_to_the_stronger_regularisation_and_the_first_features():
    x, y = blobs(60, 6, 3, spread=0.01)
    result = bank.bank_probe({"a": x, "b": x}, y, {"a": x, "b": x}, y, num_classes=3)
    found = result["bank"]["a"]
    assert result["features"] == "a" and max(found) == 100.0
    assert result["regularisation"] == bank.REGULARISATIONS[found.index(100.0)]


def test_best_threshold_is_the_best_of_all():
    rng = np.random.RandomState(0)
    scores, targets = np.round(rng.normal(size=(30, 4)), 1), rng.uniform(size=(30, 4)) < 0.3
    scores = scores + targets
    threshold = bank.best_threshold(scores, targets)

    def f1(at):
        yes = scores > at
        return 2 * (yes & targets).sum() / (yes.sum() + targets.sum())

    tried = np.concatenate([np.unique(scores) - 1e-6, [scores.max() + 1]])
    assert f1(threshold) == pytest.approx(max(map(f1, tried)))


def test_constant_features_one_image_a_class_and_missing_classes():
    x, y = blobs(6, 5, 3, spread=0.01)
    x = np.concatenate([x, np.full((6, 2), 7.0, np.float32)], axis=1)
    for rows in (slice(0, 3), slice(0, 6)):
        result = bank.bank_probe({"x": x[rows]}, y[rows], {"x": x}, y, num_classes=9)
        assert result["top1"] == 100.0
    assert bank.bank_probe({"x": x[:3]}, y[:3], {"x": x}, y, num_classes=3)["holdout_top1"] is None


def test_the_monitors_number_is_the_best_over_regularisations():
    (x, y), (z, t) = problem(False, 60), problem(False, 50, seed=1)
    found = bank.ridge_holdout_score(x, y, z, t, num_classes=3)
    mean, std = x.mean(axis=0), x.std(axis=0)
    tops = []
    for rate in bank.REGULARISATIONS:
        model = Ridge(alpha=rate * len(x), solver="svd")
        model.fit((x - mean) / std, solvers.targets_of(y, 3))
        tops.append(100 * np.mean(model.predict((z - mean) / std).argmax(axis=1) == t))
    assert found == pytest.approx(max(tops))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "svm"}, "unknown solver 'svm': choose ridge or logistic"),
        (
            {"regularisations": (1e-3, 1.0)},
            r"regularisations=\(0.001, 1.0\) must be positive and decreasing",
        ),
        ({"regularisations": ()}, "must be positive and decreasing"),
        ({"split_seeds": ()}, "split_seeds is empty"),
        ({"num_classes": 2}, "label 2 does not fit num_classes=2"),
        ({"test": {"y": np.zeros((4, 7))}}, r"\['x'\] and \['y'\] must be the same"),
    ],
)
def test_errors_name_the_value(change, message):
    x, y = problem(False, 20)
    settings = {"test": {"x": x}, "num_classes": 3, "fraction": 1.0} | change
    test = settings.pop("test")
    with pytest.raises(ValueError, match=message):
        bank.bank_probe_splits({"x": x}, y, test, y, **settings)


def test_several_labels_must_be_bool():
    x, _ = problem(False, 20)
    with pytest.raises(ValueError, match=r"bool\[M, num_classes=3\], not float64\[20, 3\]"):
        bank.bank_probe_splits(
            {"x": x}, np.zeros((20, 3)), {"x": x}, np.zeros((20, 3)), num_classes=3, fraction=1.0
        )


def test_over_splits_means_and_deviations():
    labels = np.arange(40) % 4
    scores = iter([10.0, 20.0, 60.0])
    result = protocol.over_splits(
        lambda kept: {"top1": next(scores), "protocol": "p", "num_train": len(kept)},
        labels, 0.5, (0, 1, 2),
    )  # fmt: skip
    assert result["top1_mean"] == pytest.approx(30.0)
    assert result["top1_std"] == pytest.approx(np.std([10, 20, 60], ddof=1))
