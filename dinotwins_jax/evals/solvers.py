"""Solvers of linear probes: ridge by an eigendecomposition, logistic regression by L-BFGS.

Letters: M images, D features, C classes, R regularisations.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special


class Standard(NamedTuple):
    """Standardisation of features, (x - mean) * scale."""

    mean: np.ndarray  # f64[D]
    scale: np.ndarray  # f64[D], 0 for constant dimensions

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (np.asarray(x, np.float64) - self.mean) * self.scale


def standardise(x: np.ndarray) -> Standard:
    """Mean and standard deviation of the rows of f32[M, D]."""
    x = np.asarray(x, np.float64)
    std = x.std(axis=0)
    alive = std > 1e-6
    return Standard(x.mean(axis=0), np.where(alive, 1.0 / np.where(alive, std, 1.0), 0.0))


def targets_of(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Regression targets f64[M, C] of -1 and 1."""
    yes = labels if labels.ndim == 2 else labels[:, None] == np.arange(num_classes)
    return np.where(yes, 1.0, -1.0)


def ridge(
    x: np.ndarray, targets: np.ndarray, regularisations, sample_weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Least squares with an L2 penalty, every regularisation from one eigendecomposition.

    w = argmin mean_M |x w + b - y|^2 + r |w|^2, the intercept b unpenalised

    In float64 on the host; if M < D, the Gram matrix of the images is decomposed instead of that of
    the features.

    Args:
      x: f64[M, D]; targets: f64[M, C]; regularisations: r > 0, R of them.
      sample_weight: f64[M], of the images in the mean; its own mean is 1. None: all 1.
    Returns:
      f64[R, D, C] weights and f64[R, C] biases.
    """
    M, D = x.shape
    center, middle = (np.average(of, axis=0, weights=sample_weight) for of in (x, targets))
    x, y = x - center, targets - middle
    if sample_weight is not None:
        x, y = (of * np.sqrt(sample_weight)[:, None] for of in (x, y))
    strength = M * np.asarray(regularisations, np.float64)[:, None, None]  # [R, 1, 1]
    if len(strength) == 1 and D <= M:  # ten times faster at D = 3072
        gram = x.T @ x + strength[0] * np.eye(D)
        weights = scipy.linalg.solve(gram, x.T @ y, assume_a="pos")[None]
        return weights, middle - center @ weights
    if D <= M:
        values, vectors = np.linalg.eigh(x.T @ x)
        inside = vectors.T @ (x.T @ y)  # [D, C]
    else:
        values, vectors = np.linalg.eigh(x @ x.T)
        inside, vectors = vectors.T @ y, x.T @ vectors  # [M, C], [D, M]
    weights = vectors @ (inside / (np.maximum(values, 0.0)[:, None] + strength))
    return weights, middle - center @ weights


def logistic(
    x: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    regularisations,
    sample_weight: np.ndarray | None = None,
):
    """Logistic regression with an L2 penalty by L-BFGS, from the strongest regularisation to the weakest.

    w = argmin mean_M cross-entropy(x w + b) + r / 2 |w|^2, the intercept b unpenalised: softmax for
    one label per image; for several, a sigmoid for each class, with the losses summed.

    Args:
      sample_weight: f64[M], of the images in the mean; its own mean is 1. None: all 1.
    Returns:
      f64[R, D, C] weights and f64[R, C] biases, in the order of `regularisations`, decreasing.
    """
    (M, D), multi = x.shape, labels.ndim == 2
    yes = targets_of(labels, num_classes) > 0

    def objective(flat, strength):  # in float64: in float32 the line search stops early
        weight, bias = flat[:-num_classes].reshape(D, num_classes), flat[-num_classes:]
        logits = x @ weight + bias
        if multi:
            losses = np.logaddexp(0.0, np.where(yes, -logits, logits))
            error = scipy.special.expit(logits) - yes
        else:
            losses = (scipy.special.logsumexp(logits, axis=1) - logits[yes])[:, None]
            error = scipy.special.softmax(logits, axis=1) - yes
        if sample_weight is not None:
            losses, error = (of * sample_weight[:, None] for of in (losses, error))
        loss = losses.sum()
        grad = np.append((x.T @ error / M + strength * weight).ravel(), error.sum(axis=0) / M)
        return loss / M + strength / 2 * (weight**2).sum(), grad

    flat, found = np.zeros((D + 1) * num_classes), []
    for strength in regularisations:
        options = {"maxiter": 1000, "ftol": 1e-13, "gtol": 1e-7}
        flat = scipy.optimize.minimize(
            objective, flat, (strength,), "L-BFGS-B", jac=True, options=options
        ).x
        found.append(flat)
    found = np.stack(found)
    return found[:, :-num_classes].reshape(-1, D, num_classes), found[:, -num_classes:]
