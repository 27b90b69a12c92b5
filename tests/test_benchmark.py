"""The input benchmark, reduced to seconds: it runs on generated images with consistent figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "input.json"
    small = ["--images=2", "--rounds=1", "--seconds=0.05", "--batch_size=2", "--memory_batches=10"]
    command = [sys.executable, "-m", "experiments.benchmark.input_pipeline", *small]
    done = subprocess.run(
        [*command, f"--json={out}"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


@pytest.mark.slow
def test_every_contestant_has_figures(run):
    _, figures = run
    host, device = figures["host"], figures["device"]
    pillow = {"pillow", "pillow_decode", "pillow_crops"}
    ours = {"raw", "prepared", "raw_worker_process", "prepared_worker_process"}
    assert set(host["images_per_s"]) == pillow | ours
    assert {"crops_raw", "crops_prepared", "end_to_end_raw", "end_to_end_prepared"} < set(
        device["images_per_s"]
    )
    rates = [*host["images_per_s"].values(), *device["images_per_s"].values()]
    assert min(rates) > 0
    assert (
        figures["settings"]["pictures"] == "drawn" and figures["settings"]["canvas"]["raw"] == 640
    )
    assert len(figures["memory"]["resident_bytes_after_batches"]) == 11


@pytest.mark.slow
def test_ratios_are_those_of_the_rates_and_the_table_shows_them(run):
    table, figures = run
    host = figures["host"]
    for name, rate in host["images_per_s"].items():
        ratio = rate / host["images_per_s"]["pillow"]  # one round: medians are the values
        assert host["times_pillow"][name] == pytest.approx(ratio)
    assert f"{host['images_per_s']['prepared']:.1f}" in table
    assert f"{host['times_pillow']['raw']:.1f}" in table
    assert "end to end, raw" in table and "memory after" in table
