"""Monitoring during training: k-NN and a ridge probe on a small held-out set."""

from collections.abc import Callable
from functools import partial

import numpy as np

from dinotwins_jax.evals.bank import ridge_holdout_score
from dinotwins_jax.evals.features import backbone_features
from dinotwins_jax.evals.knn import knn_classify
from dinotwins_jax.evals.scores import top_k_accuracy
from dinotwins_jax.evals.splits import holdout, stratified_indices
from dinotwins_jax.evals.view import View
from dinotwins_jax.models.vit import VisionTransformer

HELD_OUT = 1 / 3  # of the images


def make_monitor(
    backbone: VisionTransformer,
    source,
    view: View,
    *,
    images: int,
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
) -> Callable:
    """Builds the monitor, a function of the backbone's parameters on a fixed set of images.

    The images are drawn from the labelled training images, class by class, and a third of them is held
    out; the test split is not used.

    Args:
      source: labelled training images; view: of these images.
      images: number of images, at most all.
      k, temperature: of the k-NN vote.
    Returns:
      monitor(params) -> {"monitor/knn_top1", "monitor/ridge_top1"} in per cent; if images have several
      labels the ridge probe predicts all of them, "monitor/ridge_map". Its regularisation is selected on
      the held-out images, so it shows progress but is not an evaluation protocol.
    """
    labels, num_classes = source.labels, len(source.class_names)
    several = getattr(source, "multi_hot", None)
    targets, metric = (labels, "top1") if several is None else (several, "map")
    known = np.flatnonzero(labels >= 0)
    chosen = known
    if images < len(known):
        chosen = stratified_indices(labels, images / len(known), seed)
    fit, held = holdout(labels, chosen, HELD_OUT, seed)
    if not held.size:
        raise ValueError(
            f"the monitor's {len(chosen)} images leave none to hold out: raise evals.monitor_images (now "
            f"{images}) if the data has more labelled images, or set evals.monitor_every_epochs=0"
        )
    features = backbone_features(backbone, 1)
    columns = slice(0, backbone.embed_dim)

    def monitor(params) -> dict[str, float]:
        def embed(indices):
            rows, seen = view.map(partial(features, params), source, indices)
            return rows[:, columns], seen

        (x, seen), (z, asked) = embed(fit), embed(held)
        votes = knn_classify(x, labels[seen], z, k, temperature, num_classes)
        ridge = ridge_holdout_score(x, targets[seen], z, targets[asked], num_classes=num_classes)
        return {
            "monitor/knn_top1": top_k_accuracy(votes, labels[asked], 1),
            f"monitor/ridge_{metric}": ridge,
        }

    return monitor
