"""A workdir is data: nothing in it is run, a fault in it is one line, and nothing trained is lost."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from shrunk import shrunk

from dinotwins_jax import evaluation, export
from dinotwins_jax.cli import INTERRUPTED, exit_code
from dinotwins_jax.evaluate import evaluate_run
from dinotwins_jax.export import export_run
from dinotwins_jax.files import read_config, read_json_lines
from dinotwins_jax.lock import locked
from dinotwins_jax.logs.writers import JsonLines
from dinotwins_jax.stopping import EvaluationFailed
from dinotwins_jax.train import train

ROOT = Path(__file__).parent.parent
EVIL = "import pathlib\n\n\ndef touch(path, **_):\n    pathlib.Path(path).touch()\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, config) of a run of two steps without evaluation."""
    workdir = tmp_path_factory.mktemp("safety") / "run"
    options = {"evals__tasks": (), "evals__pictures": 0, "evals__monitor_every_epochs": 0.0}
    config = shrunk(total_steps=2, **options)
    train(config, workdir)
    return workdir, config


@pytest.fixture
def changed(trained):
    """Changes config.json of the run for one test."""
    path = trained[0] / "config.json"
    text = path.read_text()
    yield lambda change: path.write_text(json.dumps(change(json.loads(text))))
    path.write_text(text)


@pytest.mark.slow
def test_code_that_a_config_json_names_is_not_run(trained, changed, tmp_path, monkeypatch):
    workdir, _ = trained
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)
    term = {"fn": "evil:touch", "path": str(tmp_path / "run by a loss")}
    changed(lambda config: config | {"loss": config["loss"] | {"mine": term}})
    assert evaluate_run(workdir, tasks=["knn"])["teacher"]["knn"]["k5"]
    assert "for timm" in export_run(workdir, read_config_dict(workdir), "timm", tmp_path / "out")
    changed(lambda config: config | {"data": config["data"] | {"source": "evil:touch"}})
    with pytest.raises(ValueError, match=r"names code as its data source, 'evil:touch'"):
        evaluate_run(workdir, tasks=["knn"])
    assert not list(tmp_path.glob("run by*")) and "evil" not in sys.modules


def read_config_dict(workdir):
    from ml_collections import ConfigDict

    return ConfigDict(read_config(workdir / "config.json"))


@pytest.mark.slow
def test_a_task_that_fails_costs_only_itself(trained, monkeypatch):
    workdir, _ = trained
    score = evaluation._score

    def failing(task, *rest):
        if task == "linear":
            raise ValueError("too few images")
        return score(task, *rest)

    monkeypatch.setattr(evaluation, "_score", failing)
    with pytest.raises(EvaluationFailed, match="linear failed") as error:
        evaluate_run(workdir, tasks=["linear", "knn"])
    assert error.value.code == 4
    report = json.loads((workdir / "scores.json").read_text())
    assert report["failed"] == {"linear": "too few images"}
    assert "knn" in report["scores"]["teacher"] and (workdir / "report.html").is_file()


@pytest.mark.slow
def test_an_export_spares_runs_and_other_files_and_follows_the_umask(trained, tmp_path):
    workdir, config = trained
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(ValueError, match="is the workdir of a run"):
        export_run(workdir, config, "timm", workdir)
    assert (workdir / "config.json").read_bytes() == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something else \(notes.txt\)"):
        export_run(workdir, config, "timm", other)
    export_run(workdir, config, "timm", other, overwrite=True)
    old = os.umask(0o027)
    try:
        export_run(workdir, config, "timm", tmp_path / "new")
        export_run(workdir, config, "hf", tmp_path / "new")  # an earlier export is replaced
    finally:
        os.umask(old)
    for name in export.FILES:
        assert stat.S_IMODE((tmp_path / "new" / name).stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {', "is damaged"),
        ("[1, 2]", "is damaged: it holds a list"),
        ('{"model": {}}', "has no section 'views'"),
        ("\x00\xff", "is damaged"),
    ],
)
def test_an_odd_config_json_is_one_line_that_names_it(text, message, tmp_path):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "config.json").write_text(text)
    commands = {
        "evaluate": [f"--workdir={tmp_path}"],
        "export": [f"--workdir={tmp_path}", "--to=timm"],
    }
    from dinotwins_jax import evaluate

    for name, arguments in commands.items():
        assert {"evaluate": evaluate, "export": export}[name].run(arguments) == 2
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(error.value) and "\n" not in str(error.value)


def test_damaged_and_repeated_lines_of_a_log_are_left_out(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "lo', '{"step": 2, "loss": 2.0}', "[]"]
    path.write_text("\n".join([*lines, '{"step": 2, "loss": 2.5}', '{"step": 3, "loss": 1.0}']))
    assert [row["step"] for row in read_json_lines(path, said.append)] == [1, 2, 2, 3]
    assert said == [f"{path}: line 2 and 1 more lines cannot be read: left out"]
    log = JsonLines(path, from_step=2)
    assert log.read() == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


def test_a_workdir_in_use_is_refused_and_a_killed_holder_blocks_nothing(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from dinotwins_jax.lock import locked\n"
        f"with locked(Path({str(tmp_path)!r})):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert holder.stdout.readline() == "held\n"
        message = rf"in use by process {holder.pid} on \S+ since"
        with pytest.raises(ValueError, match=message), locked(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_ctrl_c_and_remote_workdirs_are_one_line(capsys):
    def work():
        raise KeyboardInterrupt

    assert exit_code(work) == INTERRUPTED
    from dinotwins_jax import main

    assert main.run(["--config=hybrid", "--workdir=gs://bucket/run"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "error: interrupted" and "--workdir is 'gs://bucket/run'" in errors[1]
