"""Any config trains, or its invalid key is reported in one line before compilation.

DINOTWINS_SWEEP=200 python -m pytest tests/test_sweep.py trains every config that it draws, so many.
"""

import os

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from shrunk import shrunk

from configs import byol, dinov3, hybrid, simclr, vicreg
from dinotwins_jax.build import build
from dinotwins_jax.memory import abstract_batch
from dinotwins_jax.train import train

LONG = int(os.environ.get("DINOTWINS_SWEEP", "0"))

# Values of every key that a run can get wrong, good and bad.
VALUES = {
    "seed": [0, 7, -1],
    "init_from": [""],
    "parallel": ["jit", "pmap", "pjit"],
    "mesh.data": [0, 1, 2, 16, -1],
    "mesh.fsdp": [1, 2, 3, 0],
    "batch_size": [8, 16, 0, -8, 12],
    "micro_batches": [1, 2, 3, 0],
    "total_epochs": [14.0, 1.0, 0.0, -1.0, float("nan")],
    "total_steps": [2, -1],
    "model.name": ["vit_tiny", "vit_smol"],
    "model.embed_dim": [48, 50, 0, -48],
    "model.depth": [1, 2, 0, -1],
    "model.num_heads": [3, 5, 0],
    "model.patch_size": [8, 4, 16, 0, -8],
    "model.drop_path_rate": [0.0, 0.5, 1.0, -0.1, 2.0],
    "model.drop_path_uniform": [True, False],
    "model.num_register_tokens": [0, 2, -1],
    "model.layer_scale_init": [1e-5, -1.0],
    "model.ffn": ["mlp", "swiglu", "glu"],
    "model.positions": ["learned", "rope", "rotary"],
    "model.rope_shift": [None, 0.1, 0.0, -1.0],
    "model.rope_jitter": [None, 1.2, 0.5],
    "model.rope_rescale": [None, 2.0, 0.0],
    "model.norm_eps": [1e-6, 0.0, -1.0],
    "model.init_std": [0.02, 0.0, -1.0],
    "model.dtype": ["float32", "bfloat16", "float16"],
    "model.attention": ["auto", "xla", "cudnn", "flash"],
    "model.remat": [True],
    "data.source": ["scenes", "coco", "scene"],
    "data.dir": ["nowhere"],
    "data.canvas_size": [0, 24, 4, -1],
    "data.num_workers": [0, -1],
    "data.scenes.num_train": [60, 5, 1, 0, -1],
    "data.scenes.num_test": [20, 1, 0],
    "data.scenes.size": [24, 16, 3, 0],
    "data.scenes.seed": [0, -1],
    "data.probe.canvas_size": [0, 32, -1],
    "views.global_size": [16, 24, 20, 0, -16],
    "views.global_scale": [(0.4, 1.0), (1.0, 0.4), (0.0, 1.0), (0.4, 2.0), (0.4,)],
    "views.local_size": [8, 16, 12, 0],
    "views.local_scale": [(0.05, 0.4), (0.4, 0.05), (-0.1, 0.4)],
    "views.num_local": [0, 1, 2, -1],
    "views.local_overlap": [0.0, 0.5, 1.5, -0.1],
    "views.ratio": [(3 / 4, 4 / 3), (0.0, 1.0), (2.0, 1.0)],
    "views.flip": [0.0, 1.0, 2.0, -1.0],
    "views.vertical_flip": [0.0, 1.0, 2.0],
    "views.rotate90": [0.0, 0.75, -0.1],
    "views.jitter_prob": [0.8, 1.5],
    "views.brightness": [0.4, -1.0],
    "views.contrast": [0.4, -1.0],
    "views.saturation": [0.2, -1.0],
    "views.hue": [0.1, 0.6],
    "views.grayscale_prob": [0.2, -0.2],
    "views.blur_prob": [(1.0, 0.1, 0.5), (1.0, 0.1), (2.0, 0.0, 0.0)],
    "views.blur_radius": [(0.1, 2.0), (2.0, 0.1), (-1.0, 1.0)],
    "views.blur_kernel": [0, 9, 4, -1],
    "views.solarize_prob": [(0.0, 0.2, 0.0), (0.0, 1.2, 0.0)],
    "match_gradients_to": ["dino", "", "dion"],
    "loss.dino.weight": [1.0, 0.0, -1.0, float("nan")],
    "loss.dino.final_weight": [0.5, -1.0],
    "loss.dino.weight_warmup_epochs": [1.0, 20.0, -1.0],
    "loss.dino.out_dim": [32, 1, 0, -1],
    "loss.dino.hidden_dim": [32, 0],
    "loss.dino.bottleneck_dim": [16, 0],
    "loss.dino.student_temp": [0.1, 0.0, -1.0],
    "loss.dino.center_momentum": [0.9, 0.0, 1.5],
    "loss.dino.use_bn": [True, False],
    "loss.dino.norm_last_layer": [True, False],
    "loss.dino.weight_norm": [True, False],
    "loss.dino.centering": ["ema", "sinkhorn_knopp", "sinkhorn"],
    "loss.barlow_twins.hidden_dims": [(32, 32, 32), (16,), (), (0,), (16, -1)],
    "loss.barlow_twins.lambd": [0.005, -1.0],
    "loss.barlow_twins.pair": ["student_student", "student_teacher", "students"],
    "loss.barlow_twins.views": ["global", "all", "local"],
    "teacher.momentum": [0.9, 1.0, 1.5, -1.0],
    "teacher.final_momentum": [1.0, 1.5],
    "teacher.temp": [0.04, 0.0, -1.0],
    "teacher.warmup_temp": [0.04, 0.0],
    "teacher.warmup_temp_epochs": [0.0, 5.0, 20.0, -1.0],
    "optim.name": ["adamw", "lars", "sgd"],
    "optim.lr": [1e-3, 0.0, -1.0, float("inf")],
    "optim.betas": [(0.9, 0.999), (0.0, 0.99), (0.9, 1.0), (0.9,)],
    "optim.lr_scaling": ["linear_256", "sqrt_1024", "sqrt"],
    "optim.final_lr": [1e-6, -1.0],
    "optim.final_lr_ratio": [None, 0.0, 1.0, -1.0],
    "optim.warmup_epochs": [1.0, 0.0, 20.0, -1.0],
    "optim.weight_decay": [0.04, -1.0],
    "optim.final_weight_decay": [0.4, -1.0],
    "optim.clip": [3.0, 0.0, -1.0],
    "optim.clip_mode": ["per_parameter", "per_module", "global", "local"],
    "optim.frozen_last_layer": ["skipped", "zero_rate", "frozen"],
    "optim.freeze_last_layer_epochs": [0.0, 1.0, 20.0, -1.0],
    "optim.freeze_backbone_epochs": [0.0, 5.0, 20.0, -1.0],
    "optim.layer_decay": [1.0, 0.7, 0.0, 1.5],
    "optim.patch_embed_lr_mult": [1.0, 0.2, -1.0],
    "optim.predictor_lr_mult": [1.0, 10.0, 0.0],
    "log.every_steps": [2, 0],
    "log.writers": [("jsonl",), (), ("tensorboard",), ("jsonl", "tensorbord")],
    "checkpoint.every_epochs": [7.0, 0.0],
    "checkpoint.keep": [2, 0, -1],
    "checkpoint.best_metric": ["", "monitor/knn_top1", "loss"],
    "checkpoint.best_mode": ["max", "min", "most"],
    "evals.tasks": [(), ("knn",), ("kn",)],
    "evals.monitor_every_epochs": [7.0, 0.0, -1.0],
    "evals.monitor_images": [40, 1, 0],
    "evals.batch_size": [16, 0],
    "evals.resize": [16, 8, 0],
    "evals.n_last_blocks": [1, 2, 0, 5],
    "evals.label_fractions": [(0.5,), (), (2.0,)],
    "evals.split_seeds": [(0,), ()],
    "evals.bank_solver": ["ridge", "logistic", "svm"],
    "evals.knn_k": [(5,), (0,), ()],
    "evals.knn_temp": [0.07, 0.0],
    "evals.shots": [(1,), (0,)],
    "evals.finetune_fraction": [0.1, 0.0],
    "evals.attention_size": [16, 4],
    "evals.attention_keep": [0.6, 0.0, 1.5],
    "evals.mask_images": [10, -1],
    "evals.pictures": [0, 2, -1],
}

# Those of the family's terms, in a config that has them.
FAMILY = {
    "loss.ibot.weight": [1.0, -1.0],
    "loss.ibot.out_dim": [16, 0],
    "loss.ibot.shared_head": ["", "dinosaur", "dino"],
    "loss.ibot.student_temp": [0.1, 0.0],
    "loss.ibot.centering": ["ema", "sinkhorn_knopp", "sinkhorn"],
    "loss.ibot.center_momentum": [0.9, 2.0],
    "loss.ibot.image_fraction": [0.5, 1.0, 0.0, 1.5],
    "loss.ibot.mask_ratio": [(0.1, 0.5), (0.3, 0.3), (0.5, 0.1), (0.1,), (0.0, 1.0)],
    "loss.ibot.min_patches": [1, 4, 0],
    "loss.koleo.weight": [0.1, -0.1],
    "loss.gram.start_epochs": [0.0, 7.0, -1.0, 20.0],
    "loss.gram.refresh_epochs": [0.0, 1.0, -1.0],
    "loss.gram.max_refreshes": [0, 3, -1],
    "loss.gram.level": ["image", "batch", "pixel"],
    "loss.byol.hidden_dim": [16, 0],
    "loss.byol.out_dim": [16, 0],
    "loss.simclr.hidden_dims": [(16, 8), (), (0,)],
    "loss.simclr.temp": [0.1, 0.0],
    "loss.vicreg.hidden_dims": [(16, 8), ()],
    "loss.vicreg.similarity": [25.0, -1.0],
    "loss.vicreg.variance": [25.0, -1.0],
    "loss.vicreg.covariance": [1.0, -1.0],
}


@st.composite
def changes(draw):
    """A few keys and values; the rest is a config that trains."""
    keys = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4, unique=True))
    return {key: draw(st.sampled_from(VALUES[key])) for key in keys}


def config_of(changed, module=hybrid):
    config = shrunk(module, total_steps=2, evals__tasks=("knn",), evals__pictures=0)
    config.update_from_flattened_dict(changed)
    return config


def check_error(error, changed):
    message = str(error)
    assert "\n" not in message, message
    names = {part for key in changed for part in (key, key.rsplit(".", 1)[-1])}
    assert any(name in message for name in names), f"{message!r} names none of {sorted(changed)}"


def trained_or_named(changed, workdir):
    """Runs all checks; returns whether the config trained."""
    config = config_of(changed)
    try:
        run = build(config)
    except (ValueError, OSError) as error:
        check_error(error, changed)
        return False
    if workdir is None:  # shapes and types of the whole step, without compiling it
        state = jax.eval_shape(run.fresh_state)
        if run.placement.axis_name is None:
            jax.eval_shape(run.train_step, state, abstract_batch(run, config.batch_size))
    else:
        train(config, workdir)
    return True


@pytest.mark.slow
@settings(
    max_examples=LONG or 25,
    deadline=None,
    derandomize=not LONG,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(changed=changes())
def test_any_config_trains_or_names_its_key(changed, tmp_path_factory):
    trained_or_named(changed, tmp_path_factory.mktemp("run") if LONG else None)


@pytest.mark.parametrize("key", VALUES)
def test_every_value_alone_is_taken_or_named(key):
    """Checks the value of each key without tracing."""
    for value in VALUES[key]:
        try:
            build(config_of({key: value}))
        except (ValueError, OSError) as error:
            check_error(error, {key: value})


@pytest.mark.parametrize("key", FAMILY)
def test_every_value_of_the_family_is_taken_or_named(key):
    """The first one is taken, the last one named."""
    own = {"byol": byol, "simclr": simclr, "vicreg": vicreg}
    module = own.get(key.split(".")[1], dinov3)
    build(config_of({key: FAMILY[key][0]}, module))
    for value in FAMILY[key][1:-1]:
        try:
            build(config_of({key: value}, module))
        except (ValueError, OSError) as error:
            check_error(error, {key: value})
    with pytest.raises((ValueError, OSError)) as error:
        build(config_of({key: FAMILY[key][-1]}, module))
    check_error(error.value, {key: FAMILY[key][-1]})


@pytest.mark.slow
def test_odd_ones_train(tmp_path):
    odd = {
        "model.num_register_tokens": 2,
        "model.ffn": "swiglu",
        "model.positions": "rope",
        "model.rope_rescale": 2.0,
        "model.remat": True,
        "views.global_size": 24,
        "views.num_local": 0,
        "optim.name": "lars",
        "loss.barlow_twins.pair": "student_teacher",
    }
    assert trained_or_named(odd, tmp_path)
