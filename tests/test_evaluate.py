"""Scores of a whole run: every task, the cache, the command, weights with PyTorch's names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from shrunk import shrunk

from dinotwins_jax.build import build
from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.evals import LONG_TASKS, TASKS, features, probes
from dinotwins_jax.evals.knn import knn_classify
from dinotwins_jax.evals.monitor import make_monitor
from dinotwins_jax.evals.scores import top_k_accuracy
from dinotwins_jax.evals.splits import holdout, stratified_indices
from dinotwins_jax.evals.view import View
from dinotwins_jax.evaluate import evaluate_run
from dinotwins_jax.evaluation import eval_view
from dinotwins_jax.models.torch_weights import vit_to_torch
from dinotwins_jax.stopping import EvaluationFailed
from dinotwins_jax.train import train
from dinotwins_jax.weights import from_checkpoint

ROOT = Path(__file__).parent.parent
REAL_DATA = Path(os.environ.get("DINOTWINS_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(workdir, scores) of a run that was evaluated after training, by the config in its workdir."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert train(shrunk(evals__tasks=()), workdir) == {}
    return workdir, evaluate_run(workdir)


def test_every_task_scores_every_row_it_can(evaluated):
    workdir, scores = evaluated
    backbones = {"linear", "knn", "fewshot", "finetune", "clusters", "attention", "segmentation"}
    assert set(scores["teacher"]) == set(scores["random weights"]) == backbones
    assert set(scores["raw pixels"]) == {"linear", "knn", "fewshot", "clusters"}
    assert set(scores["centre box"]) == {"attention"}
    assert set(scores["teacher"]["linear"]) == {"sgd 50%", "ridge 50%"}
    report = json.loads((workdir / "scores.json").read_text())
    assert report["scores"] == scores and report["step"] == 4
    assert set(report["seconds"]) == set(TASKS) - set(LONG_TASKS)
    assert "<h2>Map of the test images</h2>" in (workdir / "report.html").read_text()

    def leaves(tree):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value) if isinstance(value, (dict, list)) else (value,)

    numbers = [x for x in leaves(scores) if isinstance(x, float)]
    assert len(numbers) > 100 and np.isfinite(numbers).all()


def test_every_result_names_its_protocol(evaluated):
    _, scores = evaluated
    for row in scores.values():
        for task, result in row.items():
            parts = result.values() if task == "linear" else [result]
            assert all(part["protocol"] for part in parts), task


def test_scores_by_class_are_of_two_predictions(evaluated):
    """The bank with the most labels, and the k-NN of the table; of the teacher, beside the scores."""
    workdir, scores = evaluated
    report = json.loads((workdir / "scores.json").read_text())
    assert {task: list(parts) for task, parts in report["classes"].items()} == {
        "linear": ["ridge 50%"],
        "knn": ["k5"],
    }
    test = build(shrunk()).probe_sources[1]
    for task, name in (("linear", "ridge 50%"), ("knn", "k5")):
        rows = report["classes"][task][name]
        assert [row["class"] for row in rows] == list(test.class_names)
        assert [row["support"] for row in rows] == np.bincount(test.labels, minlength=10).tolist()
        recalls = [row["recall"] for row in rows if row["support"]]
        found = scores["teacher"][task][name]
        assert found.get("balanced", found.get("balanced_mean")) == pytest.approx(np.mean(recalls))
        right = sum(row["recall"] * row["support"] for row in rows if row["support"]) / 20
        assert found.get("top1", found.get("top1_mean")) == pytest.approx(right)
    for row in scores.values():
        assert "classes" not in row["linear"]["ridge 50%"] if "linear" in row else True
    page = (workdir / "report.html").read_text()
    assert "<h2>Scores by class</h2>" in page and "<h3>ridge, 50% of the labels</h3>" in page


def test_evaluating_again_keeps_the_scores_and_says_where_they_come_from(evaluated):
    workdir, scores = evaluated
    before = json.loads((workdir / "scores.json").read_text())
    config = shrunk(evals__tasks=(), evals__pictures=0)
    assert evaluate_run(workdir, config, ["fewshot"]) == scores
    after = json.loads((workdir / "scores.json").read_text())
    assert after["scores"] == before["scores"] and after["classes"] == before["classes"]
    for report in (before, after):
        assert report["provenance"].keys() == {"command", "date", "versions", "commit", "devices"}
    assert after["provenance"]["date"] >= before["provenance"]["date"]
    page = (workdir / "report.html").read_text()
    assert f"Evaluated {after['provenance']['date']} by: python " in page


def test_pictures_and_report_are_there(evaluated):
    workdir, _ = evaluated
    for name in ("attention", "segmentation", "pca", "neighbours"):
        assert (workdir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (workdir / "report.html").read_text()
    assert page.count("<img") >= 4 and "linear-sgd-cached-v1" in page
    assert "<td>4 steps, 0.571 epochs of 60 images</td>" in page  # seven steps of 8 images an epoch


def test_features_are_computed_once_and_other_tasks_stay(evaluated, monkeypatch):
    workdir, scores = evaluated
    before = {path: path.stat().st_mtime_ns for path in (workdir / "features").iterdir()}
    assert len([path for path in before if path.suffix == ".npz"]) == 6  # three rows, two splits

    def never(*_):
        raise AssertionError("features are computed again")

    monkeypatch.setattr(View, "map", never)
    config = shrunk(evals__tasks=(), evals__pictures=0)
    again = evaluate_run(workdir, config, ["knn", "fewshot"])
    assert again == scores
    assert before == {path: path.stat().st_mtime_ns for path in (workdir / "features").iterdir()}


def test_other_data_are_scored_beside(evaluated):
    """The run's own scores, report and pictures stay; its features are shared."""
    workdir, _ = evaluated
    own = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    changed = {"data.scenes.num_test": 12, "evals.pictures": 0}
    scores = evaluate_run(workdir, tasks=["knn"], overrides=changed)
    report = json.loads((workdir / "evals" / "scenes" / "scores.json").read_text())
    assert report["scores"] == scores and set(scores["teacher"]) == {"knn"}
    assert (
        report["step"] == 4
        and "on other data" in (workdir / "evals/scenes/report.html").read_text()
    )
    assert {path: path.read_bytes() for path in own} == own
    assert not (workdir / "evals" / "scenes" / "features").exists()
    again = evaluate_run(workdir, tasks=["knn"], overrides={"evals.pictures": 0}, name="again")
    assert (
        again["teacher"]["knn"]
        == json.loads(own[workdir / "scores.json"])["scores"]["teacher"]["knn"]
    )


def test_what_fails_costs_only_itself(evaluated, monkeypatch, capfd):
    workdir, scores = evaluated
    kept = (workdir / "scores.json").read_text()

    def fails(*_, **__):
        raise ValueError("too few images")

    with monkeypatch.context() as patch:
        patch.setitem(probes.PROBES, "fewshot", fails)
        patch.setattr("dinotwins_jax.drawing.nearest_neighbours", fails)
        patch.setattr("dinotwins_jax.evals.probes.FrozenFeatures.probe", _uncached)
        with pytest.raises(EvaluationFailed, match=r"^fewshot, neighbours\.png failed") as error:
            evaluate_run(workdir, tasks=["fewshot", "knn"])
    said = capfd.readouterr().err.splitlines()
    assert said == ["task fewshot failed: too few images", "neighbours.png failed: too few images"]
    report = json.loads((workdir / "scores.json").read_text())
    assert error.value.code == 4 and report["scores"] == scores
    assert report["failed"] == dict.fromkeys(("fewshot", "neighbours.png"), "too few images")
    (workdir / "scores.json").write_text(kept)


def _uncached(features, task, row, options):
    return probes.PROBES[task](features.embeds[row], *features.labelled()[row], options)


def test_other_weights_and_other_data_have_other_checksums():
    run = build(shrunk())
    params = run.random_backbone()
    changed = jax.tree.map(lambda x: x, params)
    changed["norm"]["bias"] = changed["norm"]["bias"].at[0].add(1e-6)
    assert features.checksum(params) == features.checksum(jax.device_get(params))
    assert features.checksum(params) != features.checksum(changed)
    train_source, test_source = run.probe_sources
    sums = {
        features.source_checksum(train_source, {"seed": 0}),
        features.source_checksum(train_source, {"seed": 1}),
        features.source_checksum(test_source, {"seed": 0}),
    }
    assert len(sums) == 3


def test_weights_with_pytorchs_names_score_the_same(evaluated, tmp_path):
    workdir, scores = evaluated
    run = build(shrunk())
    with Checkpoints(workdir, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(run.placement.init(run.fresh_state))
    np.savez(tmp_path / "teacher.npz", **vit_to_torch(state.teacher_params["backbone"]))
    config = shrunk(evals__tasks=())
    ours = evaluate_run(tmp_path / "out", config, ["knn"], str(tmp_path / "teacher.npz"))
    assert ours["teacher"]["knn"] == scores["teacher"]["knn"]


def test_a_checkpoint_is_chosen(evaluated):
    """The last, the best by the monitor's k-NN, or a step."""
    workdir, _ = evaluated
    config = shrunk(mesh__data=1)
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    top1 = {line["step"]: line["monitor/knn_top1"] for line in log}
    assert set(top1) == {2, 4}
    run = build(config)
    steps = {w: from_checkpoint(run, config, workdir, w).step for w in ("latest", "2", "best")}
    assert steps["latest"] == 4 and steps["2"] == 2
    assert top1[steps["best"]] == max(top1.values())
    for wrong in ("3", "last"):
        with pytest.raises(ValueError, match=rf"--checkpoint is '{wrong}'.*\[2, 4\]"):
            from_checkpoint(run, config, workdir, wrong)


def test_the_monitor_is_knn_and_ridge_on_held_out_training_images():
    run = build(shrunk())
    source, params = run.probe_sources[0], run.random_backbone()
    view = eval_view(run, shrunk())
    found = make_monitor(run.backbone, source, view, images=40, k=3)(params)
    chosen = stratified_indices(source.labels, 40 / 60, 0)
    fit, held = holdout(source.labels, chosen, 1 / 3, 0)
    embed = features.backbone_features(run.backbone, 1)
    x, z = (
        np.asarray(view.map(lambda v: embed(params, v), source, i)[0])[:, :48] for i in (fit, held)
    )
    votes = knn_classify(x, source.labels[fit], z, 3, 0.07, 10)
    expected = top_k_accuracy(votes, source.labels[held], 1)
    assert found["monitor/knn_top1"] == pytest.approx(expected)
    assert 0 <= found["monitor/ridge_top1"] <= 100


@pytest.mark.slow
def test_coco_has_both_kinds_of_labels_and_masks(tmp_path):
    directory = REAL_DATA / "coco_sample"
    if not directory.is_dir():
        pytest.skip(f"no coco_sample in DINOTWINS_DATA ({REAL_DATA})")
    tasks = ("linear", "knn", "attention")
    config = shrunk(
        data__source="coco",
        data__dir=str(directory),
        total_steps=2,
        evals__tasks=tasks,
        evals__mask_images=12,
    )
    scores = train(config, tmp_path)
    assert set(scores["teacher"]["linear"]) == {
        "sgd 50%",
        "ridge 50%",
        "multilabel sgd 50%",
        "multilabel ridge 50%",
    }
    assert {"knn", "knn multilabel", "attention"} <= set(scores["teacher"])
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < line["monitor/ridge_map"] <= 100


def command_line(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dinotwins_jax.evaluate", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_evaluate_and_export_print_no_warning(evaluated):
    """Orbax, absl and XLA have some for a run like any other; the files that were written are listed."""
    workdir, _ = evaluated
    done = command_line(f"--workdir={workdir}", "--tasks=knn,attention")
    assert done.returncode == 0 and done.stderr == ""
    listed = [line.split()[0] for line in done.stdout.partition(f"In {workdir}:\n")[2].splitlines()]
    pictures = ["attention.png", "segmentation.png", "pca.png", "neighbours.png"]
    assert listed == ["report.html", "scores.json", *pictures, "map.html"]
    export = [sys.executable, "-m", "dinotwins_jax.export", f"--workdir={workdir}", "--to=dino"]
    done = subprocess.run(export, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--workdir is required"),
        (("--workdir=nowhere",), "no run in nowhere"),
        (("--workdir=nowhere", "--config=configs/dino.py"), "no checkpoints in nowhere"),
        (("--workdir=nowhere", "--config=configs/dino.py", "--tasks=knm"), "unknown task 'knm'"),
        (
            ("--workdir=nowhere", "--config=configs/dino.py", "--torch_weights=no.pth"),
            "no.pth",
        ),
    ],
)
def test_the_command_says_one_line_and_exits_with_2(arguments, message):
    done = command_line(*arguments)
    assert done.returncode == 2 and message in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
