"""What a command writes into a pipe: line by line, with its own warnings and no library's."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = """
import os, sys
from absl import logging
from dinotwins_jax.cli import command

def log(path, level):
    exec(compile(f"logging.{level}('{level} of {path}')", path, "exec"), {"logging": logging})

def work(values):
    print("first")
    sys.stdin.readline()
    log("/site-packages/orbax/checkpoint/manager.py", "warning")
    log("/site-packages/orbax/checkpoint/manager.py", "error")
    log("/here/dinotwins_jax/data/pipeline.py", "warning")
    print(os.environ["TF_CPP_MIN_LOG_LEVEL"])
    return 0

sys.exit(command("name", "what it does", lambda values: None, work, [], config_required=False))
"""


def started(**environment):
    kept = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=ROOT, text=True, env=kept | environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_pipe_gets_each_line_at_once():
    run = started()
    assert run.stdout.readline() == "first\n"  # while it waits for a line on its stdin
    assert run.poll() is None
    run.communicate("go on\n", timeout=60)
    assert run.returncode == 0


def test_warnings_are_the_programs_own():
    out, err = started().communicate("go on\n", timeout=60)
    assert out.splitlines() == ["first", "3"]
    messages = [line.partition("] ")[2] for line in err.splitlines()]
    assert messages == ["warning of /here/dinotwins_jax/data/pipeline.py"]


def test_errors_of_orbax_which_are_raised_too_can_be_asked_for():
    _, err = started(DINOTWINS_DEBUG="1").communicate("go on\n", timeout=60)
    assert "error of /site-packages/orbax/checkpoint/manager.py" in err
    assert "warning of /site-packages" not in err


def test_xlas_messages_can_be_asked_for():
    out, _ = started(TF_CPP_MIN_LOG_LEVEL="0").communicate("go on\n", timeout=60)
    assert out.splitlines()[-1] == "0"
