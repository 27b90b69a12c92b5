"""Seconds of the tasks of an evaluation and of prepare, at a toy size."""

import pytest

from experiments.benchmark.evaluation import Files, Sizes, measure, prepared, table, tasks

BASE = Sizes(images=80, classes=3, columns=8, k=3)


@pytest.mark.slow
def test_every_task_has_its_seconds():
    found = measure(BASE, "classes", 4, None)
    assert found.keys() == tasks(BASE).keys() and min(found.values()) > 0


def test_a_row_a_setting_and_a_column_a_task():
    chosen = {value: measure(BASE, "k", value, ["draws", "clusters"]) for value in (2, 5)}
    assert chosen[2].keys() == {"draws", "clusters"}
    prepare = {"files": {3: {"prepare": 1.25}}}
    lines = table({"k": chosen} | prepare).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["k", "", "files"]
    assert lines[-1].split("|")[-2].strip() == "1.2" and "prepare" in lines[0]


def test_prepare_prepares():
    prepared(Files(files=3, side=200))()
