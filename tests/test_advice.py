"""Advice: every warning is given for a setting that causes it, and none for shipped configs."""

import pytest
from ml_collections import ConfigDict

from configs import (
    barlow_twins,
    byol,
    dino,
    dinov3,
    hybrid,
    hybrid_dinov2,
    presets,
    simclr,
    vicreg,
)
from dinotwins_jax.build import build
from dinotwins_jax.settings.advice import Setting, find

IMAGES = {
    "demo": 8_000,
    "coco": 118_287,
    "coco_cpu": 2_286,
    "cifar10": 50_000,
    "cifar10_cpu": 50_000,
    "cifar10_lt": 12_406,
    "cifar10_small": 500,
}


def setting(config, images):
    steps = config.total_steps or round(config.total_epochs * max(images // config.batch_size, 1))
    return Setting(config, images, steps)


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize(
    "module", [hybrid, dino, barlow_twins, byol, simclr, vicreg, dinov3, hybrid_dinov2]
)
def test_shipped_configs_need_none(module, preset):
    assert find(setting(module.get_config(preset), IMAGES[preset])) == []


# Changes to configs/hybrid.py:coco, and what is said of them; images: 118,287 if not given.
SAYS = [
    ({"batch_size": 64, "images": 40, "loss.dino.out_dim": 32}, "batch_size is 64 and there are 40"),
    ({"loss.dino.weight": 0.0, "loss.barlow_twins.weight": 0.0, "match_gradients_to": ""},
     "all terms of loss have weight 0"),
    ({"loss.dino.weight": 0.0}, "match_gradients_to is 'dino', of weight 0"),
    ({"views.num_local": 0}, "views.num_local is 0 and views.global_scale starts at 0.4"),
    ({"model.depth": 1}, "model.drop_path_rate is 0.1 and model.depth 1"),
    ({"teacher.momentum": 1.0}, "teacher.momentum is 1 from the start"),
    ({"total_steps": 500, "teacher.momentum": 0.996}, "a half-life of 173 steps in a run of 500"),
    ({"teacher.momentum": 0.0}, "teacher.momentum is 0: with the student"),
    ({"teacher.final_momentum": 0.99}, "final_momentum is 0.99, below teacher.momentum 0.996"),
    ({"teacher.temp": 0.08, "teacher.warmup_temp_epochs": 30.0}, "teacher.temp is 0.08: above 0.07"),
    ({"loss.dino.student_temp": 0.04}, "teacher.temp is 0.04, not below student_temp"),
    ({"teacher.warmup_temp": 0.06, "teacher.warmup_temp_epochs": 9.0}, "0.06, above teacher.temp 0.04"),
    ({"teacher.temp": 0.07}, "warmup_temp is 0.04, but teacher.warmup_temp_epochs is 0: no effect"),
    ({"images": 9_000}, "loss.dino.out_dim is 65536 prototypes for 9000 images"),
    ({"loss.dino.center_momentum": 1.0}, "loss.dino.center_momentum is 1: a center"),
    ({"loss.dino.center_momentum": 0.0, "batch_size": 8}, "center_momentum is 0 with batch_size 8"),
    ({"batch_size": 8}, "batch_size is 8: correlations of so few images, as in loss.barlow_twins"),
    ({"loss.barlow_twins.lambd": 0.0}, "loss.barlow_twins.lambd is 0: nothing keeps"),
    ({"loss.barlow_twins.lambd": 1.0}, "loss.barlow_twins.lambd is 1: the off-diagonal terms"),
    ({"optim.lr": 0.0}, "optim.lr is 0: nothing is trained"),
    ({"optim.lr": 1e-7}, "optim.final_lr is 1e-06, above the peak 1e-07"),
    ({"optim.final_lr_ratio": 2.0}, "optim.final_lr is 0.001, above the peak 0.0005"),
    ({"optim.clip": 0.0, "optim.lr": 4e-3}, "optim.clip is 0 with a peak rate of 0.004"),
    ({"optim.clip": 0.0, "optim.lr": 6e-3, "optim.lr_scaling": "sqrt_1024"},
     "peak rate of 0.003 (optim.lr times the root of batch_size / 1024)"),
    ({"optim.lr": 0.1}, "optim.lr is 0.1, a peak rate of 0.1"),
    ({"optim.name": "lars"}, "optim.lr is 0.0005 with lars"),
    ({"optim.warmup_epochs": 60.0}, "optim.warmup_epochs is 60, most of 100"),
    ({"optim.freeze_last_layer_epochs": 60.0}, "optim.freeze_last_layer_epochs is 60, most of 100"),
    ({"optim.freeze_backbone_epochs": 60.0, "init_from": "x"}, "freeze_backbone_epochs is 60, most of"),
    ({"optim.freeze_backbone_epochs": 5.0}, "optim.freeze_backbone_epochs is 5 without init_from"),
    ({"optim.predictor_lr_mult": 10.0}, "optim.predictor_lr_mult is 10, and no term of loss has"),
    ({"checkpoint.every_epochs": 200.0}, "checkpoint.every_epochs is 200 of 100"),
    ({"evals.monitor_every_epochs": 200.0}, "evals.monitor_every_epochs is 200 of 100"),
]  # fmt: skip


def changed(config, changes):
    images = changes.get("images", IMAGES["coco"])
    config.update_from_flattened_dict({k: v for k, v in changes.items() if k != "images"})
    return setting(config, images)


@pytest.mark.parametrize(
    ("changes", "message"), SAYS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_it_is_given_with_key_and_value(changes, message):
    found = find(changed(hybrid.get_config("coco"), changes))
    assert sum(message in line for line in found) == 1
    assert all(line.startswith("config.") and "\n" not in line for line in found)


def test_a_match_to_a_loss_of_patches_is_said_to_have_no_effect():
    config = hybrid_dinov2.get_config("coco")
    (line,) = find(changed(config, {"match_gradients_to": "ibot"}))
    assert "match_gradients_to is 'ibot', which has no gradient at the class tokens" in line


def test_what_a_method_has_no_use_for_is_said():
    config = dino.get_config("coco")
    (line,) = find(changed(config, {"match_gradients_to": "dino"}))
    assert "match_gradients_to is 'dino', the only term: no effect" in line
    config = barlow_twins.get_config("coco")
    (line,) = find(changed(config, {"teacher.warmup_temp_epochs": 30.0}))
    assert "teacher.warmup_temp_epochs is 30, and no term of loss has a teacher temperature" in line
    config = byol.get_config("demo")
    (line,) = find(changed(config, {"optim.predictor_lr_mult": 1.0, "images": IMAGES["demo"]}))
    assert "optim.predictor_lr_mult is 1 for byol in a run of 868 steps: the predictor lags" in line
    config = barlow_twins.get_config("coco")
    config.teacher.warmup_temp_epochs, config.total_epochs = 30.0, 80.0
    config.loss = ConfigDict({"mine": {"fn": "mine:with_a_temperature"}})
    for multiplier in (1.0, 10.0):
        config.optim.predictor_lr_mult = multiplier
        assert find(setting(config, 9_000)) == []


def test_a_run_carries_it():
    config = hybrid.get_config()
    config.data.scenes.num_train, config.mesh.data = 900, 1
    slow, many = build(config).advice  # 98 steps
    assert "teacher.momentum is 0.97, a half-life of 23 steps in a run of 98" in slow
    assert "loss.dino.out_dim is 1024 prototypes for 900 images" in many
