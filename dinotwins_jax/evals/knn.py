"""Weighted k-nearest-neighbour classifier on frozen features.

Letters: M train images, N test images, D features, C classes, k neighbours.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.evals import scores
from dinotwins_jax.evals.splits import check_labels

TEST_ROWS, TRAIN_ROWS = 256, 8192  # block of similarities: 256 x 8192 float32 = 8 MiB
_LARGEST_EXPONENT = 60.0  # e^60 is 1e26: thousands of such votes still sum below float32's 3e38


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _block(x, start: int, rows: int, fill=0) -> np.ndarray:
    """Rows start .. start + rows of x [n, ...], padded with `fill` so that all blocks have one shape."""
    x = np.asarray(x[start : start + rows])
    padding = [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1)
    return np.pad(x, padding, constant_values=fill)


@jax.jit
def _nearer(best, queries, keys, index):
    """Updates (similarity f32[n, k], index i32[n, k]) with one more block of training images.

    index: i32[rows] of the keys f32[rows, D] in the training set, -1 for rows to exclude.
    """
    # TF32 or bfloat16 products would reorder near neighbours.
    similarity = jnp.matmul(_unit(queries), _unit(keys).T, precision=jax.lax.Precision.HIGHEST)
    similarity = jnp.where(index >= 0, similarity, -jnp.inf)
    pool = jnp.concatenate([best[0], similarity], axis=1)
    everyone = jnp.broadcast_to(index, (len(queries), len(index)))
    everyone = jnp.concatenate([best[1], everyone], axis=1)
    nearest, where = jax.lax.top_k(pool, best[0].shape[1])
    return nearest, jnp.take_along_axis(everyone, where, axis=1)


def nearest_neighbours(
    train_features: np.ndarray, usable: np.ndarray, test_features: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k most cosine-similar training images of every test image, nearest first.

    Training rows may stay on the host: each block is sent to the device once. Besides the test
    features and the result, the device holds one block of similarities, for any N and M.

    Args:
      train_features: f32[M, D], test_features: f32[N, D]; normalised here.
      usable: bool[M], images that may be neighbours.
      k: neighbours; more than M means all M.
    Returns:
      f32[N, k] cosines, i32[N, k] rows of train_features; padded with -inf and -1 if fewer than k
      images are usable. Ties are ordered by row.
    """
    N, M = len(test_features), len(train_features)
    k, n, m = min(k, M), min(TEST_ROWS, N), min(TRAIN_ROWS, M)
    index = np.where(usable, np.arange(M, dtype=np.int32), np.int32(-1))
    queries = [
        jnp.asarray(_block(test_features, start, n), jnp.float32) for start in range(0, N, n)
    ]
    nobody = (jnp.full((n, k), -jnp.inf), jnp.full((n, k), -1, jnp.int32))
    best = [nobody] * len(queries)
    for start in range(0, M, m):
        keys = jnp.asarray(_block(train_features, start, m), jnp.float32)
        rows = jnp.asarray(_block(index, start, m, fill=-1))
        best = [_nearer(b, q, keys, rows) for b, q in zip(best, queries, strict=True)]
    similarity, index = (np.concatenate([np.asarray(b[i]) for b in best])[:N] for i in (0, 1))
    return similarity, index


@partial(jax.jit, static_argnames=("num_classes",))
def _single_label_votes(similarity, classes, temperature, *, num_classes):
    exponent = similarity / temperature
    exponent -= jnp.maximum(exponent.max(axis=1, keepdims=True) - _LARGEST_EXPONENT, 0.0)
    rows = jnp.arange(len(similarity))[:, None]
    return jnp.zeros((len(similarity), num_classes)).at[rows, classes].add(jnp.exp(exponent))


@jax.jit
def _multi_label_votes(similarity, multi_hot, temperature):
    # Only ratios matter here, so the nearest can have weight 1 at any temperature.
    weight = jax.nn.softmax(similarity / temperature, axis=1)
    return jnp.einsum(
        "nk,nkc->nc", weight, multi_hot.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def _votes(similarity, index, labels, temperature, num_classes) -> np.ndarray:
    """Class scores f32[N, C] of neighbours [N, k], by blocks of test images."""
    N, votes = len(similarity), []
    n = min(TEST_ROWS, N)
    for start in range(0, N, n):
        cosines = _block(similarity, start, n)
        whose = labels[_block(index, start, n, fill=-1)]  # [n, k] or [n, k, C]
        if labels.ndim == 2:
            votes.append(_multi_label_votes(cosines, whose, temperature))
        else:
            votes.append(_single_label_votes(cosines, whose, temperature, num_classes=num_classes))
    return np.concatenate([np.asarray(block) for block in votes])[:N]


def _check(train_features, labels, test_features, k, temperature, num_classes) -> None:
    if labels.ndim == 2:
        if labels.shape != (len(train_features), num_classes):
            raise ValueError(
                f"training set: multi-label labels {labels.shape} must be [M, C] = "
                f"[{len(train_features)}, {num_classes}]"
            )
    else:
        check_labels(train_features, labels, num_classes, name="training set")
        if not (labels >= 0).any():
            raise ValueError(f"no labelled images: all {len(labels)} training labels are -1")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k={k} must be at least 1 and temperature={temperature} above 0")
    if len(test_features.shape) != 2 or test_features.shape[1] != train_features.shape[1]:
        raise ValueError(
            f"test features {tuple(test_features.shape)} must be [N, {train_features.shape[1]}]"
        )


def knn_classify(
    train_features: jax.Array,
    train_labels: jax.Array,
    test_features: jax.Array,
    k: int,
    temperature: float,
    num_classes: int,
) -> jax.Array:
    """Class scores: each of the k most similar training images votes exp(cosine / temperature).

    score[n, c] = sum over the k nearest m of test n with label c of exp(<test_n, train_m> / temperature)

    Test rows and training rows are processed in blocks with a running top-k, so memory does not grow
    with N * M; any N >= 1 works.

    Args:
      train_features: f32[M, D], normalised here; may stay on the host.
      train_labels: i32[M] in [0, C); images labelled -1 are excluded.
      test_features: f32[N, D], normalised here.
      k: neighbours (DINO reports 10, 20, 100, 200); more than M means all M.
      temperature: of the votes (DINO: 0.07), > 0.
      num_classes: C.
    Returns:
      f32[N, C] scores >= 0; 0 for a class without a neighbour.
    Raises:
      ValueError: k < 1, temperature <= 0, no labelled training image, shapes or labels that do not fit.
    Source: Wu et al., arXiv:1805.01978, section 3.4; DINO, arXiv:2104.14294, eval_knn.py.
    Differs: works below 100 test images and for any number of classes (eval_knn.py: fixed 100
      chunks, 1000 classes); a row whose largest vote exceeds e^60 (temperature < 1/60) is scaled as a
      whole instead of overflowing, which keeps its ranking.
    """
    labels = np.asarray(train_labels, np.int32)
    _check(train_features, labels, test_features, k, temperature, num_classes)
    if not len(test_features):
        return jnp.zeros((0, num_classes))
    nearest = nearest_neighbours(train_features, labels >= 0, test_features, k)
    return jnp.asarray(_votes(*nearest, labels, temperature, num_classes))


def knn_scores(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    ks: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_classes: int,
    classes_of: int | None = None,
) -> dict:
    """Accuracy of the weighted k-NN for several k, from one pass over the training set.

    single-label: the votes of `knn_classify`
    multi-label:  score[n, c] = sum_m w_m label[m, c] / sum_m w_m,  w_m = exp(cosine / temperature)

    Args:
      train_features: f32[M, D], may stay on the host; test_features: f32[N, D].
      train_labels, test_labels: i32[M] and i32[N], -1 = none; or bool[M, C] and bool[N, C].
      ks: numbers of neighbours; more than M means all M.
      temperature: of the votes, > 0.
      num_classes: C.
      classes_of: one of ks, whose scores are also given class by class.
    Returns:
      {"protocol", "k<k>": {"top1", "top5", "balanced"}} in per cent, {"k<k>": {"map"}} for multi-label.
      Top-5 uses the min(5, k) best classes, as at most k classes have votes. With classes_of, its entry
      has "classes", see `class_scores`.
    Raises:
      ValueError: no ks, no test images, mixed single-label and multi-label; as `knn_classify`.
    Source: as `knn_classify`.
    Differs: the multi-label rule has no official counterpart; it is the same vote, normalised so
      that scores are comparable between images, as average precision needs.
    """
    labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    multi_label = labels.ndim == 2
    if not ks:
        raise ValueError("ks is empty: give at least one number of neighbours")
    if labels.ndim != test_labels.ndim:
        raise ValueError(
            f"training labels {labels.shape} and test labels {test_labels.shape} must both be "
            "single-label [M] or both multi-label [M, C]"
        )
    if not len(test_labels):
        raise ValueError("no test images")
    _check(train_features, labels, test_features, min(ks), temperature, num_classes)
    usable = np.ones(len(labels), bool) if multi_label else labels >= 0
    similarity, index = nearest_neighbours(train_features, usable, test_features, max(ks))
    result = {"protocol": f"knn-cosine-T{temperature:g}{'-multilabel' * multi_label}-v1"}
    for k in ks:
        votes = _votes(similarity[:, :k], index[:, :k], labels, temperature, num_classes)
        if multi_label:
            result[f"k{k}"] = {"map": scores.mean_average_precision(votes, test_labels)}
        else:
            tops = {"top1": 1, "top5": min(5, k)}
            result[f"k{k}"] = scores.single_label_scores(votes, test_labels, tops)
        if k == classes_of:
            result[f"k{k}"]["classes"] = scores.class_scores(votes, test_labels)
    return result
