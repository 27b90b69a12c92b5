"""What a prediction is worth: accuracy. Letters: N images, C classes."""

import jax
import numpy as np

from dinotwins_jax.evals.splits import check_labels


def top_k_accuracy(scores: jax.Array, labels: jax.Array, k: int) -> float:
    """Share of the labelled images whose class is among their k highest scores.

    Equal scores rank by class index, as argmax does; a NaN score of the right class is a miss.
    After knn_classify with few neighbours give min(k, neighbours), as eval_knn.py does: classes
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
