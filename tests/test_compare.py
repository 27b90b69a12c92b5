"""The three-way comparison: training plan, tables of scores, resuming."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from shrunk import SHRUNK, shrunk

from configs import dino, hybrid
from dinotwins_jax.build import build
from experiments.comparison.outcome import (
    DINO_LOSS,
    collect,
    failures,
    score_table,
    significance,
    significance_table,
)
from experiments.comparison.plan import (
    check_equal_starts,
    check_equal_steps,
    equal_flops,
    flops_per_step,
    is_finished,
    make_configs,
    split_overrides,
)
from experiments.comparison.statistics import mean_std, paired
from experiments.label_efficiency import draw, finished_runs, from_scratch, table

ROOT = Path(__file__).parent.parent
METHODS = ("dino", "barlow_twins", "hybrid")


def test_paired_is_scipys_paired_t_test():
    ours, theirs = [80.0, 82.0, 81.5], [79.0, 80.5, 81.0]
    result = paired(ours, theirs)
    expected = stats.ttest_rel(ours, theirs)
    assert result["p"] == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (result["low"], result["high"]) == pytest.approx((interval.low, interval.high))
    assert result["difference"] == pytest.approx(1.0) and result["verdict"] == "level"


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([5.0, 5.1, 4.9], [1.0, 1.0, 1.1], "better"),
        ([1.0, 1.0, 1.1], [5.0, 5.1, 4.9], "worse"),
        ([1.0, 5.0], [2.0, 3.0], "level"),
        ([2.0, 2.0], [2.0, 2.0], "level"),
        ([3.0, 4.0], [2.0, 3.0], "better"),
    ],
)
def test_the_word_for_a_difference(ours, theirs, verdict):
    assert paired(ours, theirs)["verdict"] == verdict


def test_one_seed_has_no_test_and_no_deviation():
    assert mean_std([3.0]) == (3.0, None)
    with pytest.raises(ValueError, match="1 and 1 values"):
        paired([1.0], [2.0])
    with pytest.raises(ValueError, match="not finite"):
        paired([1.0, float("nan")], [2.0, 2.0])


def test_overrides_are_taken_out_of_the_command_line():
    rest, found = split_overrides(
        ["me", "--seeds=2", "--config.batch_size=8", "--dino.optim.lr=0.1", "--preset=demo"],
        METHODS,
    )
    assert rest == ["me", "--seeds=2", "--preset=demo"]
    assert found == {"config": {"batch_size": "8"}, "dino": {"optim.lr": "0.1"}}
    with pytest.raises(ValueError, match=r"--config\.seed: give a value"):
        split_overrides(["me", "--config.seed"], METHODS)


def test_overrides_reach_every_config_that_has_the_key_with_its_type():
    overrides = {
        "config": {
            "loss.dino.out_dim": "64",
            "data.dir": "7",
            "optim.lr": "1",
            "evals.tasks": "('knn',)",
            "log.collapse_warnings": "false",
        },
        "dino": {"batch_size": "16"},
    }
    configs = make_configs("demo", METHODS, 3, overrides)
    assert configs["dino"].loss.dino.out_dim == configs["hybrid"].loss.dino.out_dim == 64
    assert "dino" not in configs["barlow_twins"].loss
    for config in configs.values():
        assert config.data.dir == "7" and config.optim.lr == 1.0 and config.seed == 3
        assert tuple(config.evals.tasks) == ("knn",) and config.log.collapse_warnings is False
    assert [configs[m].batch_size for m in METHODS] == [16, 128, 128]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"config": {"optim.lrr": "1"}},
            "--config.optim.lrr: no config of dino, barlow_twins, hybrid",
        ),
        ({"config": {"batch_size": "many"}}, "batch_size=many: expected a value like 128"),
        ({"config": {"batch_size": "1.5"}}, "batch_size=1.5: expected a value like 128"),
        ({"config": {"teacher": "1"}}, "teacher=1: give one of its keys, final_momentum, momentum"),
        ({"config": {"seed": "7"}}, r"--config\.seed=7: seeds are 0 to n - 1 of --seeds=n"),
        ({"vicreg": {"optim.lr": "1"}}, r"--vicreg\.optim\.lr: vicreg is not among --methods"),
    ],
)
def test_bad_overrides_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_configs("demo", METHODS, 0, overrides)
    with pytest.raises(ValueError, match="unknown method 'moco'"):
        make_configs("demo", ("moco",), 0, {})
    with pytest.raises(ValueError, match="no methods: choose from dino"):
        make_configs("demo", (), 0, {})


def test_unequal_budgets_and_starts_are_refused():
    check_equal_steps({"dino": 8, "hybrid": 8}, {"dino": 4, "hybrid": 4})
    with pytest.raises(ValueError, match="methods' steps differ: dino 8, hybrid 9"):
        check_equal_steps({"dino": 8, "hybrid": 9}, {"dino": 4, "hybrid": 4})
    with pytest.raises(ValueError, match="images in a batch differ: dino 4, hybrid 8"):
        check_equal_steps({"dino": 8, "hybrid": 8}, {"dino": 4, "hybrid": 8})
    configs = {"dino": shrunk(dino), "hybrid": shrunk(hybrid)}
    check_equal_starts(configs)
    configs["hybrid"].model.init_std = 0.05
    with pytest.raises(ValueError, match=r"different backbones: dino [0-9a-f]{12}, hybrid"):
        check_equal_starts(configs)


def test_equal_flops_gives_cheap_steps_more_of_them():
    steps = equal_flops({"a": 100, "b": 100, "c": 50}, {"a": 3.0, "b": 1.0, "c": 2.0})
    assert steps == {"a": 100, "b": 300, "c": 150}


@pytest.mark.slow
def test_flops_grow_with_the_batch_and_with_the_terms():
    overrides = {
        "config": {key: repr(v) if not isinstance(v, str) else v for key, v in SHRUNK.items()}
    }
    configs = make_configs("demo", METHODS, 0, overrides)
    flops = {method: flops_per_step(config) for method, config in configs.items()}
    assert flops["hybrid"] > flops["dino"] and flops["hybrid"] > flops["barlow_twins"]
    configs["dino"].batch_size = 16
    assert flops_per_step(configs["dino"]) == pytest.approx(2 * flops["dino"], rel=0.25)


def write_run(workdir, knn, loss=None, step=4, config=None):
    scores = {
        "teacher": {"knn": {"protocol": "p", "k20": {"top1": knn}}},
        "random weights": {"knn": {"protocol": "p", "k20": {"top1": 10.0}}},
    }
    workdir.mkdir(parents=True)
    report = {"step": step, "seconds": {"knn": 1.0}, "left_out": ["attention"], "scores": scores}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "scores.json").write_text(json.dumps(report))
    line = {"step": step} | ({"dino/loss": loss} if loss is not None else {})
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return workdir


def test_tables_of_hand_written_scores(tmp_path):
    values = {"dino": (70.0, 72.0), "barlow_twins": (50.0, 40.0), "hybrid": (75.0, 77.1)}
    runs = {
        method: [
            write_run(tmp_path / f"{method}{k}", v, None if "barlow" in method else 3.0 + k)
            for k, v in enumerate(of)
        ]
        for method, of in values.items()
    }
    table = collect(runs)
    assert table["hybrid"] == {DINO_LOSS: [3.0, 4.0], "k-NN, k=20": [75.0, 77.1]}
    assert table["random weights"] == {"k-NN, k=20": [10.0, 10.0]}
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in score_table(table).splitlines()]
    assert lines[0] == ["", *values, "random weights"]
    assert lines[2] == [DINO_LOSS, "3.500 ± 0.707", "–", "3.500 ± 0.707", "–"]
    assert lines[3] == ["k-NN, k=20", "71.0 ± 1.4", "45.0 ± 7.1", "76.0 ± 1.5", "10.0 ± 0.0"]
    found = significance(table)
    assert found["dino"]["k-NN, k=20"]["verdict"] == "better"
    assert DINO_LOSS not in found["barlow_twins"]
    runs["hybrid"] = [
        write_run(tmp_path / f"low{k}", v, 2.0 + k) for k, v in enumerate(values["hybrid"])
    ]
    lower = significance(collect(runs))["dino"][DINO_LOSS]
    assert (lower["difference"], lower["verdict"]) == (-1.0, "lower")
    text = significance_table(found)
    assert "+5.0 [+4.4, +5.7], p = 0.0063: better" in text and "level" in text
    assert significance(collect({m: r[:1] for m, r in runs.items()})) == {}


def test_scores_of_failed_tasks_are_marked_and_no_value_changes_its_seed(tmp_path):
    values = {"dino": (70.0, None, 73.0), "hybrid": (75.0, 90.0, 77.0)}
    runs = {
        method: [write_run(tmp_path / f"{method}-seed{k}", v) for k, v in enumerate(of)]
        for method, of in values.items()
    }
    path = runs["dino"][1] / "scores.json"
    report = json.loads(path.read_text())
    report["scores"]["teacher"], report["failed"] = {}, {"knn": "too few images"}
    path.write_text(json.dumps(report))
    table = collect(runs)
    assert table["dino"]["k-NN, k=20"] == [70.0, None, 73.0]
    assert table["random weights"]["k-NN, k=20"] == [10.0, 10.0, 10.0]
    (line,) = [line for line in score_table(table).splitlines() if "k-NN" in line]
    assert [c.strip() for c in line.split("|")[2:-1]] == [
        "71.5 ± 2.1 (2 of 3)", "80.7 ± 8.1", "10.0 ± 0.0",
    ]  # fmt: skip
    expected = paired([75.0, 77.0], [70.0, 73.0])
    assert significance(table)["dino"]["k-NN, k=20"] == expected
    assert failures(runs) == {"dino-seed1": {"knn": "too few images"}}


def test_a_run_with_a_failed_task_is_not_finished(tmp_path):
    config = shrunk(dino, evals__tasks=("knn",))
    workdir = write_run(tmp_path / "run", 1.0, config=config.to_dict())
    assert is_finished(workdir, config, 4)
    report = json.loads((workdir / "scores.json").read_text())
    (workdir / "scores.json").write_text(json.dumps(report | {"failed": {"knn": "why"}}))
    assert not is_finished(workdir, config, 4)


def test_a_run_is_finished_when_its_steps_and_tasks_are(tmp_path):
    config = make_configs(
        "demo", ("dino",), 0, {"config": {"evals.tasks": "('knn', 'attention')"}}
    )["dino"]
    workdir = write_run(tmp_path / "run", 1.0, config=config.to_dict())
    assert is_finished(workdir, config, 4)  # the data have no masks: attention was left out
    assert not is_finished(workdir, config, 5)
    config.evals.tasks = ("knn", "linear")
    assert not is_finished(workdir, config, 4)
    assert not is_finished(tmp_path / "nowhere", config, 4)


@pytest.mark.parametrize(
    ("key", "value", "finished"),
    [
        ("optim.lr", 0.1, False),
        ("evals.split_seeds", (7,), False),
        ("evals.pictures", 1, True),
        ("log.every_steps", 3, True),
        ("data.dir", "elsewhere", True),
        ("model.attention", "xla", True),  # the default of before
    ],
)
def test_a_finished_run_is_of_the_same_config(tmp_path, key, value, finished):
    """Otherwise scores of one learning rate would be reported for another."""
    config = shrunk(dino, evals__tasks=("knn",))
    old = config.to_dict()
    del old["evals"]["finetune_blocks"]  # a run from before this key
    workdir = write_run(tmp_path / "run", 1.0, config=old)
    assert is_finished(workdir, config, 4)
    config.update_from_flattened_dict({key: value})
    assert is_finished(workdir, config, 4) == finished


@pytest.mark.parametrize(
    ("key", "value", "finished"),
    [
        ("data.subset.images", 100, False),
        ("optim.lr_scaling", "sqrt_1024", False),
        ("evals.supervised_steps", 5, False),
        ("model.scan_blocks", True, True),
        ("data.subset.images", 0, True),
    ],
)
def test_a_run_of_before_is_no_result_of_keys_that_came_later(tmp_path, key, value, finished):
    config = shrunk(dino, evals__tasks=("knn",))
    old = config.to_dict()
    for name in ("subset", "probe"):
        del old["data"][name]
    del old["optim"]["lr_scaling"], old["evals"]["supervised_steps"], old["model"]["scan_blocks"]
    workdir = write_run(tmp_path / "run", 1.0, config=old)
    config.update_from_flattened_dict({key: value})
    assert is_finished(workdir, config, 4) == finished


def command(*arguments, module="experiments.compare"):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(OUT, flags, what the command printed) of two methods and two seeds, shrunk to seconds."""
    out = tmp_path_factory.mktemp("runs") / "compare"
    small = SHRUNK | {"total_steps": 2, "evals.monitor_every_epochs": 0.0, "evals.pictures": 1}
    small |= {"loss.dino.out_dim": 32, "loss.dino.hidden_dim": 32}
    small |= {"loss.barlow_twins.hidden_dims": (32, 32)}
    arguments = [f"--config.{key}={value}" for key, value in small.items()]
    arguments += ["--methods=dino,hybrid", "--seeds=2", f"--out={out}"]
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    return out, arguments, done.stdout


@pytest.mark.slow
def test_a_comparison_leaves_tables_curves_and_pictures(compared):
    out, _, printed = compared
    outcome = json.loads((out / "comparison.json").read_text())
    assert set(outcome["runs"]) == {f"{m}-seed{k}" for m in ("dino", "hybrid") for k in (0, 1)}
    for run in outcome["runs"].values():
        assert run["steps"] == 2 and run["images"] == 16 and run["flops"] > 0 < run["seconds"]
        assert np.isfinite(run["loss"])
    assert (out / "table.md").read_text().strip() in printed
    assert "hybrid - dino" in printed and "± " in printed
    for name in ("curves.png", "attention.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_methods_start_from_one_backbone_and_seeds_differ(compared):
    _, arguments, _ = compared
    _, overrides = split_overrides(arguments, METHODS)
    start = {
        (method, seed): np.asarray(build(config).random_backbone()["cls_token"])
        for seed in (0, 1)
        for method, config in make_configs("demo", ("dino", "hybrid"), seed, overrides).items()
    }
    np.testing.assert_array_equal(start["dino", 0], start["hybrid", 0])
    assert (start["dino", 0] != start["dino", 1]).any()


@pytest.mark.slow
def test_a_second_start_goes_on_where_the_first_stopped(compared):
    """Finished runs are untouched; a run without scores is evaluated again, with the same result."""
    out, arguments, printed = compared
    picture = (out / "attention.png").stat().st_mtime_ns
    lost = out / "hybrid-seed1" / "scores.json"
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/scores.json") if p != lost}
    scores = json.loads(lost.read_text())["scores"]
    lost.unlink()
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps, in") == 1
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert picture == (out / "attention.png").stat().st_mtime_ns
    assert json.loads(lost.read_text())["scores"] == scores
    assert printed[printed.index("In %") :] == done.stdout[done.stdout.index("In %") :]


@pytest.mark.slow
def test_a_failed_task_costs_the_others_nothing(compared, tmp_path):
    """DINO's report cannot be written: the comparison goes on, with exit code 4, and the same command
    completes it when it can."""
    _, arguments, _ = compared
    arguments = [a for a in arguments if not a.startswith(("--out", "--seeds"))]
    arguments += [f"--out={tmp_path}", "--seeds=1", "--config.evals.tasks=('linear','knn')"]
    in_the_way = tmp_path / "dino-seed0" / "report.html"
    in_the_way.mkdir(parents=True)
    done = command(*arguments)
    assert done.returncode == 4, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: failed: dino-seed0 (report.html); all else is written")
    outcome = json.loads((tmp_path / "comparison.json").read_text())
    assert "report.html" in outcome["failed"]["dino-seed0"]["report.html"]
    assert set(outcome["runs"]) == {"dino-seed0", "hybrid-seed0"}
    assert "dino-seed0: report.html failed: " in done.stdout
    in_the_way.rmdir()
    assert len(outcome["scores"]["hybrid"]) >= len(outcome["scores"]["dino"]) >= 1
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "comparison.json").read_text())["failed"] == {}


@pytest.mark.slow
def test_label_efficiency_of_the_comparison(compared):
    out, _, _ = compared
    done = command(str(out), "--fractions=0.5,1", module="experiments.label_efficiency")
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "label_efficiency.json").read_text())
    assert {row: np.shape(v) for row, v in found["scores"].items()} == {
        "dino": (2, 2),
        "hybrid": (2, 2),
        "random weights": (2, 2),
    }
    report = json.loads((out / "dino-seed0" / "scores.json").read_text())["scores"]
    expected = report["teacher"]["linear"]["ridge 50%"]["top1_mean"]
    assert found["scores"]["dino"][0][0] == pytest.approx(expected)
    assert (out / "label_efficiency.png").read_bytes().startswith(b"\x89PNG")
    assert "| dino " in done.stdout


def test_probes_are_compared_with_networks_from_scratch_on_as_many_labels():
    table = {
        "hybrid": {"sgd 10%": [60.0, 62.0], "ridge 10%": [61.0, 60.0], "k-NN, k=20": [50.0, 51.0]},
        "from scratch": {"whole network 10%": [50.0, 51.0]},
    }
    table["hybrid"]["whole network 10%"] = [64.0, 64.0]
    found = significance(table)["from scratch"]
    assert {column: of["difference"] for column, of in found.items()} == {
        "sgd 10%": 10.5,
        "ridge 10%": 10.0,
        "whole network 10%": 13.5,
    }


def test_label_efficiency_shows_networks_from_scratch_beside(tmp_path):
    for name, ten in (("dino-seed0", 40.0), ("hybrid-seed0", 40.0), ("dino-seed1", 44.0)):
        write_run(tmp_path / name, 1.0)
        path = tmp_path / name / "scores.json"
        whole = {
            "10%": {"fraction": 0.1, "top1_mean": ten},
            "1%": {"fraction": 0.01, "top1_mean": 20.0},
        }
        if name == "dino-seed1":
            del whole["1%"]
        scores = json.loads(path.read_text())
        scores["scores"]["from scratch"] = {"whole": whole}
        path.write_text(json.dumps(scores))
    found = from_scratch(finished_runs(tmp_path), "top1")
    assert found == {"fractions": [0.1], "scores": [[40.0], [44.0]]}
    assert from_scratch(finished_runs(tmp_path), "map") == {"fractions": [], "scores": []}
    shown = {"metric": "top1", "fractions": [0.1, 1.0], "scores": {"dino": [[50.0, 60.0]]}}
    assert (
        table(shown | {"from scratch": found}).splitlines()[-1]
        == "| from scratch | 42.0 ± 2.8 | –    |"
    )
    draw(tmp_path / "shown.png", shown | {"from scratch": found})
    draw(tmp_path / "plain.png", shown | {"from scratch": {"fractions": [], "scores": []}})
    assert (tmp_path / "shown.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


def test_label_efficiency_takes_runs_by_method_and_number(tmp_path):
    for name in ("hybrid-seed2", "hybrid-seed10", "dino-seed2", "dino-seed10"):
        write_run(tmp_path / name, 1.0)
    (tmp_path / "dino-seed3").mkdir()  # not evaluated yet
    assert [(method, seed) for method, seed, _ in finished_runs(tmp_path)] == [
        ("dino", 2),
        ("dino", 10),
        ("hybrid", 2),
        ("hybrid", 10),
    ]
    with pytest.raises(FileNotFoundError, match=r"no finished runs in .*nowhere"):
        finished_runs(tmp_path / "nowhere")


def test_label_efficiency_says_one_line_and_exits_with_2():
    done = command("runs/a", "--fraction=1", module="experiments.label_efficiency")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "fraction" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset=imagenet",), "unknown preset 'imagenet'"),
        (("--methods=moco",), "unknown method 'moco'"),
        (("--config.optim.lrr=1",), "no config of dino, barlow_twins, hybrid has this key"),
        (("--budget=time",), "budget"),
        (("runs/a",), "unknown argument 'runs/a'"),
    ],
)
def test_the_command_says_one_line_and_exits_with_2(arguments, message, tmp_path):
    done = command(*arguments, f"--out={tmp_path}")
    assert done.returncode == 2 and message in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
