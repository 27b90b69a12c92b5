"""A run in a bucket, killed and resumed, equals a run in a directory bit for bit."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from bucket import running_bucket
from shrunk import SHRUNK
from test_buckets import objects

import dinotwins_jax as dt
from dinotwins_jax.buckets import at_hand
from dinotwins_jax.evaluate import evaluate_run
from experiments.faults import final_arrays

OPTIONS = SHRUNK | {"total_steps": 20, "checkpoint.every_epochs": 1.0, "evals.monitor_every_epochs": 0.0,
                    "log.writers": "('tensorboard',)", "evals.tasks": ("knn",)}  # fmt: skip
URL = "gs://bucket/runs/killed"


def command(workdir):
    flags = [f"--config.{name}={value}" for name, value in OPTIONS.items()]
    return [
        sys.executable,
        "-m",
        "dinotwins_jax.main",
        "--config=configs/hybrid.py",
        *flags,
        f"--workdir={workdir}",
    ]


def lines(text):
    """The rows of a metrics.jsonl, without what depends on the clock."""
    timing = {"images_per_s", "data_wait"}
    return [
        {k: v for k, v in json.loads(row).items() if k not in timing} for row in text.splitlines()
    ]


def committed():
    return [
        name
        for name in objects(URL)
        if name.endswith("commit_success.txt") and name.count("/") == 2
    ]


@pytest.mark.slow
def test_killed_in_a_bucket_equals_unbroken_in_a_directory(tmp_path, monkeypatch):
    with running_bucket(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        run = subprocess.Popen(command(URL), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 600
        while not committed():
            assert run.poll() is None and time.monotonic() < deadline, run.stdout.read()
            time.sleep(0.2)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL
        before = [json.loads(line)["step"] for line in objects(URL)["metrics.jsonl"].splitlines()]
        saved = min(int(name.split("/")[1]) for name in committed())
        assert saved < 20 and saved in before  # its log is there, the run did not end

        resumed = subprocess.run(command(URL), check=True, capture_output=True, text=True)
        whole = tmp_path / "whole"
        subprocess.run(command(whole), check=True, capture_output=True)
        assert f"In {URL}:" in resumed.stdout

        with at_hand(URL) as workdir:
            ours, theirs = final_arrays(workdir), final_arrays(whole)
        assert ours.keys() == theirs.keys() and int(ours["step"]) == 20
        for path, array in theirs.items():
            np.testing.assert_array_equal(ours[path], array, err_msg=path)

        there = objects(URL)
        assert lines(there["metrics.jsonl"]) == lines((whole / "metrics.jsonl").read_bytes())
        scores = json.loads(there["scores.json"])["scores"]
        assert scores == json.loads((whole / "scores.json").read_text())["scores"]
        names = {path.name for path in whole.iterdir() if path.is_file()} - {"lock"}
        assert {"report.html", "config.json", "timing.json", "neighbours.png"} <= names
        assert names <= there.keys() and "lock" not in there
        assert sum(name.startswith("tensorboard/") for name in there) == 2  # a file a start
        assert any(name.startswith("features/") for name in there)

        found = evaluate_run(URL, tasks=["linear"])
        assert found["teacher"]["knn"] == scores["teacher"]["knn"]
        report = json.loads(objects(URL)["scores.json"])["scores"]
        assert "linear" in report["teacher"] and report == found
        image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
        model, same = dt.load(URL), dt.load(whole)
        assert model.source == URL and model.identity == same.identity
        np.testing.assert_array_equal(model(image).cls, same(image).cls)
