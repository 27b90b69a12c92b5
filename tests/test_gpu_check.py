"""experiments.gpu_check: budgets, reports that are whole at any moment, failures that cost only themselves;
its dry run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark.flops import step_flops
from experiments.gpu import (
    budget,
    gradients,
    peaks,
    plan,
    program,
    pytorch,
    reason,
    table,
    training,
)
from experiments.gpu.plan import Item, Part
from experiments.gpu.report import FAILED, FILE, MEASURED, NOT_MEASURED, Report
from experiments.gpu.runner import run_part
from experiments.gpu_check import check

ROOT = Path(__file__).parent.parent
PATHS = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def part_of(*kinds: str, seconds: float = 0.1) -> Part:
    items = tuple(Item(f"{i} {kind}", seconds, {"kind": kind}) for i, kind in enumerate(kinds))
    return Part("step", "A part", "gpu_parts", 1, items)


def measure(
    tmp_path, *kinds: str, time_s: float = 30.0, seconds: float = 0.1, cores: int = 1
) -> dict[str, dict]:
    report, environment = Report(tmp_path, 1.0), PATHS | {"CORES": str(cores)}
    run_part(part_of(*kinds, seconds=seconds), time_s, report, environment=environment)
    on_disk = json.loads((tmp_path / FILE).read_text())
    assert on_disk == report.data
    return {item["name"]: item for item in on_disk["parts"]["step"]["items"]}


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process has ended: no such process, or one that nobody has waited for."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_time_that_a_part_leaves_goes_to_those_after_it():
    assert budget.allotted([1, 3], 80.0) == 20.0
    assert budget.allotted([3], 70.0) == 70.0
    assert budget.allotted([1, 1], -5.0) == 0.0
    parts = plan.plan("full", "gpu")
    left, given = 480.0, []
    for i in range(len(parts)):
        given.append(budget.allotted([part.share for part in parts[i:]], left))
        left -= given[-1] / 2
    assert given == sorted(given) or given[-1] > 480 * parts[-1].share / 100
    assert left == pytest.approx(given[-1] / 2)  # the last one gets all that is left


def test_what_an_item_needs_follows_the_pace():
    assert budget.needs(10.0, []) == 10.0
    assert budget.needs(10.0, [(5.0, 20.0), (5.0, 10.0)]) == 30.0


def test_the_length_of_a_training():
    assert budget.steps_that_fit(100.0, 0.1) == 850
    assert budget.steps_that_fit(1.0, 100.0) == 1
    assert budget.keeps(800, 100.0, per_step=0.1, compile_s=20.0)
    assert not budget.keeps(1001, 100.0, per_step=0.1, compile_s=20.0)  # too long
    assert not budget.keeps(100, 100.0, per_step=0.1, compile_s=20.0)  # 680 would fit
    assert budget.keeps(100, 100.0, per_step=0.1, compile_s=99.0)  # no time to compile again


def test_a_failure_costs_only_itself(tmp_path):
    """An error, a program that cannot be compiled, a process that dies; the others are measured."""
    found = measure(tmp_path, "value", "error", "prepare_error", "die", "value")
    assert [item["status"] for item in found.values()] == [
        MEASURED,
        FAILED,
        FAILED,
        FAILED,
        MEASURED,
    ]
    assert found["1 error"]["reason"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert found["2 prepare_error"]["reason"] == "ValueError: this cannot be compiled"
    assert (
        found["3 die"]["reason"] == "its process ended with exit code 9: Fatal: the driver is gone"
    )
    assert 0 < found["4 value"]["left"] < 30


def test_a_compilation_that_ends_the_process_costs_only_itself(tmp_path):
    """Four are compiled at once; after the crash one by one, and the guilty one is known."""
    found = measure(tmp_path, "value", "value", "die_compiling", "value", "value", cores=16)
    assert [item["status"] for item in found.values()].count(MEASURED) == 4
    assert found["2 die_compiling"]["status"] == FAILED
    assert found["0 value"]["alone"] and found["4 value"]["alone"]


def test_what_does_not_fit_tells_what_it_needs(tmp_path):
    """The end of a part ends its process and what that has started; no item is lost."""
    start = time.monotonic()
    found = measure(tmp_path, "value", "sleep", "value", time_s=4.0)
    assert time.monotonic() - start < 12
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(gone(pid) for pid in pids)
    assert found["0 value"]["status"] == MEASURED
    assert found["1 sleep"]["status"] == found["2 value"]["status"] == NOT_MEASURED
    assert (
        found["1 sleep"]["reason"].startswith("cut off after") and found["1 sleep"]["needs_s"] > 1
    )
    assert found["2 value"]["reason"] == "no time left"
    text = table.part_text("device", json.loads((tmp_path / FILE).read_text())["parts"]["step"])
    assert "2 value: not measured, no time left; needs about" in text


def test_a_process_that_does_not_end_is_not_waited_for(tmp_path):
    """Its items are measured; a device's runtime may hang on its way out."""
    start = time.monotonic()
    assert measure(tmp_path, "linger")["0 linger"]["status"] == MEASURED
    assert time.monotonic() - start < 20


def test_an_item_that_needs_more_than_is_left_is_not_begun(tmp_path):
    found = measure(tmp_path, "sleep", seconds=100.0)
    assert found["0 sleep"] == {
        **{"name": "0 sleep", "status": NOT_MEASURED, "reason": "no time left", "needs_s": 100.0}
    }


def test_a_module_that_cannot_start_fails_with_its_last_line(tmp_path):
    report, part = Report(tmp_path, 1.0), part_of("value", "value")._replace(module="gpu_nothing")
    run_part(part, 30.0, report, environment=PATHS)
    items = report.data["parts"]["step"]["items"]
    assert [item["status"] for item in items] == [FAILED, FAILED]
    assert "No module named gpu_nothing" in items[0]["reason"]


def test_a_check_that_is_killed_leaves_whole_json_and_no_process(tmp_path):
    """SIGKILL in the middle of a part: what was measured is on the disk."""
    code = (
        "from pathlib import Path; from experiments.gpu.plan import Item, Part;"
        "from experiments.gpu.report import Report; from experiments.gpu.runner import run_part;"
        "items = tuple(Item(f'{i} {k}', 0.1, {'kind': k}) for i, k in enumerate(('value', 'sleep')));"
        "part = Part('step', 'A part', 'gpu_parts', 1, items);"
        f"run_part(part, 60, Report(Path({str(tmp_path)!r}), 1))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | PATHS)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "pids").exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)
    finally:
        parent.kill()
        parent.wait()
    found = json.loads((tmp_path / FILE).read_text())
    assert found["ended"] is None and found["parts"]["step"]["seconds"] is None
    (item,) = found["parts"]["step"]["items"]
    assert item["name"] == "0 value" and item["status"] == MEASURED
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert "not ended of 60 s" in table.text(found | {"parts": {}})
    assert Report(tmp_path, 1.0).data["parts"] == {}
    (kept,) = tmp_path.glob("gpu_check-*.json")  # of the check before
    assert json.loads(kept.read_text()) == found


def test_bad_arguments_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"--parts has 'stepp': choose from device, attention"):
        check(tmp_path, 1.0, parts=["stepp"])
    with pytest.raises(ValueError, match=r"--minutes is 0: it must be positive"):
        check(tmp_path, 0.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_kind_of_device(kind, teraflops):
    found = peaks.peak_of(kind)
    assert (found and found.flops / 1e12) == teraflops


def test_every_item_has_a_name_of_its_own_and_values_that_are_json():
    for size in ("full", "toy"):
        for platform in ("gpu", "tpu", "cpu"):
            parts = (plan.DEVICE, *plan.plan(size, platform))
            assert tuple(part.name for part in parts) == plan.NAMES
            for part in parts:
                names = [item.name for item in part.items]
                assert len(set(names)) == len(names)
                assert json.loads(json.dumps(part.items)) == [
                    json.loads(json.dumps(item)) for item in part.items
                ]
    steps = {part.name: part for part in plan.plan("full", "gpu")}["step"].items
    assert len(steps) == 2 * 3 * 2 * 2  # models, batch sizes, attention, augmentation
    assert [item.name for item in steps[:2]] == [
        "vit_small, batch 64, plain",
        "vit_small, batch 64, cudnn",
    ]


def test_every_config_of_the_full_size_is_one():
    """A key or a value that no config has would show only on a card."""
    for part in plan.plan("full", "gpu"):
        for item in part.items:
            if "settings" in (item.values or {}):
                config = program.config_for(item.values)
                settings = program.settings_of(item.values)
                assert config.model.name == settings.model
                assert config.batch_size == settings.batch_size
                assert config.total_steps == program.STEPS and step_flops(settings) > 1e12
    config = training.config_of(training.data_keys(""), 100)
    assert config.model.patch_size == 4 and config.total_steps == 100


def test_a_reason_is_one_line(tmp_path):
    assert reason.of_error(ValueError("one\ntwo")) == "ValueError: one"
    assert reason.of_error(KeyError()) == "KeyError: no message"
    log = tmp_path / "log"
    assert reason.of_log(log) == "no output"
    log.write_text("Traceback\n  File x\nRuntimeError: no cuDNN\nbye\n")
    assert reason.of_log(log) == "RuntimeError: no cuDNN"


def test_differences_of_gradients_by_part():
    """The cosine of all, of a part and of the worst array; the bias of the keys does not count."""
    path = {"backbone": {"blocks_0": {"attn": {"qkv": {"bias": jnp.float32([1, 2, 5, 7, 3, 4])}}}}}
    ours = {"heads": {"dino": {"kernel": jnp.float32([3.0, 4.0])}}} | path
    theirs = {"heads": {"dino": {"kernel": jnp.float32([4.0, 3.0])}}} | path
    theirs = theirs | {
        "backbone": {"blocks_0": {"attn": {"qkv": {"bias": jnp.float32([1, 2, 9, 9, 3, 4])}}}}
    }
    found = gradients.difference(
        gradients.Gradients(2.0, gradients.trained(ours)),
        gradients.Gradients(1.6, gradients.trained(theirs)),
    )
    assert found["loss_error"] == pytest.approx(0.25)
    assert found["parts"] == {"DINO's head": pytest.approx(0.96), "qkv": pytest.approx(1.0)}
    assert found["worst"] == {"name": "heads/dino/kernel", "cosine": pytest.approx(0.96)}
    assert found["cosine"] == pytest.approx(54 / 55)
    assert np.isfinite(gradients._cosine(np.zeros(3)))


def test_pytorch_is_compared_with_our_fastest_equal_step():
    def item(ms, **changed):
        found = {"name": f"{ms} ms", "status": MEASURED, "ms": ms, "augments": False}
        return found | {"model": "vit_small", "batch_size": 64} | changed

    items = [item(40.0), item(30.0), item(5.0, augments=True), item(4.0, batch_size=32)]
    report = {"parts": {"step": {"items": [*items, item(1.0, status=FAILED)]}}}
    found = pytorch.ours(report, item(45.0))
    assert found == {"ours": "30.0 ms", "ours_ms": 30.0, "ratio": 1.5}
    assert pytorch.ours({"parts": {}}, item(45.0)) == {}


def test_cifar10_is_trained_on_where_it_is(tmp_path):
    assert training.data_keys("") == training.data_keys(str(tmp_path)) == {"data.source": "scenes"}
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "train.npz").touch()
    found = {"data.source": "cifar10", "data.dir": str(tmp_path / "cifar10")}
    assert training.data_keys(str(tmp_path)) == found
    assert training.data_keys(str(tmp_path / "cifar10")) == found


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """A check on the CPU at toy size: (its output, its report). Two quiet cores need two minutes; a part
    gets a share of the time, and 40 leave enough on busy ones."""
    out = tmp_path_factory.mktemp("gpu_check") / "out"
    command = [sys.executable, "-m", "experiments.gpu_check", "--minutes=40", f"--out={out}"]
    done = subprocess.run(
        [*command, "--data="],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},  # one device, as on a machine with one card
        timeout=2400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / FILE).read_text())


def items_of(report: dict, part: str) -> dict[str, dict]:
    return {item["name"]: item for item in report["parts"][part]["items"]}


@pytest.mark.slow
def test_the_dry_run_measures_every_part(dry_run):
    text, report = dry_run
    assert report["size"] == "toy" and 0 < report["ended"] < 60 * report["minutes"]
    assert tuple(report["parts"]) == plan.NAMES
    for part in (plan.DEVICE, *plan.plan("toy", "cpu")):
        items = items_of(report, part.name)
        assert sorted(items) == sorted(item.name for item in part.items)
        for item in items.values():
            assert item["status"] in (MEASURED, FAILED), item
            if item["status"] == FAILED:
                assert "cudnn" in item["name"] or part.name == "pytorch"
                assert item["reason"] and "\n" not in item["reason"]
        assert report["parts"][part.name]["seconds"] <= report["parts"][part.name]["budget_s"] + 5
        assert part.title in text
    assert "all figures:" in text


@pytest.mark.slow
def test_the_dry_run_knows_the_device_and_its_rates(dry_run):
    items = items_of(dry_run[1], "device")
    assert items["versions"]["platform"] == "cpu" and items["versions"]["peak_flop_per_s"] is None
    assert items["versions"]["packages"].keys() >= {"jax", "jaxlib", "flax", "optax"}
    assert all(items["rates"][f"{dtype}_flop_per_s"] > 1e8 for dtype in ("bfloat16", "float32"))
    assert items["rates"]["memory_bytes_per_s"] > 1e7
    assert items["rates"]["host_to_device_bytes_per_s"] > 1e7


@pytest.mark.slow
def test_the_dry_run_compares_gradients(dry_run):
    """Default precision is the highest on a CPU; bfloat16 differs; cuDNN is refused in one line."""
    items = items_of(dry_run[1], "precision")
    same, low = items["float32, default precision"], items["bfloat16, plain"]
    assert same["cosine"] == pytest.approx(1.0, abs=1e-5) and same["loss_error"] < 1e-5
    assert 0.9 < low["cosine"] < 1 - 1e-7 and 0 < low["loss_error"] < 0.05
    assert set(low["parts"]) == set(gradients.PARTS)
    attention = items_of(dry_run[1], "attention")
    assert attention["bfloat16, auto"]["cosine"] == pytest.approx(1.0)  # on a CPU it is plain
    refused = attention["bfloat16, cudnn"]
    assert refused["status"] == FAILED and "config.model.attention" in refused["reason"]


@pytest.mark.slow
def test_the_dry_run_times_steps_and_the_input(dry_run):
    report = dry_run[1]
    steps = [item for item in items_of(report, "step").values() if item["status"] == MEASURED]
    assert {item["augments"] for item in steps} == {True, False}
    for item in steps:
        assert 0 < item["ms_min"] <= item["ms"] <= item["ms_max"]
        assert item["images_per_s"] == pytest.approx(1000 * item["batch_size"] / item["ms"])
        assert item["peak_bytes"] > 0 and item["compile_s"] > 0 and item["utilisation"] is None
    whole = items_of(report, "input")["end to end"]
    assert whole["images_per_s"] > 0 and 0 <= whole["share_waiting"] <= 1
    assert whole["share_of_step"] > 0


@pytest.mark.slow
def test_the_dry_run_trains_and_probes(dry_run):
    items = items_of(dry_run[1], "training")
    trained = items["training"]
    assert trained["steps_done"] == trained["steps"] == 4 and trained["stopped"] is None
    assert np.isfinite(trained["last"]["loss"]) and trained["monitor"][-1]["step"] == 4
    assert 0 <= items["probe"]["scores"]["teacher"]["k5"] <= 100


@pytest.mark.slow
def test_sigterm_ends_a_check_with_its_report(tmp_path):
    command = [sys.executable, "-m", "experiments.gpu_check", "--minutes=5", f"--out={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (tmp_path / "logs" / "device.txt").exists() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "SIGTERM: what was measured before" in error
    assert json.loads((tmp_path / FILE).read_text())["ended"] > 0
