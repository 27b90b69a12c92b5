"""Training of the runs of an experiment that are not finished, one after the other."""

import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from dinotwins_jax.build import build
from dinotwins_jax.files import replace_text
from dinotwins_jax.stopping import EvaluationFailed
from dinotwins_jax.train import train
from experiments.comparison.outcome import read_log
from experiments.comparison.plan import check_equal_starts, flops_per_step, is_finished


class Planned(NamedTuple):
    """A run of an experiment."""

    title: str  # for people, such as "dino, seed 0"
    config: ConfigDict
    workdir: Path
    steps: int
    flops: float  # of all its steps


def step_costs(out: Path, configs: dict[str, ConfigDict]) -> dict[str, tuple[int, float]]:
    """{name: (steps of the run as configured, FLOPs of a step)}; computed once, kept in OUT/flops.json."""
    path, kept = out / "flops.json", {}
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_text())
    found = {}
    for name, config in configs.items():
        key = hashlib.sha256(config.to_json_best_effort(sort_keys=True).encode()).hexdigest()[:24]
        if key not in kept:
            kept[key] = [build(config).total_steps, flops_per_step(config)]
            out.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(kept) + "\n")
        found[name] = (int(kept[key][0]), float(kept[key][1]))
    return found


def train_missing(plan: list[dict[str, Planned]], cache: Path, *, equal_starts: bool) -> None:
    """Trains and evaluates the runs that are not finished, group by group.

    Args:
      plan: groups of runs by name; runs of a group share data, order and, with equal_starts, the initial
        weights of the backbone, which is checked.
      cache: of evaluation, see `evaluation.evaluate`.
    """
    everything = [run for group in plan for run in group.values()]
    missing = [run for run in everything if not _is_finished(run)]
    for group in plan if equal_starts else ():
        if any(run in missing for run in group.values()):
            check_equal_starts({name: run.config for name, run in group.items()})
    for number, run in enumerate(missing):
        place = f"run {len(everything) - len(missing) + number + 1} of {len(everything)}"
        left = time_left([r for r in everything if r not in missing[number:]], missing[number:])
        print(f"\n{run.title}: {run.steps} steps, in {run.workdir} ({place}{left})", flush=True)
        start = time.perf_counter()
        try:
            train(run.config, run.workdir, cache=cache)
        except EvaluationFailed as error:  # reported with all others in the end
            print(f"{run.workdir.name}: {error}", file=sys.stderr, flush=True)
        finally:
            if run.workdir.is_dir():
                _add_seconds(run.workdir, time.perf_counter() - start)


def _is_finished(run: Planned) -> bool:
    return is_finished(run.workdir, run.config, run.steps)


def time_left(finished: list[Planned], missing: list[Planned]) -> str:
    """ ", 41 minutes left at the rate of the finished runs"; "" where none says so."""
    known = [(seconds_of(run.workdir), run.flops) for run in finished]
    known = [(seconds, flops) for seconds, flops in known if seconds is not None and flops]
    if not known:
        return ""
    rate = sum(seconds for seconds, _ in known) / sum(flops for _, flops in known)
    left = sum(run.flops * rate - (seconds_of(run.workdir) or 0.0) for run in missing)
    return f", {max(left, 0.0) / 60:.0f} minutes left at the rate of the finished runs"


def seconds_of(workdir: Path) -> float | None:
    """Wall time of all starts of a run that were not killed; None if unknown."""
    path = workdir / "seconds.txt"
    return float(path.read_text()) if path.exists() else None


def _add_seconds(workdir: Path, seconds: float) -> None:
    replace_text(workdir / "seconds.txt", f"{(seconds_of(workdir) or 0.0) + seconds:.1f}\n")


def costs_of(run: Planned) -> dict:
    """What a finished run cost, and its last loss."""
    return {
        "steps": run.steps,
        "images": run.steps * run.config.batch_size,
        "flops": run.flops,
        "seconds": seconds_of(run.workdir),
        "loss": read_log(run.workdir)[-1]["loss"],  # each method's own: not comparable
    }
