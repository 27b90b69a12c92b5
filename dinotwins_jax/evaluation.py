"""Evaluation of a run's weights, task by task: scores.json, pictures and report.html."""

import json
import time
from functools import partial
from pathlib import Path

import numpy as np

from dinotwins_jax.build import EvalRun, Run
from dinotwins_jax.devices.processes import warn
from dinotwins_jax.durations import steps_per_epoch, total_steps
from dinotwins_jax.evals import LABEL_TASKS, MASK_TASKS, TASKS, check_tasks, dense
from dinotwins_jax.evals.features import View, checksum, source_checksum
from dinotwins_jax.evals.finetune import fine_tune
from dinotwins_jax.evals.flat_map import draw_map
from dinotwins_jax.evals.html import write_report
from dinotwins_jax.evals.neighbours import nearest_neighbours, neighbours_grid
from dinotwins_jax.evals.outputs import MAP, PICTURES, pictures
from dinotwins_jax.evals.probes import PROBES, FrozenFeatures, ProbeOptions
from dinotwins_jax.evals.splits import spread_over_classes
from dinotwins_jax.failures import Evaluated, failing_alone
from dinotwins_jax.files import read_json_lines, replace_text
from dinotwins_jax.models.vit import as_pair
from dinotwins_jax.weights import EvalWeights, with_mask_token

NEIGHBOURS = 6  # per query image in neighbours.png


def eval_view(run: Run, config) -> View:
    """Resize and centre crop of the probes."""
    crop = config.views.global_size
    crop = crop if isinstance(crop, int) else tuple(crop)
    resize = max(config.evals.resize, *as_pair(crop))
    put = run.placement.put_images
    return View(resize, crop, run.canvas_size, config.evals.batch_size, put)


def mask_images(run: Run, config) -> dense.ImageSet:
    """The test images whose attention and cuts are scored: the first config.evals.mask_images, 0: all."""
    test = run.probe_sources[1]
    count = min(config.evals.mask_images or len(test), len(test))
    return dense.image_set(test, _attention_view(run, config), range(count))


def picture_images(run: Run, config, count: int) -> dense.ImageSet:
    """`count` test images to draw, spread over the classes."""
    test = run.probe_sources[1]
    indices = spread_over_classes(test.labels, len(test), count)
    return dense.image_set(test, _attention_view(run, config), indices)


def _attention_view(run: Run, config) -> View:
    """Squares of config.evals.attention_size, rounded down to whole patches."""
    grid = config.evals.attention_size // run.backbone.patch_size
    side = grid * run.backbone.patch_size
    # The attention of all blocks is on the device at once: at most 3e7 numbers a head.
    batch = max(1, min(config.evals.batch_size, round(3e7 / (grid**4 * run.backbone.depth))))
    return View(side, side, run.canvas_size, batch, run.placement.put_images)


def evaluate(
    run: Run | EvalRun,
    config,
    weights: EvalWeights,
    workdir: Path,
    tasks,
    cache: Path | None = None,
) -> Evaluated:
    """Scores weights on the run's labelled data.

    Writes WORKDIR/scores.json after each task, then pictures and report.html. Earlier scores of the
    same weights and data are kept. Features, and scores of weights that were never trained, are
    cached under a checksum of weights and data. A task or picture that fails costs only itself.

    Args:
      config: of the run.
      tasks: of TASKS; a task that the data has no labels or masks for is left out with one line.
      cache: directory of the cache, WORKDIR/features by default; runs on the same data may share it.
    """
    check_tasks(tasks)
    data = config.data.to_dict()
    checksums = [source_checksum(source, data) for source in run.probe_sources]
    identity = {
        "step": weights.step,
        "weights": checksum(weights.teacher),
        "data": checksums,
    }
    report = _open_report(workdir / "scores.json", identity)
    possible = _possible(tasks, *run.probe_sources)
    report["left_out"] = [task for task in tasks if task not in possible]
    features = frozen_features(run, config, weights, cache or workdir / "features", checksums)
    failed = report["failed"] = {}
    for task in possible:
        start, found = time.perf_counter(), {}
        with failing_alone(f"task {task}", task, failed):
            found = _score(task, run, config, weights, features)
        for row, scores in found.items():
            report["scores"].setdefault(row, {}).update(scores)
        report["seconds"][task] = round(time.perf_counter() - start, 2)
        _write_scores(workdir, report)
    if config.evals.pictures:
        _draw(run, config, weights, workdir, tasks, features, failed)
    with failing_alone("report.html", "report.html", failed):
        _write_html(workdir, run, config, report)
    if failed:
        _write_scores(workdir, report)
    return Evaluated(report["scores"], failed)


def _write_scores(workdir: Path, report: dict) -> None:
    replace_text(workdir / "scores.json", json.dumps(report, indent=2) + "\n")


def frozen_features(
    run: Run, config, weights: EvalWeights, cache: Path, checksums: list[str]
) -> FrozenFeatures:
    """Frozen features of a run's labelled data; checksums: `source_checksum` of train and test."""
    return FrozenFeatures(
        with_mask_token(run.backbone, weights.teacher),
        {"teacher": weights.teacher, "random weights": weights.random},
        run.probe_sources,
        eval_view(run, config),
        n_last_blocks=config.evals.n_last_blocks,
        mean_patch=config.evals.mean_patch,
        cache=cache,
        data=checksums,
    )


def _open_report(path: Path, identity: dict) -> dict:
    """The report at `path` if it is whole and of the same weights and data, else a new one."""
    fresh = identity | {"seconds": {}, "scores": {}}
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):
        return fresh
    whole = isinstance(old, dict) and all(
        isinstance(old.get(k), dict) for k in ("seconds", "scores")
    )
    return old if whole and all(old.get(key) == identity[key] for key in identity) else fresh


def _possible(tasks, train, test) -> list[str]:
    """The tasks that the data has labels and masks for, in the order of TASKS."""
    lacks = {}
    if train.labels is None or test.labels is None:
        lacks |= dict.fromkeys(LABEL_TASKS, "labels")
    if not hasattr(test, "masks"):
        lacks |= dict.fromkeys(MASK_TASKS, "masks")
    for what in ("labels", "masks"):
        left_out = [task for task in tasks if lacks.get(task) == what]
        if left_out:
            print(f"the data has no {what}: no scores of {', '.join(left_out)}")
    return [task for task in TASKS if task in tasks and task not in lacks]


def _score(
    task: str, run: Run, config, weights: EvalWeights, features: FrozenFeatures
) -> dict[str, dict]:
    """Scores {row: {task: scores}} of one task; {} for a task that only draws pictures."""
    evals = config.evals
    rows = {"teacher": weights.teacher, "random weights": weights.random}
    if task in PROBES:
        options = ProbeOptions(
            num_classes=len(run.probe_sources[0].class_names),
            label_fractions=tuple(evals.label_fractions),
            split_seeds=tuple(evals.split_seeds),
            bank_solver=evals.bank_solver,
            knn_k=_neighbours(task, evals.knn_k, run.probe_sources[0].labels),
            knn_temp=evals.knn_temp,
            shots=tuple(evals.shots),
        )
        return {row: features.probe(task, row, options) for row in features.embeds}
    if task == "finetune":
        return {row: _fine_tune(run, config, params) for row, params in rows.items()}
    if task == "segmentation":
        return dense.score_segmentation(run.backbone, rows, mask_images(run, config))
    if task == "attention":
        images = mask_images(run, config)
        return dense.score_attention(run.backbone, rows, images, keep=evals.attention_keep)
    return {}


def _neighbours(task: str, ks, labels) -> tuple[int, ...]:
    """The numbers of neighbours that the training images allow."""
    images = int((np.asarray(labels) >= 0).sum())
    fit = tuple(k for k in ks if k <= images)
    if task == "knn" and len(fit) < len(ks):
        text = f"config.evals.knn_k {tuple(k for k in ks if k > images)} is more than the {images} images"
        if not fit:
            raise ValueError(f"{text} with labels: give smaller ones")
        print(f"{text} with labels: left out", flush=True)
    return fit


def _fine_tune(run: Run, config, params) -> dict[str, dict]:
    """{"finetune": scores}, and "finetune multilabel" if images have several labels."""
    evals, view = config.evals, eval_view(run, config)
    train, test = run.probe_sources
    kinds = {"finetune": (train.labels, test.labels)}
    several = [getattr(source, "multi_hot", None) for source in (train, test)]
    if all(labels is not None for labels in several):
        kinds["finetune multilabel"] = tuple(several)
    return {
        task: fine_tune(
            run.backbone,
            params,
            lambda indices: view.of(train, indices),
            y,
            lambda indices: view.of(test, indices),
            t,
            num_classes=len(train.class_names),
            fraction=evals.finetune_fraction,
            split_seeds=tuple(evals.split_seeds),
            blocks=evals.finetune_blocks,
            epochs=evals.finetune_epochs,
        )
        for task, (y, t) in kinds.items()
    }


def _draw(
    run: Run,
    config,
    weights: EvalWeights,
    workdir: Path,
    tasks,
    features: FrozenFeatures,
    failed: dict,
) -> None:
    """The pictures of the tasks: WORKDIR/attention.png, segmentation.png, pca.png, neighbours.png,
    map.html."""
    test, neighbours = run.probe_sources[1], partial(_draw_neighbours, run, config, features)
    draw = {
        "attention": dense.draw_attention,
        "segmentation": dense.draw_segmentation if hasattr(test, "masks") else None,
        "pca": dense.draw_pca,
    }
    images = None
    for task in (task for task in draw if task in tasks and draw[task]):
        name = f"{task}.png"
        with failing_alone(name, name, failed):
            images = images or picture_images(run, config, config.evals.pictures)
            draw[task](workdir / name, run.backbone, weights.teacher, images)
    if "knn" in tasks and test.labels is not None:
        with failing_alone("neighbours.png", "neighbours.png", failed):
            neighbours(workdir / "neighbours.png")
    if "map" in tasks:
        with failing_alone(MAP, MAP, failed):
            draw_map(workdir / MAP, test, features.split(1)["teacher"], features.embeds["teacher"])


def _draw_neighbours(run: Run, config, features: FrozenFeatures, path: Path) -> None:
    """The most similar test images of a few test images, framed by whether the class agrees."""
    test, embed = features.labelled()["teacher"][1], features.embeds["teacher"]
    source, rows = run.probe_sources[1], len(test.indices)
    queries = spread_over_classes(test.labels, rows, min(config.evals.pictures, rows - 1))
    near = nearest_neighbours(test.features[:, embed.sets[embed.knn]], queries, NEIGHBOURS)
    neighbours_grid(
        path,
        lambda i: source[int(test.indices[i])],
        queries,
        near,
        titles=[_class_name(source, test.labels[i]) for i in queries],
        same=(test.labels[near] == test.labels[queries][:, None]) & (test.labels[near] >= 0),
    )


def _class_name(source, label: int) -> str:
    return source.class_names[label] if label >= 0 else "no object"


def _write_html(workdir: Path, run: Run, config, report: dict) -> None:
    """WORKDIR/report.html of the config, metrics.jsonl, scores and pictures."""
    images = len(run.source)
    steps = total_steps(config, images)
    epochs = steps / steps_per_epoch(config, images)
    write_report(
        workdir / "report.html",
        title=workdir.name,
        config=config.to_dict(),
        length=f"{steps:,} steps, {epochs:.3g} epochs of {images:,} images",
        log=read_json_lines(workdir / "metrics.jsonl", warn),
        scores=report["scores"],
        pictures={PICTURES[name].capitalize(): file for name, file in pictures(workdir).items()},
        map_file=workdir / MAP,
        notes=[f"Weights after {report['step']} steps, sha256 {report['weights'][:16]}."],
    )
