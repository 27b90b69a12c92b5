"""The hybrid's open choices as rows: what each changes, and the table."""

import json

import pytest
from shrunk import SHRUNK

from dinotwins_jax.build import build
from dinotwins_jax.settings.keys import flatten
from experiments.compositions import BASE, CHOICES, _report, compositions, config_of_row

# Of every run here; written as on a command line.
SMALL = {key: repr(value) for key, value in SHRUNK.items() if not key.startswith("evals.tasks")}
OVERRIDES = {"config": SMALL | {"evals.mask_images": "4"}}


def test_every_row_differs_from_the_hybrid_in_what_its_name_says():
    configs = {row: flatten(config_of_row(row, "demo", 1, OVERRIDES).to_dict()) for row in CHOICES}
    base = configs[BASE]
    assert base["seed"] == 1 and base["match_gradients_to"] == "dino"
    for row, (method, changes) in CHOICES.items():
        differ = {key for key in base if configs[row].get(key) != base[key]}
        if method == "hybrid":
            assert differ == set(changes), row
        else:
            lacking = {"DINO alone": "barlow_twins", "Barlow Twins alone": "dino"}[row]
            assert f"loss.{lacking}.weight" not in configs[row], row
    widths = {row: config.get("loss.barlow_twins.hidden_dims") for row, config in configs.items()}
    assert widths[BASE] == (256, 256, 256) and widths["linear projector"] == (256,)
    assert widths["projector 4 times as wide"] == (1024, 1024, 1024)


@pytest.mark.parametrize("row", ["all views", "all views of both networks", "linear projector"])
def test_rows_build(row):
    assert build(config_of_row(row, "demo", 0, OVERRIDES)).total_steps == 4


def test_an_unknown_row_is_named():
    with pytest.raises(
        ValueError, match="unknown row 'both': choose from DINO alone, Barlow Twins"
    ):
        config_of_row("both", "demo", 0, {})


def test_the_table_marks_what_is_sure(tmp_path):
    scores = {
        "DINO alone": {"k-NN, k=20": [70.0, 71.0, 72.0], "DINO's loss": [3.0, 3.1, 3.2]},
        BASE: {"k-NN, k=20": [75.0, 76.1, 77.0], "DINO's loss": [3.0, 3.2, 3.1]},
        "random weights": {"k-NN, k=20": [30.0, 31.0, 32.0]},
    }
    text = _report(tmp_path, scores, {"DINO alone": 2e9, BASE: 3e9})
    dino, hybrid = (
        next(line for line in text.splitlines() if row in line) for row in list(scores)[:2]
    )
    assert (
        "71.0 ± 1.0 *" in dino and "3.1 ± 0.1   |" in dino and dino.endswith("| 1.00            |")
    )
    assert "76.0 ± 1.0" in hybrid and "*" not in hybrid and hybrid.endswith("| 1.50            |")
    found = json.loads((tmp_path / "compositions.json").read_text())
    assert found["differences"]["DINO alone"]["k-NN, k=20"]["verdict"] == "worse"
    assert (tmp_path / "table.md").read_text() == text


@pytest.mark.slow
def test_rows_are_trained_once_and_tabled(tmp_path):
    rows = [BASE, "linear projector"]
    text = compositions("demo", rows, 1, tmp_path, OVERRIDES)
    assert all(f"| {row}" in text for row in rows)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/scores.json"))]
    assert len(times) == 2 and compositions("demo", rows, 1, tmp_path, OVERRIDES) == text
    assert times == [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/scores.json"))]
