"""Tables of scores: selection of headline scores, and Markdown."""

import io
import re
import shutil

from rich import box
from rich.align import Align
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dinotwins_jax.evals.names import NEIGHBOURS, SHOTS, closest, score_title

Value = tuple[float, float | None]  # in %, and its standard deviation where there are several draws

# title, then where it is in a row's scores and what it is called there
_DENSE = [
    ("clusters, accuracy", ("clusters",), "accuracy"),
    ("attention, Jaccard", ("attention",), "jaccard_mean_map"),
    ("with fitted share", ("attention",), "jaccard_fitted"),
    ("its best head", ("attention",), "jaccard_best_head"),
    ("pointing", ("attention",), "pointing"),
    ("normalised cut, Jaccard", ("segmentation",), "jaccard"),
    ("pointing at boxes", ("attention boxes",), "pointing"),
    ("CorLoc of boxes", ("attention boxes",), "corloc"),
    ("normalised cut, CorLoc of boxes", ("segmentation boxes",), "corloc"),
]
_LEAD = ("multilabel sgd 10%", "multi-label k-NN", "sgd 10%")  # what the first titles begin with
_LINEAR = re.compile(r"(multilabel )?(sgd|ridge|logistic) ")  # these come last, but for the lead
_PIPED = 100  # columns where no terminal tells
_SETTINGS = ("fraction", "keep", "recipe", "num_test", "num_clusters", "temperature")  # no scores
_SPREADS = ("_std", "_sem")


def headline(scores: dict, balanced: bool = False) -> dict[str, Value]:
    """The scores of one row that a table shows, in its order; what was not evaluated is not there.

    balanced: beside top-1 also the balanced accuracy, of the bank with the most labels alone among the
    linear probes.
    """
    linear = scores.get("linear", {})
    probes = [
        (f"{group}, mAP", ("linear", group), "map")
        if "map_mean" in result
        else (group, ("linear", group), "top1")
        for group, result in linear.items()
    ]
    banks = [group for group in linear if re.match("(ridge|logistic) ", group)]
    most = max(banks, key=lambda group: linear[group].get("fraction", 0.0), default=None)
    found = {}
    for title, path, metric in [*probes, *_of_labels(scores), *_DENSE]:
        part = scores
        for name in path:
            part = part.get(name, {})
        wanted = {title: metric}
        if balanced and metric == "top1" and (path[0] != "linear" or path[1] == most):
            wanted[f"{title}, balanced"] = "balanced"
        for name, key in wanted.items():
            if f"{key}_mean" in part:
                found[name] = (part[f"{key}_mean"], part.get(f"{key}_std"))
            elif key in part:
                found[name] = (part[key], None)
    return found


def _of_labels(scores: dict) -> list[tuple[str, tuple[str, ...], str]]:
    """Entries as in _DENSE of the tasks with labels; of several k or shots the one that suits a table."""
    k = closest(NEIGHBOURS, _numbers(scores, ("knn", "knn multilabel"), "k"))
    shots = closest(SHOTS, _numbers(scores, ("fewshot",), "shots"))
    several = "multi-label k-NN" if k in (None, NEIGHBOURS) else f"multi-label k-NN, k={k}"
    return [
        (f"k-NN, k={k}", ("knn", f"k{k}"), "top1"),
        (f"{shots} image{'' if shots == 1 else 's'} a class", ("fewshot", f"shots{shots}"), "top1"),
        ("fine-tuned", ("finetune",), "top1"),
        *(
            (f"whole network {share}", ("whole", share), "top1")
            for share in scores.get("whole", ())
        ),
        (f"{several}, mAP", ("knn multilabel", f"k{k}"), "map"),
        *(
            (f"multilabel whole network {share}, mAP", ("whole multilabel", share), "map")
            for share in scores.get("whole multilabel", ())
        ),
    ]


def _numbers(scores: dict, tasks: tuple[str, ...], prefix: str) -> set[int]:
    """The numbers in the keys of tasks: 10 and 20 of k10 and k20."""
    keys = [key for task in tasks for key in scores.get(task, ())]
    return {int(m[1]) for key in keys if (m := re.fullmatch(rf"{prefix}(\d+)", key))}


def figures(scores: dict[str, dict]) -> dict[str, float]:
    """The means that the table shows, as "scores/teacher/k-NN_k_20": letters that any tracker takes."""
    return {
        "scores/" + re.sub(r"[^\w/.-]+", "_", f"{row}/{title}".replace("%", "percent")): mean
        for row, of_row in scores.items()
        for title, (mean, _) in headline(of_row).items()
    }


def headline_rows(
    scores: dict[str, dict], balanced: bool = False
) -> tuple[list[str], dict[str, list[str]]]:
    """The features (teacher, random weights, …), and {title of a score: cells}, important ones first."""
    rows = _cells({row: headline(of_row, balanced) for row, of_row in scores.items()})
    return list(scores), dict(sorted(rows.items(), key=lambda item: _rank(item[0])))


def first_score(scores: dict) -> str:
    """The most important score of a row, such as "k-NN, k=20 83.2"; "" if there is none."""
    _, rows = headline_rows({"": scores})
    return next((f"{title} {cells[0]}" for title, cells in rows.items()), "")


def _rank(title: str) -> int:
    lead = [i for i, start in enumerate(_LEAD) if title.startswith(start)]
    return lead[0] if lead else len(_LEAD) + bool(_LINEAR.match(title))


def _cells(found: dict[str, dict[str, Value]]) -> dict[str, list[str]]:
    titles = dict.fromkeys(title for values in found.values() for title in values)
    return {title: [cell(values.get(title)) for values in found.values()] for title in titles}


def summary(scores: dict[str, dict]) -> str:
    """Markdown, a line a score: mean ± standard deviation over the draws of the labels, in %."""
    features, rows = headline_rows(scores)
    return markdown([["", *features], *([title, *cells] for title, cells in rows.items())])


def terminal_table(
    scores: dict[str, dict], width: int | None = None, *, balanced: bool = False
) -> str:
    """The table of `summary` as plain text, folded where it is wider than the terminal; "" without scores.

    Args:
      width: columns; None: those of the terminal, 100 in a pipe.
      balanced: also balanced accuracies, see `headline`.
    """
    features, rows = headline_rows(scores, balanced)
    if not rows:
        return ""
    columns = [_aligned([cells[i] for cells in rows.values()]) for i in range(len(features))]
    last = [_rank(title) > len(_LEAD) for title in rows]
    table = Table(Column("in %", overflow="fold"), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for feature in features:
        table.add_column(feature, justify="right", overflow="fold")
    for i, (title, *cells) in enumerate(zip(rows, *columns, strict=True)):
        cells = [
            Align.right(Text(text, justify="left")) for text in cells
        ]  # with the blanks at its end
        table.add_row(title, *cells, end_section=not last[i] and last[i + 1 : i + 2] == [True])
    width = width or shutil.get_terminal_size((_PIPED, 24)).columns
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    if any("±" in text for column in columns for text in column):
        console.print(" ± is the standard deviation over the draws of the labels")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def _aligned(cells: list[str]) -> list[str]:
    """Cells of one width, their means under each other."""
    parts = [text.partition(" ± ") for text in cells]
    mean, spread = (max(len(part[i]) for part in parts) for i in (0, 2))
    return [f"{part[0]:>{mean}}{part[1]}{part[2]:>{spread}}" for part in parts]


def score_rows(
    scores: dict[str, dict], task: str
) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """All numbers of one task: the features that have it, {title of the score: cells}, the protocols.

    "<x>_mean" and "<x>_std", or "<x>" and "<x>_sem", share a cell; lists are left out.
    """
    found, protocols = {}, {}
    for row, tasks in scores.items():
        if task in tasks:
            found[row] = {score_title(keys): value for keys, value in _values(tasks[task])}
            protocols |= dict.fromkeys(_protocols(tasks[task]))
    return list(found), _cells(found), list(protocols)


def _values(scores: dict, path: tuple[str, ...] = ()):
    """(keys, value) of the numbers of nested scores."""
    for key, value in scores.items():
        if isinstance(value, dict) and key not in _SETTINGS:
            yield from _values(value, (*path, key))
        elif isinstance(value, (int, float)) and key not in _SETTINGS and key[-4:] not in _SPREADS:
            name = key.removesuffix("_mean")
            yield (*path, name), (value, scores.get(f"{name}_std", scores.get(f"{name}_sem")))


def _protocols(scores: dict):
    for key, value in scores.items():
        if isinstance(value, dict):
            yield from _protocols(value)
        elif key == "protocol":
            yield value


def cell(value: Value | None) -> str:
    """ "78.4 ± 0.5", "78.4" or "–"."""
    if value is None:
        return "–"
    mean, std = value
    if isinstance(mean, int):
        return str(mean)
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
