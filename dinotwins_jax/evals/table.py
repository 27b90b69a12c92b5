"""Tables of scores: selection of headline scores, and Markdown."""

import re

Value = tuple[float, float | None]  # in %, and its standard deviation where there are several draws

# title, then where it is in a row's scores and what it is called there
_SINGLE = [
    ("k-NN, k=20", ("knn", "k20"), "top1"),
    ("5 images a class", ("fewshot", "shots5"), "top1"),
    ("fine-tuned", ("finetune",), "top1"),
    ("multi-label k-NN, mAP", ("knn multilabel", "k20"), "map"),
    ("attention, Jaccard", ("attention",), "jaccard_mean_map"),
    ("with fitted share", ("attention",), "jaccard_fitted"),
    ("its best head", ("attention",), "jaccard_best_head"),
    ("pointing", ("attention",), "pointing"),
    ("normalised cut, Jaccard", ("segmentation",), "jaccard"),
]
_SETTINGS = ("fraction", "keep", "recipe", "num_test", "temperature")  # no scores
_SPREADS = ("_std", "_sem")


def headline(scores: dict) -> dict[str, Value]:
    """The scores of one row that a table shows, in its order; what was not evaluated is not there."""
    found = {}
    for group, result in scores.get("linear", {}).items():
        metric = "map" if "map_mean" in result else "top1"
        title = f"{group}, mAP" if metric == "map" else group
        found[title] = (result[f"{metric}_mean"], result[f"{metric}_std"])
    for title, path, metric in _SINGLE:
        part = scores
        for name in path:
            part = part.get(name, {})
        if f"{metric}_mean" in part:
            found[title] = (part[f"{metric}_mean"], part.get(f"{metric}_std"))
        elif metric in part:
            found[title] = (part[metric], None)
    return found


def figures(scores: dict[str, dict]) -> dict[str, float]:
    """The means that the table shows, as "scores/teacher/k-NN_k_20": letters that any tracker takes."""
    return {
        "scores/" + re.sub(r"[^\w/.-]+", "_", f"{row}/{title}".replace("%", "percent")): mean
        for row, of_row in scores.items()
        for title, (mean, _) in headline(of_row).items()
    }


def summary(scores: dict[str, dict]) -> str:
    """Markdown table, one line per row of scores: mean ± standard deviation over label draws, in %."""
    lines = {row: headline(of_row) for row, of_row in scores.items()}
    columns = list(dict.fromkeys(title for line in lines.values() for title in line))
    return markdown(
        [["", *columns], *([r, *(cell(v.get(c)) for c in columns)] for r, v in lines.items())]
    )


def score_rows(
    scores: dict[str, dict], task: str
) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """All numbers of one task: columns, the cells of each row that has the task, and the protocols.

    "<x>_mean" and "<x>_std", or "<x>" and "<x>_sem", share a cell; lists are left out.
    """
    flat, protocols = {}, {}
    for row, tasks in scores.items():
        if task in tasks:
            flat[row] = dict(_values(tasks[task]))
            protocols |= dict.fromkeys(_protocols(tasks[task]))
    columns = list(dict.fromkeys(name for values in flat.values() for name in values))
    rows = {row: [cell(values.get(c)) for c in columns] for row, values in flat.items()}
    return columns, rows, list(protocols)


def _values(scores: dict, prefix: str = ""):
    """(name, value) of the numbers of nested scores."""
    for key, value in scores.items():
        if isinstance(value, dict) and key not in _SETTINGS:
            yield from _values(value, f"{prefix}{key.replace('_', ' ')} ")
        elif isinstance(value, (int, float)) and key not in _SETTINGS and key[-4:] not in _SPREADS:
            name = key.removesuffix("_mean")
            spread = scores.get(f"{name}_std", scores.get(f"{name}_sem"))
            yield f"{prefix}{name.replace('_', ' ')}", (value, spread)


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
