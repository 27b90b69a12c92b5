"""Classifiers on features: against scikit-learn and plain loops, saved, matched with tables of labels."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from dinotwins_jax.evals.solvers import logistic, ridge, targets_of
from dinotwins_jax.features.classifier import load_classifier, probe
from dinotwins_jax.probe import run as command

NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def data():
    """Features of three classes with 60, 20 and 6 images, as `embed` returns them, and a test set."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(3, 8))

    def draw(counts):
        y = np.repeat(np.arange(3), counts)
        x = (means[y] + 0.9 * rng.normal(size=(len(y), 8))).astype(np.float32)
        names = np.array([f"/data/{NAMES[c]}/{k}.jpg" for k, c in enumerate(y)])
        return {"names": names, "cls": x, "labels": y.astype(np.int32), "model": np.array("m" * 64),
                "class_names": np.array(NAMES)}  # fmt: skip

    return draw((60, 20, 6)), draw((50, 50, 50))


def test_weighted_solvers_equal_scikit_learn(data):
    x, y = data[0]["cls"].astype(np.float64), data[0]["labels"]
    weight = np.random.default_rng(1).uniform(0.2, 2.0, len(y))
    weight /= weight.mean()
    for strengths in ((0.3,), (0.3, 0.01)):
        found, bias = ridge(x, targets_of(y, 3), strengths, weight)
        for r, w, b in zip(strengths, found, bias, strict=True):
            theirs = Ridge(alpha=r * len(y)).fit(x, targets_of(y, 3), sample_weight=weight)
            np.testing.assert_allclose(w, theirs.coef_.T, atol=1e-8)
            np.testing.assert_allclose(b, theirs.intercept_, atol=1e-8)
    ones = ridge(x, targets_of(y, 3), (0.3,), np.ones(len(y)))
    np.testing.assert_allclose(ones[0], ridge(x, targets_of(y, 3), (0.3,))[0], atol=1e-12)
    found, _ = logistic(x, y, 3, (0.1,), weight)
    theirs = LogisticRegression(C=1 / (0.1 * len(y)), tol=1e-8, max_iter=1000)
    theirs.fit(x, y, sample_weight=weight)
    np.testing.assert_allclose(found[0], theirs.coef_.T, atol=1e-4)


@pytest.mark.parametrize("kind", ["ridge", "logistic", "mean"])
def test_a_probe_predicts_and_comes_back_from_its_file(data, kind, tmp_path):
    train, test = data
    found = probe(train, kind=kind, out=tmp_path / "probe.npz")
    scores = found.score(test)
    assert scores["top1"] > 60 and scores["images"] == 150
    assert scores["balanced"] == pytest.approx(scores["top1"])  # equal classes
    predicted = found.predict(test)
    assert np.mean(predicted.labels == np.array(NAMES)[test["labels"]]) * 100 == pytest.approx(
        scores["top1"]
    )
    np.testing.assert_allclose(predicted.probabilities.sum(axis=1), 1.0, rtol=1e-5)
    again = load_classifier(tmp_path / "probe.npz")
    np.testing.assert_array_equal(again.predict(test["cls"]).probabilities, predicted.probabilities)
    assert again.about == found.about and found.about["num_train"] == 86
    assert 0 <= found.about["holdout_balanced"] <= 100


def test_nearest_mean_is_that_of_evaluation(data):
    from dinotwins_jax.evals.fewshot import nearest_mean_scores

    train, test = data
    found = probe(train, kind="mean")
    options = {"center": train["cls"].mean(axis=0, dtype=np.float64), "num_classes": 3}
    expected = nearest_mean_scores(train["cls"], train["labels"], test["cls"], **options)
    np.testing.assert_allclose(found.logits(test["cls"]) * found.temperature, expected, atol=1e-6)


def test_balanced_fits_serve_the_small_class(data):
    train, test = data
    plain, balanced = (probe(train, kind="ridge", balanced=b) for b in (False, True))
    owls = test["labels"] == 2

    def recall(classifier):
        return np.mean(classifier.predict(test["cls"][owls]).labels == "owl")

    assert recall(balanced) > recall(plain)
    assert balanced.score(test)["balanced"] > plain.score(test)["balanced"]


def test_probabilities_are_calibrated_on_what_was_held_out():
    """Half of the labels of two touching classes are wrong by chance: the probabilities say so."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 2)).astype(np.float32)
    y = (rng.uniform(size=4000) < 1 / (1 + np.exp(-2.0 * x[:, 0]))).astype(np.int32)
    for kind in ("ridge", "logistic", "mean"):
        found = probe(x[:2000], y[:2000], kind=kind).predict(x[2000:]).probabilities[:, 1]
        for low, high in ((0.2, 0.4), (0.6, 0.8)):
            inside = (found > low) & (found < high)
            assert abs(y[2000:][inside].mean() - found[inside].mean()) < 0.08, kind


def test_labels_come_as_arrays_names_and_tables(data, tmp_path):
    train, _ = data
    expected = probe(train).weight
    words = np.array(NAMES)[train["labels"]]
    by_name = dict(zip(train["names"].tolist(), words.tolist(), strict=True))
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n" + "".join(f"{n[6:]},{w}\n" for n, w in by_name.items()))
    by_path = {Path(name): label for name, label in by_name.items()}
    for labels in (train["labels"], words, by_name, by_path, table):
        found = probe({k: v for k, v in train.items() if k != "labels"}, labels)
        np.testing.assert_array_equal(found.weight, expected)
    numbers = np.array(train["labels"], object)  # 0 is a class, None and NaN are none
    numbers[1], numbers[2] = None, float("nan")
    found = probe(train["cls"], numbers)
    assert found.class_names == ("0", "1", "2") and found.about["num_train"] == 84
    some = np.where(np.arange(86) % 2, train["labels"], -1)
    assert probe(train["cls"], some).about["num_train"] == 43
    assert probe(train["cls"], some).class_names == ("0", "1", "2")


def test_unknown_labels_are_misses(data):
    train, test = data
    found = probe({**train, "labels": np.where(train["labels"] == 2, -1, train["labels"])})
    assert found.class_names == ("cat", "dog")
    scores = found.score(test)
    assert scores["top1"] < 67 and scores["balanced"] == pytest.approx(scores["top1"])


def test_what_does_not_fit_is_said_in_a_line(data, tmp_path, capsys):
    train, test = data
    found = probe(train)
    for bad, message in (
        ({**test, "model": np.array("n" * 64)}, "features of another model"),
        (test["cls"][:, :5], "5 columns: the classifier takes 8"),
        ({"patches": np.zeros((3, 2, 2))}, "no 'cls'"),
    ):
        with pytest.raises(ValueError, match=message):
            found.predict(bad)
    with pytest.raises(ValueError, match="features of image 3: not finite"):
        probe(np.where(np.arange(86)[:, None] == 3, np.nan, train["cls"]), train["labels"])
    for options, message in (
        ({"labels": np.zeros(86, int)}, "of 1 classes: two are needed"),
        ({"labels": np.zeros(3, int)}, r"labels \[3\] for 86 images"),
        ({"labels": {"else.jpg": "cat"}}, "none of 1 labels fits an image, such as /data/cat/0"),
        ({"kind": "svm"}, "choose ridge, logistic, mean"),
        ({"out": tmp_path / "probe.txt"}, "a classifier is a file .npz"),
    ):
        with pytest.raises(ValueError, match=message):
            probe(train, **options)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        probe(train, out=tmp_path / "none" / "probe.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    with pytest.raises(ValueError, match=r"bad\.npz is damaged or holds no classifier"):
        load_classifier(tmp_path / "bad.npz")
    np.savez(tmp_path / "train.npz", **train)
    np.savez(tmp_path / "test.npz", **test)
    out = f"--out={tmp_path / 'probe.npz'}"
    assert (
        command([f"--features={tmp_path / 'train.npz'}", out, f"--test={tmp_path / 'test.npz'}"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert "3 classes, 86 labelled images" in lines[0] and "balanced accuracy" in lines[2]
    assert command([f"--features={tmp_path / 'none.npz'}", out]) == 2
    assert capsys.readouterr().err.count("\n") == 1
