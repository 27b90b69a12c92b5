"""Contestants of a benchmark: separate processes, which share no threads, memory or imports.

A request is a line of JSON on stdin, the answer a line of JSON on stdout; all other output goes to
stderr. Idle contestants sleep.
"""

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Contestant:
    """Parent side of a process that serves requests."""

    def __init__(self, module: str, settings: dict, python: str = sys.executable, **environment):
        self.name = module
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent.parent,
            env=os.environ | environment,
        )
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, request: str, **arguments) -> dict:
        """Sends a request and returns the answer. Raises RuntimeError if the process has ended."""
        self._process.stdin.write(json.dumps([request, arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self._process.wait()}: see above")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def serve(prepare: Callable[[dict], tuple[dict, dict[str, Callable]]]) -> None:
    """Child side: prepare(settings) -> (facts, {request: function of its arguments -> dict})."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries

    def answer(values: dict) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    facts, requests = prepare(json.loads(sys.argv[1]))
    answer(facts)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        answer(requests[name](**arguments))


def random_crops(settings: dict) -> dict[str, np.ndarray]:
    """Normalised noise f32[B, V, H, W, 3]: the step's time does not depend on the images."""
    rng = np.random.default_rng(0)
    B, g, s = (settings[name] for name in ("batch_size", "global_size", "local_size"))
    shapes = {"global_crops": (B, 2, g, g, 3), "local_crops": (B, settings["num_local"], s, s, 3)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def resident_peak() -> int:
    """Largest resident bytes of this process since `forget_peak`; 0 if unknown on this system."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def forget_peak() -> None:
    """Resets `resident_peak` after returning free memory to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
