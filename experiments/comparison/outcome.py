"""Tables of a comparison from its workdirs, as data and as Markdown."""

import json
import math
from pathlib import Path

from dinotwins_jax.devices.processes import warn
from dinotwins_jax.evals.names import SCRATCH
from dinotwins_jax.evals.table import headline, markdown
from dinotwins_jax.files import read_json_lines
from dinotwins_jax.stopping import EvaluationFailed
from experiments.comparison.statistics import mean_std, paired

DINO_LOSS = "DINO's loss"  # of those that have one; lower is better


def read_log(workdir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; raises ValueError if there is none that can be read."""
    path = workdir / "metrics.jsonl"
    if lines := read_json_lines(path, warn):
        return lines
    raise ValueError(f"{path} has no line that can be read: train that run again")


def read_report(workdir: Path) -> dict:
    """The content of a run's scores.json."""
    return json.loads((workdir / "scores.json").read_text())


def collect(workdirs: dict[str, list[Path]]) -> dict[str, dict[str, list[float | None]]]:
    """Collects {row: {column: one value per seed}} of methods, random weights, pixels and centre box;
    None for a seed whose task failed or whose score is not finite.

    Args:
      workdirs: method -> its runs by seed, in the same order.
    """
    table: dict[str, dict[str, list[float | None]]] = {}
    seeds = max(map(len, workdirs.values()))

    def add(row: str, column: str, number: int, value: float) -> None:
        values = table.setdefault(row, {}).setdefault(column, [None] * seeds)
        if values[number] is None and math.isfinite(
            value
        ):  # rows without training are the same for all methods
            values[number] = value

    for method, runs in workdirs.items():
        for number, workdir in enumerate(runs):
            loss = read_log(workdir)[-1].get("dino/loss")
            if loss is not None:
                add(method, DINO_LOSS, number, loss)
            for row, of_row in read_report(workdir)["scores"].items():
                for title, (value, _) in headline(of_row).items():
                    add(method if row == "teacher" else row, title, number, value)
    order = [*workdirs, *(row for row in table if row not in workdirs)]
    return {row: table[row] for row in order if row in table}


def failures(workdirs: dict[str, list[Path]]) -> dict[str, dict[str, str]]:
    """{run: {task or picture: why it failed}} of the runs whose evaluation is not whole."""
    found = {run.name: read_report(run).get("failed") for runs in workdirs.values() for run in runs}
    return {run: reasons for run, reasons in found.items() if reasons}


def columns_of(table: dict) -> list[str]:
    """All columns, in order of first appearance."""
    return list(dict.fromkeys(column for row in table.values() for column in row))


def spread_cell(values, digits: int = 1) -> str:
    """ "78.4 ± 0.5 (2 of 3)": mean ± standard deviation over the seeds that have a value, and how many
    these are where some lack it; "–" if all do."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    mean, std = mean_std(found)
    shown = f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")
    return shown if len(found) == len(values) else f"{shown} ({len(found)} of {len(values)})"


def score_table(table: dict) -> str:
    """Markdown table, one line per score, with the cells of `spread_cell`."""
    lines = [
        [c, *(spread_cell(row.get(c, ()), 3 if c == DINO_LOSS else 1) for row in table.values())]
        for c in columns_of(table)
    ]
    return markdown([["", *table], *lines])


def failure_lines(failed: dict[str, dict[str, str]]) -> list[str]:
    """What `failures` found, a line each."""
    return [
        f"{run}: {task} failed: {why}"
        for run, reasons in failed.items()
        for task, why in reasons.items()
    ]


def report_failures(failed: dict[str, dict[str, str]], file: str) -> None:
    """Raises EvaluationFailed where something failed, with the names of what and the file that has the
    reasons."""
    if failed:
        runs = ", ".join(f"{run} ({', '.join(reasons)})" for run, reasons in failed.items())
        raise EvaluationFailed(
            f"failed: {runs}; all else is written: {file} has the reasons under 'failed'"
        )


def significance(table: dict, ours: str = "hybrid") -> dict[str, dict[str, dict]]:
    """{other method: {column: `paired`}} for every column that both have for at least two seeds, over
    the seeds that both have.

    Linear probes are compared with the network trained from scratch on as many labels. The verdict for a
    loss is "lower" or "higher" instead of better or worse.
    """
    found = {}
    for other in ("dino", "barlow_twins", SCRATCH):
        if ours in table and other in table:
            theirs = table[other]
            if other == SCRATCH:
                theirs = theirs | {
                    column.replace("whole network", probe): values
                    for column, values in theirs.items()
                    for probe in ("sgd", "ridge")
                }
            pairs = {
                column: [
                    pair for pair in zip(values, theirs[column], strict=True) if None not in pair
                ]
                for column, values in table[ours].items()
                if column in theirs
            }
            found[other] = {
                column: paired(*zip(*both, strict=True))
                for column, both in pairs.items()
                if len(both) > 1
            }
    for columns in found.values():
        if DINO_LOSS in columns:
            loss = columns[DINO_LOSS]
            words = {"better": "higher", "worse": "lower", "level": "level"}
            loss["verdict"] = words[loss["verdict"]]
    return {other: columns for other, columns in found.items() if columns}


def significance_table(found: dict, ours: str = "hybrid") -> str:
    """Markdown table, one line per column: difference with its 95% interval, p, and verdict."""
    header = ["", *(f"{ours} - {other}" for other in found)]
    columns = list(dict.fromkeys(column for of_other in found.values() for column in of_other))

    def text(column, result):
        if result is None:
            return "–"
        digits = 3 if column == DINO_LOSS else 1
        interval = f"[{result['low']:+.{digits}f}, {result['high']:+.{digits}f}]"
        return f"{result['difference']:+.{digits}f} {interval}, p = {result['p']:.2g}: {result['verdict']}"

    rows = [
        [column, *(text(column, of_other.get(column)) for of_other in found.values())]
        for column in columns
    ]
    return markdown([header, *rows])
