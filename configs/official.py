"""Official recipes as presets: configs/dinov2.py:coco+official.

A recipe sets every key that the official files of its method state, but the size of the backbone and the
batch; sizes in pixels (patches and crops) only on data as large as theirs, after the word "coco". The
durations of DINOv2 and DINOv3 are in epochs of 1,250 and 1,000 steps, whatever the size of the data set,
so their recipes state total_steps too. tests/test_official.py names the file and line of each value;
docs/method.md, "Official recipes", what differs.
"""

from dinotwins_jax.augment.presets import BARLOW_TWINS as BARLOW_TWINS_VIEWS
from dinotwins_jax.augment.presets import DINO as DINO_VIEWS
from dinotwins_jax.augment.presets import DINOV2_AS_TRAINED
from dinotwins_jax.settings.keys import kind_of

PIXELS = ("model.patch_size", "views.global_size", "views.local_size", "evals.resize")


def _section(name: str, values: dict) -> dict:
    return {f"{name}.{key}": value for key, value in values.items()}


# facebookresearch/dino main_dino.py, its default arguments.
DINO = {
    **{"total_epochs": 100.0, "total_steps": 0},
    **_section("views", DINO_VIEWS | {"global_size": 224, "local_size": 96}),
    **{"model.patch_size": 16, "model.init_std": 0.02, "model.norm_eps": 1e-6, "model.ffn": "mlp"},
    **{"model.drop_path_rate": 0.1, "model.drop_path_uniform": False},
    **{
        "model.num_register_tokens": 0,
        "model.layer_scale_init": None,
        "model.positions": "learned",
    },
    **_section("model", {"rope_shift": None, "rope_jitter": None, "rope_rescale": None}),
    **{"loss.dino.weight": 1.0, "loss.dino.final_weight": None},
    **{"loss.dino.out_dim": 65536, "loss.dino.hidden_dim": 2048, "loss.dino.bottleneck_dim": 256},
    **{"loss.dino.norm_last_layer": True, "loss.dino.weight_norm": True, "loss.dino.use_bn": False},
    **{
        "loss.dino.student_temp": 0.1,
        "loss.dino.centering": "ema",
        "loss.dino.center_momentum": 0.9,
    },
    **{"teacher.momentum": 0.996, "teacher.final_momentum": 1.0},
    **{"teacher.warmup_temp": 0.04, "teacher.temp": 0.04, "teacher.warmup_temp_epochs": 0.0},
    **{"optim.name": "adamw", "optim.betas": (0.9, 0.999), "optim.warmup_epochs": 10.0},
    **{"optim.lr": 5e-4, "optim.lr_scaling": "linear_256"},
    **{"optim.final_lr": 1e-6, "optim.final_lr_ratio": None},
    **{"optim.weight_decay": 0.04, "optim.final_weight_decay": 0.4},
    **{"optim.clip": 3.0, "optim.clip_mode": "per_parameter"},
    **{"optim.freeze_last_layer_epochs": 1.0, "optim.frozen_last_layer": "skipped"},
    **{"optim.layer_decay": 1.0, "optim.patch_embed_lr_mult": 1.0},
    "evals.resize": 256,
}

# facebookresearch/barlowtwins main.py, its default arguments. The backbone is evaluated itself: an EMA of
# momentum 0 is the student.
BARLOW_TWINS = {
    **{"total_epochs": 1000.0, "total_steps": 0},
    **_section("views", BARLOW_TWINS_VIEWS | {"global_size": 224}),
    **{"model.drop_path_rate": 0.0, "loss.barlow_twins.weight": 1.0},
    **{"loss.barlow_twins.hidden_dims": (8192, 8192, 8192), "loss.barlow_twins.lambd": 0.0051},
    **{"loss.barlow_twins.pair": "student_student", "loss.barlow_twins.views": "global"},
    **{"teacher.momentum": 0.0, "teacher.final_momentum": 0.0},
    **{"optim.name": "lars", "optim.lr": 0.2, "optim.lr_scaling": "linear_256"},
    **{"optim.final_lr_ratio": 0.001, "optim.warmup_epochs": 10.0},
    **{"optim.weight_decay": 1e-6, "optim.final_weight_decay": 1e-6, "optim.clip": 0.0},
    "evals.resize": 256,
}

# facebookresearch/dinov2 ssl_default_config.yaml, which train/vitl16_short.yaml is: ImageNet-1k.
DINOV2 = DINO | {
    **{"total_epochs": 100.0, "total_steps": 125_000},
    **_section("views", DINOV2_AS_TRAINED),
    **{
        "model.drop_path_rate": 0.3,
        "model.drop_path_uniform": True,
        "model.layer_scale_init": 1e-5,
    },
    "loss.dino.norm_last_layer": False,
    **{"loss.ibot.weight": 1.0, "loss.ibot.final_weight": None, "loss.ibot.shared_head": "dino"},
    **{"loss.ibot.out_dim": 65536, "loss.ibot.hidden_dim": 2048, "loss.ibot.bottleneck_dim": 256},
    **{"loss.ibot.norm_last_layer": False, "loss.ibot.weight_norm": True},
    **{
        "loss.ibot.student_temp": 0.1,
        "loss.ibot.centering": "ema",
        "loss.ibot.center_momentum": 0.9,
    },
    **{"loss.ibot.image_fraction": 0.5, "loss.ibot.mask_ratio": (0.1, 0.5)},
    **{"loss.ibot.min_patches": 4, "loss.koleo.weight": 0.1},
    **{"teacher.momentum": 0.992, "teacher.temp": 0.07, "teacher.warmup_temp_epochs": 30.0},
    **{"optim.lr": 0.004, "optim.lr_scaling": "sqrt_1024"},
    **{"optim.clip_mode": "per_module", "optim.frozen_last_layer": "zero_rate"},
    **{"optim.layer_decay": 0.9, "optim.patch_embed_lr_mult": 0.2},
}

# facebookresearch/dinov2 train/vitl14.yaml and train/vitg14.yaml: the released models, on LVD-142M.
DINOV2_LONG = DINOV2 | {
    **{"total_epochs": 500.0, "total_steps": 625_000},
    **{"model.patch_size": 14, "views.local_size": 98},
    **{"model.ffn": "swiglu", "model.drop_path_rate": 0.4},
    **{"loss.dino.out_dim": 131072, "loss.dino.bottleneck_dim": 384},
    **{"loss.ibot.out_dim": 131072, "loss.ibot.shared_head": ""},
    **{"loss.dino.centering": "sinkhorn_knopp", "loss.ibot.centering": "sinkhorn_knopp"},
    **{"teacher.momentum": 0.994, "optim.lr": 2e-4, "optim.warmup_epochs": 80.0},
    **{"optim.final_weight_decay": 0.2, "optim.layer_decay": 1.0},
}

# facebookresearch/dinov3 train/vitl_im1k_lin834.yaml: ImageNet-1k. Its rates are multiplied by 4.
DINOV3_SHORT = DINOV2 | {
    "model.positions": "rope",
    **{"loss.dino.weight_norm": False, "loss.ibot.weight_norm": False, "loss.ibot.shared_head": ""},
    **{"loss.dino.centering": "sinkhorn_knopp", "loss.ibot.centering": "sinkhorn_knopp"},
    "loss.gram": None,
}

# facebookresearch/dinov3 train/dinov3_vit7b16_pretrain.yaml: the first stage of the released models.
DINOV3 = DINOV3_SHORT | {
    **{"total_epochs": 1000.0, "total_steps": 1_000_000},
    **{"views.global_size": 256, "views.local_size": 112, "views.flip": 0.0},
    **{"model.norm_eps": 1e-5, "model.num_register_tokens": 4, "model.rope_rescale": 2.0},
    "model.drop_path_rate": 0.4,
    **{"loss.dino.out_dim": 262144, "loss.dino.hidden_dim": 8192, "loss.dino.bottleneck_dim": 512},
    **{"loss.ibot.out_dim": 98304, "loss.ibot.hidden_dim": 4096, "loss.ibot.bottleneck_dim": 384},
    **{"teacher.momentum": 0.994, "teacher.final_momentum": 0.994},
    "teacher.warmup_temp_epochs": 100.0,
    **{"optim.betas": (0.9, 0.99), "optim.lr": 2e-4, "optim.final_lr_ratio": 1.0},
    **{"optim.warmup_epochs": 100.0, "optim.final_weight_decay": 0.04, "optim.clip": 30.0},
    **{"optim.freeze_last_layer_epochs": 5.0, "optim.layer_decay": 0.98},
}

# facebookresearch/dinov3 train/dinov3_vit7b16_gram_anchor.yaml: the same run, 200 epochs longer.
DINOV3_GRAM = {key: value for key, value in DINOV3.items() if key != "loss.gram"} | {
    **{"total_epochs": 1200.0, "total_steps": 1_200_000, "loss.gram.weight": 2.0},
    **{"loss.gram.start_epochs": 1000.0, "loss.gram.refresh_epochs": 10.0},
    **{"loss.gram.max_refreshes": 3, "loss.gram.level": "image", "loss.gram.normalise": True},
    "loss.gram.remove_negatives": False,
}

# The kinds of terms of a method -> word -> recipe.
RECIPES = {
    ("dino",): {"official": DINO},
    ("barlow_twins",): {"official": BARLOW_TWINS},
    ("dino", "ibot", "koleo"): {"official": DINOV2, "official_long": DINOV2_LONG},
    ("dino", "gram", "ibot", "koleo"): {
        **{"official": DINOV3, "official_gram": DINOV3_GRAM, "official_short": DINOV3_SHORT},
    },
}
WORDS = tuple(dict.fromkeys(word for recipes in RECIPES.values() for word in recipes))


def apply(config, word: str, *, pixels: bool) -> None:
    """Sets the values of an official recipe.

    Args:
      word: of WORDS.
      pixels: whether to set the keys PIXELS.
    Raises:
      ValueError: the sum of losses has no recipe of this name.
    """
    names = {kind_of(name, term): name for name, term in config.loss.items()}
    recipes = RECIPES.get(tuple(sorted(names)), {})
    if word not in recipes:
        known = (
            f"it has {', '.join(recipes)}"
            if recipes
            else "the configs dino, barlow_twins, dinov2 and dinov3 have one"
        )
        raise ValueError(
            f"preset '{word}': there is no such recipe for {' + '.join(sorted(config.loss))}; {known}"
        )
    for key, value in recipes[word].items():
        if key in PIXELS and not pixels:
            continue
        *sections, last = key.split(".")
        if sections[:1] == ["loss"]:
            sections[1:] = [names[kind] for kind in sections[1:]]
        section = config
        for name in sections:
            section = section[name]
        if key == "loss.gram":
            del section[names["gram"]]
        else:
            section[last] = value
