"""Linear probe on cached frozen features, all learning rates in one pass.

Letters: M labelled training images, N test images, D features, C classes, L learning rates, S steps,
B batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.evals.protocol import final_scores, num_labelled, over_splits, selection_score
from dinotwins_jax.evals.splits import check_labels, holdout

# Rename them when a score changes.
PROTOCOL, MULTILABEL_PROTOCOL = "linear-sgd-cached-v1", "multilabel-sgd-cached-v1"
# DINOv2's 13 rates (1e-5 ... 0.1) times ten: standardised features, and 1000 steps, not 12500.
LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)

_EXACT = jax.lax.Precision.HIGHEST  # the score must not depend on the device's matmul default


class LinearProbe(NamedTuple):
    """A fitted probe, logits = weight @ ((x - mean) * scale) + bias, and how it was selected."""

    weight: np.ndarray  # f32[C, D]
    bias: np.ndarray  # f32[C]
    mean: np.ndarray  # f32[D]
    scale: np.ndarray  # f32[D], 0 for dimensions constant over the training images
    learning_rate: float  # per 256 images
    holdout: float | None  # top-1 or mAP in per cent; None if nothing could be held out


@jax.jit
def sgd(features, labels, order, weight, rates, momentum) -> tuple[jax.Array, jax.Array]:
    """Logistic regression by SGD with momentum and a cosine to 0, one classifier per learning rate.

    Softmax for one label per image; for several, a sigmoid for each class, with the losses summed.

    g = d/dw mean cross-entropy of batch t;  v = momentum v + g;  w -= rate (1 + cos(pi t / S)) / 2 v

    Args:
      features: f32[M, D], labels: i32[M] or bool[M, C].
      order: i32[S, B] images of each step.
      weight: f32[C, D] initial weight of every classifier; biases start at 0.
      rates: f32[L] peak learning rates.
      momentum: f32[].
    Returns:
      f32[L, C, D] weights and f32[L, C] biases.
    """
    (C, D), (S, B), L = weight.shape, order.shape, len(rates)
    decay = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.arange(S) / S))

    def step(carry, now):
        params, velocity = carry
        batch, factor = now
        # The bias is the weight of a constant 1: summed over the batch by itself, its gradient took as
        # long as all the rest (L C = 65,000, two cores).
        x = jnp.pad(features[batch], ((0, 0), (0, 1)), constant_values=1.0)  # [B, D + 1]
        # (L, C) are merged, so all classifiers are one matrix product; with D last the CPU backend
        # took 1.7 ms per step instead of 3.5 (D = 3072, L = 13, C = 10, two cores).
        logits = jnp.matmul(x, params.T, precision=_EXACT)
        logits, target = logits.reshape(B, L, C), labels[batch]
        if labels.ndim == 1:
            error = jax.nn.softmax(logits) - jax.nn.one_hot(target, C)[:, None]
        else:
            error = jax.nn.sigmoid(logits) - target[:, None]
        error = error.reshape(B, L * C) / B
        velocity = momentum * velocity + jnp.matmul(error.T, x, precision=_EXACT)
        step_size = jnp.repeat(rates * factor, C)
        return (params - step_size[:, None] * velocity, velocity), None

    params = jnp.pad(jnp.tile(weight, (L, 1)), ((0, 0), (0, 1)))
    (params, _), _ = jax.lax.scan(step, (params, jnp.zeros_like(params)), (order, decay))
    params = params.reshape(L, C, D + 1)
    return params[..., :D], params[..., D]


@jax.jit
def probe_logits(features, weight, bias, mean, scale) -> jax.Array:
    """f32[N, D] features -> f32[N, C] logits of a fitted LinearProbe's arrays."""
    return jnp.matmul((features - mean) * scale, weight.T, precision=_EXACT) + bias


def batch_order(indices: np.ndarray, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """i32[steps, batch_size]: endless shuffled passes over `indices`, cut into full batches."""
    rng = np.random.RandomState(seed)
    passes = -(-steps * batch_size // len(indices))
    order = np.concatenate([rng.permutation(indices) for _ in range(passes)])
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def _in_their_span(x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, Callable]:
    """Fewer images than columns in as many columns as images, for the same SGD with fewer operations.

    A gradient is a sum of images, so with orthonormal Q and X = R Q the weights stay W + (A - W Q^T) Q,
    where A are those of R from W Q^T on: 800 images of 3,072 pixels are trained four times as fast.

    Args:
      x: f32[M, D]; weight: f32[C, D], the first W.
    Returns:
      (R f32[M, M], W Q^T f32[C, M], the function A f32[L, C, M] -> f32[L, C, D]), or the arguments and
      the identity if M >= D.
    """
    if len(x) >= x.shape[1]:
        return x, weight, lambda weights: weights
    basis, r = np.linalg.qr(x.T)
    first = weight @ basis
    return r.T, first, lambda weights: weight + (weights - first) @ basis.T


def fit_linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    epochs: int = 100,
    max_steps: int = 1000,
    batch_size: int = 128,
    momentum: float = 0.9,
    holdout_fraction: float = 0.2,
    seed: int = 0,
) -> LinearProbe:
    """Selects the learning rate on held-out training images, then fits on all of them.

    No test image is used. Ties go to the smaller rate; if every class has a single image, nothing can
    be held out and the training images are used for selection. Arguments, errors and sources: see
    `linear_probe`.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    check_labels(features, labels, num_classes, name="training set")
    rates = np.sort(np.asarray(learning_rates, np.float64))
    if not rates.size or rates[0] <= 0 or min(epochs, max_steps, batch_size) < 1:
        raise ValueError(
            f"learning_rates={tuple(learning_rates)} must be positive and not empty, epochs={epochs}, "
            f"max_steps={max_steps} and batch_size={batch_size} at least 1"
        )
    fit, held = holdout(labels, np.arange(len(labels)), holdout_fraction, seed)
    everything = np.union1d(fit, held)
    mean = features[everything].mean(axis=0, dtype=np.float64).astype(np.float32)
    std = np.sqrt(np.square(features[everything] - mean).mean(axis=0, dtype=np.float64))
    alive = std > 1e-6
    scale = np.where(alive, 1.0 / np.where(alive, std, 1.0), 0.0).astype(np.float32)
    x, y = (features - mean) * scale, jnp.asarray(labels)
    rng = np.random.RandomState(seed)
    weight = np.float32(rng.normal(0.0, 0.01, (num_classes, x.shape[1])))
    x, first, widened = _in_their_span(x, weight)
    x, first = jnp.asarray(x), jnp.asarray(first)

    def train(indices, some_rates):
        B = min(batch_size, len(indices))
        steps = min(epochs * -(-len(indices) // B), max_steps)
        order = jnp.asarray(batch_order(indices, steps, B, seed))
        peaks = jnp.asarray(some_rates * B / 256, jnp.float32)
        weights, biases = map(np.asarray, sgd(x, y, order, first, peaks, jnp.float32(momentum)))
        return widened(weights), biases

    weights, biases = train(fit, rates)
    judges = held if held.size else fit
    seen, truth = jnp.asarray(features[judges]), labels[judges]
    found = [
        selection_score(probe_logits(seen, w, b, mean, scale), truth)
        for w, b in zip(weights, biases, strict=True)
    ]
    best = int(np.argmax(found))
    weights, biases = train(everything, rates[best : best + 1])
    return LinearProbe(
        weight=weights[0],
        bias=biases[0],
        mean=mean,
        scale=scale,
        learning_rate=float(rates[best]),
        holdout=found[best] if held.size else None,
    )


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    **settings,
) -> dict:
    """Accuracy of a linear classifier trained on frozen features.

    Args:
      train_features: f32[M, D], train_labels: i32[M] in [0, C), images labelled -1 are left out; or
        bool[M, C], several labels per image.
      test_features: f32[N, D], test_labels: alike; used only for the final score.
      num_classes: C; classes without images are allowed.
      **settings: of `fit_linear_probe`: learning_rates (per 256 images, scaled by batch / 256),
        epochs, max_steps (whichever ends first), batch_size (images, at most all),
        momentum, holdout_fraction (of the training images, to select the rate), seed.
    Returns:
      {"top1", "top5", "balanced", "holdout_top1"} in per cent (several labels: "map", "f1_macro",
      "f1_micro" at a probability of 0.5, "holdout_map"), {"learning_rate"} selected, {"protocol"},
      {"num_train", "num_test"} labelled images. The held-out score is None if no class has two images.
    Raises:
      ValueError: no labelled images, shapes or labels or settings that do not fit.
    Source: DINO, arXiv:2104.14294, eval_linear.py (SGD, momentum 0.9, no weight decay, N(0, 0.01)
      weights, cosine to 0); the grid of rates: DINOv2, arXiv:2304.07193, eval/linear.py.
    Differs: features are computed once, so no crop or flip augments them; each dimension is standardised
      with the training images' mean and standard deviation (a fixed batch norm without affine);
      the cosine decays by step, not by epoch; at most max_steps; the rate is selected on training
      images and the test set scored once, while the official codes report the best epoch or the
      best head on the test set. Scores are comparable only under the same `protocol`.
    """
    test_features, test_labels = np.asarray(test_features, np.float32), np.asarray(test_labels)
    check_labels(test_features, test_labels, num_classes, name="test set")
    probe = fit_linear_probe(train_features, train_labels, num_classes=num_classes, **settings)
    logits = np.asarray(probe_logits(test_features, *probe[:4]))
    multi = test_labels.ndim == 2
    return {
        **final_scores(logits, test_labels, threshold=0.0),  # a probability of 0.5
        "learning_rate": probe.learning_rate,
        f"holdout_{'map' if multi else 'top1'}": probe.holdout,
        "protocol": MULTILABEL_PROTOCOL if multi else PROTOCOL,
        "num_train": num_labelled(train_labels),
        "num_test": num_labelled(test_labels),
    }


def linear_probe_splits(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    fraction: float,
    split_seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    **settings,
) -> dict:
    """`linear_probe` with `fraction` of the labels, over several random subsets of the labels.

    Stratified subsets have the same shapes, so all of them use the same compiled functions.

    Args:
      fraction: of each class's labels, in (0, 1], at least one image per class.
      split_seeds: one draw each, see `splits.stratified_indices`.
      Others: as in `linear_probe`.
    Returns:
      as `over_splits`.
    Raises:
      ValueError: as `linear_probe`; fraction outside (0, 1]; no split seeds.
    """
    train_features, train_labels = np.asarray(train_features), np.asarray(train_labels)

    def one(kept):
        return linear_probe(
            train_features[kept],
            train_labels[kept],
            test_features,
            test_labels,
            num_classes=num_classes,
            **settings,
        )

    return over_splits(one, train_labels, fraction, split_seeds)
