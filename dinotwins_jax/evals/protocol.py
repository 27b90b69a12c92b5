"""Shared protocol of the probes: selection score, final scores, and statistics over label subsets.

Letters: M labelled training images, N test images, C classes.
"""

from collections.abc import Callable

import jax
import numpy as np

from dinotwins_jax.evals.scores import (
    f1_scores,
    mean_average_precision,
    single_label_scores,
    top_k_accuracy,
)
from dinotwins_jax.evals.splits import stratified_indices

METRICS = ("top1", "top5", "balanced", "map", "f1_macro", "f1_micro")


def selection_score(scores: jax.Array, labels: np.ndarray) -> float:
    """Score for model selection, in per cent: top-1, or mAP for several labels per image.

    0 if no image has a class.
    """
    if labels.ndim == 1:
        return top_k_accuracy(scores, labels, 1)
    return mean_average_precision(scores, labels) if labels.any() else 0.0


def final_scores(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
    """{"top1", "top5", "balanced"}; {"map", "f1_macro", "f1_micro"} with positives above the threshold."""
    if labels.ndim == 1:
        return single_label_scores(scores, labels, {"top1": 1, "top5": 5})
    return {"map": mean_average_precision(scores, labels)} | f1_scores(scores > threshold, labels)


def num_labelled(labels: np.ndarray) -> int:
    """Number of labelled images; multi-label, an image without any class counts too."""
    labels = np.asarray(labels)
    return len(labels) if labels.ndim == 2 else int((labels >= 0).sum())


def over_splits(
    probe: Callable, labels: np.ndarray, fraction: float, split_seeds: tuple[int, ...]
) -> dict:
    """Runs `probe` on several random subsets of the labels and computes statistics.

    Args:
      probe: indices i64[m] of the labelled images that keep their label -> scores in per cent, with
        its "protocol".
    Returns:
      {"<metric>_mean", "<metric>_std" (over draws, n - 1; 0 for one) of top1, top5, balanced, map,
      f1_macro, f1_micro, "fraction", "protocol", "splits": one result per draw with its "split_seed"}.
    """
    if not split_seeds:
        raise ValueError("split_seeds is empty: give at least one seed")
    splits, known = [], {}
    for seed in split_seeds:
        kept = stratified_indices(labels, fraction, seed)
        if kept.tobytes() not in known:  # with all labels, all draws are the same
            known[kept.tobytes()] = probe(kept)
        splits.append({"split_seed": seed, **known[kept.tobytes()]})
    protocol = splits[0]["protocol"]
    return summed_up(splits) | {"fraction": fraction, "protocol": protocol, "splits": splits}


def summed_up(splits: list[dict], metrics: tuple[str, ...] = METRICS) -> dict[str, float]:
    """{"<metric>_mean", "<metric>_std" (n - 1; 0 for one)} over draws, for the metrics present."""
    summary = {}
    for metric in metrics:
        if metric in splits[0]:
            values = [split[metric] for split in splits]
            summary[f"{metric}_mean"] = float(np.mean(values))
            summary[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return summary
