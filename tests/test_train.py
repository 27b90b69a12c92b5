"""Whole runs at reduced size: their files, resuming, and errors for invalid input."""

import copy
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags
from event_files import hyperparameters, read_events, scalars
from golden_files import assert_trees_close, relative_error
from ml_collections import ConfigDict
from PIL import Image
from shrunk import SHRUNK, shrunk

from configs import (
    barlow_twins,
    base,
    byol,
    dino,
    dinov2,
    dinov3,
    hybrid,
    hybrid_dinov2,
    presets,
    simclr,
    vicreg,
)
from dinotwins_jax import build as build_module
from dinotwins_jax import data as data_module
from dinotwins_jax import durations, evaluation, inputs, tuning
from dinotwins_jax import train as train_module
from dinotwins_jax.build import build
from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.logs.progress import Progress
from dinotwins_jax.memory import abstract_batch
from dinotwins_jax.settings import rates
from dinotwins_jax.settings.keys import value_at
from dinotwins_jax.stopping import NonFiniteError
from dinotwins_jax.train import train
from dinotwins_jax.workdir import claim_workdir

ROOT = Path(__file__).parent.parent
REAL_DATA = Path(os.environ.get("DINOTWINS_DATA", ROOT.parent / "shared" / "data"))


def log_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_state(config, workdir):
    run = build(config)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        state, position = checkpoints.restore(run.placement.init(run.fresh_state))
    return state, position


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, train(shrunk(), workdir)


def test_a_run_leaves_scores_pictures_log_checkpoints_and_config(whole_run):
    workdir, scores = whole_run
    report = json.loads((workdir / "scores.json").read_text())
    assert report["step"] == 4 and report["scores"] == scores
    assert set(scores) == {"teacher", "random weights", "raw pixels"}
    for score in scores.values():
        assert 0 <= score["linear"]["sgd 50%"]["top1_mean"] <= 100
        assert 0 <= score["knn"]["k5"]["top1"] <= 100
    assert Image.open(workdir / "neighbours.png").size > (100, 100)
    assert "<img" in (workdir / "report.html").read_text()
    log = log_of(workdir)
    assert [line["step"] for line in log] == [2, 4]
    diagnostics = {"dino/teacher_entropy", "dino/kl", "dino/center_norm", "feature_std"}
    diagnostics |= {"effective_rank", "barlow_twins/on_diag", "barlow_twins/off_diag", "data_wait"}
    diagnostics |= {"monitor/knn_top1", "monitor/ridge_top1", "balance/dino/norm"}
    assert diagnostics <= set(log[0]) and all(np.isfinite(v) for v in log[0].values())
    config = json.loads((workdir / "config.json").read_text())
    assert config["loss"]["dino"]["out_dim"] == 32
    state, position = final_state(shrunk(), workdir)
    assert int(state.step) == 4 and position["position"] == 32


def test_an_interrupted_run_goes_on_to_the_same_numbers(whole_run, tmp_path, monkeypatch):
    """Started twice, and stopped in step 3, after the checkpoint of step 2: bit for bit the run that was
    started once and not stopped.

    TensorBoard has the same log as metrics.jsonl, scores and pictures.
    """
    config = shrunk(log__writers=("jsonl", "tensorboard"))
    with monkeypatch.context() as patch:
        advance = Progress.advance

        def interrupt(self, step):
            if step == 2:
                second = "from dinotwins_jax.lock import locked; locked(sys.argv[1]).__enter__()"
                command = [sys.executable, "-c", f"import sys; {second}", str(tmp_path)]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                assert "in use by process" in done.stderr
            if step == 3:
                raise KeyboardInterrupt
            advance(self, step)

        patch.setattr(Progress, "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path)
    assert [line["step"] for line in log_of(tmp_path)] == [2]
    scores = train(config, tmp_path)
    workdir, expected_scores = whole_run
    assert scores == expected_scores
    timing = {"images_per_s", "data_wait"}
    for ours, theirs in zip(log_of(tmp_path), log_of(workdir), strict=True):
        assert {k: v for k, v in ours.items() if k not in timing} == {
            k: v for k, v in theirs.items() if k not in timing
        }
    (a, position_a), (b, position_b) = (final_state(shrunk(), w) for w in (tmp_path, workdir))
    assert position_a == position_b
    jax.tree.map(np.testing.assert_array_equal, a, b)
    events = read_events(tmp_path)
    for name in log_of(tmp_path)[0].keys() - {"step"}:
        written = [(line["step"], np.float32(line[name])) for line in log_of(tmp_path)]
        assert scalars(events, name) == written
    (score,) = scalars(events, "scores/teacher/sgd_50percent")
    expected = scores["teacher"]["linear"]["sgd 50%"]["top1_mean"]
    assert score == (4, np.float32(expected))
    assert hyperparameters(events)["optim.lr"] == config.optim.lr
    assert events.Tags()["images"] == ["neighbours"]


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(tmp_path):
    """Half on 8 devices, half on 2 of which each holds half of the state: to 1e-5 the run on 8.

    By LARS with a high rate, whose steps are a hundredth of the weights. AdamW divides a gradient by its
    own size: where the true one is zero (a bias before batch norm), rounding alone moves the weight.
    """
    options = {"optim__name": "lars", "optim__lr": 300.0, "optim__clip": 0.0, "evals__tasks": ()}
    options |= {"evals__pictures": 0, "evals__monitor_every_epochs": 0.0}
    one, other = tmp_path / "one", tmp_path / "other"
    train(shrunk(mesh__data=0, **options), one)
    shutil.copytree(one, other)
    shutil.rmtree(other / "checkpoints" / "4")
    config = shrunk(mesh__data=1, mesh__fsdp=2, **options)
    half, _ = final_state(config, other)
    train(config, other)
    (ours, position), (theirs, expected) = (final_state(config, w) for w in (other, one))
    assert position == expected
    assert log_of(other)[-1]["loss"] == pytest.approx(log_of(one)[-1]["loss"], rel=1e-5)
    for name in ("params", "teacher_params", "batch_stats", "loss_state"):
        assert_trees_close(getattr(ours, name), getattr(theirs, name), 1e-5, 0.1)
    kernels = (s.params["backbone"]["blocks_0"]["mlp"]["fc1"]["kernel"] for s in (half, ours))
    assert relative_error(*kernels) > 1e-3


@pytest.mark.slow
def test_pmap_trains_to_the_same_losses(whole_run, tmp_path):
    train(shrunk(parallel="pmap", mesh__data=0), tmp_path)
    for ours, theirs in zip(log_of(tmp_path), log_of(whole_run[0]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


OTHERS = [dino, barlow_twins, byol, simclr, vicreg, dinov2, dinov3, hybrid_dinov2]


@pytest.mark.parametrize("module", OTHERS, ids=lambda m: m.__name__)
def test_the_step_of_every_other_shipped_config_is_traced(module):
    config = shrunk(module)
    run = build(config)
    state = jax.eval_shape(run.fresh_state)
    after, metrics = jax.eval_shape(run.train_step, state, abstract_batch(run, config.batch_size))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {f"{name}/loss" for name in config.loss} < set(metrics)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", [m for m in OTHERS if m is not dinov2], ids=lambda m: m.__name__
)  # the hybrid of dinov2 has all of its parts
def test_every_other_shipped_config_runs(module, tmp_path):
    """One of them is evaluated too: what is evaluated is the same backbone in all."""
    evaluated = module is dinov3
    options = {} if evaluated else {"evals__tasks": (), "evals__pictures": 0}
    scores = train(shrunk(module, total_steps=2, **options), tmp_path)
    assert bool(scores.get("teacher")) == evaluated
    assert np.isfinite(log_of(tmp_path)[-1]["loss"])


@pytest.mark.parametrize("preset", ["coco", "cifar10"])
@pytest.mark.parametrize("module", [hybrid, *OTHERS], ids=lambda m: m.__name__)
def test_real_data_presets_are_what_they_say(module, preset, monkeypatch):
    config = module.get_config(preset)
    monkeypatch.setattr(build_module, "open_source", lambda data, split: FakeLength())
    run = build(config.unlock())
    side, patch, width = (224, 16, 384) if preset == "coco" else (32, 4, 192)
    assert (run.backbone.image_size, run.backbone.patch_size) == (side, patch)
    assert (run.backbone.embed_dim, run.backbone.depth) == (width, 12)
    assert (config.views.num_local == 0) == (module in (barlow_twins, byol, simclr, vicreg))
    assert run.total_steps == 100 * (118_287 // 256) and run.warmup_steps == run.total_steps // 10


class FakeLength:
    labels, class_names = None, ()

    def __len__(self):
        return 118_287

    def default_canvas(self, global_size):
        return 640


def test_no_key_of_the_config_is_dead():
    """Sections passed as keyword arguments fail on unknown keys; all other keys are read by name."""
    modules = (build_module, train_module, data_module, durations)
    modules = (*modules, evaluation, tuning, inputs, rates)  # ranges.py reads all keys
    files = (module.__file__ for module in modules)
    source = "".join(Path(file).read_text() for file in files)
    config = base.get_config().to_dict()
    whole = {"views", "model", "loss"}
    keys = [k for k, v in config.items() if not isinstance(v, dict)]
    keys += [k for s in ("teacher", "optim", "log", "checkpoint", "evals") for k in config[s]]
    keys += [k for k, v in config["data"].items() if not isinstance(v, dict)]
    assert whole <= set(config) and len(keys) > 20
    source += "".join(f".{key} " for key in build_module.OPTIMISER)
    dead = [k for k in keys if not re.search(rf"""(\.|(data|optim)\["|get\("){k}\b""", source)]
    assert not dead


@pytest.mark.slow
def test_a_loss_from_outside_and_its_nan(tmp_path):
    """Three steps change nothing, then the run stops: module, batch and checkpoint are named."""
    config = shrunk(total_steps=8, checkpoint__every_epochs=3.5)
    config.loss = ConfigDict({"mine": {"fn": "fork:alignment", "scale": 2.0, "nan_from_step": 3}})
    config.match_gradients_to = ""
    config.views.num_local = 0
    message = (
        r"3 steps in a row, the last one step 6.*first not finite: loss/mine; .*npz.*of step 4 is"
    )
    with pytest.raises(NonFiniteError, match=message):
        train(config, tmp_path)
    state, _ = final_state(config, tmp_path)
    assert int(state.step) == 4 and int(state.loss_state["mine"]["calls"]) == 3
    assert int(state.skipped["total"]) == int(state.skipped["in_a_row"]) == 1
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 1, 3]
    batch = np.load(tmp_path / "nonfinite_step6.npz")
    assert batch["image"].shape[0] == 8 and batch["place"].tolist()[0] == [0, 40]
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.slow
def test_the_loss_in_the_readme_runs(tmp_path, monkeypatch):
    code = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert [name for name, _ in code] == ["mine.py", "mine_config.py"]
    for name, text in code:
        (tmp_path / name).write_text(text)
    assert len(code[0][1].splitlines()) + len(code[1][1].splitlines()) < 25
    monkeypatch.syspath_prepend(tmp_path)
    config = shrunk(SimpleNamespace(**runpy.run_path(tmp_path / "mine_config.py")), total_steps=2)
    train(config, tmp_path / "run")
    assert np.isfinite(log_of(tmp_path / "run")[-1]["mine/distance"])


@pytest.mark.slow
def test_coco_sample_runs(tmp_path):
    directory = REAL_DATA / "coco_sample"
    if not directory.is_dir():
        pytest.skip(f"no coco_sample in DINOTWINS_DATA ({REAL_DATA})")
    config = shrunk(data__source="coco", data__dir=str(directory), total_steps=2)
    scores = train(config, tmp_path)
    assert set(scores) == {"teacher", "random weights", "raw pixels"}


def test_too_many_truncated_images_stop_the_run_and_are_named(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(24):
        path = tmp_path / "images" / f"{i:02}.jpg"
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(path)
        if i % 4 == 0:
            path.write_bytes(path.read_bytes()[:300])
    config = shrunk(data__source="folder", data__dir=str(tmp_path / "images"))
    with pytest.raises(ValueError, match=r"of 24 images unreadable.*\.jpg") as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__source": "coco", "data__dir": "nowhere"}, "no such directory: nowhere"),
        ({"data__source": "cocoo"}, "unknown data source 'cocoo'.*did you mean 'coco'"),
        ({"views__global_size": 20}, r"views\.global_size 20 is not a multiple.*patch_size 8"),
        ({"views__local_size": 12}, r"views\.local_size 12 is not a multiple"),
        ({"parallel": "pjit"}, "choose jit or pmap"),
        ({"batch_size": 12, "mesh__data": 0}, "12 does not divide by 8 devices"),
        ({"model__name": "vit_smol"}, "unknown model 'vit_smol'"),
        ({"model__dtype": "float16"}, "choose float32 or bfloat16"),
        ({"evals__n_last_blocks": 3}, "the backbone has 2"),
        ({"optim__name": "sgd"}, "sgd.*adamw"),
        ({"total_epochs": 0.0}, "total_epochs is 0"),
        ({"total_epochs": 0.5}, "total_epochs is 0.5, shorter than .*warmup_epochs 1"),
        ({"log__every_steps": 0}, "log.every_steps is 0: it must be positive"),
        ({"batch_size": 0}, "batch_size is 0: it must lie in"),
        ({"seed": -1}, "seed is -1"),
        ({"evals__label_fractions": (10.0,)}, r"label_fractions has 10.*\(0, 1\]"),
        ({"evals__label_fractions": ()}, "label_fractions is empty"),
        ({"evals__tasks": ("linear", "kn")}, "unknown task 'kn': choose from knn"),
        ({"evals__bank_solver": "svm"}, "bank_solver is 'svm': choose ridge or logistic"),
        ({"evals__monitor_every_epochs": -1.0}, "monitor_every_epochs is -1"),
        ({"evals__knn_k": ()}, "knn_k is empty"),
        ({"evals__attention_size": 7}, "attention_size is 7"),
        ({"data__source": "dir"}, "unknown data source 'dir'"),
        ({"model__embed_dim": 50}, "embed_dim 50 is not a multiple of num_heads 3"),
        ({"loss__dino__student_temp": 0.0}, "student_temp is 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_compiled_or_written(options, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message) as error:
        train(shrunk(**options), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"dinoo": {"weight": 1.0}}, "unknown loss 'dinoo'.*did you mean 'dino'"),
        ({"mine": {"fn": "fork:alignmant"}}, "fork:alignmant.*cannot be imported"),
        ({"dino": {"temperature": 1.0}}, r"config\.loss\.dino: .*temperature"),
        ({}, "at least one term"),
    ],
)
def test_unusable_losses_are_named(terms, message):
    config = shrunk()
    config.loss, config.match_gradients_to = ConfigDict(terms), ""
    with pytest.raises(ValueError, match=message):
        build(config)


def test_annotations_that_are_not_coco_are_named(tmp_path):
    for name in ("train2017", "val2017", "annotations"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "train2017" / "1.jpg")
    for split in ("train2017", "val2017"):
        (tmp_path / "annotations" / f"instances_{split}.json").write_text('{"pictures": []}')
    config = shrunk(data__source="coco", data__dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"instances_train2017\.json") as error:
        build(config)
    assert "\n" not in str(error.value)


def test_a_workdir_belongs_to_one_config(tmp_path, capfd):
    config = shrunk().to_dict()
    claim_workdir(tmp_path, config | {"seed": 2})
    claim_workdir(tmp_path, config)  # the first attempt left no checkpoint
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-1").mkdir(parents=True)
    claim_workdir(tmp_path, config | {"seed": 2})  # nor did the second: it was never finished
    claim_workdir(tmp_path, config)
    (tmp_path / "checkpoints" / "2").mkdir()
    claim_workdir(tmp_path, config | {"log": {"every_steps": 9}})  # changes no weight
    assert json.loads((tmp_path / "config.json").read_text())["log"] == {"every_steps": 9}
    elsewhere = {"mesh": {"data": 2, "fsdp": 4}, "micro_batches": 2, "parallel": "pmap"}
    claim_workdir(tmp_path, config | elsewhere)  # the same numbers, but for rounding
    with pytest.raises(
        ValueError, match=r"another config.*--resume=force; differs in seed \(0 -> 1\)"
    ):
        claim_workdir(tmp_path, config | {"seed": 1})
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0
    claim_workdir(tmp_path, config | {"seed": 1}, force=True)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    assert "is continued with another config: seed (0 -> 1)" in capfd.readouterr().err


def test_a_config_from_before_the_official_recipes_goes_on(tmp_path):
    """It lacks their keys: the same optimiser, rates, backbone and heads, and the workdir is its own."""
    config = shrunk(dinov2)
    old = copy.deepcopy(config)
    for section, keys in {
        "model": ["drop_path_uniform"],
        "optim": ["betas", "lr_scaling", "final_lr_ratio", "frozen_last_layer"],
        "loss.dino": ["weight_norm"],
        "loss.ibot": ["weight_norm"],
    }.items():
        for key in keys:
            del value_at(old, section)[key]
    runs = [build(c) for c in (old, config)]
    states = [jax.eval_shape(run.fresh_state) for run in runs]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    of = build_module.make_schedules
    steps = [of(run.config, 4, durations.durations(run.config, 4)) for run in runs]
    for name in steps[0]:
        assert [float(steps[0][name](i)) for i in range(4)] == [
            float(steps[1][name](i)) for i in range(4)
        ]
    claim_workdir(tmp_path, old.to_dict())
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    claim_workdir(tmp_path, config.to_dict())
    config.optim.frozen_last_layer = "zero_rate"
    with pytest.raises(ValueError, match=r"optim.frozen_last_layer \(skipped -> zero_rate\)"):
        claim_workdir(tmp_path, config.to_dict())


def test_labels_of_both_splits_must_mean_the_same(monkeypatch):
    def source(data, split):
        names = ("cat", "dog") if split == "train" else ("dog", "cat")
        return SimpleNamespace(labels=np.zeros(3, np.int32), class_names=names)

    monkeypatch.setattr(build_module, "open_source", source)
    with pytest.raises(ValueError, match="labels differ"):
        build(shrunk())


@pytest.mark.slow
def test_bfloat16_reaches_heads_and_keeps_parameters_float32(whole_run, tmp_path):
    config = shrunk(model__dtype="bfloat16", total_steps=2, evals__pictures=0)
    train(config, tmp_path)
    ours = np.mean([line["dino/loss"] for line in log_of(tmp_path)])  # steps 1 and 2
    theirs = log_of(whole_run[0])[0]["dino/loss"]  # their mean
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.03)
    state, _ = final_state(config, tmp_path)
    assert all(x.dtype != "bfloat16" for x in jax.tree.leaves(state))


def test_nothing_readable_is_one_line(tmp_path):
    for i in range(120):
        (tmp_path / f"{i}.jpg").touch()
    config = shrunk(data__source="folder", data__dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"\.jpg: empty, 0 bytes") as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)


def command_line(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "dinotwins_jax.main", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no config given"),
        (("--config=configs/nothing.py",), "no such config file: configs/nothing.py"),
        (("--config=configs/dino.py:imagenet",), "unknown preset 'imagenet'"),
        (("--config=configs/dino.py", "--config.optim.lrr=1"), "did you mean 'lr'"),
        (("--config=configs/dino.py", "--config.seed=one"), "config.seed=one"),
        (("--config=configs/dino.py:coco", "--config.data.dir=nowhere"), "no such directory"),
    ],
)
def test_the_command_says_one_line_and_exits_with_2(arguments, message):
    done = command_line(*arguments)
    assert done.returncode == 2 and message in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")


@pytest.mark.slow
def test_the_command_exits_with_3_on_nan(tmp_path):
    flags = [f"--config.{name}={value}" for name, value in SHRUNK.items()]
    done = command_line(
        "--config=configs/hybrid.py", f"--workdir={tmp_path}", *flags, "--config.optim.lr=1e30"
    )
    assert done.returncode == 3
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: stopped: ") and "step 4" in line and str(tmp_path) in line


@pytest.mark.slow
def test_the_command_on_the_demo_shrunk_to_seconds(tmp_path):
    flags = [f"--config.{name}={value}" for name, value in SHRUNK.items()]
    done = command_line("--config=configs/hybrid.py", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stdout
    assert re.search(r"^ in % +teacher +random weights +raw pixels$", done.stdout, re.M)
    table, _, files = done.stdout.partition(f"In {tmp_path}:\n")
    assert max(map(len, table[table.index(" in %") :].splitlines()[:-1])) <= 100  # of a pipe
    listed = {line.split()[0] for line in files.splitlines()}
    there = {path.name for path in tmp_path.iterdir()} - {"features", ".compiled", "lock"}
    assert listed == there and {"report.html", "scores.json", "neighbours.png"} <= listed
    assert all(line.startswith("WARNING config.") for line in done.stderr.splitlines())


def test_default_workdirs_are_told_apart():
    if "workdir" in flags.FLAGS:  # of evaluate.py, when its tests ran in this process
        delattr(flags.FLAGS, "workdir")
    default_workdir = runpy.run_module("dinotwins_jax.main")["default_workdir"]
    assert default_workdir("configs/hybrid.py") == Path("runs/hybrid-demo")
    assert default_workdir("configs/dino.py:coco") == Path("runs/dino-coco")


def test_presets_share_what_runs_and_differ_in_where():
    for preset in presets.PRESETS:
        a, b = hybrid.get_config(preset), dino.get_config(preset)
        assert a.loss.dino == b.loss.dino and a.optim == b.optim and a.views == b.views
