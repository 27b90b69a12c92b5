"""Training of a whole network with labels: settings, loss, one step on augmented images, one fit.

Letters: m images, B batch, C classes, S steps.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dinotwins_jax.augment.multi_crop import image_keys
from dinotwins_jax.data.pipeline import eval_batches
from dinotwins_jax.devices.compilation import compiler_options
from dinotwins_jax.evals.finetune_step import adamw_step, rate_factors
from dinotwins_jax.evals.linear import batch_order
from dinotwins_jax.models.vit import VisionTransformer


class SupervisedSettings(NamedTuple):
    """Hyperparameters of supervised training."""

    steps: int = 1000  # the longest training that is tried
    shares: tuple[float, ...] = (0.25, 1.0)  # of it: lengths; one is selected
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # peaks; one is selected
    layer_decay: float = 1.0  # the factor of the learning rate from one layer to the one below
    batch_size: int = 128  # images
    weight_decay: float = 0.05  # AdamW, of all but biases, norms and other vectors
    warmup: float = 0.1  # of the steps, linear; a cosine to 0 follows
    smoothing: float = 0.1  # of single labels
    clip: float = 1.0  # largest norm of the gradient
    holdout_fraction: float = 0.2  # of the labelled images, to select rate and length


def logits_of(
    backbone: VisionTransformer, network: dict, images, train: bool = False, rngs=None
) -> jax.Array:
    """Logits f32[B, C] of {"backbone", "head"} for images [B, h, w, channels]."""
    options = {"train": train, "rngs": rngs, "patches": False}
    cls = backbone.apply({"params": network["backbone"]}, images, **options).cls
    return cls.astype(jnp.float32) @ network["head"]["kernel"] + network["head"]["bias"]


def supervised_loss(logits, labels, valid, smoothing: float) -> jax.Array:
    """Mean over the images with valid[b] of the cross-entropy f32[].

    Args:
      labels: i32[B], softmax with label smoothing; or bool[B, C], sigmoids, mean over C.
      valid: bool[B].
    """
    if labels.ndim == 2:
        each = optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32)).mean(axis=1)
    else:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1]), smoothing)
        each = optax.softmax_cross_entropy(logits, targets)
    return jnp.sum(each * valid) / jnp.maximum(valid.sum(), 1)


def make_step(
    backbone: VisionTransformer, random_crop: Callable, settings: SupervisedSettings
) -> Callable:
    """Builds the jitted step(network, state, batch, rate) -> (network, state).

    Compiled once for all rates, lengths and sets of images. Network and state are donated: the step writes
    the new ones where they were.

    Args:
      random_crop: as of `augment.multi_crop.make_random_crop`.
    Returns:
      a pure function. batch: {"image" u8[B, S, S, channels], "size" i32[B, 2], "label" i32[B] or
      bool[B, C], "valid" bool[B], "place" i32[B, 2] that no other image of the fit has, "seed" u32[]};
      rate: f32[], of this step; state: optax.scale_by_adam().init(network) at first.
    """

    options = compiler_options(jax.local_devices())

    @partial(jax.jit, donate_argnums=(0, 1), compiler_options=options)
    def step(network, state, batch, rate):
        key = jax.random.key(batch["seed"])
        crops, drops = jax.random.split(key)
        views = random_crop(batch["image"], batch["size"], image_keys(crops, batch["place"]))
        rngs = dict.fromkeys(("drop_path", "rope"), jax.random.fold_in(drops, batch["place"][0, 0]))

        def objective(network):
            logits = logits_of(backbone, network, views, True, rngs)
            return supervised_loss(logits, batch["label"], batch["valid"], settings.smoothing)

        gradients = jax.grad(objective)(network)
        norm = optax.global_norm(gradients)
        shrink = jnp.minimum(1.0, settings.clip / jnp.maximum(norm, 1e-12))
        gradients = jax.tree.map(lambda g: g * shrink, gradients)
        decays = settings.layer_decay, settings.weight_decay
        return adamw_step(network, gradients, state, rate, *decays)

    return step


def start_of(backbone: VisionTransformer, params, num_classes: int) -> dict:
    """The network {"backbone": params, "head"} before training, its head at 0."""
    shape = backbone.embed_dim, num_classes
    head = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(num_classes)}
    return {"backbone": params, "head": head}


def fit(
    step: Callable,
    start: dict,
    source,
    labels: np.ndarray,
    rows: np.ndarray,
    settings: SupervisedSettings,
    *,
    rate: float,
    steps: int,
    seed: int,
    canvas_size: int,
    put: Callable = jnp.asarray,
    advanced: Callable[[int], None] = lambda images: None,
) -> dict:
    """Trains a copy of `start` on the images `rows` of a source.

    Args:
      step: as of `make_step`; start: as of `start_of`.
      labels: i32[M] or bool[M, C] of all images; rows: i64[m] to train on, unreadable ones are skipped.
      rate: peak learning rate; steps: length; seed: of order, crops and drop path.
      canvas_size: pixels; put: a batch's array -> devices.
      advanced: called with the images of each step.
    Raises:
      ValueError: no readable image, or a step does not fit into the memory of the device.
    """
    B = settings.batch_size
    with fitting_in_memory(f"training the whole network with {B} images in a batch"):
        network = jax.tree.map(jnp.copy, start)  # the step takes it
        state = optax.scale_by_adam().init(network)
        factors = rate_factors(steps, settings.warmup)
        batches = _batches(source, labels, rows, steps, B, seed, canvas_size)
        for batch, factor in zip(batches, factors, strict=True):
            on_device = jax.tree.map(put, batch) | {"seed": np.uint32(seed)}
            network, state = step(network, state, on_device, np.float32(rate * factor))
            advanced(B)
        return jax.block_until_ready(network)


@contextlib.contextmanager
def fitting_in_memory(what: str) -> Iterator[None]:
    """Turns XLA's error where the memory of a device is too small into a ValueError that names `what`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"{what} does not fit into the memory of the device, config.model.remat=True needs less: "
            f"{str(error).strip().splitlines()[0][:200]}"
        ) from None


def _batches(source, labels, rows, steps, B, seed, canvas_size) -> Iterator[dict]:
    """The batches of `make_step`, without a seed."""
    order = batch_order(rows, steps, B, seed)
    read = eval_batches(source, batch_size=B, canvas_size=canvas_size, indices=order.ravel())
    for number, batch in enumerate(read):
        place = np.stack([np.full(B, number), np.arange(B)], axis=1).astype(np.int32)
        parts = {name: batch[name] for name in ("image", "size", "valid")}
        yield parts | {"label": labels[batch["index"]], "place": place}


@partial(jax.jit, static_argnames="backbone")
def predict(network, images, *, backbone) -> jax.Array:
    """Logits f32[B, C] without augmentation or drop path."""
    return logits_of(backbone, network, images)
