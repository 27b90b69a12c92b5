"""The package outside its checkout: installed by pip, used from a directory of one's own."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from shrunk import SHRUNK

from dinotwins_jax.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
SMALL = SHRUNK | {"total_steps": 2, "evals.tasks": ("knn",), "evals.pictures": 2}
FLAGS = [f"--config.{key}={value}" for key, value in SMALL.items()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(bin directory, directory of one's own) of a virtual environment with the package in it.

    What the package depends on is taken from the environment of the tests.
    """
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    programs, own = folder / "venv" / "bin", folder / "own"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "venv" / "lib" / version / "site-packages"
    (site / "tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir"]
    subprocess.run([*pip, ROOT], check=True)
    own.mkdir()
    return programs, own


def call(installed, *arguments, module=None):
    """What the command prints on stdout, from the directory of one's own."""
    programs, own = installed
    start = [programs / "python", "-m", module] if module else [programs / "dinotwins"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [*start, *arguments], cwd=own, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_shipped_config_by_its_name_is_trained_evaluated_prepared_and_exported(installed):
    _, own = installed
    out = call(installed, "train", "--config=hybrid:demo", "--workdir=runs/a", *FLAGS)
    assert "step 2/2" in out and (own / "runs" / "a" / "report.html").is_file()
    assert "scores.json" in call(installed, "evaluate", "--workdir=runs/a", "--tasks=knn")
    assert "for timm" in call(installed, "export", "--workdir=runs/a", "--to=timm")
    out = call(installed, "prepare", "--config=hybrid:demo", *FLAGS, "--out=shards")
    assert "to train: python -m dinotwins_jax.main --config=hybrid:demo " in out


@pytest.mark.slow
def test_the_readmes_loss_runs_in_a_directory_of_its_own(installed):
    _, own = installed
    text = "\n".join(page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for name in ("mine.py", "mine_config.py"):
        (code,) = re.findall(rf"```python\n(# {name}\n.*?)```", text, re.S)
        (own / name).write_text(code)
    smaller = [flag for flag in FLAGS if "loss." not in flag]
    out = call(installed, "train", "--config=mine_config.py", "--workdir=runs/mine", *smaller)
    assert "mine " in out and (own / "runs" / "mine" / "scores.json").is_file()


@pytest.mark.slow
def test_a_config_by_its_absolute_path(installed):
    config = f"--config={ROOT / 'configs' / 'hybrid.py'}"
    out = call(installed, config, *FLAGS, "--dry_run", module="dinotwins_jax.main")
    assert "temporaries" in out


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_lists_what_a_user_needs(command):
    done = subprocess.run(
        [sys.executable, "-m", "dinotwins_jax", command, "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"usage: dinotwins {command} [flags]" in done.stdout
    flags = re.findall(r"^  --(\w+)", done.stdout, re.M)
    of_features = command in ("probe", "search", "duplicates", "clusters")
    assert ("config" in flags) != of_features and {"out", "workdir"} & set(flags)
    assert all(re.findall(r"^      \S.*$", done.stdout, re.M))
    assert ("dinov2" in done.stdout) != of_features


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trane"], "unknown command 'trane': choose train, evaluate, prepare, export"),
        (["train"], "no config given: --config=hybrid:demo"),
        (["train", "--config=hybird:coco"], "did you mean --config=hybrid:coco?"),
        (["train", "--config=/nowhere/x.py"], "no such config file: /nowhere/x.py; give a path"),
        (["train", "--config", "hybrid:dmo"], "unknown preset 'dmo'"),
        (["train", "--config=hybrid", "more"], "unknown argument 'more'"),
        (["train", "--config.optim.lrr=1", "--config", "hybrid"], "did you mean 'lr'?"),
        (["train", "--workdirr=x", "--config=hybrid"], "workdirr"),
        (["export", "--workdir=x"], "--workdir and --to are required"),
        (["export", "--workdir=x", "--to=keras"], "timm"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, monkeypatch, capsys):
    from dinotwins_jax import __main__

    monkeypatch.setattr(sys, "argv", ["dinotwins", *arguments])
    monkeypatch.setattr(__main__, "restart_with_huge_pages", lambda: None)
    assert __main__.run() == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_two_commands_run_in_one_process(capsys):
    from dinotwins_jax import evaluate, export, prepare

    for module in (evaluate, export, prepare, evaluate):
        assert module.run(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: ") == 4
