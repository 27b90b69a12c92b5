"""Light fine-tuning: the last transformer blocks, the final norm and a new linear head.

The frozen part runs once: its output tokens are cached on the host.
Letters: M training images, N test images, B batch, T tokens, D features, C classes.
"""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.evals.finetune_step import FineTuneSettings, fit, head_logits, split_params
from dinotwins_jax.evals.protocol import final_scores, selection_score, summed_up
from dinotwins_jax.evals.splits import holdout, stratified_indices
from dinotwins_jax.models.vit import VisionTransformer

Views = Callable[[np.ndarray], Iterable[tuple[np.ndarray, np.ndarray]]]

_logits = jax.jit(head_logits, static_argnums=0)


@partial(jax.jit, static_argnames=("backbone", "block"))
def _tokens(params, views, *, backbone, block):
    return backbone.apply({"params": params}, views, block, method="embed_until")


@partial(jax.jit, static_argnames=("backbone", "block"))
def _test_logits(params, models, views, *, backbone, block):
    """Logits [f32[B, C] for each model]; the frozen part runs once."""
    tokens = backbone.apply({"params": params}, views, block, method="embed_until")
    return [head_logits(backbone, params, model, tokens) for model in models]


def cache_tokens(
    backbone: VisionTransformer, params, views: Views, indices: np.ndarray, block: int, dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Caches the tokens entering `block`, of each image and its mirror image, in host memory.

    Returns:
      dtype[m, 2, T, D] and i64[m] indices, ascending, without images missing from `views`.
    """
    cached, seen = None, np.zeros(len(indices), bool)
    for images, index in views(indices):
        pair = (images, images[:, :, ::-1])
        pair = [np.asarray(_tokens(params, v, backbone=backbone, block=block)) for v in pair]
        tokens = np.stack(pair, axis=1)  # [b, 2, T, D]
        largest = float(np.abs(tokens).max())
        if not largest <= float(jnp.finfo(dtype).max):
            raise ValueError(f"tokens up to {largest:g} overflow cache_dtype {np.dtype(dtype)}")
        if cached is None:
            cached = np.empty((len(indices), *tokens.shape[1:]), dtype)
        where = np.searchsorted(indices, index)
        cached[where], seen[where] = tokens, True
    if cached is None:
        raise ValueError(f"none of the {len(indices)} labelled images was read")
    return (cached, indices) if seen.all() else (cached[seen], indices[seen])


def _select(backbone, params, start, tokens, labels, settings: FineTuneSettings, seed: int):
    """Selects (peak learning rate, its held-out score or None) on held-out labelled images.

    Ties go to the smaller rate. If every class has a single image, nothing can be held out and the
    training images are used for selection.
    """
    rates = sorted(settings.learning_rates)
    chosen, held = holdout(labels, np.arange(len(labels)), settings.holdout_fraction, seed)
    models = fit(backbone, params, start, tokens, labels, chosen, rates, settings, seed)
    judges = held if held.size else chosen
    B = min(settings.batch_size, len(judges))
    padded = np.resize(judges, (-(-len(judges) // B), B))  # the last batch wraps around
    results = []
    for model in models:
        logits = [_logits(backbone, params, model, tokens[batch, 0]) for batch in padded]
        logits = np.concatenate(logits)[: len(judges)]
        results.append(selection_score(logits, labels[judges]))
    best = int(np.argmax(np.nan_to_num(results, nan=-1.0)))  # a diverged rate is never the best
    return rates[best], results[best] if held.size else None


def _fit_split(
    backbone, params, start, views, labels, kept, settings: FineTuneSettings, seed, dtype
):
    """(trained part, its report entries), using only the labels of the images `kept`."""
    block = backbone.depth - (len(start["backbone"]) - 1)
    tokens, kept = cache_tokens(backbone, params, views, kept, block, dtype)
    data = (backbone, params, start, tokens, labels[kept])
    rate, held_out = _select(*data, settings, seed)
    (model,) = fit(*data, np.arange(len(kept)), [rate], settings, seed)
    report = {
        "split_seed": seed,
        "learning_rate": rate,
        "holdout_map" if labels.ndim == 2 else "holdout_top1": held_out,
        "num_train": len(kept),
    }
    return model, report


def _check(labels, test_labels, num_classes: int, split_seeds, settings: FineTuneSettings) -> None:
    if labels.ndim != test_labels.ndim or labels.shape[1:] not in ((), (num_classes,)):
        raise ValueError(
            f"training labels {labels.shape} and test labels {test_labels.shape} must be [M] and [N], "
            f"or [M, C] and [N, C] with C = num_classes = {num_classes}"
        )
    if labels.ndim == 1 and max(labels.max(), test_labels.max()) >= num_classes:
        raise ValueError(
            f"label {max(labels.max(), test_labels.max())} does not fit num_classes={num_classes}"
        )
    if not split_seeds:
        raise ValueError("split_seeds is empty: give at least one seed")
    rates = settings.learning_rates
    if (
        not rates
        or min(rates) <= 0
        or min(settings.epochs, settings.max_steps, settings.batch_size) < 1
    ):
        raise ValueError(
            f"learning_rates={tuple(rates)} must be positive and not empty, epochs={settings.epochs}, "
            f"max_steps={settings.max_steps} and batch_size={settings.batch_size} at least 1"
        )


def fine_tune(
    backbone: VisionTransformer,
    params,
    train_views: Views,
    train_labels: np.ndarray,
    test_views: Views,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    fraction: float,
    split_seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    blocks: int = 1,
    cache_dtype=np.float16,
    **settings,
) -> dict:
    """Accuracy after training the last blocks, the final norm and a linear head on the class token.

    The tokens of a split's labelled images are kept in host memory: 4 T D bytes per image in float16
    (ViT-S/16 at 224 pixels: 303 kB). Test images are read once, for all splits' models together.

    Args:
      params: of the backbone; never modified.
      train_views, test_views: indices i64[m] -> batches (f32[b, h, w, C] normalised images of one
        size, i64[b] their indices), in any order; unreadable images may be missing.
      train_labels, test_labels: i32[M] and i32[N], -1 = none; or bool[M, C] and bool[N, C].
      num_classes: C.
      fraction: of each class's labels, in (0, 1]; split_seeds: of `splits.stratified_indices`, of
        the held-out slice and of the batches.
      blocks: number of trained blocks, 1 .. depth.
      cache_dtype: dtype of the cached tokens.
      **settings: fields of `FineTuneSettings`.
    Returns:
      {"protocol", "fraction", "num_test", "recipe", "top1_mean", "top1_std", "top5_mean", "top5_std"
      or "map_mean", "map_std", "splits": [{"split_seed", "learning_rate", "holdout_top1" or
      "holdout_map" (None when nothing could be held out), "num_train", "top1", "top5" or "map"}]}.
    Raises:
      ValueError: blocks, labels, settings or tokens that do not fit; no labelled or readable images.
    Source: layer-wise decay: BEiT, arXiv:2106.08254; partial fine-tuning: MAE, arXiv:2111.06377, 5.3.
    Differs: mirror images are the only augmentation, no drop path, mixup or label smoothing; the head
      starts at 0; learning rates are not scaled by the batch size.
    """
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    multi_label = train_labels.ndim == 2
    settings = FineTuneSettings(**settings)
    _check(train_labels, test_labels, num_classes, split_seeds, settings)
    params = jax.device_put(params)
    start = split_params(backbone, params, blocks, num_classes)
    models, splits = [], []
    for seed in split_seeds:
        kept = stratified_indices(train_labels, fraction, seed)
        labelled = (train_views, train_labels, kept)
        model, split = _fit_split(
            backbone, params, start, *labelled, settings, seed, np.dtype(cache_dtype)
        )
        models.append(model)
        splits.append(split)
    known = np.arange(len(test_labels)) if multi_label else np.flatnonzero(test_labels >= 0)
    logits, seen = [], []
    for images, index in test_views(known):
        block = backbone.depth - blocks
        logits.append(_test_logits(params, models, images, backbone=backbone, block=block))
        seen.append(index)
    if not seen:
        raise ValueError(f"none of the {len(known)} labelled test images was read")
    seen = np.concatenate(seen)
    for split, parts in zip(splits, zip(*logits, strict=True), strict=True):
        split.update(final_scores(np.concatenate(parts), test_labels[seen], threshold=0.0))
    result = {
        "protocol": f"finetune-last{blocks}{'-multilabel' * multi_label}-v1",
        "fraction": fraction,
        "num_test": len(seen),
        "recipe": {
            name: list(v) if isinstance(v, tuple) else v for name, v in settings._asdict().items()
        },
    }
    return result | summed_up(splits) | {"splits": splits}
