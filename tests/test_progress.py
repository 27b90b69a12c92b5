"""Progress display: in a pseudo-terminal, and as lines in a file."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from dinotwins_jax.logs.progress import Progress, sparkline
from dinotwins_jax.logs.tasks import TaskProgress

ROOT = Path(__file__).parent.parent
MEANS = {
    "loss": 1.5,
    "dino/loss": 1.25,
    "dino/kl": 0.125,
    "images_per_s": 123.4,
    "data_wait": 0.034,
    "lr": 0.1,
}
RUN = f"""
import time, warnings
from dinotwins_jax.logs.progress import Progress
from dinotwins_jax.stopping import Stopped, StopSignals
try:
    with StopSignals() as stop, Progress(total=40, done=0) as progress:
        for step in range(1, 41):
            progress.advance(step)
            if step % 10 == 0:
                progress.show(step, {MEANS} | {{"loss": 8.0 / step}})
                print(f"printed at {{step}}")
                progress.print("WARNING said [not] wrapped")
            if step == 20:
                warnings.warn("warned")
            if step == WAIT:
                print("waiting")
                for _ in range(300):
                    time.sleep(0 if stop.requested(step) else 0.1)
            if stop.requested(step):
                raise Stopped(stop.requested(step))
except Stopped as signal:
    print("stopped by", signal)
print("after")
"""


TASKS = """
import time
from dinotwins_jax.logs.tasks import TaskProgress
with TaskProgress(["linear", "knn", "a task with a name of its own"]) as progress:
    for name in ("linear", "knn", "a task with a name of its own"):
        with progress.task(name):
            for part in progress.parts(["teacher", "random weights"]):
                for done in range(0, 100001, 20000):
                    progress.images(done, 100000)
                    time.sleep(0.12)
            print("printed in", name)
print("after", sorted(progress.seconds))
"""


def in_terminal(wait_at=0, send=None, run=RUN, columns=100, **environment):
    """What the code wrote to a terminal, and its exit code; `send` is a signal at `wait_at`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    run = subprocess.Popen(
        [sys.executable, "-c", run.replace("WAIT", str(wait_at))],
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm-256color", "PYTHONUTF8": "1"} | environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(ours, 65536)
        except OSError:  # Linux: nobody has the other end open any more
            break
        if send and b"waiting" in output:
            run.send_signal(send)
            send = None
    os.close(ours)
    return output.decode(), run.wait(timeout=60)


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def cursor(text):
    """Whether the cursor was left visible."""
    return re.findall(r"\x1b\[\?25([hl])", text)[-1] == "h"


def test_a_terminal_has_a_live_view_and_everything_that_is_printed():
    output, code = in_terminal()
    assert code == 0 and cursor(output)
    text = plain(output)
    for step in (10, 20, 30, 40):
        assert text.count(f"printed at {step}") == 1
    assert text.count("WARNING said [not] wrapped") == 4
    assert text.count("UserWarning: warned") == 1
    assert "compiling the first step" in text
    last = text[text.rindex("step 40/40") :]
    assert "100%" in last and "left 0:00:00" in last and "123 img/s  data wait 3%" in last
    assert re.search(r"loss +0\.2 +█▃▂▁", last) and re.search(r"dino/kl +0\.125 +▁▁▁▁", last)
    assert not re.search(r"\blr\b", last)
    assert last.rstrip().endswith("after")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_sane_terminal(number):
    output, code = in_terminal(wait_at=20, send=number)
    assert code == 0 and cursor(output)
    assert plain(output).rstrip().endswith(f"stopped by {number.name}\r\nafter")


def test_a_killed_run_leaves_the_cursor():
    output, code = in_terminal(wait_at=20, send=signal.SIGKILL)
    assert code == -signal.SIGKILL and cursor(output)


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"JPY_PARENT_PID": "7"}])
def test_terminals_that_only_grow_get_plain_lines(environment):
    output, code = in_terminal(**environment)
    assert code == 0 and "\x1b" not in output
    assert len(re.findall(r"^step \d+/40  loss 0\.\d+  dino 1\.250  img/s 123", output, re.M)) == 4


def test_progress_without_a_terminal_is_plain_lines(capsys):
    with Progress(total=10, done=0) as progress:
        progress.show(5, MEANS)
    line = capsys.readouterr().out
    assert line.startswith(
        "step 5/10  loss 1.500  dino 1.250  img/s 123  data wait 3%  left 0:00:0"
    )


def test_the_time_left_knows_nothing_of_the_compilation(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with Progress(total=1000, done=900) as progress:
        for step in range(901, 911):
            now += 60.0 if step == 901 else 2.0
            progress.advance(step)
        progress.show(910, MEANS)
    assert capsys.readouterr().out.endswith("left 0:03:00\n")


def test_tasks_in_a_terminal_have_a_live_line_and_a_line_each():
    output, code = in_terminal(run=TASKS, columns=80)
    assert code == 0 and cursor(output)
    text = plain(output)
    assert "evaluation: linear, knn, a task with a name of its own" in text
    assert re.search(r"1/3 linear, teacher +\S+ [2468]0,000/100,000 img 0:00:0\d", text)
    assert "2/3 knn, random weights" in text
    for name in ("linear", "knn"):
        assert text.count(f"printed in {name}") == 1
        assert len(re.findall(rf"[\r\n]  {name} +\d+\.\d s\r", text)) == 1
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= 80
    assert text.rstrip().endswith("after ['a task with a name of its own', 'knn', 'linear']")


def test_tasks_in_a_pipe_are_a_line_each(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with TaskProgress(["linear", "knn"]) as progress:
        with progress.task("linear") as say:
            for _ in progress.parts(["teacher", "raw pixels"]):
                for done in range(0, 50, 10):
                    now += 9.0
                    progress.images(done, 40)
                now += 0.25
            say("sgd 10% 82.7 ± 0.9")
        with pytest.raises(ValueError), progress.task("knn"):
            now += 2.0
            raise ValueError
    assert capsys.readouterr().out.splitlines() == [
        "evaluation: linear, knn",
        "  linear, teacher: 30 of 40 images",  # after 36 s; no line in the first 30 s
        "  linear, raw pixels: 20 of 40 images",
        "  linear            90.5 s   sgd 10% 82.7 ± 0.9",
        "  knn                2.0 s",
    ]
    assert progress.seconds == {"linear": 90.5, "knn": 2.0}
    with TaskProgress([]):
        pass
    assert capsys.readouterr().out == ""


def test_a_sparkline_spans_lowest_to_highest():
    assert sparkline([0.0, 7.0, 3.0, float("nan"), 1.0]) == "▁█▄ ▂"
    assert sparkline([2.0, 2.0]) == "▁▁" and sparkline([float("inf")]) == " "
