"""Groups pictures by k-means: python -m dinotwins_jax.clusters --features=features.npz --out=clusters.png

FEATURES is what embed wrote. Prints each cluster with its most typical pictures; where the features have
labels, also how the clusters agree with the classes.
"""

import sys
from collections import Counter
from pathlib import Path

from absl import flags

from dinotwins_jax.cli import command, exit_code, fail

K = 10  # clusters where there are no labels
STARTS = 10  # of k-means, the best is kept
TYPICAL = 10  # pictures a cluster on the sheet
ROWS = 60  # clusters on the sheet


def _define(values: flags.FlagValues) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string(
        "features", None, "a file .npz or .parquet, or a folder, of embed", **options
    )
    flags.DEFINE_integer(
        "k",
        None,
        f"clusters; by default the classes of the labels, or {K}",
        lower_bound=1,
        **options,
    )
    flags.DEFINE_enum("tokens", "cls", ["cls", "mean_patch"], "what is clustered", **options)
    flags.DEFINE_integer("seed", 0, "of the first centres", lower_bound=0, **options)
    flags.DEFINE_multi_string(
        "out",
        [],
        "a sheet .png, the pictures' clusters .csv or .json, a map .html; may be given again",
        **options,
    )


def _clusters(values: flags.FlagValues) -> int:
    if not values.features:
        return fail("--features is required, such as --features=features.npz")

    def work():
        from dinotwins_jax.evals.clusters import k_means
        from dinotwins_jax.features.gallery import Gallery
        from dinotwins_jax.features.outputs import outputs, write_lists

        files = outputs(values.out, (".png", ".csv", ".json", ".html"))
        gallery = Gallery(values.features, values.tokens)
        clusters = k_means(gallery.features, _k(values, gallery), values.seed, STARTS)
        _print(clusters, gallery)
        rows = [
            (str(name), int(cluster) + 1, round(float(cosine), 4), gallery.label(i))
            for i, (name, cluster, cosine) in enumerate(zip(gallery.names, *clusters, strict=True))
        ]
        write_lists(files, ("name", "cluster", "cosine", "class"), rows)
        if ".png" in files:
            _draw(files[".png"], gallery, clusters)
        if ".html" in files:
            _map(files[".html"], gallery, clusters)

    return exit_code(work)


def _k(values: flags.FlagValues, gallery) -> int:
    import numpy as np

    if values.k is not None:
        return values.k
    classes = [] if gallery.labels is None else np.unique(gallery.labels[gallery.labels >= 0])
    return min(len(classes) or K, len(gallery))


def _print(clusters, gallery) -> None:
    from dinotwins_jax.evals.clusters import agreement, typical

    for k, members in enumerate(typical(clusters, 3)):
        size = int((clusters.cluster == k).sum())
        share = _classes(clusters, gallery, k)
        names = ", ".join(str(gallery.names[i]) for i in members)
        print(f"cluster {k + 1}: {size:,} pictures{share}; most typical {names}")
    if gallery.labels is not None and (gallery.labels >= 0).any():
        scores = agreement(clusters.cluster, gallery.labels)
        print(
            f"clusters and classes: normalised mutual information {scores['nmi']:.1f}%, adjusted Rand "
            f"index {scores['ari']:.1f}%, accuracy of clusters matched to classes {scores['accuracy']:.1f}%"
        )


def _classes(clusters, gallery, k: int) -> str:
    """ ", 62% airplane", the most frequent class of a cluster; "" without labels."""
    if gallery.labels is None:
        return ""
    counts = Counter(gallery.label(i) for i in (clusters.cluster == k).nonzero()[0].tolist())
    known = sum(counts.values()) - counts.pop("", 0)
    if not known:
        return ""
    ((name, count),) = counts.most_common(1)
    return f", {100 * count / known:.0f}% {name}"


def _draw(path: Path, gallery, clusters) -> None:
    from dinotwins_jax.evals.clusters import typical
    from dinotwins_jax.evals.sheets import tile_grid

    shown = typical(clusters, TYPICAL)
    rows = [[gallery.tile(int(i), gallery.label(i)) for i in members] for members in shown[:ROWS]]
    titles = [
        f"cluster {k + 1}: {(clusters.cluster == k).sum():,} pictures{_classes(clusters, gallery, k)}"
        for k in range(len(rows))
    ]
    tile_grid(path, rows, titles=titles)
    more = f", the largest {ROWS} of {len(shown)}" if len(shown) > ROWS else ""
    print(f"{path}: {len(rows)} clusters{more}, the pictures nearest to the centre first")


def _map(path: Path, gallery, clusters) -> None:
    from dinotwins_jax.evals.flat_map import write_map

    if gallery.labels is None:
        groups, names = (
            clusters.cluster,
            [f"cluster {k + 1}" for k in range(clusters.cluster.max() + 1)],
        )
    else:
        groups, names = gallery.labels, gallery.class_names
    shown = write_map(
        path,
        gallery.features,
        groups,
        names,
        gallery.names,
        gallery.picture,
        title=gallery.path.name,
    )
    print(f"{path}: a map of {shown:,} pictures")


def run(argv=None, program="python -m dinotwins_jax.clusters") -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    options = {"takes_config": False, "directories": ()}
    return command(program, __doc__, _define, _clusters, argv, **options)


if __name__ == "__main__":
    sys.exit(run())
