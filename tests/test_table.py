"""The scores of a run as tables, for a terminal, a page and Markdown; the names that they show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_scores import SCORES

from dinotwins_jax.evals.names import monitor_title, score_title, task_title, term_title
from dinotwins_jax.evals.outputs import EVALUATION, TRAINING, listing
from dinotwins_jax.evals.table import (
    headline,
    headline_rows,
    markdown,
    score_rows,
    summary,
    terminal_table,
)

ROOT = Path(__file__).parent.parent
LINEAR = {f"{probe} {share}%": {"top1_mean": 70.0 + share, "top1_std": 1.25}
          for share in (1, 10, 20) for probe in ("sgd", "ridge")}  # fmt: skip
FULL = {
    "linear": LINEAR | {"multilabel sgd 10%": {"map_mean": 20.0, "map_std": 1.0}},
    "knn": {"k20": {"top1": 83.9}},
    "knn multilabel": {"k20": {"map": 31.0}},
    "fewshot": {"shots5": {"top1_mean": 61.0, "top1_std": 2.0}},
    "attention": {"jaccard_mean_map": 42.0, "jaccard_fitted": 68.0, "jaccard_best_head": 25.0,
                  "pointing": 9.0},
    "segmentation": {"jaccard": 55.0},
}  # fmt: skip
WIDE = dict.fromkeys(("teacher", "random weights", "raw pixels", "centre box"), FULL)
FIRST = [
    "multilabel sgd 10%, mAP",
    "multi-label k-NN, mAP",
    "sgd 10%",
    "k-NN, k=20",
    "5 images a class",
]
FIRST += ["attention, Jaccard", "with fitted share", "its best head", "pointing"]
FIRST += ["normalised cut, Jaccard"]
LAST = ["sgd 1%", "ridge 1%", "ridge 10%", "sgd 20%", "ridge 20%"]


def test_all_scores_of_one_task():
    features, rows, protocols = score_rows(SCORES, "knn")
    assert features == ["teacher", "raw <pixels>"] and protocols == ["p3"]
    assert rows == {"k-NN, k=20: top-1": ["83.9", "45.1"], "k-NN, k=20: top-5": ["99.0", "80.3"]}
    features, rows, protocols = score_rows(SCORES, "linear")
    assert features == ["teacher"] and protocols == ["p1", "p2"]
    assert rows == {
        "SGD, 10% of the labels: top-1": ["78.4 ± 0.5"],
        "ridge, 10% of the labels: top-1": ["80.0 ± 0.0"],
    }
    _, rows, _ = score_rows(SCORES, "attention")
    assert rows == {"number of images": ["12"], "pointing game": ["50.0 ± 5.0"]}


def test_the_summary_shows_what_there_is_the_important_scores_first():
    assert headline(SCORES["teacher"]) == {
        "sgd 10%": (78.44, 0.51),
        "ridge 10%": (80.0, 0.0),
        "k-NN, k=20": (83.9, None),
        "pointing": (50.0, None),
    }
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in summary(SCORES).splitlines()]
    assert lines[0] == ["", "teacher", "raw <pixels>"]
    assert lines[2:] == [
        ["sgd 10%", "78.4 ± 0.5", "–"],
        ["k-NN, k=20", "83.9", "45.1"],
        ["pointing", "50.0", "–"],
        ["ridge 10%", "80.0 ± 0.0", "–"],
    ]
    assert len({len(line) for line in summary(SCORES).splitlines()}) == 1
    assert list(headline_rows(WIDE)[1]) == FIRST + LAST


def test_several_labels_are_named_map():
    scores = {"linear": {"multilabel sgd 10%": {"map_mean": 20.0, "map_std": 1.0}}}
    assert headline(scores) == {"multilabel sgd 10%, mAP": (20.0, 1.0)}
    assert markdown([["a", "b"], ["1", "–"]]) == "| a | b |\n|---|---|\n| 1 | – |"


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_terminal_shows_a_line_a_score(width):
    lines = terminal_table(WIDE, width).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == [
        "in",
        "%",
        "teacher",
        "random",
        "weights",
        "raw",
        "pixels",
        "centre",
        "box",
    ]
    blank = lines.index("", 2)
    assert [line[1:25].strip() for line in lines[2:blank]] == FIRST
    assert [line[1:25].strip() for line in lines[blank + 1 : blank + 1 + len(LAST)]] == LAST
    points = {line.index(".") for line in lines[2:blank]}
    assert len(points) == 2, "the means of a column end in one place, 9.0 beside 20.0 ± 1.0 too"
    assert lines[-1] == " ± is the standard deviation over the draws of the labels"


def test_no_score_of_the_table_is_no_table():
    assert terminal_table({}) == "" == terminal_table({"teacher": {"pca": {}}})


@pytest.mark.parametrize(
    ("ks", "title"),
    [((10, 20, 100), "k-NN, k=20"), ((5,), "k-NN, k=5"), ((10, 30), "k-NN, k=10"),
     ((1, 100), "k-NN, k=1"), ((15, 21, 200), "k-NN, k=21")],
)  # fmt: skip
def test_the_table_shows_20_neighbours_or_the_nearest_number(ks, title):
    """Of two equally near ones the smaller."""
    scores = {"knn": {"protocol": "p"} | {f"k{k}": {"top1": float(k)} for k in ks}}
    number = int(title.rpartition("=")[2])
    assert headline(scores) == {title: (float(number), None)}
    several = {"knn multilabel": {f"k{k}": {"map": float(k)} for k in ks}}
    named = "multi-label k-NN, mAP" if number == 20 else f"multi-label k-NN, k={number}, mAP"
    assert headline(several) == {named: (float(number), None)}
    assert f"k={number}" in terminal_table({"teacher": scores}, 80)


def test_the_table_shows_five_shots_or_the_nearest_number():
    shots = {f"shots{n}": {"top1_mean": float(n), "top1_std": 0.0} for n in (1, 2, 16)}
    assert headline({"fewshot": shots}) == {"2 images a class": (2.0, 0.0)}
    assert headline({"fewshot": {"shots1": shots["shots1"]}}) == {"1 image a class": (1.0, 0.0)}


def test_balanced_accuracies_stand_below_top_1_where_asked():
    both = {"top1_mean": 90.0, "top1_std": 1.0, "balanced_mean": 40.0, "balanced_std": 2.0}
    linear = {f"{probe} {100 * f:g}%": both | {"fraction": f}
              for f in (0.1, 1.0, 0.2) for probe in ("sgd", "ridge")}  # fmt: skip
    scores = {
        "linear": linear,
        "knn": {"k20": {"top1": 80.0, "balanced": 30.0}},
        "fewshot": {"shots5": both},
        "finetune": both,
        "knn multilabel": {"k20": {"map": 50.0}},
    }
    plain, found = headline(scores), headline(scores, balanced=True)
    assert found.items() >= plain.items()
    assert {title: value for title, value in found.items() if title not in plain} == {
        "ridge 100%, balanced": (40.0, 2.0),
        "k-NN, k=20, balanced": (30.0, None),
        "5 images a class, balanced": (40.0, 2.0),
        "fine-tuned, balanced": (40.0, 2.0),
    }
    titles = list(headline_rows({"teacher": scores}, balanced=True)[1])
    for title in ("k-NN, k=20", "ridge 100%", "fine-tuned"):
        assert titles[titles.index(title) + 1] == f"{title}, balanced"
    lines = terminal_table({"teacher": scores}, 80, balanced=True).splitlines()
    assert max(map(len, lines)) <= 80 and any("k-NN, k=20, balanced" in line for line in lines)
    assert "balanced" not in terminal_table({"teacher": scores}, 80)


def test_boxes_are_named():
    scores = {
        "attention boxes": {"protocol": "attention-box-v1", "pointing": 50.0, "corloc": 20.0},
        "segmentation boxes": {"protocol": "ncut-box-v1", "corloc": 30.0},
    }
    assert list(headline(scores)) == [
        "pointing at boxes", "CorLoc of boxes", "normalised cut, CorLoc of boxes"
    ]  # fmt: skip
    assert task_title("attention boxes") == "Attention of the last block and object boxes"


def test_a_narrow_terminal_folds_the_table():
    lines = terminal_table(SCORES, 30).splitlines()
    assert max(map(len, lines)) <= 30
    words = " ".join(lines).split()
    assert {"teacher", "10%", "78.4", "0.5", "83.9", "45.1"} <= set(words) and "…" not in str(words)
    assert "±" not in terminal_table({"teacher": {"knn": {"k20": {"top1": 83.9}}}}, 80)


def test_a_table_fits_the_terminal_that_columns_names():
    code = f"from dinotwins_jax.evals.table import terminal_table as t; print(t({WIDE}))"

    def widest(**environment):
        kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        kept |= {"PYTHONUTF8": "1"} | environment
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=kept, capture_output=True, text=True
        )
        return max(map(len, done.stdout.splitlines()))

    assert 60 < widest() <= 100 and widest(COLUMNS="60") <= 60


def test_names():
    assert score_title(("shots1", "top1")) == "1 image a class: top-1"
    assert score_title(("sizes", "small", "objects")) == "small objects: number of objects"
    assert score_title(("multilabel sgd 10%", "map")) == "multi-label SGD, 10% of the labels: mAP"
    assert score_title(("k20", "balanced")) == "k-NN, k=20: balanced accuracy"
    assert score_title(("10%", "top1")) == "whole network, 10% of the labels: top-1"
    assert score_title(("new_score",)) == "new score"
    assert [task_title(t) for t in ("knn multilabel", "finetune multilabel", "mine")] == [
        "Multi-label k-NN", "Multi-label fine-tuning", "mine"
    ]  # fmt: skip
    assert [monitor_title(f"monitor/{k}") for k in ("knn_top1", "ridge_map")] == [
        "k-NN: top-1", "ridge probe: mAP"
    ]  # fmt: skip
    assert [term_title(t) for t in ("barlow_twins", "mine")] == ["Barlow Twins", "mine"]


def test_the_files_that_are_there_are_listed(tmp_path):
    for name in ("pca.png", "scores.json", "metrics.jsonl", "note.txt"):
        (tmp_path / name).touch()
    names = [line.split()[0] for line in listing(tmp_path, EVALUATION, TRAINING).splitlines()[1:]]
    assert names == ["scores.json", "pca.png", "metrics.jsonl"]
    assert listing(tmp_path, TRAINING).splitlines()[0] == f"In {tmp_path}:"
    assert len(listing(tmp_path, TRAINING).splitlines()) == 2
