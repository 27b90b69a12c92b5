"""The log on disk and in the trackers: dropped and resent lines after a resume, failures."""

import io
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from event_files import hyperparameters, read_events, scalars
from PIL import Image
from shrunk import shrunk

from dinotwins_jax.evals.table import figures
from dinotwins_jax.logs.trackers import TRACKERS, TensorBoard, WandB
from dinotwins_jax.logs.writers import JsonLines, Log
from dinotwins_jax.settings.ranges import CHOICES
from dinotwins_jax.stopping import Stopped
from dinotwins_jax.train import train

CONFIG = {"seed": 3, "optim": {"name": "adamw", "lr": 5e-4}, "tasks": ("knn",), "unset": None}
SCORES = {"scores/teacher/k-NN_k_20": 61.5, "scores/random_weights/sgd_1percent": 12.25}


def line(step):
    return {"dino/loss": step / 2, "lr": 0.1 * step}


def picture(folder):
    path = folder / "attention.png"
    Image.fromarray(np.full((5, 7, 3), 200, np.uint8)).save(path)
    return {"attention": path}


def preempted_and_resumed(workdir, names):
    """Stopped after step 3, resumed from the checkpoint of step 2, ended with step 4."""
    with pytest.raises(Stopped), Log(workdir, names, "project", CONFIG) as log:
        log.start(0)
        for step in (1, 2, 3):
            log.write(step, line(step))
        raise Stopped("SIGTERM")
    with Log(workdir, names, "project", CONFIG) as log:
        log.start(2)
        for step in (3, 4):
            log.write(step, line(step))
        log.results(4, SCORES, picture(workdir))


def lines(workdir):
    return [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_writers_of_the_config_are_those_that_there_are():
    assert set(CHOICES["log.writers"]) == {"jsonl", *TRACKERS}


def test_json_lines_forget_what_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, from_step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a crash
    JsonLines(path, from_step=2).write(3, {"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_json_lines_alone_leave_nothing_else(tmp_path):
    preempted_and_resumed(tmp_path, ("jsonl",))
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "attention.png"}
    assert lines(tmp_path) == [{"step": step} | line(step) for step in (1, 2, 3, 4)]


def test_tensorboard_reads_the_log_config_scores_and_pictures(tmp_path):
    preempted_and_resumed(tmp_path, ("jsonl", "tensorboard"))
    events = read_events(tmp_path)
    assert scalars(events, "dino/loss") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert scalars(events, "scores/random_weights/sgd_1percent") == [(4, 12.25)]
    expected = {"seed": 3, "optim.name": "adamw", "optim.lr": 5e-4, "tasks": "('knn',)"}
    assert hyperparameters(events) == expected
    (image,) = events.Images("attention")
    assert (image.step, image.width, image.height) == (4, 7, 5)
    assert Image.open(io.BytesIO(image.encoded_image_string)).getpixel((0, 0)) == (200, 200, 200)


def test_tensorboard_forgets_what_comes_after_the_checkpoint(tmp_path):
    """Lines that are not computed again are dropped too."""
    log = Log(tmp_path, ("tensorboard",), "project", CONFIG)
    log.start(0)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
    log = Log(tmp_path, ("tensorboard",), "project", CONFIG)
    log.start(2)
    log.write(3, {"loss": 9.0})
    assert scalars(read_events(tmp_path), "loss") == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_a_tracker_that_comes_later_gets_the_lines_before(tmp_path):
    log = Log(tmp_path, ("jsonl",), "project", CONFIG)
    log.start(0)
    log.write(2, line(2))
    log = Log(tmp_path, ("jsonl", "tensorboard"), "project", CONFIG)
    log.start(2)
    log.write(4, line(4))
    assert scalars(read_events(tmp_path), "dino/loss") == [(2, 1.0), (4, 2.0)]


def test_a_tracker_that_fails_is_named_once_and_catches_up_at_the_next_start(
    tmp_path, monkeypatch, capfd
):
    class Breaks(TensorBoard):
        def log(self, step, values):
            if step == 4:
                raise ConnectionError("no route\nto host")
            super().log(step, values)

    with monkeypatch.context() as patch:
        patch.setitem(TRACKERS, "tensorboard", Breaks)
        with Log(tmp_path, ("tensorboard",), "project", CONFIG) as log:
            log.start(0)
            for step in (2, 4, 6):
                log.write(step, line(step))
            log.results(6, SCORES, {})
    said = capfd.readouterr().err
    assert said.count("WARNING") == said.count("\n") == 1
    assert "tensorboard failed (ConnectionError: no route)" in said
    assert [row["step"] for row in lines(tmp_path)] == [2, 4, 6]
    assert scalars(read_events(tmp_path), "dino/loss") == [(2, 1.0)]
    Log(tmp_path, ("tensorboard",), "project", CONFIG).start(6)
    assert scalars(read_events(tmp_path), "dino/loss") == [(2, 1.0), (4, 2.0), (6, 3.0)]


def test_a_tracker_that_cannot_open_stops_nothing(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with Log(tmp_path, ("tensorboard",), "project", CONFIG) as log:
        log.start(0)
        log.write(2, line(2))
    assert "tensorboard failed (FileExistsError" in capfd.readouterr().err
    assert lines(tmp_path) == [{"step": 2} | line(2)]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(WandB, "package", "nowhere_installed")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nowhere_installed").mkdir()  # as W&B leaves ./wandb: no package
    with pytest.raises(ValueError, match=r"'wandb', which is not installed: pip install 'wandb>="):
        train(shrunk(log__writers=("jsonl", "wandb")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_figures_have_letters_that_every_tracker_takes():
    scores = {
        "teacher": {
            "linear": {"sgd 1%": {"top1_mean": 70.0, "top1_std": 1.0}},
            "attention": {"jaccard_mean_map": 36.7},
        },
        "random weights": {"knn": {"k20": {"top1": 38.9}}},
    }
    assert figures(scores) == {
        "scores/teacher/sgd_1percent": 70.0,
        "scores/teacher/attention_Jaccard": 36.7,
        "scores/random_weights/k-NN_k_20": 38.9,
    }


def test_mlflow_goes_on_in_its_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install -e .[mlflow]")
    pytest.importorskip("sqlalchemy", reason="pip install -e .[mlflow]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    preempted_and_resumed(tmp_path / "run", ("jsonl", "mlflow"))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("project")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    found = client.get_metric_history(run.info.run_id, "dino/loss")
    assert [(m.step, m.value) for m in found] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert SCORES.items() <= run.data.metrics.items()
    assert run.data.params["optim.lr"] == "0.0005" and run.data.params["tasks"] == "('knn',)"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["attention.png"]


def test_wandb_goes_on_in_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install -e .[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    preempted_and_resumed(tmp_path, ("jsonl", "wandb"))
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime)
    first, second = (offline_run(file) for file in files)
    assert first.id == second.id and first.project == second.project == "project"
    assert first.config["optim"] == CONFIG["optim"] and first.name == tmp_path.name
    assert first.history == [(1, 0.5), (2, 1.0), (3, 1.5)]  # and not 3 again
    assert second.history == [(4, 2.0)]
    assert SCORES.items() <= second.summary.items()
    assert second.summary["attention/width"] == 7


def offline_run(path):
    """id, project, name, config, history of "dino/loss" and summary in an offline file of W&B."""
    from wandb.proto import wandb_internal_pb2

    run = SimpleNamespace(history=[], summary={})
    for content in records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.project, run.name = (
                record.run.run_id,
                record.run.project,
                record.run.display_name,
            )
            run.config = {i.key: json.loads(i.value_json) for i in record.run.config.update}
        if kind == "history":
            values = items(record.history.item)
            if "dino/loss" in values:
                run.history.append((values["_step"], values["dino/loss"]))
        if kind == "summary":
            run.summary |= items(record.summary.update)
    return run


def items(of_record):
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in of_record}


def records(data):
    """Contents of a LevelDB log after its 7 bytes: blocks of 32 KiB, each record (crc, length, type).

    Type 1 is a whole record, 2, 3 and 4 are the first, a middle and the last part of one.
    """
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""
