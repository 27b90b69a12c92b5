"""Several processes: start-up, and a run of two that equals the run of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_files import assert_close
from shrunk import SHRUNK, shrunk

from dinotwins_jax.devices import processes
from dinotwins_jax.devices.processes import join, started_together
from dinotwins_jax.train import train
from experiments.faults import final_arrays
from experiments.invariance import free_port

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, False),  # sbatch without srun: this is the only process
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host-0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
    ],
)
def test_launchers_are_told_apart(environment, several):
    assert started_together(environment) == several


@pytest.mark.parametrize(
    ("arguments", "environment", "started"),
    [
        ({}, {}, None),
        ({"mode": "off"}, {"SLURM_STEP_NUM_TASKS": "8"}, None),
        ({"mode": "off", "address": "a:1"}, {}, None),
        ({}, {"SLURM_STEP_NUM_TASKS": "8"}, (None, None, None)),
        ({"mode": "on"}, {}, (None, None, None)),
        ({"address": "a:1", "num_processes": 4, "process_id": 3}, {}, ("a:1", 4, 3)),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"},
            ("a:1", 4, 2),
        ),
        (
            {"process_id": 1},
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"},
            ("a:1", 4, 1),
        ),
        ({"num_processes": 1, "process_id": 0}, {}, None),
    ],
)
def test_flags_environment_and_launchers_decide(arguments, environment, started, monkeypatch):
    calls = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *a: calls.append(a))
    join(**arguments, environment=environment)
    assert calls == ([] if started is None else [started])


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ({"mode": "yes"}, {}, "--distributed is 'yes': choose auto, on, off"),
        (
            {"num_processes": 2, "process_id": 2},
            {},
            r"--process_id is 2: .*\[0, --num_processes 2\)",
        ),
        ({}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two': it must be a number"),
    ],
)
def test_a_wrong_description_is_one_line(arguments, environment, message):
    with pytest.raises(ValueError, match=message) as error:
        join(**arguments, environment=environment)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """Two processes of two devices against one of four: equal state, one log, one set of scores."""
    # LARS at a high rate, see test_train.test_a_run_goes_on_on_other_devices.
    options = {"optim__name": "lars", "optim__lr": 300.0, "optim__clip": 0.0}
    options |= {"mesh__data": 2, "mesh__fsdp": 2, "evals__pictures": 0}
    address = f"127.0.0.1:{free_port()}"
    flags = [f"--config.{name}={value}" for name, value in SHRUNK.items()]
    flags += [f"--config.{name.replace('__', '.')}={value}" for name, value in options.items()]
    flags += ["--config.loss.dino.out_dim=32", "--config.loss.dino.hidden_dim=32"]
    flags += [
        "--config.loss.dino.bottleneck_dim=16",
        "--config.loss.barlow_twins.hidden_dims=(32,32,32)",
    ]
    two = tmp_path / "two"
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "dinotwins_jax.main", "--config=configs/hybrid.py"),
                *(f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}"),
                *(f"--workdir={two}", *flags),
            ],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    output = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], output[0][1] + output[1][1]
    assert "step 4/4" in output[0][0]
    # Gloo's own lines, which its threads may tear in two
    said = [line for line in output[1][0].splitlines() if line and "peer ranks" not in line]
    assert [line for line in said if "[Gloo]" not in line] == []

    one = tmp_path / "one"
    scores = train(shrunk(**options), one)
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (two, one)
    )
    assert [line["step"] for line in ours] == [2, 4]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["monitor/knn_top1"] == b["monitor/knn_top1"]
    assert json.loads((two / "scores.json").read_text())["scores"].keys() == scores.keys()
    assert not list(two.glob("*.tmp")) and {p.name for p in two.iterdir()} == {
        p.name for p in one.iterdir()
    } - {"features"}
    arrays = final_arrays(one)
    for path, array in final_arrays(two).items():
        assert_close(array, arrays[path], 1e-4, path, floor=0.1)
