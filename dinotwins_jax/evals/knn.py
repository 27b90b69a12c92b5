"""Weighted k-nearest-neighbour classifier on frozen features.

Letters: M train images, N test images, D features, C classes, k neighbours.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.evals.splits import check_labels

TEST_ROWS, TRAIN_ROWS = 256, 8192  # similarities held at once: 256 x 8192 float32 = 8 MiB
_LARGEST_EXPONENT = 60.0  # e^60 is 1e26: thousands of such votes still sum below float32's 3e38


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _blocks(x: jax.Array, rows: int, fill) -> jax.Array:
    """[n, ...] -> [ceil(n / rows), rows, ...], the last block padded with `fill`."""
    padding = [(0, -len(x) % rows)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding, constant_values=fill).reshape(-1, rows, *x.shape[1:])


@partial(jax.jit, static_argnames=("k", "num_classes", "test_rows", "train_rows"))
def _class_scores(train, labels, test, temperature, *, k, num_classes, test_rows, train_rows):
    train_blocks = _blocks(_unit(train), train_rows, 0.0)
    label_blocks = _blocks(labels, train_rows, -1)

    def score(queries):  # f32[n, D] -> f32[n, C]
        n = len(queries)

        def nearer(best, block):
            keys, classes = block
            # TF32 or bfloat16 products would reorder near neighbours.
            similarity = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
            similarity = jnp.where(classes >= 0, similarity, -jnp.inf)
            pool = jnp.concatenate([best[0], similarity], axis=1)
            pool_classes = jnp.concatenate([best[1], jnp.broadcast_to(classes, (n, train_rows))], 1)
            nearest, where = jax.lax.top_k(pool, k)
            return (nearest, jnp.take_along_axis(pool_classes, where, axis=1)), None

        nobody = (jnp.full((n, k), -jnp.inf), jnp.full((n, k), -1, jnp.int32))
        (similarity, classes), _ = jax.lax.scan(nearer, nobody, (train_blocks, label_blocks))
        exponent = similarity / temperature
        exponent -= jnp.maximum(exponent.max(axis=1, keepdims=True) - _LARGEST_EXPONENT, 0.0)
        rows = jnp.arange(n)[:, None]
        return jnp.zeros((n, num_classes)).at[rows, classes].add(jnp.exp(exponent))

    scores = jax.lax.map(score, _blocks(_unit(test), test_rows, 0.0))
    return scores.reshape(-1, num_classes)[: len(test)]


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

    Test rows and training rows are visited in blocks with a running top-k, so memory does not grow
    with N * M, and any N >= 1 will do.

    Args:
      train_features: f32[M, D], normalised here.
      train_labels: i32[M] in [0, C); images labelled -1 are no one's neighbour.
      test_features: f32[N, D], normalised here.
      k: neighbours (DINO reports 10, 20, 100, 200); more than M means all M.
      temperature: of the votes (DINO: 0.07), > 0.
      num_classes: C.
    Returns:
      f32[N, C] scores >= 0; a class without a neighbour has 0.
    Raises:
      ValueError: k < 1, temperature <= 0, no labelled training image, shapes or labels that do not fit.
    Source: Wu et al., arXiv:1805.01978, section 3.4; DINO, arXiv:2104.14294, eval_knn.py.
    Differs: works below 100 test images and for any number of classes (eval_knn.py: fixed 100
      chunks, 1000 classes); a row whose largest vote passes e^60 (temperature < 1/60) is scaled as a
      whole instead of overflowing, which leaves its ranking.
    """
    labels = np.asarray(train_labels, np.int32)
    check_labels(train_features, labels, num_classes, name="training set")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k={k} must be at least 1 and temperature={temperature} above 0")
    if not (labels >= 0).any():
        raise ValueError(f"no labelled images: all {len(labels)} training labels are -1")
    if len(test_features.shape) != 2 or test_features.shape[1] != train_features.shape[1]:
        raise ValueError(
            f"test features {tuple(test_features.shape)} must be [N, {train_features.shape[1]}]"
        )
    if not len(test_features):
        return jnp.zeros((0, num_classes))
    return _class_scores(
        jnp.asarray(train_features, jnp.float32),
        jnp.asarray(labels),
        jnp.asarray(test_features, jnp.float32),
        jnp.float32(temperature),
        k=min(k, len(labels)),
        num_classes=num_classes,
        test_rows=min(TEST_ROWS, len(test_features)),
        train_rows=min(TRAIN_ROWS, len(labels)),
    )
