"""Studies on photographs: settings chosen without the test split, batch sizes, learning curves, limits."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shrunk import SHRUNK

from dinotwins_jax.build import build
from dinotwins_jax.settings.keys import flatten
from dinotwins_jax.stopping import EvaluationFailed, Stopped, StopSignals, time_limit
from dinotwins_jax.train import train
from experiments import photographs
from experiments.comparison.batch_sizes import configs_of_batch, report
from experiments.comparison.learning import learning_curves
from experiments.comparison.outcome import DINO_LOSS, collect, report_failures, spread_cell
from experiments.comparison.plan import make_configs
from experiments.comparison.running import Planned, time_left
from experiments.comparison.settings import (
    BASE,
    CURVE,
    JUDGES,
    SETTINGS,
    config_of_row,
    settings_study,
)

# Of every run here; written as on a command line.
SMALL = {
    key: v if isinstance(v, str) else repr(v) for key, v in SHRUNK.items() if key != "evals.tasks"
}
SMALL |= {"loss.dino.out_dim": "32", "loss.dino.hidden_dim": "32", "loss.dino.bottleneck_dim": "16"}
SMALL |= {"loss.barlow_twins.hidden_dims": "(32, 32)"}

SCENES = {"config": {"data.source": "scenes", "total_epochs": "1.0"}}


def test_every_row_of_the_settings_differs_in_what_it_says_and_is_not_evaluated():
    overrides = {"config": {"total_epochs": "1.0", "data.source": "scenes"}}
    configs = {row: config_of_row(row, "cifar10_cpu", 1, overrides) for row in SETTINGS}
    for row, (method, changes) in SETTINGS.items():
        config = configs[row]
        plain = flatten(
            configs[{"hybrid": BASE, "dino": "dino"}.get(method, "barlow twins")].to_dict()
        )
        differ = {key for key, value in flatten(config.to_dict()).items() if plain[key] != value}
        assert differ == set(changes), row
        assert config.evals.tasks == () and config.evals.monitor_images == JUDGES
        assert config.evals.monitor_every_epochs == config.total_epochs / CURVE
    with pytest.raises(ValueError, match="unknown row 'best': choose from hybrid, width x 3/4"):
        config_of_row("best", "cifar10_cpu", 0, {})


@pytest.mark.parametrize("row", ["patch doubled", "width x 3/4", "no local crops", "a block more"])
def test_rows_of_the_settings_build(row):
    overrides = {"config": {"data.source": "scenes", "total_steps": "62"}}
    assert build(config_of_row(row, "cifar10_cpu", 0, overrides)).total_steps == 62


def test_a_short_run_is_a_tenth_of_the_preset():
    config = config_of_row(BASE, "cifar10_cpu", 0, {"config": {"data.source": "scenes"}})
    whole = build(
        make_configs("cifar10_cpu", ["hybrid"], 0, {"config": {"data.source": "scenes"}})["hybrid"]
    )
    assert config.total_steps == round(whole.total_steps / 10)


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    out, overrides = tmp_path_factory.mktemp("runs") / "settings", {"config": SMALL}
    rows = [BASE, "width x 3/4"]
    text, failed = settings_study("demo", rows, 1, out, overrides)
    assert failed == {}
    return out, rows, overrides, text


@pytest.mark.slow
def test_the_log_of_the_settings_says_what_was_tried_and_on_what_it_was_judged(studied):
    out, rows, _, text = studied
    found = json.loads((out / "settings.json").read_text())["rows"]
    assert [entry["row"] for entry in found] == rows
    assert found[1]["changes"] == {"model.embed_dim": 36, "model.num_heads": 2}
    assert found[0]["judged on"] == "13 held out of at most 40 training images"
    assert found[1]["runs"][0]["images"] > found[0]["runs"][0]["images"]  # a cheaper step
    for entry, row in zip(found, ["hybrid", "width_x_3_4"], strict=True):
        (value,) = entry["scores"]["monitor/knn_top1"]
        log = (out / f"{row}-seed0" / "metrics.jsonl").read_text().splitlines()
        assert value == json.loads(log[-1])["monitor/knn_top1"]
        assert len(entry["curves"]["monitor/ridge_top1"][0]) >= 2
    assert "width x 3/4" in text and "`model.embed_dim=36`" in text
    reports = [json.loads(path.read_text()) for path in out.glob("*/scores.json")]
    assert len(reports) == 2 and all(report["scores"] == {} for report in reports)


@pytest.mark.slow
def test_a_finished_study_trains_nothing_again(studied, monkeypatch):
    out, rows, overrides, text = studied
    monkeypatch.setattr("experiments.comparison.running.train", None)
    assert settings_study("demo", rows, 1, out, overrides) == (text, {})


def test_batch_sizes_see_equal_images_and_the_teacher_looks_as_many_back():
    configs = {
        batch: configs_of_batch("demo", ("dino", "hybrid"), batch, 0, {})["hybrid"]
        for batch in (16, 64, 256)
    }
    plain = make_configs("demo", ["hybrid"], 0, {})["hybrid"]
    for batch, config in configs.items():
        assert config.batch_size == batch and config.total_epochs == plain.total_epochs
        images = np.log(0.5) / np.log(config.teacher.momentum) * batch
        assert images == pytest.approx(np.log(0.5) / np.log(plain.teacher.momentum) * 128)
    steps = {"config": {"total_steps": "80"}}
    found = configs_of_batch("demo", ("dino",), 16, 0, steps)["dino"]
    assert found.total_steps == 80 * 128 / 16


def test_the_loss_from_large_to_small_batches_is_compared_seed_by_seed(tmp_path):
    scores = {
        "barlow_twins": {16: (40.0, 41.0, 42.0), 256: (60.0, 61.5, 62.0)},
        "hybrid": {16: (58.0, 58.0, 58.5), 256: (63.0, 63.5, 63.0)},
    }
    table = {
        f"{method}-batch{batch}": {"k-NN, k=20": list(values), "ridge 10%": list(values)}
        for method, of in scores.items()
        for batch, values in of.items()
    }
    text = report(tmp_path, table, {}, ["barlow_twins", "hybrid"], [16, 256], 3, {})
    lost = json.loads((tmp_path / "batch_sizes.json").read_text())["lost"]
    test = lost["k-NN, k=20"]["barlow_twins"]
    assert test["difference"] == pytest.approx(np.mean([5.0, 5.5, 4.5]) - np.mean([20, 20.5, 20]))
    assert test["verdict"] == "worse"  # less is lost
    (line,) = [line for line in text.splitlines() if line.startswith("| hybrid")][:1]
    assert line.split("|")[-2].strip() == "5.0 ± 0.5"
    assert (
        "hybrid loses 15.2 points fewer than barlow_twins (difference -15.2, with 95% confidence in "
        in text
    )
    assert (tmp_path / "batch_sizes.png").read_bytes().startswith(b"\x89PNG")


def test_failed_tasks_are_missing_in_the_tables_of_batch_sizes_and_named(tmp_path):
    """One seed of a score, a whole column of a row, and a whole row."""
    table = {
        "dino-batch16": {"k-NN, k=20": [40.0, None, 42.0]},
        "dino-batch256": {"k-NN, k=20": [60.0, 61.0, 62.5], "ridge 10%": [1.0, 2.0, 3.0]},
        "hybrid-batch256": {"k-NN, k=20": [63.0, 63.5, 63.0], "ridge 10%": [None] * 3},
    }
    failed = {"dino-batch16-seed1": {"knn": "too little memory"}}
    text = report(tmp_path, table, {}, ["dino", "hybrid"], [16, 256], 3, failed)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert rows[2] == ["dino", "41.0 ± 1.4 (2 of 3)", "61.2 ± 1.3", "20.2 ± 0.4 (2 of 3)"]
    assert rows[3] == ["hybrid", "–", "63.2 ± 0.3", "–"]
    assert rows[6:] == [["dino", "–", "2.0 ± 1.0", "–"], ["hybrid", "–", "–", "–"]]
    assert "dino-batch16-seed1: knn failed: too little memory" in text
    found = json.loads((tmp_path / "batch_sizes.json").read_text())
    assert found["failed"] == failed and found["lost"] == {"k-NN, k=20": {}, "ridge 10%": {}}
    assert (tmp_path / "batch_sizes.png").exists()
    with pytest.raises(EvaluationFailed, match=r"dino-batch16-seed1 \(knn\).*batch_sizes.json has"):
        report_failures(failed, "batch_sizes.json")


def test_a_score_that_is_not_finite_is_none(tmp_path):
    assert spread_cell([None, None]) == "–" and spread_cell([1.0, None]) == "1.0 (1 of 2)"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "dino/loss": NaN}\n')
    scores = {"teacher": {"knn": {"k20": {"top1": float("nan")}}}}
    (tmp_path / "scores.json").write_text(json.dumps({"scores": scores}))
    assert collect({"dino": [tmp_path]})["dino"] == {DINO_LOSS: [None], "k-NN, k=20": [None]}


def test_sizes_of_a_preset_that_follow_from_its_model_are_changed_too():
    """vit_tiny: width 192, 12 blocks, 3 heads."""
    config = config_of_row("width x 3/4", "cifar10", 0, SCENES)
    assert config.model.embed_dim == 144 and config.model.num_heads == 2
    assert config_of_row("a block more", "cifar10", 0, SCENES).model.depth == 13
    assert config_of_row(BASE, "cifar10", 0, SCENES).model.depth is None
    with pytest.raises(
        ValueError, match=r"'dino: rate halved' .*config\.optim\.lr .*leaves it open"
    ):
        config_of_row("dino: rate halved", "cifar10+auto", 0, SCENES)


def test_settings_without_labels_to_judge_by_are_refused_at_the_start(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    keys = {"data.source": "folder", "data.dir": str(tmp_path), "total_epochs": "1.0"}
    with pytest.raises(
        ValueError, match=r"judges by labels, and the training data \(folder, .*none"
    ):
        settings_study("demo", [BASE], 1, tmp_path / "out", {"config": SMALL | keys})
    assert not (tmp_path / "out").exists()


def test_learning_curves_are_over_images_at_the_steps_of_all_seeds(tmp_path):
    def run(name, lines):
        (tmp_path / name).mkdir()
        text = "".join(
            json.dumps({"step": step, "loss": 1.0} | ({"monitor/knn_top1": v} if v else {})) + "\n"
            for step, v in lines
        )
        (tmp_path / name / "metrics.jsonl").write_text(text)
        return tmp_path / name

    runs = {
        "dino": [run("a", [(5, 20.0), (8, None), (10, 30.0)]), run("b", [(5, 22.0), (10, 33.0)])],
        "hybrid": [run("c", [(5, 25.0)]), run("d", [(5, 26.0), (10, 40.0)])],
    }
    found = learning_curves(runs, {"dino": 4, "hybrid": 4})
    (images, values) = found["monitor/knn_top1"]["dino"]
    assert images.tolist() == [20, 40] and values.tolist() == [[20.0, 30.0], [22.0, 33.0]]
    assert found["monitor/knn_top1"]["hybrid"][1].tolist() == [[25.0], [26.0]]
    assert set(found) == {"monitor/knn_top1"}


def test_time_left_is_at_the_rate_of_the_finished_runs(tmp_path):
    def planned(name, flops, seconds=None):
        workdir = tmp_path / name
        workdir.mkdir()
        if seconds is not None:
            (workdir / "seconds.txt").write_text(f"{seconds}\n")
        return Planned(name, None, workdir, 1, flops)

    done, begun, missing = planned("a", 10.0, 600), planned("b", 30.0, 300), planned("c", 10.0)
    assert time_left([done], [begun, missing]).startswith(", 35 minutes left")  # 25 and 10
    assert time_left([], [missing]) == ""


def test_a_time_limit_ends_what_runs_and_asks_a_training_to_save(tmp_path):
    before = signal.getsignal(signal.SIGALRM)
    over = pytest.raises(Stopped, match=r"0\.001 minutes are over: the same command goes on")
    with over, time_limit(0.001):
        time.sleep(30)
    with time_limit(0.001), StopSignals() as stop:
        time.sleep(0.2)
        assert stop.requested(1) == "time limit"
        signal.raise_signal(signal.SIGALRM)  # the timer goes on; it interrupts no saving
        assert stop.requested(2) == "time limit"
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0
    with StopSignals(), time_limit(0):  # none: alarms are left alone
        assert signal.getsignal(signal.SIGALRM) == before


@pytest.mark.slow
def test_a_training_goes_on_after_the_time_is_over(tmp_path, monkeypatch):
    config = config_of_row(BASE, "demo", 0, {"config": SMALL})
    asked = StopSignals.requested

    def at_the_second_step(self, step):
        if step == 2:
            signal.raise_signal(signal.SIGALRM)
        return asked(self, step)

    monkeypatch.setattr(StopSignals, "requested", at_the_second_step)
    stopped = pytest.raises(
        Stopped, match="time limit: stopped after step 2 of 4, which is saved in"
    )
    with stopped, time_limit(60):
        train(config, tmp_path)
    monkeypatch.undo()
    assert train(config, tmp_path) == {}
    assert "4" in {p.name for p in (tmp_path / "checkpoints").iterdir()}


def test_the_tables_have_the_baseline_and_keys_on_the_command_line_come_last(monkeypatch):
    given = {}

    def compare(preset, seeds, methods, budget, out, overrides):
        given.update(preset=preset, seeds=seeds, tasks=overrides["config"]["evals.tasks"])
        return "table", {"dino-seed0": {"knn": "why"}}

    monkeypatch.setattr(photographs, "compare", compare)
    assert photographs.run_study("small", "", 0, Path("x"), {}, methods=["dino"]) == (
        "table",
        {"dino-seed0": {"knn": "why"}},
    )
    assert given["preset"] == "cifar10_small" and given["seeds"] == 3
    assert "scratch" in given["tasks"] and "finetune_all" in given["tasks"]
    own = {"config": {"evals.tasks": "('knn',)"}}
    photographs.run_study("cifar10", "", 1, Path("x"), own, methods=["dino"])
    assert given == {"preset": "cifar10_cpu", "seeds": 1, "tasks": "('knn',)"}
