"""Comparison of DINO, Barlow Twins and the hybrid under equal training and evaluation, with error bars.

    python -m experiments.compare --preset=demo --seeds=3
    python -m experiments.compare --preset=coco --seeds=3 --config.data.dir=/data/coco --out=runs/compare

Every run starts from the same backbone, sees the same images in the same order, and has the same
number of steps (--budget=steps) or of floating-point operations (--budget=flops). --config.key=value
is for all methods that have the key, --dino.key=value for one. The same command continues after an
interruption, and prints the tables again when all is done. Where a task of a run fails, the others go on,
the tables show what is missing, and the exit code is 4; the same command tries it again. Results are in
OUT/table.md, comparison.json, curves.png and attention.png, and for each run in
OUT/<method>-seed<k>/report.html.
"""

import json
import sys
import time
from pathlib import Path

from absl import flags, logging

from dinotwins_jax.build import build
from dinotwins_jax.cli import COMPILED, exit_code, fail
from dinotwins_jax.devices.compilation import remember_compilations
from dinotwins_jax.failures import failing_alone
from dinotwins_jax.files import replace_text
from dinotwins_jax.stopping import EvaluationFailed
from dinotwins_jax.train import train
from experiments.comparison.command import run_with_overrides
from experiments.comparison.outcome import (
    collect,
    failures,
    read_log,
    score_table,
    significance,
    significance_table,
)
from experiments.comparison.pictures import draw_attention, draw_curves
from experiments.comparison.plan import (
    METHODS,
    check_equal_starts,
    check_equal_steps,
    equal_flops,
    flops_per_step,
    is_finished,
    make_configs,
)

_PRESET = flags.DEFINE_string(
    "preset", "demo", "Preset, as after the colon of configs/hybrid.py:demo"
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 3, "Number of seeds; seed k is the config's seed", lower_bound=1
)
_METHODS = flags.DEFINE_list("methods", list(METHODS[:3]), "Files in configs/")
_BUDGET = flags.DEFINE_enum("budget", "steps", ["steps", "flops"], "What is equal between methods")
_OUT = flags.DEFINE_string(
    "out", None, "Directory; default runs/compare-<preset>, with the suffix -flops for equal FLOPs"
)


def compare(
    preset: str, seeds: int, methods, budget: str, out: Path, overrides: dict
) -> tuple[str, dict[str, dict[str, str]]]:
    """Trains and evaluates the unfinished runs.

    Returns:
      the tables as Markdown, and {run or picture: {task: why it failed}}.
    """
    first = make_configs(preset, methods, 0, overrides)
    steps, flops = _cost_of(out, first)
    if budget == "flops":
        steps = equal_flops(steps, flops)
    else:
        check_equal_steps(steps, {method: config.batch_size for method, config in first.items()})
    costs, workdirs = {}, {method: [] for method in first}
    for seed in range(seeds):
        configs = make_configs(preset, methods, seed, overrides)
        if budget == "flops":
            for method, config in configs.items():
                config.total_steps = steps[method]
        _train_missing(out, configs, steps, seed)
        for method, config in configs.items():
            workdir = out / f"{method}-seed{seed}"
            workdirs[method].append(workdir)
            costs[workdir.name] = {
                "steps": steps[method],
                "images": steps[method] * config.batch_size,
                "flops": steps[method] * flops[method],
                "seconds": _seconds(workdir),
                "loss": read_log(workdir)[-1]["loss"],  # each method's own: not comparable
            }
    return _report(out, workdirs, first, costs, budget)


def _train_missing(out: Path, configs: dict, steps: dict[str, int], seed: int) -> None:
    """Trains and evaluates the runs of one seed that are not finished."""
    missing = [
        method
        for method, config in configs.items()
        if not is_finished(out / f"{method}-seed{seed}", config, steps[method])
    ]
    if not missing:
        return
    check_equal_starts(configs)
    for method in missing:
        workdir = out / f"{method}-seed{seed}"
        print(f"\n{method}, seed {seed}: {steps[method]} steps, in {workdir}", flush=True)
        start = time.perf_counter()
        try:
            train(configs[method], workdir, cache=out / "features")
        except EvaluationFailed as error:  # reported with all others in the end
            print(f"{workdir.name}: {error}", file=sys.stderr, flush=True)
        _add_seconds(workdir, time.perf_counter() - start)


def _cost_of(out: Path, configs: dict) -> tuple[dict[str, int], dict[str, float]]:
    """Configured steps and FLOPs per step of each method; computed once, kept in OUT/flops.json."""
    path, text = out / "flops.json", {m: c.to_json_best_effort() for m, c in configs.items()}
    try:
        kept = json.loads(path.read_text())
        if kept["configs"] == text:
            return kept["steps"], kept["flops"]
    except (OSError, ValueError, KeyError):
        pass
    steps = {method: build(config).total_steps for method, config in configs.items()}
    flops = {method: flops_per_step(config) for method, config in configs.items()}
    out.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"configs": text, "steps": steps, "flops": flops}) + "\n")
    return steps, flops


def _seconds(workdir: Path) -> float | None:
    """Wall time of all completed starts of a run; None if unknown."""
    path = workdir / "seconds.txt"
    return float(path.read_text()) if path.exists() else None


def _add_seconds(workdir: Path, seconds: float) -> None:
    replace_text(workdir / "seconds.txt", f"{(_seconds(workdir) or 0.0) + seconds:.1f}\n")


def _report(
    out: Path, workdirs: dict, configs: dict, costs: dict, budget: str
) -> tuple[str, dict[str, dict[str, str]]]:
    """Writes the results to OUT; returns the tables and what failed."""
    table, failed = collect(workdirs), failures(workdirs)
    found = significance(table)
    seeds = len(next(iter(workdirs.values())))
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    equal = {"steps": "steps", "flops": "FLOPs of models and losses, crops not counted"}[budget]
    text = f"In %, {spread}; equal {equal}.\n\n{score_table(table)}\n"
    if found:
        text += f"\nPaired by seed, with 95% confidence:\n\n{significance_table(found)}\n"
    elif seeds == 1:
        text += "\nOne seed: no significance can be stated.\n"
    for run, reasons in failed.items():
        text += "".join(f"\n{run}: {task} failed: {why}\n" for task, why in reasons.items())
    replace_text(out / "table.md", text)
    draw_curves(out / "curves.png", workdirs)
    outcome = {"budget": budget, "scores": table, "significance": found, "runs": costs}
    pictures: dict[str, str] = {}
    with failing_alone("attention.png", "attention.png", pictures):
        first = {method: runs[0] for method, runs in workdirs.items()}
        outcome["attention.png"] = _draw_attention(out, first, configs)
    failed |= {out.name: pictures} if pictures else {}
    outcome["failed"] = failed
    replace_text(out / "comparison.json", json.dumps(outcome, indent=2) + "\n")
    return text, failed


def _draw_attention(out: Path, workdirs: dict, configs: dict) -> dict:
    """Draws OUT/attention.png unless it exists; returns what it shows."""
    shown = {}
    for method, workdir in workdirs.items():
        weights = json.loads((workdir / "scores.json").read_text())["weights"]
        evals = configs[method].evals
        shown[method] = [weights, evals.attention_size, evals.pictures]
    try:
        before = json.loads((out / "comparison.json").read_text()).get("attention.png")
    except (OSError, ValueError):
        before = None
    if before != shown or not (out / "attention.png").exists():
        draw_attention(out / "attention.png", workdirs, configs)
    return shown


def main(argv, overrides: dict) -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    logging.set_verbosity(logging.WARNING)
    suffix = "-flops" if _BUDGET.value == "flops" else ""
    out = Path(_OUT.value or f"runs/compare-{_PRESET.value}{suffix}")
    chosen = (_PRESET.value, _SEEDS.value, _METHODS.value, _BUDGET.value)

    def work():
        remember_compilations(out.parent / COMPILED)
        text, failed = compare(*chosen, out, overrides)
        print(text)
        print(
            f"in {out}: table.md, comparison.json, curves.png, attention.png; a report.html a run"
        )
        if failed:
            runs = ", ".join(f"{run} ({', '.join(reasons)})" for run, reasons in failed.items())
            raise EvaluationFailed(
                f"failed: {runs}; all else is written: comparison.json has the reasons under 'failed'"
            )

    return exit_code(work)


if __name__ == "__main__":
    run_with_overrides(main, METHODS)
