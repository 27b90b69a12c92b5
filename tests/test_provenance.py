"""Where results come from."""

import datetime
import shlex
import subprocess
import sys

import jax
import numpy as np

import dinotwins_jax
from dinotwins_jax.provenance import commit, described, provenance


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, "-C", folder, *arguments], check=True, capture_output=True)


def test_command_date_versions_and_devices():
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    found = provenance()
    assert shlex.split(found["command"]) == ["python", *sys.orig_argv[1:]]
    date = datetime.datetime.fromisoformat(found["date"])
    assert before <= date <= datetime.datetime.now(datetime.UTC)
    assert date.utcoffset() == datetime.timedelta(0)
    assert found["versions"] == {
        "dinotwins_jax": dinotwins_jax.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    assert found["devices"]["count"] == len(jax.devices())
    lines = " ".join(described(found))
    assert found["date"] in lines and f"jax {jax.__version__}" in lines and "8 x cpu" in lines


def test_a_command_can_be_pasted(monkeypatch):
    arguments = ["-m", "m", "--a=('knn', 'pca')", "--dir=a b", "$HOME's", 'say "x"', "it's"]
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", *arguments])
    command = provenance()["command"]
    assert command.startswith("""python -m m "--a=('knn', 'pca')" '--dir=a b' """)
    assert shlex.split(command) == ["python", *arguments]
    echoed = subprocess.run(
        ["bash", "-c", f"python() {{ printf '%s\\n' \"$@\"; }}; {command}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert echoed.stdout.splitlines() == arguments


def test_the_commit_of_a_checkout_and_of_no_other(tmp_path):
    """A package installed inside another project's checkout has no commit."""
    assert commit(tmp_path) is None
    git(tmp_path, "init")
    assert commit(tmp_path) is None  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-m", "first")
    head = commit(tmp_path)
    assert len(head) == 40 and int(head, 16)
    (tmp_path / "b.py").write_text("not tracked")
    assert commit(tmp_path) == head
    (tmp_path / "a.py").write_text("2")
    assert commit(tmp_path) == f"{head}+changes"
    (tmp_path / "inside").mkdir()
    assert commit(tmp_path / "inside") is None


def test_no_git_is_no_commit(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) is None
