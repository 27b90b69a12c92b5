"""Curves of one or several runs from their metrics.jsonl, as small multiples."""

import io
import re
from itertools import chain

import numpy as np

from dinotwins_jax.evals.names import monitor_title, term_title

INK, MUTED, LINE, BAD = "#1f2328", "#656d76", "#d8dee4", "#d1383d"
COLOURS = ("#2f7ed8", "#e0812c", "#2f9e6e", "#c4569a", "#8a6fd1", "#a3862f", "#3aa6b9", "#7d8590")
WIDTH, HEIGHT, GAP_X, GAP_Y = 3.0, 1.35, 0.55, 0.75  # of a panel, inches
LEFT, RIGHT, TOP, BOTTOM, LEGEND = 0.5, 0.12, 0.45, 0.42, 0.3  # around all panels
NICE = (1, 2, 5, 10)  # ticks are multiples of these
FEW = 40  # points; a curve of fewer shows them

LOSSES, COLLAPSE, BALANCE = "Losses", "Collapse diagnostics", "Gradient balance"
MONITOR, SCHEDULES, OTHER = "k-NN and probe during training", "Schedules and speed", "Other metrics"

# last part of a key (the term of the loss comes before it) -> (section, title, unit and reading)
_METRICS = {
    "loss": (LOSSES, "loss", "mean since the last log"),
    "teacher_entropy": (COLLAPSE, "teacher entropy", "of ln K; 1 uniform, 0 one-hot"),
    "marginal_entropy": (COLLAPSE, "entropy of the mean", "of ln K; 0: one prototype for all"),
    "kl": (COLLAPSE, "KL, teacher to student", "nats; 0: nothing left to learn"),
    "center_norm": (COLLAPSE, "center norm", "L2, in logits"),
    "feature_std": (COLLAPSE, "feature std", "1 isotropic, 0 all images alike"),
    "effective_rank": (COLLAPSE, "effective rank", "dimensions in use"),
    "diag_mean": (COLLAPSE, "diagonal of C", "correlation; 1: the views agree"),
    "off_diag_rms": (COLLAPSE, "off-diagonal of C", "rms correlation; 0: no redundancy"),
    "weighted_norm": (BALANCE, "weighted gradient norm", "at the class tokens, L2 times weight"),
    "norm": (BALANCE, "gradient norm", "at the class tokens, L2, unweighted"),
    "weight": (BALANCE, "weight of the term", "factor"),
    "cos": (BALANCE, "gradient cosine", "1 agree, 0 apart, -1 oppose"),
    "lr": (SCHEDULES, "learning rate", "scaled with the batch"),
    "weight_decay": (SCHEDULES, "weight decay", "per unit of learning rate"),
    "teacher_momentum": (SCHEDULES, "teacher momentum", "kept fraction a step"),
    "teacher_temp": (SCHEDULES, "teacher temperature", "divides the logits"),
    "grad_norm": (SCHEDULES, "gradient norm", "L2 of all parameters, before clipping"),
    "images_per_s": (SCHEDULES, "speed", "images/s"),
    "data_wait": (SCHEDULES, "waiting for data", "fraction of the time"),
    "skipped": (SCHEDULES, "skipped steps", "loss or gradient not finite, since the start"),
    "on_diag": (OTHER, "on-diagonal part of the loss", "sum of squares"),
    "off_diag": (OTHER, "off-diagonal part of the loss", "sum of squares, unweighted"),
    "invariance": (OTHER, "invariance part of the loss", "mean square, unweighted"),
    "variance": (OTHER, "variance part of the loss", "unweighted"),
    "covariance": (OTHER, "covariance part of the loss", "unweighted"),
    "accuracy": (OTHER, "accuracy of the contrast", "fraction of the views; 1: all pairs found"),
    "hidden": (OTHER, "hidden patches", "fraction of the patches"),
}
_LOG_IF_WIDE = {"loss", "kl", "center_norm", "norm", "weighted_norm", "grad_norm", "weight"}


def _metric(key: str) -> str:
    return "cos" if key.startswith("balance/cos/") else key.rpartition("/")[2]


def _term(key: str) -> str:
    """The loss term of a key: "dino" for dino/loss and balance/dino/norm, "" for lr."""
    if key.startswith("balance/cos/"):
        return key.removeprefix("balance/cos/")
    return key.removeprefix("balance/").rpartition("/")[0]


def _term_title(key: str) -> str:
    """The names of the terms that a key is about: "DINO, Barlow Twins"."""
    return ", ".join(map(term_title, _term(key).split(",")))


def _title(keys: tuple[str, ...]) -> tuple[str, str]:
    """Title, and the unit with how to read it."""
    if keys[0].startswith("monitor/"):
        return monitor_title(keys[0]), "%"
    metric = _metric(keys[0])
    _, title, unit = _METRICS.get(metric, (OTHER, metric.replace("_", " "), ""))
    return (
        f"{_term_title(keys[0])}: {title}" if len(keys) == 1 and _term(keys[0]) else title
    ), unit


def _seeds(log) -> list[list[dict]]:
    return log if log and isinstance(log[0], list) else [log]


def curve_sections(logs: dict[str, list]) -> dict[str, list[tuple[str, ...]]]:
    """Every number in the logs, sorted into panels under headings; headings without any are left out.

    Args:
      logs: as in `draw_curves`.
    Returns:
      heading -> panels, each the keys that share its axes.
    """
    every = chain.from_iterable(seed for log in logs.values() for seed in _seeds(log))
    keys = dict.fromkeys(k for line in every for k, v in line.items() if _is_number(v))
    keys.pop("step", None)
    sections = {name: [] for name in (LOSSES, COLLAPSE, BALANCE, MONITOR, SCHEDULES, OTHER)}
    balance = {}
    for key in keys:
        if key.startswith("balance/"):
            balance.setdefault(_metric(key), []).append(key)
        elif key.startswith("monitor/"):
            sections[MONITOR].append((key,))
        else:
            sections[_METRICS.get(_metric(key), (OTHER,))[0]].append((key,))
    if "norm" in balance and "weight" in balance:
        stems = [key.removesuffix("norm") for key in balance["norm"]]
        balance["weighted_norm"] = [stem + "weighted_norm" for stem in stems]
    sections[BALANCE] += [tuple(some) for some in balance.values()]
    order = list(_METRICS)
    for panels in sections.values():  # stable: terms keep the order of the log, the total leads
        panels.sort(key=lambda p: order.index(_metric(p[0])) if _metric(p[0]) in order else 99)
    sections[LOSSES].sort(key=lambda panel: panel != ("loss",))
    return {heading: panels for heading, panels in sections.items() if panels}


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _value(line: dict, key: str) -> float | None:
    if key.endswith("/weighted_norm"):
        stem = key.removesuffix("weighted_norm")
        norm, weight = line.get(stem + "norm"), line.get(stem + "weight")
        return norm * weight if _is_number(norm) and _is_number(weight) else None
    return line.get(key)


def series(log: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """f64[n] steps and f64[n] values of the lines that have both; "balance/<term>/weighted_norm" is
    norm times weight."""
    pairs = [(line.get("step"), _value(line, key)) for line in log]
    pairs = [pair for pair in pairs if _is_number(pair[0]) and _is_number(pair[1])]
    return tuple(np.array(pairs, np.float64).reshape(-1, 2).T)


def draw_curves(logs: dict[str, list], panels: list[str | tuple[str, ...]], *, columns: int = 3):
    """Small multiples over the training step, one panel a key or tuple of keys.

    Runs differ by colour, and are named above the panels when there are several; keys that share a
    panel by line style, or by colour for a single run. A value that is not finite leaves a gap and
    a red cross at its step. Losses and norms that span two decades get a logarithmic axis.

    Args:
      logs: name of the run -> lines of its metrics.jsonl ({"step", key: number}, any key may lack),
        or a list of such logs, one a seed, which share its colour.
      panels: keys, as `curve_sections` sorts them.
    Returns:
      matplotlib Figure; `.savefig(path, dpi=150)` writes a PNG, `svg_text` an SVG for a page.
    Raises:
      ValueError: no panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not panels:
        raise ValueError("no panels to draw: give at least one key of the log")
    every = chain.from_iterable(seed for log in logs.values() for seed in _seeds(log))
    last_step = max((line.get("step", 1) for line in every), default=1)
    rows, legend = -(-len(panels) // columns), LEGEND if len(logs) > 1 else 0.0
    width = LEFT + columns * WIDTH + (columns - 1) * GAP_X + RIGHT
    height = legend + TOP + rows * HEIGHT + (rows - 1) * GAP_Y + BOTTOM
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    for i, keys in enumerate(panels):
        row, column = divmod(i, columns)
        x = LEFT + column * (WIDTH + GAP_X)
        y = height - legend - TOP - (row + 1) * HEIGHT - row * GAP_Y
        axes = figure.add_axes((x / width, y / height, WIDTH / width, HEIGHT / height))
        _panel(axes, logs, (keys,) if isinstance(keys, str) else keys)
        axes.set_xlim(0, last_step * 1.02)
        if i + columns >= len(panels):
            axes.set_xlabel("step", fontsize=7, color=MUTED, labelpad=1)
    if legend:
        lines = [Line2D([], [], color=colour, lw=1.8) for colour in _colours(logs)]
        where = ((LEFT - 0.08) / width, 1 - 0.06 / height)
        _legend(figure, lines, list(logs), loc="upper left", bbox_to_anchor=where, fontsize=8)
    return figure


def _colours(names) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(names))]


def _legend(where, lines: list, names: list[str], **options) -> None:
    legend = where.legend(
        lines, names, frameon=False, labelcolor=INK, ncols=len(names), columnspacing=1.2,
        handlelength=1.4, handletextpad=0.5, borderaxespad=0.0, **options,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _panel(axes, logs: dict[str, list], keys: tuple[str, ...]) -> None:
    """The curves of all runs and keys on one pair of axes, with title, unit and last value."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

    alone = len(logs) == 1
    inks = _colours(keys) if alone else [MUTED] * len(keys)
    styles = [("-" if alone else ("-", "--", ":", "-.")[i % 4]) for i in range(len(keys))]
    drawn = []  # (finite values, colour)
    for colour, log in zip(_colours(logs), logs.values(), strict=True):
        for key, ink, style in zip(keys, inks, styles, strict=True):
            ink = ink if alone else colour
            drawn += [(_curve(axes, *series(seed, key), ink, style), ink) for seed in _seeds(log)]
    drawn = [(values, ink) for values, ink in drawn if values.size]
    low = min((values.min() for values, _ in drawn), default=0.0)
    high = max((values.max() for values, _ in drawn), default=0.0)
    axes.margins(y=0.1)
    if _metric(keys[0]) in _LOG_IF_WIDE and 0 < 100 * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=NICE))
    if high - low < 1e-5 * abs(high):  # rounding is no curve
        axes.set_ylim(sorted((0.5 * low, 1.5 * high)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=NICE, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color=LINE, lw=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(length=0, labelsize=7, labelcolor=MUTED, pad=3)
    title, unit = _title(keys)
    above, style = 1 + 0.21 / HEIGHT, {"transform": axes.transAxes, "parse_math": False}
    axes.text(0, above, title, color=INK, fontsize=8.5, **style)
    axes.text(0, 1 + 0.08 / HEIGHT, unit, color=MUTED, fontsize=7, **style)
    if len(drawn) == 1:
        (values, ink), style = drawn[0], style | {"fontsize": 8.5, "ha": "right"}
        axes.text(1, above, f"{values[-1]:.4g}", color=ink, **style)
    if len(keys) > 1:
        lines = [Line2D([], [], color=c, ls=s, lw=1.5) for c, s in zip(inks, styles, strict=True)]
        _legend(axes, lines, [_term_title(key) for key in keys], fontsize=7, loc="best")


def _curve(axes, steps, values, colour: str, style: str) -> np.ndarray:
    """One line with a cross for each value that is not finite; returns the finite ones."""
    finite = np.isfinite(values)
    axes.plot(
        steps, values, style, color=colour, lw=1.1, ms=2.2,
        marker="o" if finite.sum() < FEW else None, solid_joinstyle="round",
    )  # fmt: skip
    bottom = np.full((~finite).sum(), 0.04)  # of the axes' height
    axes.plot(steps[~finite], bottom, "x", color=BAD, ms=4, transform=axes.get_xaxis_transform())
    return values[finite]


def svg_text(figure) -> str:
    """The figure as an <svg> element for a page: text stays text, colours follow the page.

    Ink, muted text and rules become CSS's currentColor, var(--muted) and var(--line).
    """
    from matplotlib import rc_context

    for part in (figure, *figure.axes):
        part.patch.set_alpha(0.0)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    svg = "<svg" + file.getvalue().partition("<svg")[2]  # without the head of an XML file
    for colour, css in ((INK, "currentColor"), (MUTED, "var(--muted)"), (LINE, "var(--line)")):
        svg = svg.replace(colour, css)
    used = set(re.findall(r"#([\w-]+)", svg))  # other ids would repeat from figure to figure
    return re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
