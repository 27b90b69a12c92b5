"""Runs of before: keys that their config.json lacks."""

import json

import pytest
from shrunk import shrunk

from configs import base
from dinotwins_jax.cli import command, overrides_of_run
from dinotwins_jax.configuration import config_of
from dinotwins_jax.settings.added import ADDED, OF_TERMS, with_added
from dinotwins_jax.settings.keys import flatten, value_at


def before(config: dict) -> dict:
    """The config as a run of before wrote it."""
    config = json.loads(json.dumps(config))
    for key in ADDED:
        *sections, last = key.split(".")
        node = config
        for name in sections:
            node = node.get(name, {})
        node.pop(last, None)
    for name in ("subset", "window", "probe"):
        config["data"].pop(name, None)
    for term in config["loss"].values():
        term.pop("weight_norm", None)
    return config


def test_added_keys_are_keys_and_have_the_defaults():
    known = json.loads(json.dumps(base.get_config().to_dict()))
    default = {key: value_at(known, key, "no such key") for key in ADDED}
    assert default == ADDED | {"model.position_interpolation": None}
    assert base.dino_terms().weight_norm == base.ibot_terms().weight_norm == OF_TERMS["weight_norm"]


def test_a_run_of_before_gets_the_keys_that_it_lacks(tmp_path):
    whole = shrunk()
    whole.model.position_interpolation = "dino"
    whole.loss.mine = base.ibot_terms()
    whole.loss.mine.fn = "ibot"
    whole = json.loads(json.dumps(whole.to_dict()))
    old = before(whole)
    (tmp_path / "config.json").write_text(json.dumps(old))
    kept = flatten(whole)
    for name in ("scenes", "coco", "folder", "tfds"):  # options of other data for the probes
        kept = {k: v for k, v in kept.items() if not k.startswith(f"data.probe.{name}.")}
    assert len(flatten(old)) < len(kept) - 30
    assert flatten(config_of(tmp_path).to_dict()) == kept
    assert old == before(whole)  # a copy is filled
    assert with_added(whole) == whole


def test_what_is_no_section_is_left_as_it_is():
    broken = {
        "data": {"window": 3, "subset": None},
        "views": 2,
        "loss": {"dino": 1, "a": {"fn": 2}},
    }
    found = with_added(broken)
    assert found["data"]["window"] == 3 and found["data"]["subset"] is None
    assert {key: found[key] for key in ("views", "loss")} == {
        key: broken[key] for key in ("views", "loss")
    }
    assert "model" not in found


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("evals.supervised_steps", "5", 5),
        ("data.subset.classes", "2", 2),
        ("data.window.range", "(0, 9)", (0, 9)),
        ("data.probe.source", "folder", "folder"),
        ("optim.final_lr_ratio", "0.5", 0.5),
    ],
)
def test_keys_that_came_later_can_be_set_for_a_run_of_before(tmp_path, key, text, value):
    (tmp_path / "config.json").write_text(json.dumps(before(shrunk().to_dict())))
    given = {}

    def work(values):
        given.update(overrides_of_run(values))
        return 0

    def define(values):
        from absl import flags

        flags.DEFINE_string("workdir", None, "", flag_values=values)

    arguments = [f"--workdir={tmp_path}", f"--config.{key}={text}"]
    assert command("evaluate", "", define, work, arguments, config_required=False) == 0
    assert given == {key: value}
