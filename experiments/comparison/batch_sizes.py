"""DINO, Barlow Twins and the hybrid at several batch sizes, with equal images.

The learning rate follows the batch by config.optim.lr_scaling. The teacher's momentum is raised to the
power of the batch over the preset's, so that it looks as many images back (the EMA scaling rule of
arXiv:2307.13813).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dinotwins_jax.evals.table import cell, markdown
from dinotwins_jax.files import replace_text
from experiments.comparison.lines import Panel, draw_lines
from experiments.comparison.outcome import collect
from experiments.comparison.plan import make_configs
from experiments.comparison.running import Planned, costs_of, step_costs, train_missing
from experiments.comparison.statistics import mean_std, paired

FRACTION = 0.1  # of the labels
OURS = "hybrid"


def configs_of_batch(
    preset: str, methods: Sequence[str], batch: int, seed: int, overrides: dict
) -> dict[str, ConfigDict]:
    """{method: config} of one batch size and seed."""
    configs = make_configs(preset, methods, seed, overrides)
    for config in configs.values():
        teacher, ratio = config.teacher, batch / config.batch_size
        teacher.momentum, teacher.final_momentum = (
            teacher.momentum**ratio,
            teacher.final_momentum**ratio,
        )
        config.batch_size = batch
        if "total_steps" in overrides.get("config", {}):
            config.total_steps = max(1, round(config.total_steps / ratio))
        config.evals.tasks, config.evals.label_fractions = ("linear", "knn"), (FRACTION,)
        config.evals.monitor_every_epochs, config.evals.pictures = 0.0, 0
    return configs


def batch_sizes(
    preset: str, methods: Sequence[str], batches: Sequence[int], seeds: int, out: Path, overrides
) -> str:
    """Trains the unfinished runs; writes OUT/batch_sizes.json, .md and .png, returns the table."""
    plan: list[dict[str, Planned]] = []
    of_batch: dict[int, dict] = {}
    for seed in range(seeds):
        for batch in batches:
            configs = configs_of_batch(preset, methods, batch, seed, overrides)
            if not seed:
                of_batch[batch] = step_costs(out, configs)
            group = {}
            for method, config in configs.items():
                steps, flops = of_batch[batch][method]
                row = f"{method}-batch{batch}"
                workdir, title = out / f"{row}-seed{seed}", f"{method}, batch {batch}, seed {seed}"
                group[row] = Planned(title, config, workdir, steps, steps * flops)
            plan.append(group)
    train_missing(plan, out / "features", equal_starts=True)
    runs: dict[str, list[Planned]] = {}
    for group in plan:
        for row, run in group.items():
            runs.setdefault(row, []).append(run)
    table = collect({row: [run.workdir for run in of] for row, of in runs.items()})
    costs = {run.workdir.name: costs_of(run) for of in runs.values() for run in of}
    return report(out, table, costs, list(methods), list(batches))


def report(out: Path, table: dict, costs: dict, methods: list[str], batches: list[int]) -> str:
    """Writes the results of {"<method>-batch<B>": {column: one value a seed}}; returns the Markdown."""
    titles = list(table[f"{methods[0]}-batch{batches[0]}"])
    columns = [t for t in titles if t.startswith("k-NN")] + [
        t for t in titles if t.startswith(("ridge", "logistic", "sgd"))
    ]
    low, high = min(batches), max(batches)
    parts, tests = [], {}
    for column in columns:
        values = {
            method: [table[f"{method}-batch{batch}"][column] for batch in batches]
            for method in methods
        }
        lost = {
            method: (
                np.array(of[batches.index(high)], float) - np.array(of[batches.index(low)], float)
            ).tolist()
            for method, of in values.items()
        }
        lines = [["", *(f"batch {batch}" for batch in batches), f"lost from {high} to {low}"]]
        for method, of in values.items():
            cells = [cell(mean_std(seeds)) for seeds in of]
            lines.append([method, *cells, cell(mean_std(lost[method]))])
        parts.append(f"{column}, in %:\n\n{markdown(lines)}")
        if OURS in methods and len(lost[OURS]) > 1:
            tests[column] = {
                other: paired(lost[OURS], lost[other]) for other in methods if other != OURS
            }
            parts += [
                f"{OURS} loses {test['difference']:+.1f} points against {other} "
                f"[{test['low']:+.1f}, {test['high']:+.1f}], p = {test['p']:.2g}"
                for other, test in tests[column].items()
            ]
    text = "\n\n".join(parts) + "\n"
    replace_text(out / "batch_sizes.md", text)
    found = {"batches": batches, "scores": table, "lost": tests, "runs": costs}
    replace_text(out / "batch_sizes.json", json.dumps(found, indent=2) + "\n")
    ticks = [float(batch) for batch in batches], [str(batch) for batch in batches]
    panels = [
        Panel(
            f"{column}, in %",
            "images in a batch",
            {
                method: (
                    np.array(batches, float),
                    np.array([table[f"{method}-batch{b}"][column] for b in batches], float).T,
                )
                for method in methods
            },
            ticks=ticks,
        )
        for column in columns
    ]
    draw_lines(out / "batch_sizes.png", panels)
    return text
