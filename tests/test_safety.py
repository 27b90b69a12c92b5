"""Received, damaged and shared workdirs: no code out of data, one line an error, one run at a time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from shrunk import shrunk

from dinotwins_jax.build import build, build_for_evaluation
from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.cli import INTERRUPTED, command, exit_code
from dinotwins_jax.configuration import config_of
from dinotwins_jax.evaluate import evaluate_run
from dinotwins_jax.export import export_run
from dinotwins_jax.failures import Evaluated, failing_alone
from dinotwins_jax.files import read_json_lines
from dinotwins_jax.lock import locked
from dinotwins_jax.logs.writers import JsonLines, Log
from dinotwins_jax.pretrained import read_backbone
from dinotwins_jax.stopping import EvaluationFailed
from dinotwins_jax.weights import from_checkpoint
from dinotwins_jax.workdir import claim_workdir
from experiments.comparison.outcome import read_log

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run_of_zero_steps(tmp_path_factory):
    workdir, config = tmp_path_factory.mktemp("runs") / "run", shrunk()
    claim_workdir(workdir, config.to_dict())
    run = build(config)
    state = run.placement.init(run.fresh_state)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state, {})
    return workdir


@pytest.fixture
def received(run_of_zero_steps, tmp_path, monkeypatch):
    """A workdir with a config.json that names code which leaves a file, and that file."""
    mark = tmp_path / "executed"
    (tmp_path / "received_code.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "def loss(**_): raise SystemExit('ran')\n"
        "def source(*_, **__): raise SystemExit('ran')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "received_code", raising=False)
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(run_of_zero_steps / "checkpoints")
    config = json.loads((run_of_zero_steps / "config.json").read_text())
    config["loss"] |= {"evil": {"fn": "received_code:loss", "command": "true"}}
    config["evals"] |= {"pictures": 0}
    write(workdir, config)
    return workdir, config, mark


def write(workdir, config):
    (workdir / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))


def test_evaluate_and_export_run_no_loss_of_a_received_workdir(received):
    workdir, _, mark = received
    run = build_for_evaluation(config_of(workdir, opens_data=True))
    weights = from_checkpoint(run, run.config, workdir)
    assert weights.step == 0 and not mark.exists()
    jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail(), *weights[:2])
    assert evaluate_run(workdir, tasks=["attention"])["teacher"]["attention"]
    export_run(workdir, config_of(workdir), "timm", workdir / "export_timm")
    assert not mark.exists() and "received_code" not in sys.modules


def test_a_source_that_is_code_is_refused_unless_the_command_line_names_it(received):
    workdir, config, mark = received
    config["data"]["source"] = "received_code:source"
    write(workdir, config)
    with pytest.raises(
        ValueError, match=r"config\.json names code as its data source, 'received_c"
    ):
        evaluate_run(workdir)
    export_run(workdir, config_of(workdir), "timm", workdir / "export_timm")
    assert not mark.exists()
    with pytest.raises(SystemExit, match="ran"):
        evaluate_run(workdir, shrunk(data__source="received_code:source"))
    assert mark.exists()


def test_a_resume_takes_code_from_the_given_config_alone(received):
    workdir, _, mark = received
    with pytest.raises(
        ValueError, match=r"run with another config.*loss\.evil\.fn \(received_code"
    ):
        claim_workdir(workdir, shrunk(evals__pictures=0).to_dict())
    assert not mark.exists() and "received_code" not in sys.modules


def test_keys_on_the_command_line_do_not_run_a_received_source(received):
    workdir, config, mark = received
    config["data"]["source"] = "received_code:source"
    write(workdir, config)
    with pytest.raises(ValueError, match="names code as its data source"):
        evaluate_run(workdir, overrides={"data.dir": "/elsewhere"})
    assert not mark.exists()
    assert evaluate_run(workdir, tasks=["attention"], overrides={"data.source": "scenes"})
    assert not mark.exists()


def test_init_from_a_received_workdir_runs_nothing(received):
    workdir, config, mark = received
    config["data"]["source"] = "received_code:source"
    write(workdir, config)
    backbone = build_for_evaluation(shrunk()).backbone
    assert "pos_embed" in read_backbone(str(workdir), backbone, jax.random.key(0))
    assert not mark.exists()


def test_a_checkpoint_of_another_model_is_named(run_of_zero_steps):
    config = shrunk(model__depth=3)
    with pytest.raises(ValueError, match=r"step 0 has another model.*blocks_2.* none there"):
        from_checkpoint(build_for_evaluation(config), config, run_of_zero_steps)


DAMAGED = {
    '{"model": {': "is damaged",
    "[1, 2]": "is damaged: it holds a list",
    "7": "is damaged: it holds a int",
    '{"seed": 1}': "has no section 'model'",
    '{"model": []}': "has no section 'model'",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_config_is_one_line_that_names_the_file(tmp_path, text):
    write(tmp_path, text)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    backbone = build_for_evaluation(shrunk()).backbone
    starts = {
        "evaluate": lambda: evaluate_run(tmp_path),
        "export": lambda: export_run(tmp_path, config_of(tmp_path), "timm", tmp_path / "out"),
        "resume": lambda: claim_workdir(tmp_path, shrunk().to_dict()),
        "init_from": lambda: read_backbone(str(tmp_path), backbone, jax.random.key(0)),
    }
    for name, start in starts.items():
        with pytest.raises(ValueError, match=DAMAGED[text]) as error:
            start()
        assert str(tmp_path / "config.json") in str(error.value), name
        assert "\n" not in str(error.value), name
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize(
    "change",
    [lambda c: c["evals"].pop("pictures"), lambda c: c["model"].pop("attention"),
     lambda c: c.pop("seed"), lambda c: c["model"].update(depth="two")],
)  # fmt: skip
def test_a_config_of_another_version_is_one_line(received, change):
    workdir, config, _ = received
    change(config)
    write(workdir, config)
    with pytest.raises(ValueError, match=r"config\.json is of another version"):
        evaluate_run(workdir)


def test_damaged_lines_of_the_log_are_left_out_with_one_warning(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 3.0}', "\x00\x00", "[1]", '{"loss": 1}', '{"step": 2, "loss": "x"}',
             '{"step": 3, "loss": NaN}', '{"step": 4, "lo']  # fmt: skip
    path.write_text("\n".join(lines))
    said = []
    assert [row["step"] for row in read_json_lines(path, said.append)] == [1, 3]
    assert said == [f"{path}: line 2 and 4 more lines cannot be read: left out"]
    assert [row["step"] for row in read_log(tmp_path)] == [1, 3]
    JsonLines(path, 3).write(4, {"loss": 1.0})
    assert [row["step"] for row in read_json_lines(path, pytest.fail)] == [1, 3, 4]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="has no line that can be read"):
        read_log(tmp_path)


def test_a_step_stands_in_the_log_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [(2, 1.0), (4, 2.0), (2, 1.5), (6, 3.0), (4, 2.5)]  # of two processes at once
    path.write_text("".join(f'{{"step": {step}, "loss": {loss}}}\n' for step, loss in rows))
    found = JsonLines(path, 6).read()
    assert [(row["step"], row["loss"]) for row in found] == [(2, 1.5), (4, 2.5), (6, 3.0)]


@pytest.mark.parametrize("text", ["{", "[]", '{"wandb": 3}', '{"wandb": ["id", null]}'])
def test_damaged_identifiers_of_trackers_start_new_ones(tmp_path, text, capfd):
    (tmp_path / "trackers.json").write_text(text)
    Log(tmp_path, (), "project", {}).start(2)
    assert "trackers.json is damaged" in capfd.readouterr().err


HOLD = """
import sys
from pathlib import Path
from dinotwins_jax.lock import locked
try:
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error)
"""


def holder(workdir):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_a_second_start_is_refused_and_a_killed_one_blocks_nothing(tmp_path):
    first = holder(tmp_path)
    assert first.stdout.readline() == "held\n"
    message = rf"in use by process {first.pid} on \S+ since 2"
    with pytest.raises(ValueError, match=message) as error, locked(tmp_path):
        pass
    assert "\n" not in str(error.value)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with locked(tmp_path):  # although the file is there
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    again = holder(tmp_path)
    assert again.communicate("", timeout=60)[0] == "held\n"


def test_only_process_0_takes_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with locked(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, capfd):
    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("dinotwins_jax.lock.fcntl.lockf", unsupported)
    with locked(tmp_path):
        pass
    assert capfd.readouterr().err.count("cannot be locked") == 1


@pytest.mark.parametrize(
    "flag", ["--workdir=s3://bucket/run", "--workdir=file:///run", "--out=gs://bucket/x"]
)
def test_a_place_elsewhere_is_refused_at_the_start(flag, capfd):
    """A workdir may be in a bucket (test_buckets.py), what a command writes elsewhere may not."""

    def define(values):
        from absl import flags

        for name in ("workdir", "out"):
            flags.DEFINE_string(name, None, "", flag_values=values)

    assert command("name", "", define, lambda _: pytest.fail(), [flag], config_required=False) == 2
    name, _, place = flag.partition("=")
    said = capfd.readouterr().err
    assert f"{name} is '{place}': it must be a directory of this machine" in said
    assert ("or gs://BUCKET/RUN" in said) == (name == "--workdir")
    argv = ["--workdir=gs://bucket/run"]
    assert command("name", "", define, lambda _: 0, argv, config_required=False) == 0


def test_ctrl_c_is_one_line_and_130(capfd):
    def work():
        raise KeyboardInterrupt

    assert exit_code(work) == INTERRUPTED == 130
    assert exit_code(work, "interrupted: again") == 130
    assert capfd.readouterr().err == "error: interrupted\nerror: interrupted: again\n"


def test_an_export_spares_runs_and_other_files(received, tmp_path):
    workdir, _, _ = received
    config, out = config_of(workdir), tmp_path / "out"
    before = (workdir / "config.json").read_bytes()
    for place in (workdir, workdir / ".." / workdir.name):
        with pytest.raises(ValueError, match="is the workdir of a run"):
            export_run(workdir, config, "timm", place, overwrite=True)
    assert (workdir / "config.json").read_bytes() == before
    export_run(workdir, config, "timm", out)
    export_run(workdir, config, "dino", out)  # just an earlier export
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something else \(notes\.txt\).*--overwrite"):
        export_run(workdir, config, "timm", out)
    export_run(workdir, config, "timm", out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")  # of another model
    with pytest.raises(ValueError, match=r"holds something else \(config\.json\)"):
        export_run(workdir, config, "timm", other)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_exported_files_follow_the_umask(received, tmp_path, umask):
    workdir, _, _ = received
    old = os.umask(umask)
    try:
        export_run(workdir, config_of(workdir), "timm", tmp_path / "out")
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_part_that_fails_is_one_line_and_a_reason(capfd, monkeypatch):
    monkeypatch.delenv("DINOTWINS_DEBUG", raising=False)
    failed = {}
    with failing_alone("task knn", "knn", failed):
        raise OSError("no\nroom")
    assert failed == {"knn": "no room"}
    assert capfd.readouterr().err == "task knn failed: no room\n"
    with pytest.raises(ZeroDivisionError), failing_alone("task knn", "knn", failed):
        raise ZeroDivisionError  # an error of the program
    Evaluated({}, {}).check()
    with pytest.raises(EvaluationFailed, match="knn failed") as error:
        Evaluated({}, failed).check()
    assert error.value.code == 4
