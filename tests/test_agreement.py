"""Failures of one of several processes: all of them take the same path, and the evaluation goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinotwins_jax.devices.agreement import agree
from experiments.invariance import free_port

ROOT = Path(__file__).parent.parent
# Parts of an evaluation. Each line of `blocks` names a part and what it does in this process.
RUN = """
import json, sys
import numpy as np
from dinotwins_jax.devices.processes import join
me = int(sys.argv[1])
join("on", sys.argv[2], 2, me)
from dinotwins_jax.data.base import BadImage
from dinotwins_jax.evals.view import View
from dinotwins_jax.failures import failing_alone

class Greys:
    labels, class_names = None, ()
    def __init__(self, unreadable=()):
        self.unreadable = unreadable
    def __len__(self):
        return 6
    def __getitem__(self, i):
        if i in self.unreadable:
            raise BadImage(f"image {i}", "cut off")
        return np.full((8, 8, 3), i, np.uint8)
    def name(self, i):
        return f"image {i}"

view, failed, rows = View(8, 8, 8, 2), {}, []

def read(source=Greys()):
    rows.append(view.map(lambda x: np.asarray(x).mean((1, 2, 3)), source)[1].tolist())

def alone(process, then):
    if me == process:
        raise OSError("no room")
    then()

parts = {
    "share": lambda: read(Greys((4, 5))),  # the second half of the images is of process 1
    "before": lambda: alone(0, read),  # the other one waits in an exchange of data
    "after": lambda: alone(1, lambda: None),  # the other one has ended the part
    "both": lambda: agree_all(),
    "none": read,
}

def agree_all():
    raise ValueError("the same")

for name, part in parts.items():
    with failing_alone(name, name, failed):
        part()
print(json.dumps({"failed": failed, "rows": rows}))
"""


def test_one_process_raises_its_own_error():
    agree(None)
    error = OSError("here")
    with pytest.raises(OSError) as raised:
        agree(error)
    assert raised.value is error


@pytest.mark.slow
def test_what_fails_in_one_process_fails_in_all_and_the_rest_goes_on():
    address = f"127.0.0.1:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(index), address],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    output = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], output[0][1] + output[1][1]
    ours, theirs = (json.loads(out.splitlines()[-1]) for out, _ in output)
    assert ours == theirs
    reasons = ours["failed"]
    assert reasons.keys() == {"share", "before", "after", "both"}
    assert reasons["share"].startswith("process 1: ") and "image 4: cut off" in reasons["share"]
    assert reasons["before"] == "process 0: no room" and reasons["after"] == "process 1: no room"
    assert reasons["both"] == "the same"
    assert ours["rows"] == [[0, 1, 2, 3, 4, 5]]
    assert "after failed: process 1: no room" in output[0][1]
    assert " failed: " not in output[1][1]
