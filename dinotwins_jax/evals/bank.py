"""A bank of linear probes: all (regularisation, feature set) pairs, with the best one scored.

Letters: M labelled training images, N test images, D features, C classes, R regularisations.
"""

from functools import partial

import numpy as np

from dinotwins_jax.evals.protocol import (
    final_scores,
    num_labelled,
    over_splits,
    selection_score,
)
from dinotwins_jax.evals.scores import class_scores
from dinotwins_jax.evals.solvers import logistic, ridge, standardise, targets_of
from dinotwins_jax.evals.splits import check_labels, holdout

# L2 penalties on the mean squared error or cross-entropy of standardised features, strongest first.
REGULARISATIONS = tuple(float(r) for r in 10.0 ** np.arange(2, -7, -1))
SOLVERS = ("ridge", "logistic")
HOLDOUT_FRACTION = 0.2


def _fit(solver, x, labels, num_classes, regularisations):
    if solver == "ridge":
        return ridge(x, targets_of(labels, num_classes), regularisations)
    return logistic(x, labels, num_classes, regularisations)


def _bank(solver, features: dict, labels, fit, judges, num_classes, regularisations):
    """{feature set: (held-out score of each regularisation, r -> held-out scores f64[h, C])}."""
    found = {}
    for name, x in features.items():
        standard = standardise(x[fit])
        fitted = _fit(solver, standard(x[fit]), labels[fit], num_classes, regularisations)
        scores = partial(_scores_of, standard(x[judges]), *fitted)
        values = [selection_score(scores(r), labels[judges]) for r in range(len(regularisations))]
        found[name] = values, scores
    return found


def _scores_of(x, weights, biases, r: int) -> np.ndarray:
    """f64[h, C] of one regularisation: those of all may be gigabytes."""
    scores = x @ weights[r]
    scores += biases[r]
    return scores


def best_threshold(scores: np.ndarray, targets: np.ndarray) -> float:
    """Threshold on scores [N, C] with the highest micro F1; 0 without a positive."""
    order = np.argsort(-scores, axis=None, kind="stable")
    found = np.cumsum(targets.ravel()[order])
    if not found[-1]:
        return 0.0
    f1 = 2 * found / (np.arange(1, found.size + 1) + found[-1])
    ranked = scores.ravel()[order]
    f1 = np.where(
        np.append(ranked[1:] < ranked[:-1], True), f1, 0.0
    )  # equal scores stay on one side
    best = int(f1.argmax())
    return float((ranked[best] + ranked[min(best + 1, found.size - 1)]) / 2)


def bank_probe(
    train: dict[str, np.ndarray],
    labels: np.ndarray,
    test: dict[str, np.ndarray],
    test_labels: np.ndarray,
    *,
    num_classes: int,
    solver: str = "ridge",
    regularisations: tuple[float, ...] = REGULARISATIONS,
    per_class: bool = False,
) -> dict:
    """Selects the best probe on a held-out fifth of the training labels and refits it on all of them.

    Ties go to the stronger regularisation, then to the first feature set. If nothing can be held out,
    the training images are used for selection. Arguments: see `bank_probe_splits`.
    """
    multi = labels.ndim == 2
    fit, held = holdout(labels, np.arange(len(labels)), HOLDOUT_FRACTION, seed=0)
    judges = held if held.size else fit
    bank = _bank(solver, train, labels, fit, judges, num_classes, regularisations)
    name, r = max(
        ((name, r) for r in range(len(regularisations)) for name in bank),
        key=lambda pair: bank[pair[0]][0][pair[1]],
    )
    everything = np.union1d(fit, held)
    x, strength = train[name][everything], regularisations[r : r + 1]
    standard = standardise(x)
    weights, biases = _fit(solver, standard(x), labels[everything], num_classes, strength)
    scores = standard(test[name]) @ weights[0] + biases[0]
    threshold = 0.0
    if multi and solver == "ridge":  # its scores are not log odds
        threshold = best_threshold(bank[name][1](r), labels[judges])
    classes = {"classes": class_scores(scores, test_labels)} if per_class else {}
    return {
        **final_scores(scores, test_labels, threshold),
        **classes,
        "regularisation": strength[0],
        "features": name,
        f"holdout_{'map' if multi else 'top1'}": bank[name][0][r] if held.size else None,
        "bank": {name: found for name, (found, _) in bank.items()},
        "protocol": f"{solver}-bank{'-multilabel' if multi else ''}-v1",
        "num_train": num_labelled(labels),
        "num_test": num_labelled(test_labels),
    }


def bank_probe_splits(
    train: dict[str, np.ndarray],
    labels: np.ndarray,
    test: dict[str, np.ndarray],
    test_labels: np.ndarray,
    *,
    num_classes: int,
    solver: str = "ridge",
    fraction: float,
    split_seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    regularisations: tuple[float, ...] = REGULARISATIONS,
    per_class: bool = False,
) -> dict:
    """`bank_probe` with `fraction` of the labels, over several random subsets of the labels.

    Args:
      train: feature set -> f32[M, D]; test: the same sets, f32[N, D].
      labels, test_labels: i32[M] and i32[N], -1 = none; or bool[M, C] and bool[N, C]. The test
        labels are used only for the final scores.
      solver: "ridge", closed form, or "logistic", L-BFGS.
      fraction, split_seeds: as in `linear_probe_splits`.
      regularisations: strongest first.
      per_class: whether the scores of the first draw are also given class by class.
    Returns:
      as `over_splits`, each split with the selected "regularisation" and "features" and, in "bank",
      the held-out score of every pair; and "regularisations"; with per_class also "classes", see
      `class_scores`.
    Raises:
      ValueError: unknown solver, regularisations not decreasing or not positive, no labelled
        images, shapes or labels that do not fit.
    Source: the idea of a grid scored at once: DINOv2, arXiv:2304.07193, eval/linear.py (which
      selects on the test split); the closed form: big_vision's few-shot evaluation.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver '{solver}': choose {' or '.join(SOLVERS)}")
    rates = np.asarray(regularisations, np.float64)
    if not rates.size or rates.min() <= 0 or (np.diff(rates) >= 0).any():
        raise ValueError(
            f"regularisations={tuple(regularisations)} must be positive and decreasing"
        )
    labels, test_labels = np.asarray(labels), np.asarray(test_labels)
    if not train or train.keys() != test.keys():
        raise ValueError(f"feature sets {list(train)} and {list(test)} must be the same")
    for name in train:
        check_labels(train[name], labels, num_classes, name=f"training set, {name}")
        check_labels(test[name], test_labels, num_classes, name=f"test set, {name}")

    def one(kept):
        return bank_probe(
            {name: x[kept] for name, x in train.items()},
            labels[kept],
            test,
            test_labels,
            num_classes=num_classes,
            solver=solver,
            regularisations=tuple(regularisations),
            per_class=per_class,
        )

    result = over_splits(one, labels, fraction, split_seeds)
    classes = [split.pop("classes", None) for split in result["splits"]]
    if per_class:
        result["classes"] = classes[0]
    return result | {"regularisations": list(regularisations)}


def ridge_holdout_score(
    features: np.ndarray,
    labels: np.ndarray,
    holdout_features: np.ndarray,
    holdout_labels: np.ndarray,
    *,
    num_classes: int,
    regularisations: tuple[float, ...] = REGULARISATIONS,
) -> float:
    """Best held-out top-1 (or mAP) over the regularisations, in per cent, for monitoring.

    Not an evaluation protocol: the regularisation is selected on the scored images.
    """
    standard = standardise(features)
    targets = targets_of(labels, num_classes)
    weights, biases = ridge(standard(features), targets, regularisations)
    scores = standard(holdout_features) @ weights + biases[:, None]
    return max(selection_score(s, holdout_labels) for s in scores)
