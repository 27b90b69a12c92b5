"""A full disk: one line with the file, its file system and what is kept; the same call goes on later.

A limit on the size of a file stands for the disk, since the system reports both alike.
"""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shrunk import SHRUNK

from dinotwins_jax.data import shards
from dinotwins_jax.data.store import Settings, union
from dinotwins_jax.evals.features import _load, _save
from dinotwins_jax.evals.pictures import panel_grid, show
from dinotwins_jax.features.classifier import Classifier
from dinotwins_jax.features.files import join, read_features
from dinotwins_jax.files import FullDisk, full_disk, replace_text, replacing
from dinotwins_jax.logs.writers import JsonLines

ROOT = Path(__file__).parent.parent
LIMIT = 100_000  # bytes; pytest's own files of captured output stay below


@contextlib.contextmanager
def small_files(limit=LIMIT):
    """Writes above `limit` bytes of a file fail with EFBIG, as they would with ENOSPC on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def save_array(path):
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, big=noise(2 * LIMIT))


WRITERS = {
    "text": lambda path: replace_text(path, "x" * 2 * LIMIT),
    "arrays": save_array,
    "picture": lambda path: panel_grid(
        path, [[show(noise(300, 300, 3))] * 3], ("a", "b", "c"), aspect=1
    ),
    "log": lambda path: JsonLines(path, 0).write(1, {"x" * 2 * LIMIT: 1.0}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_without_room_is_one_line_and_the_old_one_stays(tmp_path, kind):
    path = tmp_path / "file"
    path.write_text("" if kind == "log" else "old")
    with small_files(), pytest.raises(FullDisk) as error:
        WRITERS[kind](path)
    text = str(error.value)
    assert text.startswith(f"{path} could not be written (File too large: file system /")
    assert text.endswith("is kept: when there is room, the same command goes on")
    assert "\n" not in text and " MB free" in text
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    if kind != "log":
        assert path.read_text() == "old"
    WRITERS[kind](path)  # with room


def test_a_log_cut_by_a_full_disk_is_mended_by_the_next_start(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0)
    log.write(1, {"loss": 3.0})
    with small_files(), pytest.raises(FullDisk):
        log.write(2, {"x" * 2 * LIMIT: 1.0})
    again = JsonLines(path, 1)
    again.write(2, {"loss": 2.0})
    assert [row["loss"] for row in again.read()] == [3.0, 2.0]
    assert "line 2 cannot be read" in capfd.readouterr().err


def test_features_that_cannot_be_cached_are_a_warning(tmp_path, capfd):
    path = tmp_path / "features" / "a.npz"
    features = np.random.default_rng(0).normal(size=(200, 200)).astype(np.float32)
    with small_files():
        _save(path, features, np.arange(200))
    said = capfd.readouterr().err
    assert said.startswith("WARNING features are not cached: ") and said.count("\n") == 1
    assert not list(path.parent.iterdir()) and _load(path) is None
    _save(path, features, np.arange(200))
    np.testing.assert_array_equal(_load(path)[0], features)


class Noise:
    """Pictures that do not compress: 60 kB each."""

    class_names, labels = (), None

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return noise(200, 200, 3)

    def name(self, i):
        return f"noise/{i}"


def test_features_and_classifiers_without_room_leave_nothing(tmp_path):
    shard, out = tmp_path / "shard.npz", tmp_path / "out.npz"
    about = {name: np.array("") for name in ("model", "source", "place")}
    names, wide = np.array(["a.png"]), np.zeros((1, LIMIT), np.float32)
    np.savez(shard, names=names, cls=wide, left_out=names[:0], **about)
    classifier = Classifier("ridge", *[wide[0]] * 4, 1.0, ("a", "b"), ("cls",), "", {})
    for write in (lambda: join([shard], out, {}), lambda: classifier.save(out)):
        with small_files(), pytest.raises(FullDisk, match=f"{out} could not be written"):
            write()
        assert list(tmp_path.iterdir()) == [shard]
    join([shard], out, {})
    np.testing.assert_array_equal(read_features(out)["cls"], wide)


@pytest.mark.slow
def test_shards_without_room_go_on_from_the_last_whole_one(tmp_path):
    store, out = union({"pretrain": Noise()}), tmp_path / "out"
    start = lambda: shards.write(  # noqa: E731
        store, out, Settings(images_per_shard=2), description={}, command="again", workers=1
    )
    with (
        small_files(),
        pytest.raises(FullDisk, match=r"images-0000\d-of-00002\.array_record could"),
    ):
        start()
    assert not list(out.glob("*.tmp")) and (out / "unfinished.json").is_file()
    assert start()["images"] == 4


def test_words_of_other_libraries_are_recognised():
    assert full_disk(RuntimeError("RESOURCE_EXHAUSTED: x [No space left on device]; more"))
    assert full_disk(OSError(122, os.strerror(122)))
    assert full_disk(PermissionError(13, "Permission denied")) is None


def test_threads_of_a_failed_save_say_nothing_and_others_do():
    code = """
import sys, logging
from dinotwins_jax.cli import command
class Raises:
    def __init__(self, text):
        self.text = text
    def __del__(self):  # its error cannot be raised, as in a thread of a library
        raise RuntimeError(self.text)
def work(values):
    Raises("Event loop is closed"), Raises("something else")
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    return 0
sys.exit(command("name", "", lambda values: None, work, [], config_required=False))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "RuntimeError: something else\n" in done.stderr
    assert "Event loop" not in done.stderr and "never retrieved" not in done.stderr


@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_with_one_line_and_goes_on(tmp_path):
    """The command, with all that JAX, Orbax and asyncio would print."""
    options = SHRUNK | {"evals.tasks": (), "evals.pictures": 0, "loss.dino.out_dim": 4096}
    keys = [f"--config.{key}={value}" for key, value in options.items()]
    start = [sys.executable, "-m", "dinotwins_jax.main", "--config=hybrid:demo", *keys]
    start += [f"--workdir={tmp_path / 'run'}"]
    where = {"cwd": ROOT, "capture_output": True, "text": True}
    limited = ["sh", "-c", f'ulimit -f {LIMIT // 512}; exec "$@"', "sh", *start]
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}  # its files are large
    full = subprocess.run(limited, env=env, **where)
    lines = [line for line in full.stderr.splitlines() if not line.startswith("WARNING ")]
    assert full.returncode == 2 and len(lines) == 1, full.stderr
    assert lines[0].startswith("error: a checkpoint could not be written to ")
    assert "File too large: file system /" in lines[0] and "there is none before it" in lines[0]
    again = subprocess.run(start, **where)
    assert again.returncode == 0 and "step 4/4" in again.stdout, again.stderr
