"""Few-shot accuracy: nearest class mean from a few images per class, without training.

Letters: M train images, N test images, D features, C classes.
"""

import numpy as np

from dinotwins_jax.evals.protocol import summed_up
from dinotwins_jax.evals.scores import single_label_scores
from dinotwins_jax.evals.splits import check_labels, stratified_indices

PROTOCOL = "fewshot-nearest-mean-v1"  # rename it when a score changes
_NO_SHARE = np.finfo(np.float64).tiny  # rounds to 0 images of any class: only the minimum counts


def shot_indices(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Ascending i64 indices of `shots` images per class, or of all images of a smaller class.

    With the same seed fewer shots are a subset of more, and all are the first images that
    `splits.stratified_indices` draws.
    """
    return stratified_indices(labels, _NO_SHARE, seed, minimum=shots)


def nearest_mean_scores(
    shots: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    *,
    center: np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """Minus half the squared distance to each class mean, up to a constant.

    z = (x - center) / |x - center|;  w_c = mean of z over the shots of c;  score = z . w_c - |w_c|^2 / 2

    Args:
      shots: f32[m, D], labels: i32[m] in [0, C); queries: f32[N, D]; center: f32[D].
    Returns:
      f64[N, C]; -inf for a class without a shot.
    """

    def unit(x):
        x = np.asarray(x, np.float64) - center
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    counts = np.bincount(labels, minlength=num_classes)
    sums = np.zeros((num_classes, shots.shape[1]))
    np.add.at(sums, labels, unit(shots))
    means = sums / np.maximum(counts, 1)[:, None]
    scores = unit(queries) @ means.T
    scores -= 0.5 * np.square(means).sum(axis=1)  # in place: N * C numbers may be gigabytes
    scores[:, counts == 0] = -np.inf
    return scores


def few_shot(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    shots: tuple[int, ...] = (1, 5, 10),
    split_seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> dict:
    """Accuracy of the nearest class mean with `shots` labelled images per class.

    Args:
      train_features: f32[M, D]; the center is their mean, labelled or not.
      train_labels: i32[M] in [0, C), -1 = none; the dominant class if images have several.
      test_features: f32[N, D], test_labels: i32[N], used only for the score.
      num_classes: C; a test image of a class without a training image is a miss.
      shots: images per class; all images of a smaller class.
      split_seeds: one draw of the images each; fewer shots are a subset of more.
    Returns:
      {"protocol", "num_test", "shots<n>": {"top1_mean", "top1_std" (over draws, n - 1; 0 for one),
      "balanced_mean", "balanced_std", "splits": [{"split_seed", "top1", "balanced", "num_train"}]}},
      accuracies in per cent.
    Raises:
      ValueError: no shots or split seeds, shots < 1, no labelled images, labels that do not fit.
    Source: Wang et al., SimpleShot, arXiv:1911.04623, section 3 (CL2N: centered, L2-normalised,
      nearest centroid), which has no hyperparameters.
    Differs: every class at once instead of 5-way episodes; the center is the mean of all training
      features, which needs no label and does not depend on the draw; SimpleShot uses the mean of its
      base classes.
    """
    train_features, train_labels = np.asarray(train_features), np.asarray(train_labels)
    test_features, test_labels = np.asarray(test_features), np.asarray(test_labels)
    check_labels(train_features, train_labels, num_classes, name="training set")
    check_labels(test_features, test_labels, num_classes, name="test set")
    if not split_seeds or not shots or min(shots) < 1:
        raise ValueError(
            f"shots={tuple(shots)} and split_seeds={tuple(split_seeds)} must not be empty, "
            "and shots at least 1"
        )
    known = test_labels >= 0
    queries, wanted = test_features[known], test_labels[known]
    center = train_features.mean(axis=0, dtype=np.float64)
    result = {"protocol": PROTOCOL, "num_test": int(known.sum())}
    for n in shots:
        splits = []
        for split_seed in split_seeds:
            drawn = shot_indices(train_labels, n, split_seed)
            scores = nearest_mean_scores(
                train_features[drawn],
                train_labels[drawn],
                queries,
                center=center,
                num_classes=num_classes,
            )
            found = single_label_scores(scores, wanted, {"top1": 1})
            splits.append({"split_seed": split_seed, **found, "num_train": len(drawn)})
        result[f"shots{n}"] = summed_up(splits) | {"splits": splits}
    return result
