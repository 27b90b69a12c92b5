"""Tables of docs/photographs.md: those of the results beside them, by seed."""

import json
from pathlib import Path

import pytest

from experiments.comparison.outcome import score_table, significance, significance_table

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "experiments" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_page_shows_what_was_measured(path):
    found, page = json.loads(path.read_text()), (ROOT / "docs" / "photographs.md").read_text()
    assert path.name in page
    assert score_table(found["scores"]) in page
    tests = significance(found["scores"])
    assert tests.keys() == found["significance"].keys()
    assert not tests or significance_table(tests) in page
