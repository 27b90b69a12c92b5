"""Wall time of a run by phase, from the command's start: cold, and with a warm compilation cache.

    python -m experiments.benchmark.end_to_end      # the demo, twice: ten minutes on 2 CPU cores
    python -m experiments.benchmark.end_to_end -- --config.total_steps=100 --config.evals.tasks="('knn',)"

Arguments after -- go to the command, python -m dinotwins_jax.main.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from dinotwins_jax.evals.table import markdown
from dinotwins_jax.files import replace_text
from experiments.benchmark.train_step import environment

ROOT = Path(__file__).parent.parent.parent


def measure(config: str, arguments: list[str]) -> dict[str, dict[str, float]]:
    """{"cold" | "warm": seconds of each phase, with "wall" of the whole process}."""
    found = {}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    with tempfile.TemporaryDirectory() as folder:
        for start in ("cold", "warm"):
            workdir = Path(folder) / start  # the compilation cache is beside it
            command = [sys.executable, "-m", "dinotwins_jax.main", f"--config={config}"]
            began = time.perf_counter()
            done = subprocess.run(
                [*command, f"--workdir={workdir}", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(
                    f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
                )
            wall = time.perf_counter() - began
            found[start] = json.loads((workdir / "timing.json").read_text()) | {"wall": wall}
    return found


def until_first_step(phases: dict[str, float]) -> float:
    """Seconds from the command's start to the end of its first step."""
    before = ("import", "build", "initial state", "first step")
    return phases["wall"] - phases["total"] + sum(phases[name] for name in before)


def table(found: dict[str, dict[str, float]]) -> str:
    """Formats a table with one line per phase."""
    names = [name for name in found["cold"] if name not in ("total", "wall")]
    rows = [["seconds", *found]]
    rows += [[name, *(f"{of[name]:.1f}" for of in found.values())] for name in names]
    claimed = {start: sum(of[name] for name in names) for start, of in found.items()}
    rows.append(["other", *(f"{of['wall'] - claimed[start]:.1f}" for start, of in found.items())])
    rows.append(["all", *(f"{of['wall']:.1f}" for of in found.values())])
    rows.append(["start to first step", *(f"{until_first_step(of):.1f}" for of in found.values())])
    return markdown(rows)


def define_flags() -> None:
    """Defines the command's flags; other commands have flags of the same names."""
    flags.DEFINE_string(
        "run_config", "configs/hybrid.py", "Config file, with presets after a colon"
    )
    flags.DEFINE_string("json", None, "File for all figures")


def main(argv) -> None:
    found = measure(flags.FLAGS.run_config, argv[1:])
    print(f"{table(found)}\n{', '.join(environment().values())}")
    if flags.FLAGS.json:
        figures = {"environment": environment(), "seconds": found}
        replace_text(Path(flags.FLAGS.json), json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    app.run(main)
