"""From a run's parts and weights to scores, pictures and a report, task by task."""

import json
import time
from pathlib import Path

import numpy as np

from dinotwins_jax.build import Run
from dinotwins_jax.evals import dense
from dinotwins_jax.evals.features import checksum, source_checksum
from dinotwins_jax.evals.finetune import fine_tune
from dinotwins_jax.evals.html import write_report
from dinotwins_jax.evals.neighbours import nearest_neighbours, neighbours_grid
from dinotwins_jax.evals.probes import PROBES, ProbeOptions
from dinotwins_jax.evals.tasks import LABEL_TASKS, MASK_TASKS, TASKS, check_tasks
from dinotwins_jax.files import replace_text
from dinotwins_jax.subject import Features, Subject, eval_view, look_at

NEIGHBOURS = 6  # in the picture
CAPTIONS = {
    "attention": "What the class token of the last block looks at",
    "segmentation": "Objects found by a normalised cut of the patch features",
    "pca": "The first three principal components of the patch features, as colours",
    "neighbours": "Nearest neighbours among the test images, by the class token",
}


def evaluate(
    run: Run, config, subject: Subject, workdir: Path, tasks, cache: Path | None = None
) -> dict[str, dict]:
    """Scores weights on the run's labelled data; what other tasks found about them stays.

    Writes WORKDIR/scores.json after each task, then pictures and report.html. Features, and probes of
    weights that were never trained, are kept under a checksum of weights and data.

    Args:
      config: of the run.
      cache: where they are kept, WORKDIR/features by default; runs of one data set may share it.
      tasks: of TASKS; those that the data cannot serve are left out, and a line says so.
    Returns:
      {row: {task: scores}}, rows "teacher", "random weights", "raw pixels", "centre box".
    """
    check_tasks(tasks)
    train, test = run.probe_sources
    data = config.data.to_dict()
    identity = {
        "step": subject.step,
        "weights": checksum(subject.teacher),
        "data": [source_checksum(source, data) for source in (train, test)],
    }
    report = _open_report(workdir / "scores.json", identity)
    possible = _possible(tasks, train, test)
    report["left_out"] = [task for task in tasks if task not in possible]
    features = Features(run, config, subject, cache or workdir / "features", identity["data"])
    for task in possible:
        start = time.perf_counter()
        for row, found in _score(task, run, config, subject, features).items():
            report["scores"].setdefault(row, {}).update(found)
        report["seconds"][task] = round(time.perf_counter() - start, 2)
        replace_text(workdir / "scores.json", json.dumps(report, indent=2) + "\n")
    if config.evals.pictures:
        draw(run, config, subject, workdir, tasks, features)
    write_html(workdir, config, report)
    return report["scores"]


def _open_report(path: Path, identity: dict) -> dict:
    """What is there already of the same weights and data, or a new one."""
    fresh = identity | {"seconds": {}, "scores": {}}
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):
        return fresh
    return old if all(old.get(key) == value for key, value in identity.items()) else fresh


def _possible(tasks, train, test) -> list[str]:
    """The tasks that the data can serve, in the order of TASKS."""
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


def _score(task: str, run: Run, config, subject: Subject, features) -> dict[str, dict]:
    """{row: {task: scores}}; a picture has none."""
    evals = config.evals
    weights = {"teacher": subject.teacher, "random weights": subject.random}
    if task in PROBES:
        options = ProbeOptions(
            num_classes=len(run.probe_sources[0].class_names),
            label_fractions=tuple(evals.label_fractions),
            split_seeds=tuple(evals.split_seeds),
            bank_solver=evals.bank_solver,
            knn_k=tuple(evals.knn_k),
            knn_temp=evals.knn_temp,
            shots=tuple(evals.shots),
        )
        return {row: features.probe(task, row, options) for row in features.embeds}
    if task == "finetune":
        return {row: _fine_tune(run, config, params) for row, params in weights.items()}
    if task in ("attention", "segmentation"):
        looked = look_at(run, config, evals.mask_images)
        if task == "segmentation":
            return dense.score_segmentation(run.backbone, weights, looked)
        return dense.score_attention(run.backbone, weights, looked, keep=evals.attention_keep)
    return {}


def _fine_tune(run: Run, config, params) -> dict[str, dict]:
    """{"finetune": scores}, and "finetune multilabel" where images have several labels."""
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


def draw(run: Run, config, subject: Subject, workdir: Path, tasks, features: Features) -> None:
    """The pictures of the tasks: WORKDIR/attention.png, segmentation.png, pca.png, neighbours.png."""
    looked = look_at(run, config, config.evals.pictures)
    here = (run.backbone, subject.teacher, looked)
    if "attention" in tasks:
        dense.draw_attention(workdir / "attention.png", *here)
    if "segmentation" in tasks and looked.masks is not None:
        dense.draw_segmentation(workdir / "segmentation.png", *here)
    if "pca" in tasks:
        dense.draw_pca(workdir / "pca.png", *here)
    if "knn" in tasks and run.probe_sources[1].labels is not None:
        _draw_neighbours(workdir / "neighbours.png", run, config, features)


def _draw_neighbours(path: Path, run: Run, config, features: Features) -> None:
    """The most similar test images of a few test images, framed by whether the class agrees."""
    test, embed = features.labelled()["teacher"][1], features.embeds["teacher"]
    source = run.probe_sources[1]
    queries = np.arange(min(config.evals.pictures, len(test.indices) - 1))
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


def pictures(workdir: Path) -> dict[str, Path]:
    """What `draw` left in the workdir, by name."""
    files = {name: workdir / f"{name}.png" for name in CAPTIONS}
    return {name: file for name, file in files.items() if file.exists()}


def write_html(workdir: Path, config, report: dict) -> None:
    """WORKDIR/report.html of all that lies there."""
    lines = (
        (workdir / "metrics.jsonl").read_text().splitlines()
        if (workdir / "metrics.jsonl").exists()
        else []
    )
    write_report(
        workdir / "report.html",
        title=workdir.name,
        config=config.to_dict(),
        log=[json.loads(line) for line in lines],
        scores=report["scores"],
        pictures={CAPTIONS[name]: file for name, file in pictures(workdir).items()},
        notes=[f"Weights after {report['step']} steps, sha256 {report['weights'][:16]}."],
    )
