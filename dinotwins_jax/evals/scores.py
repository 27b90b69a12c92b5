"""Scores of predictions: accuracy, mAP, F1; and class by class. Letters: N images, C classes."""

import jax
import numpy as np

from dinotwins_jax.evals.splits import check_labels

_LAST = np.iinfo(np.int64).max
UNBALANCED = 1.5  # images of the largest class for one of the smallest that has any


def label_ranks(scores: jax.Array, labels: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Number of classes with a higher score than the image's own class, of the labelled images.

    Ties are ordered by class index, as in argmax. An image whose own score is NaN is among no highest
    scores: its rank is the largest i64.

    Args:
      scores: f32[N, C].
      labels: i32[N] in [0, C), -1 = none (left out).
    Returns:
      i64[n], and the labels i32[n].
    Raises:
      ValueError: no labelled image, shapes or labels that do not fit.
    """
    scores, labels = np.asarray(scores, np.float32), np.asarray(labels)
    check_labels(scores, labels, scores.shape[-1], name="scores")
    known = labels >= 0
    if not known.all():
        scores, labels = scores[known], labels[known]
    if not len(labels):
        raise ValueError("no labelled images: every label is -1")
    own = scores[np.arange(len(labels)), labels][:, None]
    ranks = np.count_nonzero(scores > own, axis=1)
    equal = scores == own
    for i in np.flatnonzero(np.count_nonzero(equal, axis=1) > 1):
        ranks[i] += np.count_nonzero(equal[i, : labels[i]])
    return np.where(np.isnan(own[:, 0]), _LAST, ranks), labels


def top_k_accuracy(scores: jax.Array, labels: jax.Array, k: int) -> float:
    """Share of the labelled images whose class is among their k highest scores.

    After knn_classify with few neighbours pass min(k, neighbours), as eval_knn.py does: classes
    without a vote all tie at 0. Ties, NaN and errors: see `label_ranks`.

    Args:
      scores: f32[N, C].
      labels: i32[N] in [0, C), -1 = none (left out of the share).
      k: at least 1.
    Returns:
      per cent, in [0, 100].
    Raises:
      ValueError: k < 1; as `label_ranks`.
    """
    return single_label_scores(scores, labels, {"top": k})["top"]


def single_label_scores(scores: jax.Array, labels: jax.Array, tops: dict[str, int]) -> dict:
    """Accuracies of one ranking, in per cent.

    Args:
      scores, labels: as in `label_ranks`.
      tops: name -> k of `top_k_accuracy`.
    Returns:
      {name: top-k accuracy, "balanced": mean over the classes with images of the share of their images
      whose highest score is theirs}.
    """
    if min(tops.values()) < 1:
        raise ValueError(f"k={min(tops.values())} must be at least 1")
    ranks, labels = label_ranks(scores, labels)
    support = np.bincount(labels)
    right = np.bincount(labels, weights=ranks == 0, minlength=len(support))
    found = {name: 100.0 * float(np.mean(ranks < k)) for name, k in tops.items()}
    return found | {"balanced": 100.0 * float((right[support > 0] / support[support > 0]).mean())}


def is_unbalanced(labels: np.ndarray) -> bool:
    """Whether the largest class of i32[N] (-1 = none) has at least UNBALANCED times the images of the
    smallest that has any."""
    labels = np.asarray(labels)
    counts = np.bincount(labels[labels >= 0])
    counts = counts[counts > 0]
    return bool(counts.size) and bool(counts.max() >= UNBALANCED * counts.min())


def class_scores(scores: np.ndarray, labels: np.ndarray) -> dict[str, list]:
    """Scores class by class, a list of C entries each.

    Args:
      scores: f32[N, C].
      labels: i32[N] in [0, C), -1 = none (left out); or bool[N, C].
    Returns:
      "support": images of the class, and in per cent "precision", "recall" and "f1" of the prediction
      of the highest score (the first class in a tie), or for several labels "average_precision". None
      where it is not defined: the precision of a class that is never predicted, anything else of a
      class without images.
    """
    scores, labels = np.asarray(scores, np.float32), np.asarray(labels)
    if labels.ndim == 2:
        support = labels.sum(axis=0)
        precision = [
            100.0 * _average_precision(scores[:, c], labels[:, c]) if support[c] else None
            for c in range(len(support))
        ]
        return {"support": support.tolist(), "average_precision": precision}
    C, known = scores.shape[1], labels >= 0
    labels, predicted = labels[known], np.nan_to_num(scores[known], nan=-np.inf).argmax(axis=1)
    support, times = (np.bincount(of, minlength=C) for of in (labels, predicted))
    right = np.bincount(labels[labels == predicted], minlength=C)
    f1 = _per_cent(2 * right, support + times)
    return {
        "support": support.tolist(),
        "precision": _per_cent(right, times),
        "recall": _per_cent(right, support),
        "f1": [value if n else None for value, n in zip(f1, support, strict=True)],
    }


def _per_cent(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
    pairs = zip(part.tolist(), whole.tolist(), strict=True)
    return [100.0 * a / b if b else None for a, b in pairs]


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
