"""The pictures of a run: attention, cuts, principal components, nearest neighbours, and its map."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dinotwins_jax.build import EvalRun, Run
from dinotwins_jax.evals import dense
from dinotwins_jax.evals.flat_map import draw_map
from dinotwins_jax.evals.neighbours import nearest_neighbours, neighbours_grid
from dinotwins_jax.evals.outputs import MAP
from dinotwins_jax.evals.pictures import picture_of
from dinotwins_jax.evals.probes import FrozenFeatures
from dinotwins_jax.evals.splits import spread_over_classes
from dinotwins_jax.failures import failing_alone
from dinotwins_jax.weights import EvalWeights

NEIGHBOURS = 6  # per query image in neighbours.png
_DRAW = {
    "attention": dense.draw_attention,
    "segmentation": dense.draw_segmentation,
    "pca": dense.draw_pca,
}


def draw(
    run: Run | EvalRun,
    weights: EvalWeights,
    workdir: Path,
    names: Sequence[str],
    features: FrozenFeatures,
    failed: dict[str, str],
    *,
    images: Callable[[int], dense.ImageSet],
    count: int,
) -> None:
    """Draws pictures; one that fails costs only itself.

    Args:
      names: of attention, segmentation, pca and neighbours, which become WORKDIR/<name>.png, and map,
        WORKDIR/map.html.
      failed: gets the reason of a picture that fails.
      images: number -> test images to draw; count: of images in a picture.
    """
    shown = None
    for name in names:
        file = MAP if name == "map" else f"{name}.png"
        with failing_alone(file, file, failed):
            if name == "map":
                test, embed = features.split(1)["teacher"], features.embeds["teacher"]
                draw_map(workdir / file, run.probe_sources[1], test, embed)
            elif name == "neighbours":
                _draw_neighbours(run, features, workdir / file, count)
            else:
                shown = shown or images(count)
                _DRAW[name](workdir / file, run.backbone, weights.teacher, shown)


def _draw_neighbours(run: Run | EvalRun, features: FrozenFeatures, path: Path, count: int) -> None:
    """The most similar test images of a few test images, framed by whether the class agrees."""
    test, embed = features.labelled()["teacher"][1], features.embeds["teacher"]
    source, rows = run.probe_sources[1], len(test.indices)
    queries = spread_over_classes(test.labels, rows, min(count, rows - 1))
    columns = embed.sets[embed.knn]
    near = nearest_neighbours(test.features[:, columns], queries, min(NEIGHBOURS, rows - 1))
    neighbours_grid(
        path,
        lambda i: picture_of(source, int(test.indices[i])),
        queries,
        near,
        titles=[_class_name(source, test.labels[i]) for i in queries],
        same=(test.labels[near] == test.labels[queries][:, None]) & (test.labels[near] >= 0),
    )


def _class_name(source, label: int) -> str:
    return source.class_names[label] if label >= 0 else "no object"
