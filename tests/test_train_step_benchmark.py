"""The step benchmarks, reduced to seconds: contestants are processes, figures are consistent."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dinotwins_jax.build import build
from experiments.benchmark import end_to_end, growth
from experiments.benchmark.flops import step_flops
from experiments.benchmark.settings import Settings, architecture, config_of
from experiments.benchmark.train_step import OURS, measure, table
from experiments.benchmark.worker import Contestant, random_crops

TINY = Settings(
    model="vit_tiny", global_size=32, local_size=16, num_local=1, batch_size=2, prototypes=64,
    projector=32, drop_path=0.0, way="data1",
)  # fmt: skip


@pytest.fixture(scope="module")
def figures():
    return measure(TINY, rounds=2, seconds=0.01)


@pytest.mark.slow
def test_figures_hang_together(figures):
    row = figures["contestants"][OURS]
    assert row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
    assert row["images_per_s"] == pytest.approx(2000 / row["ms"]["median"])
    assert row["utilisation"] == pytest.approx(1e12 * row["tflop_per_s"] / figures["ceiling"])
    assert row["peak_bytes"] > row["temporary_bytes"] > 0 and row["compile_s"] > 0
    text = table(figures)
    assert "hybrid, vit_tiny/16, 2 x 32 + 1 x 16, K 64 D 32, batch 2" in text
    assert f"{row['images_per_s']:.2f}" in text


@pytest.mark.slow
def test_formula_is_what_the_compiler_counts():
    """Besides the matrix products of the formula, XLA counts one operation per element."""
    settings = TINY._replace(method="dino", global_size=64, local_size=32, prototypes=256)
    run = build(config_of(settings), jax.devices()[:1], make_crops=lambda batch: batch)
    state = run.placement.abstract(jax.eval_shape(run.fresh_state))
    batch = jax.eval_shape(lambda: random_crops(settings._asdict()))
    flops = (
        run.placement.compile(run.train_step, state).lower(state, batch).cost_analysis()["flops"]
    )
    assert step_flops(settings) < flops < 1.25 * step_flops(settings)


def test_bad_settings_and_dead_contestants_are_named(capfd):
    with pytest.raises(ValueError, match=r"'mikro4' is no way to train"):
        measure(TINY._replace(way="mikro4"))
    with pytest.raises(ValueError, match="unknown method 'dyno'"):
        measure(TINY._replace(method="dyno"))
    with pytest.raises(RuntimeError, match=r"jax_step ended with code 1"):
        Contestant("experiments.benchmark.jax_step", TINY._replace(model="vit_huge")._asdict())
    assert "vit_huge" in capfd.readouterr().err


@pytest.mark.slow
def test_the_command_writes_its_figures(tmp_path):
    flags = [
        f"--{name}={getattr(TINY, name)}"
        for name in ("global_size", "local_size", "num_local", "batch_size", "prototypes", "way")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark.train_step", "--methods=dino", *flags,
         "--models=vit_tiny", "--rounds=1", "--seconds=0.01", f"--json={tmp_path / 'x.json'}"],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "x.json").read_text())["settings"]
    assert f"{found['contestants'][OURS]['images_per_s']:.2f}" in done.stdout


@pytest.mark.slow
def test_growth_has_a_row_and_a_point_a_setting(figures, monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "measure", lambda settings, rounds: figures)
    sweeps = {"batch size": ("batch_size", (1, 2)), "virtual devices": ("way", (1, 2))}
    found = growth.sweep(TINY, sweeps, rounds=1)
    row = figures["contestants"][OURS]
    assert found["batch size"][2]["ms_per_image"] == pytest.approx(row["ms"]["min"] / 2)
    assert growth.table(found).count("\n") == 5
    growth.draw(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


@pytest.mark.slow
def test_end_to_end_adds_up():
    phases = {"import": 1.0, "build": 0.5, "initial state": 0.5, "first step": 10.0, "steps": 20.0}
    found = {"cold": phases | {"total": 33.0, "wall": 34.0}}
    assert end_to_end.until_first_step(found["cold"]) == 13.0
    text = end_to_end.table(found)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["other", "2.0"] in rows and ["all", "34.0"] in rows


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "barlow_twins"])
def test_the_pytorch_baseline_has_the_same_loss_and_gradient(method):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (requirements-bench.txt)")
    from dinotwins_jax.models.torch_weights import vit_to_torch
    from experiments.benchmark.torch_step import Trainer, to_views

    settings = TINY._replace(method=method, batch_size=4)
    run = build(config_of(settings), jax.devices()[:1], make_crops=lambda batch: batch)
    state, crops = run.fresh_state(), random_crops(settings._asdict())
    _, metrics = jax.jit(run.train_step)(state, crops)

    trainer = Trainer(settings._asdict() | architecture(settings), "cpu")

    def load(module, arrays):
        own = module.state_dict()
        taken = {name: torch.tensor(np.asarray(x)) for name, x in arrays.items()}
        module.load_state_dict(own | taken)
        return set(own) - set(taken)

    assert not load(trainer.student["backbone"], vit_to_torch(state.params["backbone"]))
    head = state.params["heads"][method]
    names = {"mlp": "mlp.{}", "dense": "{}", "bn": "{}"}
    arrays = {}
    for name, layer in head.items():
        kind, _, number = name.rpartition("_")
        if name == "last_layer":
            arrays["last_layer.weight_v"] = layer["weight_v"]
            continue
        place = int(number) * (2 if kind == "mlp" else 3) + (kind == "bn")
        prefix = names[kind].format(place)
        arrays[f"{prefix}.weight"] = layer["kernel"].T if "kernel" in layer else layer["scale"]
        if "bias" in layer:
            arrays[f"{prefix}.bias"] = layer["bias"]
    missing = load(trainer.student[method], arrays)
    assert all("running" in name or "num_batches" in name for name in missing)
    trainer.sync_teacher()
    views = [to_views(crops[name], "cpu") for name in ("global_crops", "local_crops")]
    loss, _ = trainer.loss(*views, trainer.center)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in trainer.parameters if p.grad is not None]).norm()
    assert loss.item() == pytest.approx(float(metrics["loss"]), rel=1e-4)
    assert norm.item() == pytest.approx(float(metrics["grad_norm"]), rel=1e-3)
