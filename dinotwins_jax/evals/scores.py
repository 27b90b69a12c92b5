"""Scores of predictions: accuracy, mAP, F1. Letters: N images, C classes."""

import jax
import numpy as np

from dinotwins_jax.evals.splits import check_labels


def top_k_accuracy(scores: jax.Array, labels: jax.Array, k: int) -> float:
    """Share of the labelled images whose class is among their k highest scores.

    Ties are ordered by class index, as in argmax; a NaN score of the right class is a miss.
    After knn_classify with few neighbours pass min(k, neighbours), as eval_knn.py does: classes
    without a vote all tie at 0.

    Args:
      scores: f32[N, C].
      labels: i32[N] in [0, C), -1 = none (left out of the share).
      k: at least 1.
    Returns:
      per cent, in [0, 100].
    Raises:
      ValueError: k < 1, no labelled image, shapes or labels that do not fit.
    """
    scores, labels = np.asarray(scores, np.float32), np.asarray(labels)
    check_labels(scores, labels, scores.shape[-1], name="scores")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    scores, labels = scores[labels >= 0], labels[labels >= 0]
    if not len(labels):
        raise ValueError("no labelled images: every label is -1")
    own = scores[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    return 100.0 * float(np.mean((rank < k) & ~np.isnan(own[:, 0])))


def mean_average_precision(scores: jax.Array, targets: np.ndarray) -> float:
    """Macro mAP: the mean over classes of the area under the stepwise precision-recall curve.

    AP = sum_n (R_n - R_(n-1)) P_n over the thresholds n, equal scores being one threshold.

    Args:
      scores: f32[N, C], higher means more likely.
      targets: bool[N, C]; classes without a positive are left out of the mean.
    Returns:
      per cent, in [0, 100].
    Raises:
      ValueError: shapes differ, a score is NaN, or there is no positive.
    """
    scores, targets = np.asarray(scores), np.asarray(targets, bool)
    if scores.shape != targets.shape or scores.ndim != 2:
        raise ValueError(f"scores {scores.shape} and targets {targets.shape} must both be [N, C]")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN")
    classes = np.flatnonzero(targets.any(axis=0))
    if not classes.size:
        raise ValueError(f"no positive among {len(targets)} images: mAP needs one")
    return 100.0 * float(
        np.mean([_average_precision(scores[:, c], targets[:, c]) for c in classes])
    )


def _average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    found = np.cumsum(targets[order])[ends]
    return float(np.sum(np.diff(found, prepend=0) / found[-1] * found / (ends + 1)))


def f1_scores(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """{"f1_macro", "f1_micro"} of binary predictions, in per cent.

    Args:
      predictions, targets: bool[N, C]. Macro: over the classes with a positive in `targets`; a class
        that is never predicted has 0.
    Raises:
      ValueError: shapes differ, or there is no positive.
    """
    predictions, targets = np.asarray(predictions, bool), np.asarray(targets, bool)
    if predictions.shape != targets.shape or targets.ndim != 2:
        raise ValueError(
            f"predictions {predictions.shape} and targets {targets.shape} must both be [N, C]"
        )
    right = (predictions & targets).sum(axis=0)
    total = predictions.sum(axis=0) + targets.sum(axis=0)
    present = targets.any(axis=0)
    if not present.any():
        raise ValueError(f"no positive among {len(targets)} images: F1 needs one")
    return {
        "f1_macro": 100.0 * float(np.mean(2 * right[present] / total[present])),
        "f1_micro": 100.0 * float(2 * right.sum() / total.sum()),
    }
