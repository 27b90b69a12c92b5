"""Automatic values of open keys, and their reasons."""

import json
import math
from operator import attrgetter

import pytest
from shrunk import shrunk

from configs import barlow_twins, byol, dino, hybrid, presets
from dinotwins_jax.build import build, for_evaluation
from dinotwins_jax.settings.advice import Setting, find
from dinotwins_jax.settings.auto import Facts, half_life, known_keys, open_keys, resolve
from dinotwins_jax.train import train
from experiments.comparison.plan import is_finished, make_configs

KEYS = known_keys(hybrid.get_config().to_dict())
IMAGENET = Facts(images=1_281_167, batch_size=1024, steps=125_100, epochs=100.0, embed_dim=384)
IMAGES = {"demo": 8_000, "coco_cpu": 2_286}


def facts_of(config, images):
    steps = round(config.total_epochs * (images // config.batch_size))
    return Facts(images, config.batch_size, steps, config.total_epochs, config.model.embed_dim)


def values(facts):
    return {key: choice.value for key, choice in resolve(KEYS, facts).items()}


def test_at_imagenet_it_is_the_official_recipe():
    found = values(IMAGENET)
    official = {"loss.dino.out_dim": 65536, "loss.dino.center_momentum": 0.9, "teacher.momentum": 0.996,
                "teacher.warmup_temp": 0.04, "teacher.temp": 0.07, "optim.weight_decay": 0.04,
                "optim.final_weight_decay": 0.4, "optim.freeze_backbone_epochs": 0.0}  # fmt: skip
    assert {key: found[key] for key in official} == pytest.approx(official, rel=1e-4)
    epochs = {"teacher.warmup_temp_epochs": 30, "optim.warmup_epochs": 10}
    epochs |= {"optim.freeze_last_layer_epochs": 1}
    assert {key: found[key] for key in epochs} == pytest.approx(epochs, rel=1e-3)
    assert found["teacher.final_momentum"] == pytest.approx(1.0, abs=1e-4)
    vanilla = values(IMAGENET._replace(batch_size=512))["optim.lr"]  # 8 GPUs x 64: peak 1e-3
    assert vanilla * 512 / 256 == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("preset", IMAGES)
def test_in_a_thousand_steps_it_is_near_what_was_found_by_hand(preset):
    """Rates within a tenth, half-lives within a third; where a value is discrete it is the same."""
    config = dino.get_config(preset)
    found = values(facts_of(config, IMAGES[preset]))
    by_hand = {key: attrgetter(key)(config) for key in found}
    same = ("teacher.temp", "teacher.warmup_temp", "optim.weight_decay", "optim.final_weight_decay",
            "loss.dino.center_momentum")  # fmt: skip
    assert {key: found[key] for key in same} == {key: by_hand[key] for key in same}
    assert found["optim.lr"] == pytest.approx(by_hand["optim.lr"], rel=0.1)
    for key in ("teacher.momentum", "teacher.final_momentum"):
        assert half_life(found[key]) == pytest.approx(half_life(by_hand[key]), rel=0.34)
    assert found["optim.warmup_epochs"] / config.total_epochs == pytest.approx(1 / 14, abs=0.04)
    assert found["loss.dino.out_dim"] == by_hand["loss.dino.out_dim"]


def test_the_half_life_is_so_many_images_until_the_run_is_short():
    """The EMA scaling rule: at batch B the momentum is 0.996^(B / 1024)."""
    for batch in (128, 256, 1024, 4096):
        momentum = values(IMAGENET._replace(batch_size=batch))["teacher.momentum"]
        assert momentum == pytest.approx(0.996 ** (batch / 1024), abs=2e-5)
    short = values(IMAGENET._replace(batch_size=128, steps=2_000))["teacher.momentum"]
    assert half_life(short) == pytest.approx(2_000 / 40, rel=0.01)


@pytest.mark.parametrize(
    ("images", "prototypes"),
    [(60, 32), (500, 256), (8_000, 1024), (50_000, 4096), (118_287, 16384), (10**7, 65536)],
)
def test_prototypes_grow_with_the_images(images, prototypes):
    assert values(IMAGENET._replace(images=images))["loss.dino.out_dim"] == prototypes


def test_trained_weights_and_lars_have_other_rates():
    plain = values(IMAGENET)
    trained = values(IMAGENET._replace(has_weights=True))
    assert trained["optim.lr"] == pytest.approx(plain["optim.lr"] / 10, rel=0.01)
    assert trained["optim.freeze_backbone_epochs"] == trained["optim.warmup_epochs"] > 0
    lars = values(IMAGENET._replace(optimizer="lars"))
    assert lars["optim.lr"] == 0.2  # per 256
    assert lars["optim.weight_decay"] == lars["optim.final_weight_decay"] == 1e-6


def test_the_peak_is_the_same_under_either_scaling_of_the_rate():
    """optim.lr means another batch, the rate in use does not change."""
    for batch in (64, 1024):
        facts = IMAGENET._replace(batch_size=batch)
        linear = values(facts)["optim.lr"] * batch / 256
        root = values(facts._replace(lr_scaling="sqrt_1024"))["optim.lr"] * (batch / 1024) ** 0.5
        assert root == pytest.approx(linear, rel=0.01)


def test_a_predictor_is_as_fast_as_by_hand_in_short_runs_and_as_the_rest_in_long_ones():
    (key,) = set(known_keys(byol.get_config().to_dict())) - set(KEYS)
    by_hand = byol.get_config("demo").optim.predictor_lr_mult
    for steps, expected in ((500, by_hand), (1_000, by_hand), (125_000, 1.0), (11_180, 5.48)):
        found = resolve([key], IMAGENET._replace(steps=steps))[key].value
        assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("images", [3, 60, 3_000, 10**6])
@pytest.mark.parametrize("batch_size", [2, 256])
@pytest.mark.parametrize("epochs", [1.0, 300.0])
def test_any_run_gets_a_config_that_builds_without_advice(images, batch_size, epochs):
    config = hybrid.get_config("coco+auto")
    config.batch_size, config.total_epochs = batch_size, epochs
    config.checkpoint.every_epochs = 1.0
    steps = round(epochs * max(images // batch_size, 1))
    facts = Facts(images, batch_size, steps, epochs, 384)
    chosen = resolve(open_keys(config.to_dict()), facts)
    config.update_from_flattened_dict({key: choice.value for key, choice in chosen.items()})
    assert all(math.isfinite(choice.value) for choice in chosen.values())
    about_the_data = ("config.batch_size", "config.loss.barlow_twins")
    left = [x for x in find(Setting(config, images, steps)) if not x.startswith(about_the_data)]
    # A run of so few steps has no room for a teacher of its own.
    assert steps < 8 or left == []


@pytest.mark.parametrize("module", [hybrid, dino, barlow_twins, byol])
def test_auto_leaves_the_known_keys_open_and_nothing_else(module):
    config, plain = (
        module.get_config(p).to_dict() for p in ("demo+auto+dinov2_as_written", "demo")
    )
    assert open_keys(config) == known_keys(config) and open_keys(plain) == []
    temperatures = {"teacher.temp", "teacher.warmup_temp", "teacher.warmup_temp_epochs"}
    assert temperatures.isdisjoint(known_keys(config)) == (module in (barlow_twins, byol))
    assert ("optim.predictor_lr_mult" in known_keys(config)) == (module is byol)
    assert config["loss"].keys() == plain["loss"].keys() and config["views"]["blur_kernel"] == 9
    with pytest.raises(ValueError, match=r"unknown preset 'auto'.*\(as in demo\+auto\)"):
        presets.apply(module.get_config(), "auto")


def auto(**options):
    config = shrunk(hybrid, "demo+auto", **options)
    config.loss.dino.out_dim = None  # which the shrinking gave
    return config


def test_explicit_values_win_and_the_run_says_what_it_chose():
    run = build(auto(optim__lr=0.3))
    assert run.config.optim.lr == 0.3 and run.config.loss.dino.out_dim == 32
    assert open_keys(run.config.to_dict()) == []
    head, *lines = run.recipe
    assert head == "recipe for 60 images, batch 8, 4 steps:" and len(lines) == len(KEYS)
    lines = {line.split()[0]: line for line in lines}
    assert set(lines) == set(KEYS) and lines["optim.lr"].split()[1:] == ["0.3", "given"]
    assert "a tenth of 60 images" in lines["loss.dino.out_dim"]
    assert build(shrunk()).recipe == []
    evaluated = build(for_evaluation(auto(optim__lr=0.3)))
    assert evaluated.config.teacher == run.config.teacher  # though its batch is another one


@pytest.mark.slow
def test_a_run_keeps_its_recipe_and_is_known_by_it(tmp_path, capfd):
    config = auto(evals__tasks=(), evals__pictures=0, evals__monitor_every_epochs=0.0)
    train(config, tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["loss"]["dino"]["out_dim"] == 32 and kept["teacher"]["momentum"] > 0
    text = (tmp_path / "recipe.txt").read_text()
    assert text in capfd.readouterr().out and "teacher.momentum" in text
    assert train(config, tmp_path) == {}  # the same command goes on
    with pytest.raises(ValueError, match=r"differs in optim\.lr"):
        train(auto(optim__lr=0.3), tmp_path)


def test_a_comparison_goes_on_with_runs_by_the_recipe(tmp_path):
    config = make_configs("demo+auto", ["hybrid"], 0, {"hybrid": {"optim.lr": "1"}})["hybrid"]
    assert config.optim.lr == 1.0 and "optim.lr" not in open_keys(config.to_dict())
    kept = build(config).config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(kept))
    report = {"step": 868, "seconds": dict.fromkeys(config.evals.tasks, 1.0)}
    (tmp_path / "scores.json").write_text(json.dumps(report))
    assert is_finished(tmp_path, config, 868)
    config.optim.lr = 2.0
    assert not is_finished(tmp_path, config, 868)
