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

from dinotwins_jax.evals.table import markdown
from dinotwins_jax.files import replace_text
from experiments.comparison.lines import Panel, draw_lines
from experiments.comparison.outcome import (
    collect,
    columns_of,
    failure_lines,
    failures,
    spread_cell,
)
from experiments.comparison.plan import make_configs
from experiments.comparison.running import Planned, costs_of, step_costs, train_missing
from experiments.comparison.statistics import paired

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
) -> tuple[str, dict[str, dict[str, str]]]:
    """Trains the unfinished runs; writes OUT/batch_sizes.json, .md and .png.

    Returns:
      the tables as Markdown, and {run: {task: why it failed}}.
    """
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
    workdirs = {row: [run.workdir for run in of] for row, of in runs.items()}
    table, failed = collect(workdirs), failures(workdirs)
    costs = {run.workdir.name: costs_of(run) for of in runs.values() for run in of}
    return report(out, table, costs, list(methods), list(batches), seeds, failed), failed


def report(
    out: Path,
    table: dict,
    costs: dict,
    methods: list[str],
    batches: list[int],
    seeds: int,
    failed: dict[str, dict[str, str]],
) -> str:
    """Writes the results of {"<method>-batch<B>": {column: one value a seed, None: it failed}}; returns the
    Markdown. A difference is of the seeds that have both values; a point of the figure, of all seeds.
    """

    def of_seeds(method: str, batch: int, column: str) -> list[float | None]:
        return table.get(f"{method}-batch{batch}", {}).get(column, [None] * seeds)

    rows = [f"{method}-batch{batch}" for method in methods for batch in batches]
    titles = columns_of({row: table[row] for row in rows if row in table})
    columns = [t for t in titles if t.startswith("k-NN")] + [
        t for t in titles if t.startswith(("ridge", "logistic", "sgd"))
    ]
    low, high = min(batches), max(batches)
    parts, tests, panels = [], {}, []
    for column in columns:
        values = {
            method: [of_seeds(method, batch, column) for batch in batches] for method in methods
        }
        lost = {
            method: _less(of[batches.index(high)], of[batches.index(low)])
            for method, of in values.items()
        }
        lines = [["", *(f"batch {batch}" for batch in batches), f"lost from {high} to {low}"]]
        for method, of in values.items():
            lines.append([method, *map(spread_cell, of), spread_cell(lost[method])])
        parts.append(f"{column}, in %:\n\n{markdown(lines)}")
        tests[column] = _compared(lost)
        parts += [_sentence(other, test) for other, test in tests[column].items()]
        drawn = {
            method: [
                (batch, of) for batch, of in zip(batches, by_batch, strict=True) if None not in of
            ]
            for method, by_batch in values.items()
        }
        lines_of = {
            method: (np.array([b for b, _ in of], float), np.array([v for _, v in of], float).T)
            for method, of in drawn.items()
            if of
        }
        ticks = [float(batch) for batch in batches], [str(batch) for batch in batches]
        if lines_of:
            panels.append(Panel(f"{column}, in %", "images in a batch", lines_of, ticks=ticks))
    text = "\n\n".join([*parts, *failure_lines(failed)]) + "\n"
    replace_text(out / "batch_sizes.md", text)
    found = {"batches": batches, "scores": table, "lost": tests, "runs": costs, "failed": failed}
    replace_text(out / "batch_sizes.json", json.dumps(found, indent=2) + "\n")
    if panels:
        draw_lines(out / "batch_sizes.png", panels)
    return text


def _less(ours: list[float | None], theirs: list[float | None]) -> list[float | None]:
    """Differences seed by seed."""
    return [None if None in pair else pair[0] - pair[1] for pair in zip(ours, theirs, strict=True)]


def _compared(lost: dict[str, list[float | None]]) -> dict[str, dict]:
    """{other method: `paired` of what OURS and it lose} over the seeds that both have, at least two."""
    found = {}
    for other in lost if OURS in lost else ():
        both = [p for p in zip(lost[OURS], lost[other], strict=True) if None not in p]
        if other != OURS and len(both) > 1:
            found[other] = paired(*zip(*both, strict=True))
    return found


def _sentence(other: str, test: dict) -> str:
    points, more = abs(test["difference"]), "fewer" if test["difference"] < 0 else "more"
    return (
        f"{OURS} loses {points:.1f} points {more} than {other} (difference {test['difference']:+.1f}, with "
        f"95% confidence in [{test['low']:+.1f}, {test['high']:+.1f}], p = {test['p']:.2g})"
    )
