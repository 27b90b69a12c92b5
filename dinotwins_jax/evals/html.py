"""The report of a run: one self-contained HTML file with curves, tables and pictures."""

import base64
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path

from dinotwins_jax.evals.curves import curve_sections, draw_curves, svg_text
from dinotwins_jax.evals.flat_map import read_map
from dinotwins_jax.evals.names import score_title, task_title, term_title
from dinotwins_jax.evals.table import cell, headline_rows, score_rows
from dinotwins_jax.files import replace_text

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1f2328; --muted: #656d76;
  --line: #d8dee4; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --ink: #e6edf3; --muted: #8d96a0;
  --line: #30363d; --card: #161b22; } }
body { margin: 0 auto; max-width: 1160px; padding: 1.5rem; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem;
  border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, figcaption { color: var(--muted); margin: .3rem 0; }
.wide { overflow-x: auto; } .curves { display: grid; gap: .8rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
table { border-collapse: collapse; font-size: .85rem;
  font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .25rem .45rem; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child, .settings td { text-align: left; padding-left: 0;
  white-space: normal; }
.settings td { overflow-wrap: anywhere; } .settings td:first-child { padding-right: 1.2rem;
  color: var(--muted); white-space: nowrap; }
figure { margin: 1rem 0; } .curves figure { margin: 0; }
img { max-width: 100%; background: #ffffff; border-radius: 6px; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; }
pre { background: var(--card); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: 12.5px; }
@media (max-width: 640px) { body { padding: 1rem; } table { width: 100%; font-size: .75rem; }
  th, td { padding: .25rem .2rem; } td:first-child { width: 40%; } }
"""
_READING = """In %. sgd and ridge are linear probes with that share of the labels; 5 images a class is
few-shot classification by the nearest class mean; ± is the standard deviation over draws of the labels.
The Jaccard scores of attention compare its strongest part, a fixed or a fitted share, with the objects."""
_BALANCED = (
    """ The test set is unbalanced: the balanced accuracy is the mean of the classes' recalls."""
)


_FEW = 20  # classes; a table of more is folded


def write_report(
    path: Path,
    *,
    title: str,
    config: dict,
    length: str = "",
    log: list[dict],
    scores: dict[str, dict],
    pictures: dict[str, Path],
    map_file: Path | None = None,
    notes: tuple[str, ...] | list[str] = (),
    classes: dict[str, dict[str, list[dict]]] | None = None,
    balanced: bool = False,
) -> None:
    """Writes the page; sections without anything in them are left out.

    Args:
      path: file to write.
      title: what run this is.
      config: its config as nested dictionaries.
      length: steps and epochs of the run.
      log: lines of its metrics.jsonl.
      scores: {row: {task: scores}}, as in scores.json.
      pictures: caption -> PNG file.
      map_file: a page of `write_map`; left out where there is none.
      notes: lines under the title.
      classes: {task: {name of a score: rows as of `class_rows`}}.
      balanced: whether the main scores have balanced accuracies.
    Raises:
      FileNotFoundError: a picture is not there.
      ValueError: the map is damaged.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        _settings(config, length),
        _key_numbers(scores, balanced),
        *_curves(title, log),
        *_scores(scores),
        *_classes(classes or {}),
        *_map(map_file),
        *_pictures(pictures),
        "<h2>Config</h2><details><summary>every key</summary><pre>"
        f"{escape(json.dumps(config, indent=2, default=str))}</pre></details>",
    ]
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    replace_text(path, page)


def _settings(config: dict, length: str) -> str:
    """Table of the main config keys."""
    model, data = config.get("model", {}), config.get("data", {})
    sizes = {"embed_dim": "width {}", "depth": "depth {}", "num_heads": "{} heads"}
    sizes = [text.format(model[key]) for key, text in sizes.items() if model.get(key)]
    shown = {
        "loss": " + ".join(
            f"{term.get('weight', 1)} × {term_title(name)}"
            for name, term in config.get("loss", {}).items()
        ),
        "weights matched to": term_title(config.get("match_gradients_to") or ""),
        "model": ", ".join(
            [str(model.get("name", "")), *sizes, f"patch {model.get('patch_size', '')}"]
        ),
        "data": f"{data.get('source', '')} {data.get('dir') or ''}",
        "batch": config.get("batch_size"),
        "length": length,
        "seed": config.get("seed"),
    }
    cells = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>"
        for key, value in shown.items()
        if value not in (None, "")
    )
    return f'<table class="settings">{cells}</table>'


def _curves(title: str, log: list[dict]) -> list[str]:
    logs = {title: log}
    return [
        f'<h2>{escape(heading)}</h2><div class="curves">{_figures(logs, panels)}</div>'
        for heading, panels in (curve_sections(logs) if log else {}).items()
    ]


def _figures(logs: dict, panels: list) -> str:
    """A figure a panel, so that the page can put them beside or under each other."""
    figures = (svg_text(draw_curves(logs, [panel], columns=1)) for panel in panels)
    return "".join(f"<figure>{svg}</figure>" for svg in figures)


def _scores(scores: dict[str, dict]) -> list[str]:
    tasks = list(dict.fromkeys(task for row in scores.values() for task in row))
    if not tasks:
        return []
    parts = ["<h2>Scores</h2><p>In %. ± is the standard deviation over draws of the labels (of "
             "clusters over seeds), or the standard error over images.</p>"]  # fmt: skip
    for task in tasks:
        features, rows, protocols = score_rows(scores, task)
        named = f"Protocol{'s' if len(protocols) > 1 else ''}: {', '.join(protocols)}"
        parts.append(
            f"<h3>{escape(task_title(task))}</h3>{_table(features, rows.items())}<p>{escape(named)}</p>"
        )
    return parts


def _classes(classes: dict[str, dict[str, list[dict]]]) -> list[str]:
    """A table a prediction, the class with the most test images first."""
    parts = []
    for task, of_task in classes.items():
        several = "multi-label " if task.endswith(" multilabel") else ""
        for name, rows in of_task.items():
            columns = [key for key in rows[0] if key != "class"]
            lines = [
                (row["class"], [cell(None if row[c] is None else (row[c], None)) for c in columns])
                for row in sorted(rows, key=lambda row: -row["support"])
            ]
            table = _table([score_title((c,)) for c in columns], lines)
            if len(rows) > _FEW:
                table = f"<details><summary>{len(rows):,} classes</summary>{table}</details>"
            parts.append(f"<h3>{escape(several + score_title((name,)))}</h3>{table}")
    head = "<h2>Scores by class</h2><p>Of the teacher, in %. – is not defined: the precision of a "
    head += "class that is never predicted.</p>"
    return [head, *parts] if parts else []


def _key_numbers(scores: dict[str, dict], balanced: bool) -> str:
    """Table of the main scores."""
    features, rows = headline_rows(scores, balanced)
    reading = _READING + _BALANCED * balanced
    return f"{_table(features, rows.items())}<p>{reading}</p>" if rows else ""


def _table(columns: list[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in ("", *columns))
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in (row, *cells)) + "</tr>"
        for row, cells in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _map(file: Path | None) -> list[str]:
    return [f"<h2>Map of the test images</h2>{read_map(file)}"] if file and file.is_file() else []


def _pictures(pictures: dict[str, Path]) -> list[str]:
    parts = ["<h2>Pictures</h2>"] if pictures else []
    for caption, file in pictures.items():
        if not Path(file).is_file():
            raise FileNotFoundError(f"no picture {file} for the report: '{caption}'")
        data = base64.b64encode(Path(file).read_bytes()).decode()
        text = escape(caption)
        parts.append(
            f'<figure><figcaption>{text}</figcaption><img alt="{text}" '
            f'src="data:image/png;base64,{data}"></figure>'
        )
    return parts
