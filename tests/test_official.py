"""The presets of official recipes against the values in the official repositories, and each one trains.

A row is: our key, the official text, where it stands (a line, or the name of a function), and, where the
two differ in form, how ours follows from the official value. The commit is in the address of the file:
https://github.com/<repository>/blob/<commit>/<file>#L<line>.
"""

import ast
import math

import jax
import numpy as np
import pytest
from shrunk import shrunk

from configs import (
    barlow_twins,
    byol,
    dino,
    dinov2,
    dinov3,
    hybrid,
    hybrid_dinov2,
    official,
    presets,
)
from dinotwins_jax.augment.presets import BARLOW_TWINS, DINO, DINOV2_AS_TRAINED
from dinotwins_jax.build import build
from dinotwins_jax.durations import durations, total_steps
from dinotwins_jax.memory import abstract_batch
from dinotwins_jax.settings.keys import value_at
from dinotwins_jax.settings.rates import peak_and_final

PER_EPOCH = {"V2": 1250, "V3": 1000}  # train.OFFICIAL_EPOCH_LENGTH: see its rows


def always(value):
    return lambda _: value


CENTERING = {"centering": "ema", "sinkhorn_knopp": "sinkhorn_knopp"}.get

DINO_FILE = "facebookresearch/dino cc72fe9 main_dino.py"
DINO_ROWS = [
    ("total_epochs", "--epochs=100", 91, float),
    ("total_steps", "--epochs=100", 91, always(0)),  # its epochs are those of the data set
    ("model.patch_size", "--patch_size=16", 50),
    ("model.drop_path_rate", "--drop_path_rate=0.1", 104),
    ("loss.dino.out_dim", "--out_dim=65536", 55),
    ("loss.dino.norm_last_layer", "--norm_last_layer=True", 57),
    ("loss.dino.use_bn", "--use_bn_in_head=False", 63),
    ("loss.dino.student_temp", "student_temp=0.1", "DINOLoss.__init__"),
    ("loss.dino.center_momentum", "center_momentum=0.9", "DINOLoss.__init__"),
    ("loss.dino.centering", "center_momentum=0.9", "DINOLoss.update_center", always("ema")),
    ("teacher.momentum", "--momentum_teacher=0.996", 60),
    ("teacher.final_momentum", "final_value=1", "train_dino, momentum_schedule", float),
    ("teacher.warmup_temp", "--warmup_teacher_temp=0.04", 67),
    ("teacher.temp", "--teacher_temp=0.04", 70),
    ("teacher.warmup_temp_epochs", "--warmup_teacher_temp_epochs=0", 73, float),
    ("optim.name", "--optimizer='adamw'", 102),
    ("optim.lr", "--lr=0.0005", 95),
    ("optim.lr_scaling", "reference=256", "train_dino, lr_schedule", always("linear_256")),
    ("optim.final_lr", "--min_lr=1e-6", 100),
    ("optim.warmup_epochs", "--warmup_epochs=10", 98, float),
    ("optim.weight_decay", "--weight_decay=0.04", 81),
    ("optim.final_weight_decay", "--weight_decay_end=0.4", 83),
    ("optim.clip", "--clip_grad=3.0", 86),
    ("optim.clip_mode", "clip_grad=3.0", "utils.py, clip_gradients", always("per_parameter")),
    ("optim.freeze_last_layer_epochs", "--freeze_last_layer=1", 92, float),
    ("optim.frozen_last_layer", "grad=None", "utils.py, cancel_gradients_last_layer", always("skipped")),
    ("loss.dino.hidden_dim", "hidden_dim=2048", "vision_transformer.py, DINOHead.__init__"),
    ("loss.dino.bottleneck_dim", "bottleneck_dim=256", "vision_transformer.py, DINOHead.__init__"),
    ("views.num_local", "--local_crops_number=8", 111),
    ("views.global_scale", "--global_crops_scale=(0.4, 1.)", 107),
    ("views.local_scale", "--local_crops_scale=(0.05, 0.4)", 114),
    ("views.global_size", "size=224", "DataAugmentationDINO.__init__"),
    ("views.local_size", "size=96", "DataAugmentationDINO.__init__"),
]  # fmt: skip

BARLOW_FILE = "facebookresearch/barlowtwins 046eec3 main.py"
BARLOW_ROWS = [
    ("total_epochs", "--epochs=1000", 29, float),
    ("total_steps", "--epochs=1000", 29, always(0)),
    ("loss.barlow_twins.hidden_dims", "--projector='8192-8192-8192'", 41,
     lambda text: tuple(map(int, text.split("-")))),
    ("loss.barlow_twins.lambd", "--lambd=0.0051", 39),
    ("optim.name", "optimizer='LARS'", 99, str.lower),
    ("optim.lr", "--learning-rate-weights=0.2", 33),
    ("optim.lr_scaling", "base_lr=256", 158, always("linear_256")),
    ("optim.final_lr_ratio", "end_lr=0.001", 165),
    ("optim.warmup_epochs", "warmup_steps=10", 157, float),
    ("optim.weight_decay", "--weight-decay=1e-6", 37),
    ("optim.final_weight_decay", "--weight-decay=1e-6", 37),
    ("optim.clip", "clip=None", "main_worker: no clipping", always(0.0)),
    ("model.drop_path_rate", "drop_path=None", "BarlowTwins: a ResNet", always(0.0)),
    ("teacher.momentum", "teacher=None", "main_worker: no teacher", always(0.0)),
    ("teacher.final_momentum", "teacher=None", "main_worker: no teacher", always(0.0)),
    ("views.global_size", "size=224", "Transform.__init__"),
]  # fmt: skip

V2_FILE = "facebookresearch/dinov2 fc49f49 dinov2/configs/ssl_default_config.yaml"
HEAD = "dinov2/layers/dino_head.py, line"
V2_ROWS = [
    ("total_epochs", "epochs: 100", 90, float),
    ("total_steps", "epochs: 100", 90, lambda n: n * PER_EPOCH["V2"]),
    ("model.patch_size", "patch_size: 16", 73),
    ("model.drop_path_rate", "drop_path_rate: 0.3", 74),
    ("model.drop_path_uniform", "drop_path_uniform: true", 76),
    ("model.layer_scale_init", "layerscale: 1.0e-05", 75),
    ("model.ffn", 'ffn_layer: "mlp"', 78),
    ("model.norm_eps", "eps=1e-6", "dinov2/models/vision_transformer.py, line 90"),
    ("model.num_register_tokens", "num_tokens=0", "dinov2/models/vision_transformer.py: no registers"),
    ("loss.dino.weight", "loss_weight: 1.0", 44),
    ("loss.dino.out_dim", "head_n_prototypes: 65536", 45),
    ("loss.dino.bottleneck_dim", "head_bottleneck_dim: 256", 46),
    ("loss.dino.hidden_dim", "head_hidden_dim: 2048", 48),
    ("loss.dino.norm_last_layer", "weight_g=1", f"{HEAD} 29: trained", always(False)),
    ("loss.dino.weight_norm", "last_layer=weight_norm", f"{HEAD} 28", always(True)),
    ("loss.dino.use_bn", "use_bn=False", f"{HEAD} 18"),
    ("loss.dino.centering", 'centering: "centering"', 70, CENTERING),
    ("loss.dino.student_temp", "student_temp=0.1", "dinov2/loss/dino_clstoken_loss.py"),
    ("loss.dino.center_momentum", "center_momentum=0.9", "dinov2/loss/dino_clstoken_loss.py"),
    ("loss.koleo.weight", "koleo_loss_weight: 0.1", 49),
    ("loss.ibot.weight", "loss_weight: 1.0", 51),
    ("loss.ibot.image_fraction", "mask_sample_probability: 0.5", 52),
    ("loss.ibot.mask_ratio", "mask_ratio_min_max: (0.1, 0.5)", 53),
    ("loss.ibot.min_patches", "min_num_patches=4", "dinov2/data/masking.py"),
    ("loss.ibot.shared_head", "separate_head: false", 56, lambda own: "" if own else "dino"),
    ("loss.ibot.out_dim", "head_n_prototypes: 65536", 57),
    ("loss.ibot.bottleneck_dim", "head_bottleneck_dim: 256", 58),
    ("loss.ibot.hidden_dim", "head_hidden_dim: 2048", 60),
    ("loss.ibot.norm_last_layer", "weight_g=1", f"{HEAD} 29: trained", always(False)),
    ("loss.ibot.weight_norm", "last_layer=weight_norm", f"{HEAD} 28", always(True)),
    ("loss.ibot.centering", 'centering: "centering"', 70, CENTERING),
    ("loss.ibot.student_temp", "student_temp=0.1", "dinov2/loss/ibot_patch_loss.py"),
    ("loss.ibot.center_momentum", "center_momentum=0.9", "dinov2/loss/ibot_patch_loss.py"),
    ("teacher.momentum", "momentum_teacher: 0.992", 84),
    ("teacher.final_momentum", "final_momentum_teacher: 1", 85, float),
    ("teacher.warmup_temp", "warmup_teacher_temp: 0.04", 86),
    ("teacher.temp", "teacher_temp: 0.07", 87),
    ("teacher.warmup_temp_epochs", "warmup_teacher_temp_epochs: 30", 88, float),
    ("optim.name", "torch.optim=AdamW", "dinov2/train/train.py, line 63", str.lower),
    ("optim.betas", "adamw_beta1, adamw_beta2: (0.9, 0.999)", 102),
    ("optim.lr", "base_lr: 0.004", 93),
    ("optim.lr_scaling", "scaling_rule: sqrt_wrt_1024", 99, lambda rule: rule.replace("wrt_", "")),
    ("optim.final_lr", "min_lr: 1.0e-06", 96),
    ("optim.final_lr_ratio", "min_lr: 1.0e-06", 96, always(None)),
    ("optim.warmup_epochs", "warmup_epochs: 10", 95, float),
    ("optim.weight_decay", "weight_decay: 0.04", 91),
    ("optim.final_weight_decay", "weight_decay_end: 0.4", 92),
    ("optim.clip", "clip_grad: 3.0", 97),
    ("optim.clip_mode", "model.student=values", "dinov2/train/train.py, line 253", always("per_module")),
    ("optim.freeze_last_layer_epochs", "freeze_last_layer_epochs: 1", 98, float),
    ("optim.frozen_last_layer", "last_layer_lr=0", "dinov2/train/train.py, line 99", always("zero_rate")),
    ("optim.layer_decay", "layerwise_decay: 0.9", 101),
    ("optim.patch_embed_lr_mult", "patch_embed_lr_mult: 0.2", 100),
    ("views.global_scale", "global_crops_scale: (0.32, 1.0)", 105),
    ("views.num_local", "local_crops_number: 8", 108),
    ("views.local_scale", "local_crops_scale: (0.05, 0.32)", 109),
    ("views.global_size", "global_crops_size: 224", 112),
    ("views.local_size", "local_crops_size: 96", 113),
]  # fmt: skip

# vitl14.yaml; the same lines in vitg14.yaml. What it leaves out is in ssl_default_config.yaml.
LONG_FILE = "facebookresearch/dinov2 fc49f49 dinov2/configs/train/vitl14.yaml"
LONG_ROWS = [
    ("total_epochs", "epochs: 500", 20, float),
    ("total_steps", "epochs: 500", 20, lambda n: n * PER_EPOCH["V2"]),
    ("model.patch_size", "patch_size: 14", 13),
    ("model.drop_path_rate", "drop_path_rate: 0.4", 14),
    ("model.ffn", "ffn_layer: swiglufused", 15, lambda name: name.removesuffix("fused")),
    ("loss.dino.out_dim", "head_n_prototypes: 131072", 2),
    ("loss.dino.bottleneck_dim", "head_bottleneck_dim: 384", 3),
    ("loss.dino.centering", "centering: sinkhorn_knopp", 10, CENTERING),
    ("loss.ibot.shared_head", "separate_head: true", 5, lambda own: "" if own else "dino"),
    ("loss.ibot.out_dim", "head_n_prototypes: 131072", 6),
    ("loss.ibot.centering", "centering: sinkhorn_knopp", 10, CENTERING),
    ("teacher.momentum", "momentum_teacher: 0.994", 18),
    ("optim.lr", "base_lr: 2.0e-04", 22),
    ("optim.warmup_epochs", "warmup_epochs: 80", 23, float),
    ("optim.final_weight_decay", "weight_decay_end: 0.2", 21),
    ("optim.layer_decay", "layerwise_decay: 1.0", 24),
    ("views.local_size", "local_crops_size: 98", 26),
]

# DINOv3's own rule of this name multiplies the rate by 4 too: dinov3/configs/config.py,
# apply_scaling_rules_to_cfg, and dinov3/train/train.py, build_schedulers_v2.
NORM_EPS = {"layernorm": 1e-6, "layernormbf16": 1e-5}.get  # models/vision_transformer.py
V3_HEAD = "dinov3/layers/dino_head.py, DINOHead.__init__"
V3_COMMON = [
    ("model.drop_path_uniform", "drop_path=drop_path_rate",
     "dinov3/models/vision_transformer.py, blocks_list", always(True)),
    ("loss.dino.weight_norm", "last_layer=Linear", V3_HEAD, always(False)),
    ("loss.ibot.weight_norm", "last_layer=Linear", V3_HEAD, always(False)),
    ("optim.clip_mode", "student=items", "dinov3/train/train.py, do_train", always("per_module")),
    ("optim.frozen_last_layer", "last_layer_lr=0", "dinov3/train/train.py, build_schedulers",
     always("zero_rate")),
    ("loss.gram.weight", "use_loss=false", "dinov3/configs/ssl_default_config.yaml, gram", always(None)),
]  # fmt: skip

V3_SHORT_FILE = "facebookresearch/dinov3 98b38de dinov3/configs/train/vitl_im1k_lin834.yaml"
V3_SHORT_ROWS = [
    ("total_epochs", "epochs: 100", 105, float),
    ("total_steps", "epochs: 100", 105, lambda n: n * PER_EPOCH["V2"]),  # line 47
    ("model.patch_size", "patch_size: 16", 62),
    ("model.drop_path_rate", "drop_path_rate: 0.3", 63),
    ("model.layer_scale_init", "layerscale: 1.0e-05", 64),
    ("model.ffn", "ffn_layer: mlp", 67),
    ("model.norm_eps", "norm_layer: layernorm", 73, NORM_EPS),
    ("model.num_register_tokens", "n_storage_tokens: 0", 74),
    ("model.positions", "pos_embed_type: rope", 77),
    ("model.rope_shift", "pos_embed_rope_shift_coords: null", 82),
    ("model.rope_jitter", "pos_embed_rope_jitter_coords: null", 83),
    ("model.rope_rescale", "pos_embed_rope_rescale_coords: null", 84),
    ("loss.dino.weight", "loss_weight: 1.0", 14),
    ("loss.dino.out_dim", "head_n_prototypes: 65536", 16),
    ("loss.dino.bottleneck_dim", "head_bottleneck_dim: 256", 17),
    ("loss.dino.norm_last_layer", "head_norm_last_layer: false", 18),
    ("loss.dino.hidden_dim", "head_hidden_dim: 2048", 20),
    ("loss.dino.centering", "centering: sinkhorn_knopp", 53, CENTERING),
    ("loss.koleo.weight", "koleo_loss_weight: 0.1", 21),
    ("loss.ibot.weight", "loss_weight: 1.0", 27),
    ("loss.ibot.image_fraction", "mask_sample_probability: 0.5", 28),
    ("loss.ibot.mask_ratio", "mask_ratio_min_max: (0.1, 0.5)", 29),
    ("loss.ibot.shared_head", "separate_head: true", 34, lambda own: "" if own else "dino"),
    ("loss.ibot.out_dim", "head_n_prototypes: 65536", 35),
    ("loss.ibot.bottleneck_dim", "head_bottleneck_dim: 256", 36),
    ("loss.ibot.norm_last_layer", "head_norm_last_layer: false", 37),
    ("loss.ibot.hidden_dim", "head_hidden_dim: 2048", 39),
    ("loss.ibot.centering", "centering: sinkhorn_knopp", 53, CENTERING),
    ("teacher.momentum", "momentum_teacher: 0.992", 89),
    ("teacher.final_momentum", "final_momentum_teacher: 1", 90, float),
    ("teacher.warmup_temp", "warmup_teacher_temp: 0.04", 91),
    ("teacher.temp", "teacher_temp: 0.07", 92),
    ("teacher.warmup_temp_epochs", "warmup_teacher_temp_epochs: 30", 93, float),
    ("optim.name", "optimizer: adamw", 106),
    ("optim.weight_decay", "weight_decay: 0.04", 107),
    ("optim.final_weight_decay", "weight_decay_end: 0.4", 108),
    ("optim.lr", "lr: 0.001", 109, lambda rate: 4 * rate),
    ("optim.warmup_epochs", "warmup_epochs: 10", 110, float),
    ("optim.final_lr", "min_lr: 1.0e-06", 111),
    ("optim.final_lr_ratio", "min_lr: 1.0e-06", 111, always(None)),
    ("optim.clip", "clip_grad: 3.0", 112),
    ("optim.freeze_last_layer_epochs", "freeze_last_layer_epochs: 1", 113, float),
    ("optim.lr_scaling", "scaling_rule: sqrt_wrt_1024", 114, lambda rule: rule.replace("wrt_", "")),
    ("optim.patch_embed_lr_mult", "patch_embed_lr_mult: 0.2", 115),
    ("optim.layer_decay", "layerwise_decay: 0.9", 117),
    ("optim.betas", "adamw_beta1, adamw_beta2: (0.9, 0.999)", 120),
    ("views.global_scale", "global_crops_scale: (0.32, 1.0)", 123),
    ("views.num_local", "local_crops_number: 8", 126),
    ("views.local_scale", "local_crops_scale: (0.05, 0.32)", 127),
    ("views.global_size", "global_crops_size: 224", 130),
    ("views.local_size", "local_crops_size: 96", 131),
    ("views.flip", "horizontal_flips: true", 134, {True: 0.5, False: 0.0}.get),
]

V3_FILE = "facebookresearch/dinov3 98b38de dinov3/configs/train/dinov3_vit7b16_pretrain.yaml"
V3_ROWS = [
    ("total_epochs", "epochs: 1000", 108, float),
    ("total_steps", "epochs: 1000", 108, lambda n: n * PER_EPOCH["V3"]),  # line 46
    ("model.patch_size", "patch_size: 16", 63),
    ("model.drop_path_rate", "drop_path_rate: 0.4", 64),
    ("model.layer_scale_init", "layerscale: 1.0e-05", 65),
    ("model.norm_eps", "norm_layer: layernormbf16", 74, NORM_EPS),
    ("model.num_register_tokens", "n_storage_tokens: 4", 75),
    ("model.positions", "pos_embed_type: rope", 80),
    ("model.rope_shift", "pos_embed_rope_shift_coords: null", 85),
    ("model.rope_jitter", "pos_embed_rope_jitter_coords: null", 86),
    ("model.rope_rescale", "pos_embed_rope_rescale_coords: 2", 87, float),
    ("loss.dino.out_dim", "head_n_prototypes: 262144", 12),
    ("loss.dino.bottleneck_dim", "head_bottleneck_dim: 512", 13),
    ("loss.dino.norm_last_layer", "head_norm_last_layer: false", 14),
    ("loss.dino.hidden_dim", "head_hidden_dim: 8192", 16),
    ("loss.koleo.weight", "koleo_loss_weight: 0.1", 17),
    ("loss.ibot.image_fraction", "mask_sample_probability: 0.5", 25),
    ("loss.ibot.mask_ratio", "mask_ratio_min_max: (0.1, 0.5)", 26),
    ("loss.ibot.shared_head", "separate_head: true", 31, lambda own: "" if own else "dino"),
    ("loss.ibot.out_dim", "head_n_prototypes: 98304", 32),
    ("loss.ibot.bottleneck_dim", "head_bottleneck_dim: 384", 33),
    ("loss.ibot.hidden_dim", "head_hidden_dim: 4096", 36),
    ("optim.clip", "clip_grad: 30.0", 116),
    ("optim.patch_embed_lr_mult", "patch_embed_lr_mult: 0.2", 119),
    ("optim.layer_decay", "layerwise_decay: 0.98", 121),
    ("optim.betas", "adamw_beta1, adamw_beta2: (0.9, 0.99)", 124),
    ("views.global_size", "global_crops_size: 256", 134),
    ("views.local_size", "local_crops_size: 112", 135),
    ("views.flip", "horizontal_flips: false", 138, {True: 0.5, False: 0.0}.get),
    ("optim.lr", "peak: 5.0e-05", 154, lambda rate: 4 * rate),
    ("optim.final_lr_ratio", "end over peak: 1.0", 155),
    ("optim.warmup_epochs", "warmup_epochs: 100", 156, float),
    ("optim.freeze_last_layer_epochs", "freeze_last_layer_epochs: 5", 157, float),
    ("optim.weight_decay", "start: 0.04", 159),
    ("optim.final_weight_decay", "end: 0.04", 161),
    ("teacher.warmup_temp", "start: 0.04", 164),
    ("teacher.temp", "end: 0.07", 166),
    ("teacher.warmup_temp_epochs", "warmup_epochs: 100", 167, float),
    ("teacher.momentum", "start: 0.994", 169),
    ("teacher.final_momentum", "end: 0.994", 171),
]

# Iterations of this file are those of one run, whose first 1,000 epochs are the file above.
GRAM_FILE = "facebookresearch/dinov3 0f84b8b dinov3/configs/train/dinov3_vit7b16_gram_anchor.yaml"
GRAM_ROWS = [
    ("total_epochs", "epochs: 1200", "optim", float),
    ("total_steps", "epochs: 1200", "optim", lambda n: n * PER_EPOCH["V3"]),
    ("loss.gram.refresh_epochs", "update_frequency: 10000", 53, lambda n: n / PER_EPOCH["V3"]),
    ("loss.gram.start_epochs", "it_first_update: 1010000", 54,
     lambda n: (n - 10_000) / PER_EPOCH["V3"]),  # the weight rises from here: line 67
    ("loss.gram.max_refreshes", "max_updates: 3", 55),
    ("loss.gram.normalise", "normalized: true", 56),
    ("loss.gram.level", "img_level: true", 57, {True: "image", False: "batch"}.get),
    ("loss.gram.remove_negatives", "remove_neg: false", 58),
    ("loss.gram.weight", "end: 2.0", 66),
]  # fmt: skip

RECIPES = {
    (dino, "official"): {DINO_FILE: DINO_ROWS},
    (barlow_twins, "official"): {BARLOW_FILE: BARLOW_ROWS},
    (dinov2, "official"): {V2_FILE: V2_ROWS},
    (dinov2, "official_long"): {V2_FILE: V2_ROWS, LONG_FILE: LONG_ROWS},
    (dinov3, "official_short"): {V2_FILE: V2_ROWS, "": V3_COMMON, V3_SHORT_FILE: V3_SHORT_ROWS},
    (dinov3, "official"): {
        **{V2_FILE: V2_ROWS, "": V3_COMMON, V3_SHORT_FILE: V3_SHORT_ROWS, V3_FILE: V3_ROWS},
    },
    (dinov3, "official_gram"): {
        **{V2_FILE: V2_ROWS, "": V3_COMMON, V3_SHORT_FILE: V3_SHORT_ROWS, V3_FILE: V3_ROWS},
        GRAM_FILE: GRAM_ROWS,
    },
}
IDS = [f"{module.__name__.rpartition('.')[2]}:{word}" for module, word in RECIPES]

KINDS = {
    module: kinds
    for kinds, module in zip(official.RECIPES, (dino, barlow_twins, dinov2, dinov3), strict=True)
}

# Keys that a recipe sets and no official file names, and why.
OURS = {
    "model.init_std": "the std that the official code gives to Linear layers, without an argument",
    "evals.resize": "of the official evaluation, eval_linear.py",
    "loss.dino.final_weight": "weights are constant",
    "loss.ibot.final_weight": "weights are constant",
    "loss.barlow_twins.weight": "the only term",
    "loss.barlow_twins.pair": "one student and no teacher",
    "loss.barlow_twins.views": "two views",
    "loss.dino.weight": "the only term of DINO",
    "loss.dino.weight_norm": "DINO: vision_transformer.py, DINOHead, weight_norm",
    "optim.final_lr_ratio": "DINO: min_lr is not scaled",
    **dict.fromkeys(("optim.betas", "optim.layer_decay", "optim.patch_embed_lr_mult"),
                    "DINO: PyTorch's defaults, no factors"),
    **dict.fromkeys(("model.drop_path_uniform", "model.num_register_tokens", "model.layer_scale_init",
                     "model.positions", "model.rope_shift", "model.rope_jitter", "model.rope_rescale",
                     "model.ffn", "model.norm_eps"),
                    "DINO and DINOv2: vision_transformer.py has no other"),
}  # fmt: skip


def official_value(text: str):
    """Value of "name: value" or "name=value", as YAML and Python write it."""
    raw = text.partition(": " if ": " in text else "=")[2]
    raw = {"true": "True", "false": "False", "null": "None"}.get(raw, raw)
    try:
        return ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        return raw


def table(recipe) -> dict:
    """{our key: (expected value, the official text, its place)}; later files overrule earlier ones."""
    rows = {}
    for file, of in RECIPES[recipe].items():
        for key, text, where, *how in of:
            value = official_value(text)
            rows[key] = (how[0](value) if how else value, text, f"{file} {where}")
    return rows


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_every_value_is_the_official_one(recipe):
    module, word = recipe
    config = module.get_config(f"coco+{word}")
    for key, (expected, text, where) in table(recipe).items():
        ours = value_at(config, key)
        same = ours == expected and type(ours) is type(expected)
        assert same, f"{key} is {ours!r}, official {text} ({where})"


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_every_key_of_a_recipe_has_a_source(recipe):
    """In the table, in OURS with its reason, or of the crops, which test_augment_draws.py compares."""
    module, word = recipe
    rows, config = table(recipe), module.get_config(f"coco+{word}")
    crops = {dino: DINO, barlow_twins: BARLOW_TWINS}.get(module, DINOV2_AS_TRAINED)
    for key in official.RECIPES[KINDS[module]][word]:
        section, _, name = key.rpartition(".")
        if section == "views" and key not in rows:
            assert config.views[name] == crops[name], key
        else:
            assert key in rows or key in OURS or key == "loss.gram", key


@pytest.mark.parametrize("module", [dino, barlow_twins, dinov2, dinov3])
def test_a_recipe_is_the_same_after_every_data_set(module):
    """Whatever a preset for a small computer changes, but for the sizes in pixels."""
    recipe = official.RECIPES[KINDS[module]]["official"]
    keys = [key for key in recipe if key not in official.PIXELS and key != "loss.gram"]
    plain = module.get_config("coco+official")
    for place in presets.PRESETS:
        config = module.get_config(f"{place}+official")
        assert all(value_at(config, key) == value_at(plain, key) for key in keys), place
        assert (
            config.views.global_size == module.get_config(place).views.global_size
            or place == "coco"
        )


@pytest.mark.parametrize(
    ("module", "preset", "message"),
    [
        (hybrid, "coco+official", "'official'.* barlow_twins \\+ dino; the configs dino, "),
        (hybrid_dinov2, "coco+official", "'official'.* barlow_twins \\+ dino \\+ ibot \\+ koleo; "),
        (byol, "demo+official", "'official'.* byol; "),
        (dino, "coco+official_long", "'official_long'.* dino; it has official$"),
        (dinov2, "coco+official_gram", "it has official, official_long$"),
        (dinov2, "official", "unknown preset 'official'.*\\(as in demo\\+official\\)"),
    ],
)
def test_other_methods_are_told_in_one_line(module, preset, message):
    with pytest.raises(ValueError, match=message) as error:
        module.get_config(preset)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "word", "batch", "peak", "final", "steps"),
    [
        (dino, "official", 1024, 0.002, 1e-6, None),
        (barlow_twins, "official", 2048, 1.6, 1.6e-3, None),
        (dinov2, "official", 2048, 0.004 * math.sqrt(2), 1e-6, (125_000, 12_500, 37_500, 1_250)),
        (
            dinov2,
            "official_long",
            3072,
            2e-4 * math.sqrt(3),
            1e-6,
            (625_000, 100_000, 37_500, 1_250),
        ),
        (
            dinov3,
            "official_short",
            2048,
            0.004 * math.sqrt(2),
            1e-6,
            (125_000, 12_500, 37_500, 1_250),
        ),
        (dinov3, "official", 4096, 4e-4, 4e-4, (1_000_000, 100_000, 100_000, 5_000)),
        (dinov3, "official_gram", 4096, 4e-4, 4e-4, (1_200_000, 100_000, 100_000, 5_000)),
    ],
)
def test_rates_and_lengths_in_steps(module, word, batch, peak, final, steps):
    """The rate at the official global batch, and durations in steps whatever the number of images."""
    config = module.get_config(f"coco+{word}")
    np.testing.assert_allclose(peak_and_final(config.optim, batch), (peak, final), rtol=1e-12)
    for images in (5_000, 1_281_167):
        total = total_steps(config, images)
        found = durations(config, total)
        if steps:
            keys = (
                "optim.warmup_epochs",
                "teacher.warmup_temp_epochs",
                "optim.freeze_last_layer_epochs",
            )
            assert (total, *(found[key] for key in keys)) == steps
        else:
            assert found["optim.warmup_epochs"] == 10 * (images // config.batch_size)


IN_EVERY_RUN = [(dinov2, "official"), (dinov3, "official_gram")]  # the rest takes half a minute


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=() if r in IN_EVERY_RUN else pytest.mark.slow) for r in RECIPES],
    ids=IDS,
)
def test_every_recipe_builds(recipe):
    """With its own schedules, optimiser and terms, at tiny sizes; a step is traced."""
    module, word = recipe
    config = shrunk(module, f"demo+{word}", total_steps=2400, model__depth=1)
    run = build(config)
    state = jax.eval_shape(run.fresh_state)
    state, metrics = jax.eval_shape(run.train_step, state, abstract_batch(run, config.batch_size))
    assert metrics["loss"].shape == ()
    heads = state.params["heads"]
    last = heads.get("dino", {}).get("last_layer", {})
    assert set(last) == {"barlow_twins": set(), "dino": {"weight_v"}, "dinov2": {"weight_v", "weight_g"},
                         "dinov3": {"weight"}}[module.__name__.rpartition(".")[2]]  # fmt: skip
