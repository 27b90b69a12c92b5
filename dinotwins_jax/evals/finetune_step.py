"""Training of light fine-tuning: trained tensors, their learning rates, one step, one fit.

Letters: m images, B batch, T tokens, D features, C classes, S steps.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dinotwins_jax.evals.linear import batch_order
from dinotwins_jax.models.vit import VisionTransformer


class FineTuneSettings(NamedTuple):
    """Hyperparameters of light fine-tuning."""

    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # peaks; one is selected
    layer_decay: float = 0.65  # the factor of the learning rate from one layer to the one below
    epochs: int = 50
    max_steps: int = 1000  # whichever ends first
    batch_size: int = 128  # images, at most those there are
    weight_decay: float = 0.05  # AdamW, of matrices only
    warmup: float = 0.1  # of the steps, linear; a cosine to 0 follows
    holdout_fraction: float = 0.2  # of the labelled images, to select the learning rate


def split_params(backbone: VisionTransformer, params, blocks: int, num_classes: int) -> dict:
    """Trained parameters {"backbone": {"blocks_<i>" of the last `blocks`, "norm"}, "head"}, head at 0."""
    if not 1 <= blocks <= backbone.depth:
        raise ValueError(f"blocks={blocks} to train must be in 1 .. depth={backbone.depth}")
    names = [f"blocks_{i}" for i in range(backbone.depth - blocks, backbone.depth)]
    return {
        "backbone": {name: params[name] for name in [*names, "norm"]},
        "head": {
            "kernel": jnp.zeros((backbone.embed_dim, num_classes)),
            "bias": jnp.zeros(num_classes),
        },
    }


def layer_scales(trainable: dict, layer_decay: float) -> dict:
    """Learning-rate factor of every trained tensor: head and norm 1, last block decay, …, and below all
    blocks the patch embedding and what is added to it.

    Source: BEiT, arXiv:2106.08254, optim_factory.py: decay^(depth + 1 - layer), block i being layer
      i + 1, norm and head layer depth + 1, all else layer 0.
    """
    blocks = sorted(
        (name for name in trainable["backbone"] if name.startswith("blocks_")),
        key=lambda name: int(name.removeprefix("blocks_")),
        reverse=True,
    )
    factor = dict.fromkeys(trainable["backbone"], layer_decay ** (len(blocks) + 1))
    factor |= {name: layer_decay ** (i + 1) for i, name in enumerate(blocks)} | {"norm": 1.0}
    return {
        "backbone": {
            name: jax.tree.map(lambda _, f=factor[name]: f, part)
            for name, part in trainable["backbone"].items()
        },
        "head": jax.tree.map(lambda _: 1.0, trainable["head"]),
    }


def rate_factors(steps: int, warmup: float) -> np.ndarray:
    """f64[S] share of the peak learning rate: linear from 1 / W to 1 in W steps, then a cosine to 0."""
    W = round(warmup * steps)
    t = np.arange(steps)
    cosine = 0.5 * (1.0 + np.cos(np.pi * (t - W) / max(steps - W, 1)))
    return np.where(t < W, (t + 1) / max(W, 1), cosine)


def head_logits(backbone: VisionTransformer, params, trainable: dict, tokens) -> jax.Array:
    """Logits f32[B, C] of tokens [B, T, D] entering the first trained block; `params`: frozen ones."""
    first = backbone.depth - (len(trainable["backbone"]) - 1)
    merged = {"params": {**params, **trainable["backbone"]}}
    cls = backbone.apply(merged, tokens, first, method="finish_from").cls
    return cls @ trainable["head"]["kernel"] + trainable["head"]["bias"]


def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy for i32[B] labels; for bool[B, C], mean sigmoid one over B and C."""
    if labels.ndim == 2:
        return optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32)).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def adamw_step(trainable, gradients, state, rate, layer_decay, weight_decay):
    """p <- p - rate * scale(p) * (adam(g) + weight_decay * p, for matrices); Adam's own defaults.

    Returns (trainable, state); `state` starts as optax.scale_by_adam().init(trainable).
    """
    direction, state = optax.scale_by_adam().update(gradients, state)

    def move(p, u, scale):
        return p - rate * scale * (u + weight_decay * p if p.ndim > 1 else u)

    scales = layer_scales(trainable, layer_decay)
    return jax.tree.map(move, trainable, direction, scales), state


@partial(jax.jit, static_argnames=("backbone", "layer_decay", "weight_decay"))
def train_step(
    params, trainable, state, tokens, labels, rate, *, backbone, layer_decay, weight_decay
):
    """One AdamW step on a batch of tokens; returns (trainable, state)."""

    def objective(trainable):
        return loss(head_logits(backbone, params, trainable, tokens), labels)

    gradients = jax.grad(objective)(trainable)
    return adamw_step(trainable, gradients, state, rate, layer_decay, weight_decay)


def fit(
    backbone, params, start, tokens, labels, rows, rates, settings: FineTuneSettings, seed: int
) -> list:
    """Trains a copy of `start` for each peak rate, all on the same batches.

    Args:
      start: as `split_params`; tokens: [m, 2, T, D] on the host, of images and their mirror images, each
        used with probability 1/2; labels: i32[m] or bool[m, C]; rows: i64[r] of both to train on.
      rates: peak learning rates; seed: of the batches and of mirroring.
    """
    B = min(settings.batch_size, len(rows))
    steps = min(settings.epochs * -(-len(rows) // B), settings.max_steps)
    order = batch_order(rows, steps, B, seed)
    coins = np.random.RandomState([seed, 1]).randint(2, size=order.shape)
    models = [(start, optax.scale_by_adam().init(start)) for _ in rates]
    decays = {"layer_decay": settings.layer_decay, "weight_decay": settings.weight_decay}
    for batch, side, factor in zip(order, coins, rate_factors(steps, settings.warmup), strict=True):
        x, y = jnp.asarray(tokens[batch, side]), jnp.asarray(labels[batch])
        models = [
            train_step(params, *model, x, y, rate * factor, backbone=backbone, **decays)
            for model, rate in zip(models, rates, strict=True)
        ]
    return [trainable for trainable, _ in models]
