"""A comparison of methods: its runs, its tables and its pictures."""

import json
from pathlib import Path

from dinotwins_jax.failures import failing_alone
from dinotwins_jax.files import replace_text
from experiments.comparison.learning import draw_learning
from experiments.comparison.outcome import (
    collect,
    failure_lines,
    failures,
    score_table,
    significance,
    significance_table,
)
from experiments.comparison.pictures import draw_attention, draw_curves
from experiments.comparison.plan import (
    check_equal_steps,
    equal_flops,
    make_configs,
)
from experiments.comparison.running import Planned, costs_of, step_costs, train_missing

PICTURES = ("curves.png", "learning.png", "attention.png")


def compare(
    preset: str, seeds: int, methods, budget: str, out: Path, overrides: dict
) -> tuple[str, dict[str, dict[str, str]]]:
    """Trains and evaluates the unfinished runs.

    Returns:
      the tables as Markdown, and {run or picture: {task: why it failed}}.
    """
    first = make_configs(preset, methods, 0, overrides)
    found = step_costs(out, first)
    steps, flops = ({m: of[i] for m, of in found.items()} for i in (0, 1))
    if budget == "flops":
        steps = equal_flops(steps, flops)
    else:
        check_equal_steps(steps, {method: config.batch_size for method, config in first.items()})
    plan = []
    for seed in range(seeds):
        configs = make_configs(preset, methods, seed, overrides)
        if budget == "flops":
            for method, config in configs.items():
                config.total_steps = steps[method]
        plan.append(
            {
                method: Planned(
                    f"{method}, seed {seed}",
                    config,
                    out / f"{method}-seed{seed}",
                    steps[method],
                    steps[method] * flops[method],
                )
                for method, config in configs.items()
            }
        )
    train_missing(plan, out / "features", equal_starts=True)
    workdirs = {method: [of_seed[method].workdir for of_seed in plan] for method in first}
    costs = {run.workdir.name: costs_of(run) for of_seed in plan for run in of_seed.values()}
    return _report(out, workdirs, first, costs, budget)


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
    text += "".join(f"\n{line}\n" for line in failure_lines(failed))
    replace_text(out / "table.md", text)
    draw_curves(out / "curves.png", workdirs)
    batches = {method: config.batch_size for method, config in configs.items()}
    draw_learning(out / "learning.png", workdirs, batches)
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
