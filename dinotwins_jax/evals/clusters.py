"""Clusters of images in feature space by k-means, and how they agree with labels.

Letters: M images, D features, k clusters.
"""

import warnings
from typing import NamedTuple

import numpy as np

from dinotwins_jax.evals.neighbours import unit
from dinotwins_jax.evals.protocol import summed_up

PROTOCOL = "kmeans-cosine-v1"
METRICS = ("nmi", "ari", "accuracy")
LARGE = 50_000  # images, from which k-means sees them in small batches


class Clusters(NamedTuple):
    """Clusters, the largest first, without empty ones.

    cluster: i64[M] in [0, k); cosine: f32[M] of each image to the centre of its cluster.
    """

    cluster: np.ndarray
    cosine: np.ndarray


def k_means(features: np.ndarray, k: int, seed: int = 0, starts: int = 1) -> Clusters:
    """k-means on features of length one.

    Args:
      features: f32[M, D], normalised here.
      k: clusters, from 1 to M. Fewer are found where fewer images differ.
      seed: of the first centres, chosen by k-means++.
      starts: the best of so many.
    Returns:
      Clusters; equal arguments give equal ones. From 50,000 images on centres are moved by batches of
      4,096 images (mini-batch k-means).
    Raises:
      ValueError: k outside [1, M], or features that are not finite.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if not 1 <= k <= len(features):
        raise ValueError(f"k={k} must be from 1 to {len(features)}, the number of pictures")
    check_finite(features)
    rows = unit(features)
    options = {"n_clusters": k, "random_state": seed, "n_init": starts}
    few = len(rows) < LARGE
    model = KMeans(**options) if few else MiniBatchKMeans(batch_size=4096, **options)
    # Threads wait for each other at every step, which on a busy machine takes many times the work.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer different images than k
        found = model.fit_predict(rows)
    names, inverse, counts = np.unique(found, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-counts, kind="stable"))
    centres = unit(model.cluster_centers_[names])
    cosine = np.einsum("md,md->m", rows, centres[inverse])
    return Clusters(rank[inverse], np.minimum(cosine, 1.0))


def check_finite(features: np.ndarray) -> None:
    """Raises ValueError if a row is not finite."""
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        raise ValueError(f"features of image {bad[0]}: not finite")


def typical(clusters: Clusters, count: int) -> list[np.ndarray]:
    """The images nearest to the centre, i64[at most count] a cluster, the nearest first."""
    order = np.lexsort((-clusters.cosine, clusters.cluster))
    ends = np.cumsum(np.bincount(clusters.cluster))[:-1]
    return [members[:count] for members in np.split(order, ends)]


def agreement(cluster: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Agreement of clusters with classes, in per cent.

    Args:
      cluster: i[M]; labels: i[M], -1 = none (left out).
    Returns:
      nmi: mutual information over the mean of the two entropies; ari: Rand index, 0 for chance; accuracy:
      share of the images in the cluster of their class, one cluster a class, matched by the Hungarian
      method.
    Raises:
      ValueError: no labelled image.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    known = _labelled(labels)
    cluster, labels = cluster[known], labels[known]
    table = contingency_matrix(labels, cluster)
    right = table[linear_sum_assignment(table, maximize=True)].sum()
    return {
        "nmi": 100.0 * float(normalized_mutual_info_score(labels, cluster)),
        "ari": 100.0 * float(adjusted_rand_score(labels, cluster)),
        "accuracy": 100.0 * float(right / len(labels)),
    }


def cluster_scores(features: np.ndarray, labels: np.ndarray, seeds: tuple[int, ...]) -> dict:
    """Scores of k-means with as many clusters as classes, on the labelled images.

    Args:
      features: f32[M, D]; labels: i[M], -1 = none (left out).
      seeds: one clustering each.
    Returns:
      {"<metric>_mean", "<metric>_std" (n - 1; 0 for one) of nmi, ari and accuracy, "num_clusters",
      "protocol", "splits": one result a seed}.
    Raises:
      ValueError: no labelled image.
    """
    known = _labelled(labels)
    features, labels = features[known], labels[known]
    k = len(np.unique(labels))
    splits = [
        {"seed": seed, **agreement(k_means(features, k, seed).cluster, labels)} for seed in seeds
    ]
    about = {"num_clusters": k, "protocol": PROTOCOL, "splits": splits}
    return summed_up(splits, METRICS) | about


def _labelled(labels: np.ndarray) -> np.ndarray:
    """bool[M], whether an image has a label. Raises ValueError if none has."""
    known = labels >= 0
    if not known.any():
        raise ValueError(f"no labelled images: all {len(labels)} labels are -1")
    return known
