"""Checkpoints: retention, damaged, half-written and foreign ones, a full disk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dinotwins_jax.checkpoint import CheckpointError, Checkpoints
from dinotwins_jax.damage import fingerprint

ROOT = Path(__file__).parent.parent


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict


@flax.struct.dataclass
class TeacherState:
    step: jax.Array
    teacher_params: dict


def state(step, width=6):
    weights = jnp.arange(4.0 * width).reshape(4, width) + step
    return State(jnp.int32(step), {"a": weights, "b": jnp.full((3,), 1.5 * step)})


def save(workdir, steps, metrics=None, **options):
    checkpoints = Checkpoints(workdir, options.pop("keep", 2), **options)
    for step in steps:
        checkpoints.save(state(step), {"position": 10 * step}, (metrics or {}).get(step))
    checkpoints.wait()
    found = checkpoints.steps(), checkpoints.best()
    checkpoints.close()
    return found


def restore(workdir, like=None, step=None):
    checkpoints = Checkpoints(workdir, 2)
    try:
        return checkpoints.restore(like or state(0), step)
    finally:
        checkpoints.close()


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    save(tmp_path, [1, 2])
    found, position = restore(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, state(2))
    assert position == {"position": 20}
    assert int(restore(tmp_path, step=1)[0].step) == 1


@pytest.mark.parametrize(("mode", "kept", "best"), [("max", [2, 5, 6], 2), ("min", [3, 5, 6], 3)])
def test_the_last_and_the_best_are_kept(tmp_path, mode, kept, best):
    values = {1: 3.0, 2: 9.0, 3: 1.0, 4: 5.0, 6: 4.0}  # 5 has none
    metrics = {step: {"m": value, "other": 0.0} for step, value in values.items()}
    found = save(tmp_path, range(1, 7), metrics, best_metric="m", best_mode=mode)
    assert found == (kept, best)
    assert save(tmp_path, [7], {7: {"m": 4.5}}, best_metric="m", best_mode=mode)[1] == best


def test_without_a_metric_only_the_last_are_kept(tmp_path):
    assert save(tmp_path, range(1, 5), {1: {"m": 1.0}}) == ([3, 4], None)


def flip(path):
    """Flips one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def values_file(step_dir):
    """The file that holds most of the arrays' bytes."""
    return max((step_dir / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def test_a_teacher_is_read_without_its_model_from_the_last_that_is_whole(tmp_path, capfd):
    def with_teacher(step):
        backbone = {"block": {"kernel": jnp.full((64, 64), 1.0 * step)}, "norm": jnp.ones(3)}
        return TeacherState(jnp.int32(step), {"backbone": backbone})

    with Checkpoints(tmp_path, 2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(with_teacher(step), {"position": 0})
            checkpoints.wait()

    def teacher():
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            return checkpoints.restore_teacher()[0]

    found = teacher()
    assert set(found) == {"block", "norm"} and np.all(found["block"]["kernel"] == 2.0)
    flip(values_file(tmp_path / "checkpoints" / "2"))
    assert np.all(teacher()["block"]["kernel"] == 1.0)
    assert "WARNING checkpoint 2 in" in capfd.readouterr().err
    assert (tmp_path / "checkpoints" / "2").is_dir()  # of another run: nothing is moved
    truncate(values_file(tmp_path / "checkpoints" / "1"))
    with pytest.raises(CheckpointError, match=r"no intact checkpoint in .*checkpoints"):
        teacher()


@pytest.mark.parametrize(
    "hurt",
    [
        lambda d: truncate(values_file(d)),
        lambda d: values_file(d).unlink(),
        lambda d: truncate(d / "state" / "manifest.ocdbt"),
        lambda d: flip(d / "state" / "manifest.ocdbt"),
        lambda d: truncate(d / "state" / "_METADATA"),
        lambda d: (d / "data" / "metadata").unlink(),
        lambda d: truncate(d / "data" / "metadata"),
        lambda d: [shutil.rmtree(d), d.mkdir()],
    ],
    ids=[
        "values cut",
        "no values",
        "index cut",
        "index bit",
        "metadata cut",
        "no data",
        "data cut",
        "empty",
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, hurt, capfd):
    save(tmp_path, [1, 2])
    hurt(tmp_path / "checkpoints" / "2")
    found, position = restore(tmp_path)
    assert int(found.step) == 1 and position == {"position": 10}
    error = capfd.readouterr().err
    assert "WARNING checkpoint 2 in" in error and "is damaged" in error and "Traceback" not in error
    assert (tmp_path / "damaged" / "2").is_dir()
    assert save(tmp_path, [2])[0] == [1, 2]  # its place is free again


def test_a_bit_that_orbax_does_not_miss_is_found_by_the_fingerprint(tmp_path, capfd):
    noise = jax.random.normal(jax.random.key(0), (64, 64))
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2):
        checkpoints.save(State(jnp.int32(step), {"a": noise + step}), {"position": step})
    checkpoints.close()
    flip(values_file(tmp_path / "checkpoints" / "2"))
    found, _ = restore(tmp_path, State(jnp.int32(0), {"a": noise}))
    assert int(found.step) == 1
    assert "(params/a does not match its fingerprint)" in capfd.readouterr().err


def test_when_no_checkpoint_is_whole_nothing_is_thrown_away(tmp_path):
    save(tmp_path, [1, 2])
    for step in (1, 2):
        truncate(tmp_path / "checkpoints" / str(step) / "data" / "metadata")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint in .*--resume=force"):
        restore(tmp_path)
    assert {p.name for p in (tmp_path / "damaged").iterdir()} == {"1", "2"}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory"),
        OSError(5, "Input/output error"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_is_wrong_with_the_machine_damages_no_checkpoint(tmp_path, monkeypatch, error):
    save(tmp_path, [1, 2])
    checkpoints = Checkpoints(tmp_path)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints._manager, "restore", fails)
    with pytest.raises(OSError, match="cannot be read now"):
        checkpoints.restore(state(0))
    checkpoints.close()
    assert not (tmp_path / "damaged").exists() and int(restore(tmp_path)[0].step) == 2


def test_a_reader_changes_nothing(tmp_path, capfd):
    save(tmp_path, [1, 2])
    truncate(tmp_path / "checkpoints" / "2" / "data" / "metadata")
    half = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-17"
    shutil.copytree(tmp_path / "checkpoints" / "1", half)
    before = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        found, _ = checkpoints.restore(state(0))
    assert int(found.step) == 1 and sorted(tmp_path.rglob("*")) == before
    assert "checkpoint 2" in capfd.readouterr().err


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_disk(tmp_path, monkeypatch, capfd):
    def fails():
        raise OSError("No space left on device")

    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fails)
        raise ZeroDivisionError
    assert "No space left on device" in capfd.readouterr().err


def test_a_half_written_checkpoint_is_named_and_dropped(tmp_path, capfd):
    save(tmp_path, [1])
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-17"
    shutil.copytree(tmp_path / "checkpoints" / "1", half)
    assert int(restore(tmp_path)[0].step) == 1
    assert "checkpoint 2 in" in (error := capfd.readouterr().err) and "never finished" in error
    assert not half.exists()


def test_a_broken_metric_does_not_cost_a_checkpoint(tmp_path, capfd):
    save(tmp_path, [1, 2], {1: {"m": 2.0}, 2: {"m": 1.0}}, best_metric="m")
    truncate(tmp_path / "checkpoints" / "1" / "metrics" / "metrics")
    assert save(tmp_path, [], best_metric="m") == ([1, 2], 2)
    assert "the metric of checkpoint 1" in capfd.readouterr().err


def test_a_checkpoint_of_another_model_is_refused_and_stays(tmp_path):
    save(tmp_path, [1])
    with pytest.raises(
        ValueError, match=r"step 1 has another model.*params/a has shape \(4, 6\).*\(4, 7\)"
    ):
        restore(tmp_path, state(0, width=7))
    assert int(restore(tmp_path)[0].step) == 1


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int32", "uint8"])
def test_a_fingerprint_sees_every_bit_and_no_device(kind):
    array = jnp.asarray(np.arange(64).reshape(8, 8), kind)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    alone = fingerprint({"a": array})
    for spec in (PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()):
        assert fingerprint({"a": jax.device_put(array, NamedSharding(mesh, spec))}) == alone
    raw = np.asarray(array)
    for place in (0, 17, 63):
        words = raw.copy().view(f"uint{8 * raw.dtype.itemsize}")
        words.flat[place] ^= 1
        assert fingerprint({"a": jnp.asarray(words.view(raw.dtype))}) != alone
    swapped = raw.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert fingerprint({"a": jnp.asarray(swapped)}) != alone


FULL = """
import sys
from pathlib import Path
sys.path[:0] = ["tests", "."]
import jax.numpy as jnp
from test_checkpoint import State
from dinotwins_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), 2)
small, big = jnp.ones((100,)), jnp.arange(4_000_000.0) ** 0.5  # 16 MB, which do not compress
checkpoints.save(State(jnp.int32(1), {"a": small}), {"position": 1})
checkpoints.wait()
try:
    checkpoints.save(State(jnp.int32(2), {"a": big}), {"position": 2})
    checkpoints.wait()
except OSError as error:
    print(type(error).__name__, error)
print(checkpoints.restore(State(jnp.int32(0), {"a": small}))[1])
"""


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_intact(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        done = subprocess.run(
            [sys.executable, "-c", FULL, str(disk)], cwd=ROOT, capture_output=True, text=True
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 2 and lines[1] == "{'position': 1}"
    assert lines[0].startswith("CheckpointError a checkpoint could not be written to")
    assert "No space left" in lines[0] and "the one of step 1 is intact" in lines[0]
