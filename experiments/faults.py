"""Fault test: kills a run repeatedly and checks that its final state is that of an unbroken run.

    python -m experiments.faults --out=runs/faults --kills=30 --terms=10 [--config.key=value …]

Trains the demo once without interruption, then again under SIGKILL and SIGTERM at random moments: while
it starts, between checkpoints, and while a checkpoint is being written. After each signal the same command
is restarted. Prints one table; exits with 1 unless all arrays of both final states are equal bit for bit.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from dinotwins_jax.build import build, for_evaluation
from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.cli import exit_code
from dinotwins_jax.damage import paths
from dinotwins_jax.evals.table import markdown

DEMO = (
    "--config.checkpoint.every_epochs=0.25",
    "--config.log.every_steps=10",
    "--config.evals.tasks=()",
)
MOMENTS = ("while it starts", "while it trains", "while it saves")
WAIT_S = 300.0  # longest wait for a moment


class Fault(NamedTuple):
    """A signal, its intended moment, the process' return code and its last checkpoint."""

    name: str
    moment: str
    returned: int
    unfinished: int  # half-written checkpoints
    step: int


def break_run(
    command: list[str], workdir: Path, signals: list[int], seed: int, spell_s: float = 4.0
) -> list[Fault]:
    """Starts `command` once per signal, sent at a random moment, then once to the end.

    Args:
      command: trains in `workdir`; workdir: must not exist yet.
      spell_s: longest time of training between two signals, in seconds.
    Raises:
      ChildProcessError: a start ended by itself before its signal, or the last one failed.
    """
    rng, faults, start_s = random.Random(seed), [], 5.0
    for number in signals:
        moment = rng.choice(MOMENTS)
        before = _progress(workdir)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        began = time.perf_counter()
        if moment == MOMENTS[0]:
            time.sleep(rng.uniform(0.0, start_s))
        else:
            _wait(process, lambda before=before: _progress(workdir) != before)
            start_s = time.perf_counter() - began
            if moment == MOMENTS[1]:
                time.sleep(rng.uniform(0.0, spell_s))
            else:
                old = set(_unfinished(workdir))
                _wait(process, lambda old=old: set(_unfinished(workdir)) - old)
                time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(number)
        error = process.communicate()[1].decode()
        if process.returncode in (0, 1, 2, 3):
            raise ChildProcessError(f"ended by itself with {process.returncode}: {error[-500:]}")
        left, steps = len(_unfinished(workdir)), _steps(workdir)
        name = signal.Signals(number).name
        faults.append(Fault(name, moment, process.returncode, left, max(steps, default=0)))
    last = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if last.returncode:
        raise ChildProcessError(
            f"the last start ended with {last.returncode}: {last.stderr[-500:]}"
        )
    return faults


def _wait(process: subprocess.Popen, come) -> None:
    end = time.perf_counter() + WAIT_S
    while not come():
        if process.poll() is not None or time.perf_counter() > end:
            return
        time.sleep(0.005)


def _progress(workdir: Path) -> int:
    log = workdir / "metrics.jsonl"
    return log.stat().st_mtime_ns if log.exists() else 0


def _steps(workdir: Path) -> list[int]:
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def _unfinished(workdir: Path) -> list[str]:
    return [p.name for p in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")]


def final_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """{path: array} of the state in the last checkpoint of a run."""
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    run = build(for_evaluation(config))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        like = run.placement.abstract(jax.eval_shape(run.fresh_state))
        state, _ = checkpoints.restore(like, checkpoints.latest())
    return {path: np.asarray(array) for path, array in paths(jax.device_get(state))}


def table(faults: list[Fault]) -> str:
    """Table of counts by signal and moment."""
    rows = [["signal", "moment", "times", "half-written checkpoints", "exit codes"]]
    for name, moment in dict.fromkeys((f.name, f.moment) for f in sorted(faults)):
        of = [f for f in faults if (f.name, f.moment) == (name, moment)]
        codes = ", ".join(map(str, sorted({f.returned for f in of})))
        rows.append([name, moment, str(len(of)), str(sum(f.unfinished > 0 for f in of)), codes])
    return markdown(rows)


def define_flags() -> None:
    """Defines the command's flags; other commands have flags of the same names."""
    flags.DEFINE_string("out", "runs/faults", "Directory; existing contents are removed")
    flags.DEFINE_integer("kills", 30, "SIGKILLs", lower_bound=0)
    flags.DEFINE_integer("terms", 10, "SIGTERMs", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Seed of the moments")
    flags.DEFINE_string(
        "train_config", "configs/hybrid.py:demo", "Config, as for dinotwins_jax.main"
    )


def main(argv) -> int:
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    overrides = [*DEMO, *argv[1:]]
    out = Path(given.out)
    shutil.rmtree(out, ignore_errors=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((out / "compiled").absolute()))

    def command(workdir: Path) -> list[str]:
        main = [sys.executable, "-m", "dinotwins_jax.main", f"--config={given.train_config}"]
        return [*main, f"--workdir={workdir}", *overrides]

    def work():
        start = time.perf_counter()
        subprocess.run(command(out / "unbroken"), check=True, stdout=subprocess.DEVNULL)
        unbroken = time.perf_counter() - start
        signals = [signal.SIGKILL] * given.kills + [signal.SIGTERM] * given.terms
        random.Random(given.seed).shuffle(signals)
        faults = break_run(command(out / "broken"), out / "broken", signals, given.seed)
        print(table(faults))
        print(f"{unbroken:.0f} s unbroken, {time.perf_counter() - start - unbroken:.0f} s broken")
        ours, theirs = final_arrays(out / "broken"), final_arrays(out / "unbroken")
        differ = [path for path in theirs if not np.array_equal(ours[path], theirs[path])]
        if differ:
            raise ValueError(f"{len(differ)} of {len(theirs)} arrays differ, such as {differ[0]}")
        print(f"all {len(theirs)} arrays of the final states are equal, bit for bit")

    return exit_code(work)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; returns the program's name and the --config.… arguments to pass on."""
    ours = [argument for argument in argv if not argument.startswith("--config.")]
    return flags.FLAGS(ours) + [argument for argument in argv if argument not in ours]


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=_parse)
