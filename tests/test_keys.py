"""Kinds of loss terms, used by ranges, automatic values, advice and presets."""

import inspect

import pytest
from ml_collections import ConfigDict
from shrunk import shrunk

from configs import base, presets
from dinotwins_jax.build import build
from dinotwins_jax.losses import LOSSES, _find
from dinotwins_jax.settings import keys
from dinotwins_jax.settings.advice import Setting, find
from dinotwins_jax.settings.auto import known_keys
from dinotwins_jax.settings.ranges import check_ranges


def test_the_losses_that_settings_know_are_those_that_there_are():
    assert set(keys.LOSSES) == set(LOSSES)
    distilling = {n for n in LOSSES if "student_temp" in inspect.signature(_find(n)).parameters}
    assert distilling == set(keys.DISTILLING)


@pytest.mark.parametrize(
    ("name", "term", "kind"),
    [
        ("dino", {}, "dino"),
        ("mine", {"fn": "dino"}, "dino"),
        ("mine", {"fn": "dinotwins_jax.losses.dino:dino"}, "dino"),
        ("mine", {}, ""),
        ("dino", {"fn": "fork:alignment"}, ""),
        ("mine", {"fn": "fork:dino"}, ""),
    ],
)
def test_a_term_is_what_its_function_is(name, term, kind):
    assert keys.kind_of(name, term) == kind


def test_keys_of_nested_mappings():
    config = ConfigDict({"a": {"b": 1, "c": {}}, "d": None})
    assert keys.value_at(config, "a.b") == 1 and keys.value_at(config, "a.x.y", 7) == 7
    assert keys.flatten(config.to_dict()) == {"a.b": 1, "a.c": {}, "d": None}


def config_with(**terms):
    config = base.get_config()
    config.loss = ConfigDict(terms)
    return config


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"fn": "dino", "student_temp": 0.0}, "config.loss.mine.student_temp is 0.0"),
        ({"fn": "barlow_twins", "hidden_dims": ()}, "config.loss.mine.hidden_dims is empty"),
        ({"fn": "ibot", "mask_ratio": (0.1,)}, "config.loss.mine.mask_ratio is"),
        ({"fn": "fork:alignment", "weight": -1.0}, "config.loss.mine.weight is -1"),
    ],
)
def test_ranges_hold_for_a_loss_under_another_name(term, message):
    with pytest.raises(ValueError, match=message):
        check_ranges(config_with(mine=term))


def test_arguments_of_a_loss_from_outside_have_no_ranges_and_no_automatic_values():
    term = {"fn": "fork:alignment", "student_temp": -3.0, "out_dim": 0}
    config = config_with(mine=term)
    check_ranges(config)
    assert not any(key.startswith("loss.") for key in known_keys(config.to_dict()))
    own = config_with(mine={"fn": "dino", "out_dim": 16, "student_temp": 0.1})
    assert "loss.mine.out_dim" in known_keys(own.to_dict())


@pytest.mark.parametrize("preset", ["demo", "cifar10", "cifar10_cpu", "cifar10_lt", "coco_cpu"])
def test_presets_leave_a_fork_s_arguments_alone(preset):
    sizes = {"out_dim": 7, "hidden_dim": 11, "hidden_dims": (13, 17), "bottleneck_dim": 19}
    config = config_with(mine={"fn": "fork:alignment", **sizes}, other={"fn": "dino", **sizes})
    config = presets.apply(config, preset)
    assert {key: config.loss.mine[key] for key in sizes} == sizes
    assert config.loss.other.out_dim in (1024, 4096) and config.loss.other.hidden_dims != (13, 17)


def test_advice_knows_a_term_by_its_function():
    mine = {"fn": "barlow_twins", "lambd": 1.0}
    found = find(Setting(config_with(mine=mine), images=10**6, steps=10**5))
    assert any(line.startswith("config.loss.mine.lambd is 1") for line in found)


def test_a_duration_of_a_loss_is_stated_in_epochs_and_arrives_in_steps():
    config = shrunk()
    config.loss.mine = ConfigDict({"fn": "fork:late", "start_epochs": 7.0})  # half of 14 epochs
    run = build(config)
    assert run.loss.terms["mine"][1].init()["start_steps"] == 2  # of 4
    config.loss.mine = ConfigDict({"fn": "fork:alignment", "start_epochs": 7.0})
    with pytest.raises(
        ValueError, match=r"loss\.mine: .*start_steps.*_epochs are passed as …_steps"
    ):
        build(config)
