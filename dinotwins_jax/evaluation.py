"""Evaluation of a run's weights, task by task: scores.json, pictures and report.html."""

import functools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dinotwins_jax.buckets import download, upload
from dinotwins_jax.build import EvalRun, Run
from dinotwins_jax.data import has_probe_data, probe_section
from dinotwins_jax.devices.processes import warn
from dinotwins_jax.drawing import draw
from dinotwins_jax.durations import steps_per_epoch, total_steps
from dinotwins_jax.evals import DRAWN_TASKS, LONG_TASKS, check_tasks, dense
from dinotwins_jax.evals.classes import class_rows, take_classes
from dinotwins_jax.evals.content import content_checksum
from dinotwins_jax.evals.features import checksum, source_checksum
from dinotwins_jax.evals.html import write_report
from dinotwins_jax.evals.names import SCRATCH
from dinotwins_jax.evals.needs import Served, served
from dinotwins_jax.evals.outputs import MAP, PICTURES, pictures
from dinotwins_jax.evals.probes import PROBES, FrozenFeatures, ProbeOptions
from dinotwins_jax.evals.scores import is_unbalanced
from dinotwins_jax.evals.splits import spread_over_classes
from dinotwins_jax.evals.table import first_score
from dinotwins_jax.evals.view import View, silent
from dinotwins_jax.failures import Evaluated, failing_alone
from dinotwins_jax.files import read_json_lines, replace_text
from dinotwins_jax.inputs import moments_of
from dinotwins_jax.logs.tasks import TaskProgress
from dinotwins_jax.models.vit import as_pair
from dinotwins_jax.preprocessing import preprocessing_of
from dinotwins_jax.provenance import described, provenance
from dinotwins_jax.tuning import last_blocks, whole_network
from dinotwins_jax.weights import EvalWeights, with_mask_token


def eval_view(run: Run, config) -> View:
    """Resize and centre crop of the probes."""
    crop = config.views.global_size
    crop = crop if isinstance(crop, int) else tuple(crop)
    return _view(run, config, preprocessing_of(config).resize, crop, config.evals.batch_size)


def _view(run: Run, config, resize: int, crop, batch_size: int) -> View:
    put, (mean, std) = run.placement.put_images, moments_of(config)
    return View(resize, crop, _canvas_size(run, config), batch_size, put, mean, std)


def _canvas_size(run: Run, config) -> int:
    """Side in pixels of the square that holds an image of the probes on the device."""
    if not has_probe_data(config.data):
        return run.canvas_size
    side = max(as_pair(config.views.global_size))
    return config.data.probe.canvas_size or run.probe_sources[0].default_canvas(side)


def mask_images(
    run: Run, config, objects: str = "masks", report: Callable[[int, int], None] = silent
) -> dense.ImageSet:
    """The test images whose attention and cuts are scored: the first config.evals.mask_images, 0: all."""
    test = run.probe_sources[1]
    count = min(config.evals.mask_images or len(test), len(test))
    view = _attention_view(run, config)._replace(report=report)
    return dense.image_set(test, view, range(count), objects)


def picture_images(run: Run, config, count: int, among: np.ndarray | None = None) -> dense.ImageSet:
    """`count` test images to draw, spread over the classes, of `among` i64[n] or, if None, of all."""
    test = run.probe_sources[1]
    among = np.arange(len(test)) if among is None else among
    labels = None if test.labels is None else test.labels[among]
    indices = among[spread_over_classes(labels, len(among), count)]
    return dense.image_set(test, _attention_view(run, config), indices)


def _attention_view(run: Run, config) -> View:
    """Squares of config.evals.attention_size, rounded down to whole patches."""
    grid = config.evals.attention_size // run.backbone.patch_size
    side = grid * run.backbone.patch_size
    # The attention of all blocks is on the device at once: at most 3e7 numbers a head.
    batch = max(1, min(config.evals.batch_size, round(3e7 / (grid**4 * run.backbone.depth))))
    return _view(run, config, side, side, batch)


def what_is_served(run: Run | EvalRun, config, tasks) -> Served:
    """What the labelled data of a run can be scored for; see `served`."""
    evals = config.evals
    options = {"mask_images": evals.mask_images, "draws": evals.pictures > 0}
    return served(tasks, *run.probe_sources, knn_k=tuple(evals.knn_k), **options)


def evaluate(
    run: Run | EvalRun,
    config,
    weights: EvalWeights,
    workdir: Path,
    tasks,
    cache: Path | None = None,
    length: str = "",
) -> Evaluated:
    """Scores weights on the run's labelled data.

    Writes WORKDIR/scores.json after each task, then pictures and report.html. Earlier scores of the
    same weights and data are kept. Features, and scores of weights that were never trained, are
    cached under a checksum of weights and data. A task or picture that fails costs only itself.

    Args:
      config: of the run.
      tasks: of TASKS; what the data cannot serve is left out with one line, see `served`.
      cache: directory of the cache, WORKDIR/features by default; runs on the same data may share it.
      length: of the training, for the report; that of the config by default.
    """
    check_tasks(tasks)
    data = probe_section(config.data.to_dict())
    checksums = [source_checksum(source, data) for source in run.probe_sources]
    identity = {
        "step": weights.step,
        "weights": checksum(weights.teacher),
        "data": checksums,
        "content": content_checksum(run.probe_sources, data["source"]),
    }
    report = _open_report(workdir / "scores.json", identity)
    train, test = run.probe_sources
    report["sets"] = {"train": len(train), "test": len(test), "classes": len(train.class_names)}
    serves = what_is_served(run, config, tasks)
    for line in serves.lines:
        print(line, flush=True)
    report |= {"provenance": provenance(), "left_out": serves.left_out, "failed": {}}
    failed = report["failed"]
    drawn = [task for task in tasks if task in (*PICTURES, "map")] if config.evals.pictures else []
    if config.evals.pictures and "knn" in tasks and run.probe_sources[1].labels is not None:
        drawn.append("neighbours")
    scored = [task for task in serves.tasks if task not in DRAWN_TASKS]
    report["seconds"] |= dict.fromkeys((task for task in tasks if task in DRAWN_TASKS), 0.0)
    with TaskProgress(scored + ["pictures"] * bool(drawn)) as progress:
        cache = cache or workdir / "features"
        download(cache)
        features = frozen_features(run, config, weights, cache, checksums, progress.images)
        masked = partial(mask_images, run, config, serves.objects, progress.images)
        of_run = (run, config, weights, features, functools.cache(masked), serves)
        for task in scored:
            found: dict[str, dict] = {}
            with progress.task(task) as say, failing_alone(f"task {task}", task, failed):
                found = _score(task, *of_run, cache, checksums, progress)
                say(first_score(found.get("teacher", {})))
            _add(report, found, run.probe_sources[1].class_names)
            report["seconds"][task] = round(progress.seconds[task], 2)
            _write_scores(workdir, report)
        if drawn:
            with progress.task("pictures"):
                draw(
                    run, weights, workdir, drawn, features, failed,
                    images=lambda count: picture_images(run, config, count),
                    count=config.evals.pictures,
                )  # fmt: skip
    with failing_alone("report.html", "report.html", failed):
        _write_html(workdir, run, config, report, length)
    _write_scores(workdir, report)
    return Evaluated(report["scores"], failed, _unbalanced(run))


def _add(report: dict, found: dict[str, dict], class_names) -> None:
    """Adds the scores {row: {task: scores}} to the report, those by class of the teacher alone."""
    for row, scores in found.items():
        classes = take_classes(scores)
        report["scores"].setdefault(row, {}).update(scores)
        if row == "teacher":
            report["classes"] |= {
                name: {part: class_rows(columns, class_names) for part, columns in of.items()}
                for name, of in classes.items()
            }


def _unbalanced(run: Run | EvalRun) -> bool:
    labels = run.probe_sources[1].labels
    return labels is not None and is_unbalanced(labels)


def _write_scores(workdir: Path, report: dict) -> None:
    replace_text(workdir / "scores.json", json.dumps(report, indent=2) + "\n")
    upload(workdir)


def frozen_features(
    run: Run,
    config,
    weights: EvalWeights,
    cache: Path,
    checksums: list[str],
    report: Callable[[int, int], None] = silent,
) -> FrozenFeatures:
    """Frozen features of a run's labelled data.

    Args:
      checksums: `source_checksum` of train and test; report: of `View`.
    """
    return FrozenFeatures(
        with_mask_token(run.backbone, weights.teacher),
        {"teacher": weights.teacher, "random weights": weights.random},
        run.probe_sources,
        eval_view(run, config)._replace(report=report),
        n_last_blocks=config.evals.n_last_blocks,
        mean_patch=config.evals.mean_patch,
        cache=cache,
        data=checksums,
    )


def _open_report(path: Path, identity: dict) -> dict:
    """The report at `path` if it is whole and of the same weights and data, else a new one.

    Data are the same if their files are, or their content, so that they may have moved.
    """
    fresh = identity | {"seconds": {}, "scores": {}, "classes": {}}
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):
        return fresh
    whole = isinstance(old, dict) and all(
        isinstance(old.get(k), dict) for k in ("seconds", "scores")
    )
    same = {key for key in identity if whole and old.get(key) == identity[key]}
    known = {"step", "weights"} <= same and same & {"data", "content"}
    return fresh | old | identity if known else fresh


def _score(
    task: str,
    run: Run,
    config,
    weights: EvalWeights,
    features: FrozenFeatures,
    masked: Callable[[], dense.ImageSet],
    serves: Served,
    cache: Path,
    checksums: list[str],
    progress: TaskProgress,
) -> dict[str, dict]:
    """Scores {row: {task: scores}} of one task."""
    evals = config.evals
    rows = {"teacher": weights.teacher, "random weights": weights.random}
    if task in PROBES:
        options = ProbeOptions(
            num_classes=len(run.probe_sources[0].class_names),
            label_fractions=tuple(evals.label_fractions),
            split_seeds=tuple(evals.split_seeds),
            bank_solver=evals.bank_solver,
            knn_k=serves.knn_k,
            knn_temp=evals.knn_temp,
            shots=tuple(evals.shots),
        )
        return {row: features.probe(task, row, options) for row in progress.parts(features.embeds)}
    view = eval_view(run, config)._replace(report=progress.images)
    if task == "finetune":
        return {row: last_blocks(run, config, rows[row], view) for row in progress.parts(rows)}
    if task in LONG_TASKS:
        row, start = (
            ("teacher", "teacher") if task == "finetune_all" else (SCRATCH, "random weights")
        )
        options = (view, cache, checksums, task == "finetune_all")
        return {row: whole_network(run, config, rows[start], *options)}
    if task == "segmentation":
        return dense.score_segmentation(run.backbone, rows, masked())
    return dense.score_attention(run.backbone, rows, masked(), keep=evals.attention_keep)


def _write_html(workdir: Path, run: Run, config, report: dict, length: str) -> None:
    """WORKDIR/report.html of the config, metrics.jsonl, scores and pictures."""
    if not length:
        images = len(run.source)
        steps = total_steps(config, images)
        epochs = steps / steps_per_epoch(config, images)
        length = f"{steps:,} steps, {epochs:.3g} epochs of {images:,} images"
    write_report(
        workdir / "report.html",
        title=workdir.name,
        config=config.to_dict(),
        length=length,
        log=read_json_lines(workdir / "metrics.jsonl", warn),
        scores=report["scores"],
        pictures={PICTURES[name].capitalize(): file for name, file in pictures(workdir).items()},
        map_file=workdir / MAP,
        notes=[
            f"Weights after {report['step']} steps, sha256 {report['weights'][:16]}.",
            *described(report["provenance"]),
        ],
        classes=report["classes"],
        balanced=_unbalanced(run),
    )
