"""The HTML report: self-contained, opened in a real browser; its tables."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_scores import SCORES

from dinotwins_jax.evals import curves
from dinotwins_jax.evals.html import write_report

LOG = [
    {
        "step": step,
        "loss": 5.0 / step,
        "dino/loss": np.nan if step == 3 else 4.0 / step,
        "dino/teacher_entropy": 0.5,
        "balance/dino/norm": 0.1 * step,
        "balance/dino/weight": 1.0,
        "monitor/knn_top1": 20.0 * step,
        "lr": 0.1,
    }
    for step in (1, 2, 3, 4)
]
HEADINGS = ["Losses", "Collapse diagnostics", "Gradient balance", "k-NN and probe during training"]
HEADINGS += ["Schedules and speed", "Scores", "Pictures", "Config"]


@pytest.fixture
def report(tmp_path):
    pictures = {}
    for name in ("attention & more", "pca"):
        pictures[name] = tmp_path / f"{name[:3]}.png"
        Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(pictures[name])
    path = tmp_path / "report.html"
    config = {"loss": {"dino": {"weight": 1.0}}, "seed": 3, "model": {"name": "<b>vit</b>"}}
    write_report(
        path, title="a <run> & more", config=config, length="4 steps, 0.1 epochs", log=LOG,
        scores=SCORES, pictures=pictures, notes=["after <4> steps"],
    )  # fmt: skip
    return path


def test_everything_is_in_the_page_and_escaped(report):
    page = report.read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == HEADINGS
    assert "<title>a &lt;run&gt; &amp; more</title>" in page and "<b>vit" not in page
    key_numbers = page[: page.index("<h2>")]
    assert "sgd 10%" in key_numbers and "78.4 ± 0.5" in key_numbers and "83.9" in key_numbers
    assert (
        page.count("<img") == 2 and page.count("<svg") == 8
    )  # a chart each, so that they can stack
    assert "<td>length</td><td>4 steps, 0.1 epochs</td>" in page
    assert "raw &lt;pixels&gt;" in page and "78.4 ± 0.5" in page and "p1, p2" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page), "nothing outside the file is needed"


PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images], curves = [...document.querySelectorAll("svg")];
  const boxes = curves.map(c => c.getBoundingClientRect());
  const found = {
    width: innerWidth,
    images: images.length && images.every(i => i.naturalWidth == 30 && i.clientWidth > 0),
    curves: curves.length && boxes.every(b => b.width > 300),
    abreast: new Set(boxes.map(b => b.left)).size,
    overflows: document.documentElement.scrollWidth > innerWidth,
    cut: [...document.querySelectorAll(".wide")].filter(w => w.scrollWidth > w.clientWidth).length,
    requests: performance.getEntriesByType("resource")
      .filter(r => !r.name.startsWith("data:")).length,
  };
  parent.postMessage(found, "*");
});</script>"""
FRAME = """<!DOCTYPE html>
<iframe src="probed.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>
<script>addEventListener("message", m => {
  document.documentElement.dataset.found = JSON.stringify(m.data)
})</script>"""


@pytest.mark.parametrize(("width", "abreast"), [(390, 1), (1280, 3)])
def test_a_browser_shows_it(report, tmp_path, width, abreast):
    """Chromium lays the page out as a phone and a desktop do: pictures decoded, charts under or beside
    each other, no sideways scroll, no table cut, no request, no error.

    In a frame, as its own window is never narrower than 500 pixels.
    """
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("no chromium on the PATH")
    page = report.read_text().replace("</body>", f"{PROBE}</body>")
    (tmp_path / "probed.html").write_text(page)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--dump-dom",
         "--hide-scrollbars", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}",
         f"file://{frame}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (found,) = re.findall('data-found="(.*?)"', done.stdout)
    assert json.loads(unescape(found)) == {
        "width": width, "images": True, "curves": True, "abreast": abreast, "overflows": False, "cut": 0,
        "requests": 0,
    }  # fmt: skip
    assert "CONSOLE" not in done.stderr


def rows_of(count):
    """`count` classes, the last one the largest, the first never predicted."""
    rows = [{"class": f"<{c}>", "support": c, "precision": 50.0, "recall": 25.0, "f1": 33.3}
            for c in range(1, count + 1)]  # fmt: skip
    rows[0]["precision"] = None
    return rows


def test_scores_by_class_the_largest_first_and_folded_if_many(tmp_path):
    classes = {
        "linear": {"ridge 100%": rows_of(3)},
        "knn": {"k20": rows_of(21)},
        "knn multilabel": {"k20": [{"class": "ant", "support": 2, "average_precision": 12.5}]},
    }
    path = tmp_path / "report.html"
    write_report(path, title="r", config={}, log=[], scores={}, pictures={}, classes=classes)
    page = path.read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["Scores by class", "Config"]
    few, many, several = page.split("<h3>")[1:]
    assert few.startswith("ridge, 100% of the labels</h3>")
    assert many.startswith("k-NN, k=20</h3>") and several.startswith("multi-label k-NN, k=20</h3>")
    assert "<summary>21 classes</summary>" in many and "<details>" not in few
    cells = [re.findall("<t[hd]>(.*?)</t[hd]>", line) for line in few.split("<tr>")[1:]]
    assert cells == [
        ["", "test images", "precision", "recall", "F1"],
        ["&lt;3&gt;", "3", "50.0", "25.0", "33.3"],
        ["&lt;2&gt;", "2", "50.0", "25.0", "33.3"],
        ["&lt;1&gt;", "1", "–", "25.0", "33.3"],
    ]
    assert "<th>average precision</th>" in several and "<td>12.5</td>" in several


def test_sections_without_content_are_left_out(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, title="empty", config={}, log=[], scores={}, pictures={})
    assert re.findall("<h2>(.*?)</h2>", path.read_text()) == ["Config"]


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no picture .*none\.png for the report: 'a grid'"):
        write_report(
            tmp_path / "r.html", title="", config={}, log=[], scores={},
            pictures={"a grid": Path("none.png")},
        )  # fmt: skip
    assert not (tmp_path / "r.html").exists()


def curve(line):
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def test_curves_are_the_numbers_of_the_log():
    pair = ("balance/dino/weighted_norm", "balance/dino/norm")
    figure = curves.draw_curves({"run": [*LOG[:2], {"lr": 0.1}, *LOG[2:]]}, ["dino/loss", pair])
    (line, crosses), (weighted, _, norm, _) = (axes.lines for axes in figure.axes)
    steps, values = curve(line)
    assert steps == [1, 2, 3, 4] and values[:2] + values[3:] == [4.0, 2.0, 1.0]
    assert np.isnan(values[2]) and curve(crosses)[0] == [3.0]
    assert curve(norm)[1] == pytest.approx([0.1, 0.2, 0.3, 0.4]) and curve(norm) == curve(weighted)
    heavier = [line | {"balance/dino/weight": 0.5} for line in LOG]
    assert curves.series(heavier, pair[0])[1] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert [axes.texts[0].get_text() for axes in figure.axes] == [
        "DINO: loss",
        "weighted gradient norm",
    ]
    with pytest.raises(ValueError, match="no panels"):
        curves.draw_curves({"run": LOG}, [])


def test_curves_of_seeds_share_the_colour_of_their_run():
    runs = {"DINO": [LOG, LOG], "$hybrid": LOG[:1], "nothing yet": []}
    figure = curves.draw_curves(runs, ["loss"])
    lines = figure.axes[0].lines[::2]  # each has its crosses behind it
    assert [line.get_color() for line in lines] == [curves.COLOURS[i] for i in (0, 0, 1, 2)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    assert "$hybrid" in curves.svg_text(figure)


def test_odd_numbers_are_drawn(recwarn):
    values = [
        [np.nan, np.inf, -np.inf], [0.0, 0.0], [-1.0, -1.0], [1e-30, 3e38], [np.nan, 2.0], ["a", None]
    ]  # fmt: skip
    for some in values:
        log = [{"step": i, "loss": value} for i, value in enumerate(some)]
        assert "<svg" in curves.svg_text(curves.draw_curves({"run": log}, ["loss"]))
    assert not recwarn.list
    for constant, limits in ((2.0, (1.0, 3.0)), (-2.0, (-3.0, -1.0))):  # not a zoom into rounding
        log = [{"step": i, "lr": constant * (1 + 1e-7 * i)} for i in range(3)]
        axes = curves.draw_curves({"run": log}, ["lr"]).axes[0]
        assert axes.get_ylim() == pytest.approx(limits, rel=1e-5)


def test_every_number_of_the_log_has_its_panel():
    log = [{"step": 1, "name": "x", "dino/loss": 1.0, "loss": 2.0, "mine/odd": 1}]
    log += [{"step": 2, "balance/a/norm": 1.0, "balance/b/norm": 2.0, "balance/cos/a,b": 0.1}]
    assert curves.curve_sections({"one": log[:1], "two": [log[1:]]}) == {
        "Losses": [("loss",), ("dino/loss",)],
        "Gradient balance": [("balance/a/norm", "balance/b/norm"), ("balance/cos/a,b",)],
        "Other metrics": [("mine/odd",)],
    }
