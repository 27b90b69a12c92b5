"""Valid ranges and choices of single config keys; build.py checks combinations."""

import difflib
import math

from ml_collections import ConfigDict

from dinotwins_jax.settings.keys import LOSSES, kind_of, value_at
from dinotwins_jax.settings.rates import SCALINGS

POSITIVE, NOT_NEGATIVE = "(0, inf)", "[0, inf)"
SEED = "[0, 4294967295]"  # of numpy's generators
LARGEST = 2**31 - 1  # of whole numbers without a range of their own: those of JAX

# Key -> interval, which every element of a tuple must lie in. loss.<kind> stands for every term of that
# kind, see `kind_of`. Keys that a config lacks are ignored.
RANGES = {
    **dict.fromkeys(("micro_batches", "total_epochs", "mesh.fsdp"), POSITIVE),
    **dict.fromkeys(("total_steps", "mesh.data"), NOT_NEGATIVE),
    **{"seed": SEED, "batch_size": "[1, 1000000]"},
    **{
        f"model.{k}": POSITIVE
        for k in (
            "embed_dim",
            "depth",
            "num_heads",
            "patch_size",
            "in_channels",
            "init_std",
            "norm_eps",
        )
    },
    **{"model.drop_path_rate": "[0, 1)", "model.num_register_tokens": NOT_NEGATIVE},
    **{"model.rope_shift": POSITIVE, "model.rope_jitter": "[1, inf)"},
    **{"model.rope_rescale": "[1, inf)"},
    **{"data.canvas_size": NOT_NEGATIVE, "data.num_workers": NOT_NEGATIVE},
    **{"data.max_pixels": "[0, 1000000000000]", "model.mlp_ratio": POSITIVE},
    **{"data.std": POSITIVE, "data.window.percentiles": "[0, 100]"},
    **{f"data.scenes.{k}": POSITIVE for k in ("num_train", "num_test", "size")},
    **{"data.subset.classes": NOT_NEGATIVE, "data.subset.images": NOT_NEGATIVE},
    **{"data.subset.long_tail": "[1, inf)", "data.subset.seed": SEED},
    **{"data.scenes.seed": SEED, "data.folder.test_fraction": "(0, 1)"},
    **{
        "views.global_size": POSITIVE,
        "views.local_size": POSITIVE,
        "views.num_local": NOT_NEGATIVE,
    },
    **{f"loss.{t}.{k}": NOT_NEGATIVE for t in LOSSES for k in ("weight", "final_weight")},
    **{
        f"loss.{t}.{k}": POSITIVE
        for t in LOSSES
        for k in ("out_dim", "hidden_dim", "bottleneck_dim", "hidden_dims", "student_temp", "temp")
    },
    **{f"loss.{t}.center_momentum": "[0, 1]" for t in ("dino", "ibot")},
    **{"loss.ibot.image_fraction": "(0, 1]", "loss.ibot.mask_ratio": "[0, 1)"},
    **{"loss.ibot.min_patches": POSITIVE, "loss.barlow_twins.lambd": NOT_NEGATIVE},
    **{f"loss.gram.{k}": NOT_NEGATIVE for k in ("start_epochs", "refresh_epochs", "max_refreshes")},
    **{f"loss.vicreg.{k}": NOT_NEGATIVE for k in ("similarity", "variance", "covariance")},
    **{"teacher.momentum": "[0, 1]", "teacher.final_momentum": "[0, 1]"},
    **{"teacher.temp": POSITIVE, "teacher.warmup_temp": POSITIVE},
    **{"teacher.warmup_temp_epochs": NOT_NEGATIVE},
    **{
        f"optim.{k}": NOT_NEGATIVE
        for k in ("lr", "final_lr", "warmup_epochs", "weight_decay", "final_weight_decay", "clip")
    },
    **{"optim.freeze_backbone_epochs": NOT_NEGATIVE, "optim.layer_decay": "(0, 1]"},
    **{"optim.betas": "[0, 1)", "optim.final_lr_ratio": NOT_NEGATIVE},
    **{"optim.patch_embed_lr_mult": NOT_NEGATIVE, "optim.predictor_lr_mult": POSITIVE},
    **{"optim.freeze_last_layer_epochs": NOT_NEGATIVE, "log.every_steps": POSITIVE},
    **{"checkpoint.every_epochs": POSITIVE, "checkpoint.keep": POSITIVE},
    **{
        f"evals.{k}": POSITIVE
        for k in (
            "monitor_images",
            "batch_size",
            "resize",
            "n_last_blocks",
            "knn_k",
            "knn_temp",
            "shots",
        )
    },
    **{"evals.supervised_steps": POSITIVE, "evals.supervised_draws": POSITIVE},
    **{"evals.finetune_blocks": POSITIVE, "evals.finetune_epochs": POSITIVE},
    **{"evals.split_seeds": SEED, "evals.monitor_every_epochs": NOT_NEGATIVE},
    **{"evals.mask_images": NOT_NEGATIVE, "evals.pictures": NOT_NEGATIVE},
    **{f"evals.{k}": "(0, 1]" for k in ("label_fractions", "finetune_fraction", "attention_keep")},
}
# The same hold for the data of the probes.
RANGES |= {
    key.replace("data.", "data.probe."): interval
    for key, interval in RANGES.items()
    if key.startswith(("data.canvas_size", "data.scenes.", "data.folder.", "data.subset."))
}
CHOICES = {  # for every element of a tuple
    "parallel": ("jit", "pmap"),
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "cudnn"),
    "model.ffn": ("mlp", "swiglu"),
    "model.positions": ("learned", "rope"),
    "model.position_interpolation": ("dino", "antialias", "size"),
    "data.window.mode": ("", "fixed", "picture", "set"),
    "optim.name": ("adamw", "lars"),
    "optim.lr_scaling": tuple(SCALINGS),
    "optim.clip_mode": ("per_parameter", "per_module", "global"),
    "optim.frozen_last_layer": ("skipped", "zero_rate"),
    "log.writers": ("jsonl", "tensorboard", "wandb", "mlflow"),
    "checkpoint.best_mode": ("max", "min"),
    "evals.bank_solver": ("ridge", "logistic"),
}
PAIRS = (
    "loss.ibot.mask_ratio",
    "optim.betas",
    "data.window.percentiles",
    "views.global_scale",
    "views.local_scale",
    "views.ratio",
    "views.blur_radius",
)
NOT_EMPTY = (
    *(f"loss.{t}.hidden_dims" for t in LOSSES),
    *(f"evals.{k}" for k in ("label_fractions", "split_seeds", "knn_k", "shots")),
)


def check_ranges(config: ConfigDict) -> None:
    """Raises ValueError for the first key outside its range, naming the key and the range."""
    for key in _present(config, NOT_EMPTY):
        if not len(value_at(config, key)):
            raise ValueError(f"config.{key} is empty: name at least one")
    for key in _present(config, PAIRS):
        if len(values := value_at(config, key)) != 2:
            raise ValueError(f"config.{key} is {values}: it must be a pair (smallest, largest)")
    weights = {f"{OUTSIDE}.{k}": NOT_NEGATIVE for k in ("weight", "final_weight")}
    for key, interval in _present(config, RANGES | weights).items():
        for value, verb in _each(value_at(config, key)):
            if not _inside(value, interval):
                raise ValueError(f"config.{key} {verb} {value}: it must {_words(value, interval)}")
    for key, choices in _present(config, CHOICES).items():
        for value, verb in _each(value_at(config, key)):
            if value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f" (did you mean '{near[0]}'?)" if near else ""
                raise ValueError(
                    f"config.{key} {verb} '{value}'{hint}: choose {' or '.join(choices)}"
                )


OUTSIDE = "loss."  # the section of an external term, of no kind in LOSSES


def _present(config: ConfigDict, rules) -> dict:
    """{key of the config: rule} of the keys present and not None, with terms by kind."""
    rules = rules if isinstance(rules, dict) else dict.fromkeys(rules)
    sections = {}  # "loss.<kind>" -> the sections of the terms of that kind
    for name, term in config.get("loss", {}).items():
        sections.setdefault(f"loss.{kind_of(name, term)}", []).append(f"loss.{name}")
    found = {}
    for key, rule in rules.items():
        section, _, last = key.rpartition(".")
        if section.startswith("loss."):
            keys = [f"{term}.{last}" for term in sections.get(section, ())]
        else:
            keys = [key]
        found |= {k: rule for k in keys if value_at(config, k) is not None}
    return found


def _each(values) -> list[tuple]:
    """(value, verb) for each element of a tuple, or for a single value."""
    if isinstance(values, tuple | list):
        return [(value, "has") for value in values]
    return [(values, "is")]


def _inside(value, interval: str) -> bool:
    """Whether a finite number lies in "[low, high)"."""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return (
        _usable(value, high) and above and (value <= high if interval[-1] == "]" else value < high)
    )


def _usable(value, high: float) -> bool:
    """Whether a number is finite, and a whole one with no limit of its own at most LARGEST."""
    if isinstance(value, int):
        return value <= LARGEST or math.isfinite(high)
    return math.isfinite(value)


def _words(value, interval: str) -> str:
    if not _usable(value, float(interval[1:-1].split(",")[1])):
        return f"be at most {LARGEST:,}" if isinstance(value, int) else "be a finite number"
    return {POSITIVE: "be positive", NOT_NEGATIVE: "not be negative"}.get(
        interval, f"lie in {interval}"
    )
