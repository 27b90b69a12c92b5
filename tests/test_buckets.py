"""Workdirs in a bucket: the mirror, the lock, checkpoints, and one line where it cannot be used."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from bucket import running_bucket
from test_checkpoint import save, state

from dinotwins_jax import buckets, lease
from dinotwins_jax.buckets import (
    NoBucket,
    at_hand,
    download,
    is_file_of_workdir,
    mirror_of,
    shown,
    upload,
)
from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.damage import damage
from dinotwins_jax.data import make_source
from dinotwins_jax.lock import locked
from dinotwins_jax.workdir import has_checkpoints

pytestmark = pytest.mark.slow  # needs requirements-remote.txt, which .ci/run installs

HOLDER = """
import sys, time
from dinotwins_jax.buckets import at_hand
from dinotwins_jax.lock import locked
with at_hand(sys.argv[1], writes=True) as workdir, locked(workdir):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module", autouse=True)
def bucket(tmp_path_factory):
    with (
        running_bucket(tmp_path_factory.mktemp("bucket")) as environment,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def url(request):
    return f"gs://bucket/{request.node.name}/run"


def objects(url):
    """{name: content} of all objects of a workdir."""
    from google.cloud import storage

    bucket, _, prefix = url.removeprefix("gs://").partition("/")
    blobs = storage.Client().list_blobs(bucket, prefix=f"{prefix}/")
    return {blob.name.removeprefix(f"{prefix}/"): blob.download_as_bytes() for blob in blobs}


def test_a_directory_is_given_as_it_is(tmp_path):
    with at_hand(tmp_path / "run", writes=True) as workdir:
        assert workdir == tmp_path / "run" and mirror_of(workdir) is None
        assert not workdir.exists()


def test_what_is_written_is_in_the_bucket_and_comes_back(url):
    with at_hand(url, writes=True) as workdir:
        assert workdir.name == "run" and shown(f"In {workdir}:") == f"In {url}:"
        (workdir / "metrics.jsonl").write_text("1\n")
        (workdir / "features").mkdir()
        (workdir / "features" / "a.npz").write_bytes(b"a")
        upload(workdir / "features")
        assert objects(url) == {"metrics.jsonl": b"1\n", "features/a.npz": b"a"}
        (workdir / "metrics.jsonl").write_text("1\n2\n")
        (workdir / "scores.json.tmp").write_text("half of it")
    assert objects(url) == {"metrics.jsonl": b"1\n2\n", "features/a.npz": b"a"}
    assert not workdir.exists()

    with at_hand(url, writes=True) as workdir:
        assert [path.name for path in workdir.iterdir()] == ["metrics.jsonl"]
        download(workdir / "features")
        assert (workdir / "features" / "a.npz").read_bytes() == b"a"
        (workdir / "features" / "a.npz").unlink()
    assert objects(url) == {"metrics.jsonl": b"1\n2\n"}


def test_what_others_write_meanwhile_stays(url):
    """An evaluation beside a training uploads its own files alone."""
    with at_hand(url, writes=True) as workdir:
        (workdir / "metrics.jsonl").write_text("old")
    with at_hand(url, writes=True) as evaluation:
        with at_hand(url, writes=True) as training:
            (training / "metrics.jsonl").write_text("newer")
        (evaluation / "scores.json").write_text("{}")
    assert objects(url) == {"metrics.jsonl": b"newer", "scores.json": b"{}"}


def test_a_reader_writes_nothing(url):
    with at_hand(url) as workdir:
        (workdir / "x").write_text("x")
    assert objects(url) == {}


def test_an_error_uploads_first_and_names_the_address(url):
    with pytest.raises(ValueError) as error, at_hand(url, writes=True) as workdir:
        (workdir / "nonfinite_step3.npz").write_bytes(b"x")
        raise ValueError(f"its batch is in {workdir}/nonfinite_step3.npz")
    assert str(error.value) == f"its batch is in {url}/nonfinite_step3.npz"
    assert objects(url) == {"nonfinite_step3.npz": b"x"}
    with pytest.raises(FileNotFoundError, match=f"{url}/nothing"), at_hand(url) as workdir:
        (workdir / "nothing").read_text()


@pytest.mark.parametrize("name", ["../run.json", "a/../../x", "/etc/x", "features/", "", "lock"])
def test_objects_that_are_no_files_of_the_workdir_are_not_mirrored(name):
    assert not is_file_of_workdir(name) and is_file_of_workdir("features/a.npz")


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("gs://nobucket/run", "gs://nobucket/run: there is no bucket 'nobucket'"),
        ("gs://forbidden/run", "gs://forbidden/run: no permission to read and write there"),
        ("gs://bucket", "gs://bucket: give a bucket and a folder in it, such as gs://bucket/run"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(place, line):
    with pytest.raises(NoBucket, match=line) as error, at_hand(place, writes=True):
        pytest.fail("it was used")
    assert "\n" not in str(error.value)


def test_no_network_is_one_line(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setattr(buckets, "_START_S", 1.0)
    line = r"gs://bucket/run cannot be reached .*refused"
    with pytest.raises(NoBucket, match=line), at_hand("gs://bucket/run"):
        pytest.fail("it was reached")


def test_without_gcsfs_the_line_names_package_and_mount(monkeypatch):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    line = r"gs://bucket/run needs gcsfs: pip install gcsfs; or mount .*gcsfuse"
    with pytest.raises(NoBucket, match=line), at_hand("gs://bucket/run"):
        pytest.fail("it was used")


def test_data_in_a_bucket_are_refused_with_the_mount():
    line = r"config.data.dir is 'gs://bucket/data': .*mount that storage \(a bucket: gcsfuse"
    for source in ("array_record", "folder", "tfds"):
        with pytest.raises(ValueError, match=line):
            make_source(source, "train", dir="gs://bucket/data")


def test_one_training_at_a_time(url):
    with at_hand(url, writes=True) as first, locked(first):
        held = json.loads(objects(url)["lock"])
        assert held["pid"] == os.getpid()
        with (
            pytest.raises(
                ValueError, match=f"{url} is in use by process {os.getpid()} on .* stop that one"
            ),
            at_hand(url, writes=True) as second,
            locked(second),
        ):
            pytest.fail("two hold it")
    assert "lock" not in objects(url)


def test_a_killed_run_blocks_nothing_on_its_machine(url):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with at_hand(url, writes=True) as workdir:
        line = f"in use by process {holder.pid} "
        with pytest.raises(ValueError, match=line), locked(workdir):
            pytest.fail("two hold it")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with at_hand(url, writes=True) as workdir, locked(workdir):
        assert json.loads(objects(url)["lock"])["pid"] == os.getpid()


def test_a_lock_of_another_machine_runs_out(url, monkeypatch):
    """What is left of a run that was killed there, or of one that has not been heard of."""
    other = json.dumps(
        {"pid": 1, "host": "other", "machine": "other", "started": "then", "lease": "x"}
    )
    with at_hand(url, writes=True) as workdir:
        mirror_of(workdir).object("lock").upload_from_string(other)
        line = r"process 1 on other since then: .* runs out in 1\d\d s"
        with pytest.raises(ValueError, match=line), locked(workdir):
            pytest.fail("two hold it")
        monkeypatch.setattr(lease, "LEASE_S", 0.2)
        time.sleep(0.3)
        with locked(workdir):
            time.sleep(0.3)  # it is renewed
            assert json.loads(objects(url)["lock"])["pid"] == os.getpid()


def test_a_run_whose_lock_was_taken_writes_no_more(url, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_S", 0.4)
    taken = {"pid": 7, "host": "other", "started": "now", "machine": "other", "lease": "x"}
    line = r"was taken over by process 7 on other since now: .* no more"
    with (
        pytest.raises(NoBucket, match=line),
        at_hand(url, writes=True) as workdir,
        locked(workdir),
    ):
        mirror = mirror_of(workdir)
        mirror.object("lock").upload_from_string(json.dumps(taken))
        deadline = time.monotonic() + 30
        while not mirror.in_use_by and time.monotonic() < deadline:
            time.sleep(0.05)
        (workdir / "metrics.jsonl").write_text("1")
        upload(workdir)
    assert set(objects(url)) == {"lock"} and json.loads(objects(url)["lock"]) == taken


@pytest.mark.parametrize(
    "error",
    [
        OSError("Cannot connect to host x:443"),
        ConnectionResetError("reset"),
        OSError("Forbidden: x"),
    ],
)
def test_a_network_that_fails_is_no_damage(error):
    """A checkpoint that cannot be read now is not moved aside."""
    with pytest.raises(OSError, match="a checkpoint cannot be read now"), damage():
        raise error


def test_of_two_starts_at_once_one_wins(url):
    with at_hand(url, writes=True) as workdir:
        first, second = (
            lease._Lease(mirror_of(workdir), {"lease": n, "pid": 1, "host": n}) for n in "ab"
        )
        first._write(0)
        with pytest.raises(lease._precondition_failed()):
            second._write(0)  # it had read that nobody held it


@pytest.mark.slow
def test_checkpoints_in_a_bucket(url, capfd):
    """Saved, kept, restored to the bit; unfinished ones are dropped, damaged ones moved aside."""
    with at_hand(url, writes=True) as workdir:
        assert not has_checkpoints(workdir)
        metrics = {step: {"m": 1.0 / step} for step in (1, 2, 3)}
        assert save(workdir, [1, 2, 3], metrics, best_metric="m") == ([1, 2, 3], 1)
        assert has_checkpoints(workdir) and not (workdir / "checkpoints").exists()
        mirror = mirror_of(workdir)
        mirror.object("checkpoints/4/state/d/x").upload_from_string(b"killed while it was written")
        for name in objects(url):
            if name.startswith("checkpoints/3/state/d/"):
                mirror.object(name).upload_from_string(b"damaged")
    with at_hand(url, writes=True) as workdir, Checkpoints(workdir, 2) as checkpoints:
        assert (
            f"checkpoint 4 in {url}/checkpoints was never finished: dropped"
            in capfd.readouterr().err
        )
        found, position = checkpoints.restore(state(0))
        jax.tree.map(np.testing.assert_array_equal, found, state(2))
        assert position == {"position": 20} and 4 not in checkpoints.steps()
        assert f"moved to {url}/damaged" in capfd.readouterr().err
        there = objects(url)
        assert any(name.startswith("damaged/3/state/") for name in there)
        assert not any(name.startswith(("checkpoints/3/", "checkpoints/4/")) for name in there)
        checkpoints.save(state(3), {"position": 31})
    with at_hand(url) as workdir, Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.restore(state(0))[1] == {"position": 31}
