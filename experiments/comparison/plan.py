"""Plan of a comparison: one config per method and seed, with an equal budget for all."""

import ast
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dinotwins_jax.build import build
from dinotwins_jax.damage import paths
from dinotwins_jax.evals.features import checksum
from dinotwins_jax.models.vit import as_pair
from dinotwins_jax.settings.added import with_added
from dinotwins_jax.settings.auto import open_keys
from dinotwins_jax.settings.keys import flatten, value_at
from dinotwins_jax.training.optim import make_optimizer
from dinotwins_jax.training.state import create_state
from dinotwins_jax.training.step import make_train_step

METHODS = (
    *("dino", "barlow_twins", "hybrid"),
    *("byol", "simclr", "vicreg", "dinov2", "dinov3", "hybrid_dinov2"),
)
_ABSENT = object()
# Keys that change neither weights nor scores.
_FREE = ("log.", "checkpoint.", "data.num_workers", "data.dir", "data.probe.dir", "evals.tasks",
         "evals.monitor_", "evals.batch_size", "evals.pictures", "model.attention",
         "model.scan_blocks")  # fmt: skip


def split_overrides(argv: list[str], methods) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Extracts --config.key=value (for all methods) and --<method>.key=value from a command line.

    Returns:
      (the rest, {"config" or method: {key: text}}).
    Raises:
      ValueError: an override without a value.
    """
    rest, found = [], {}
    for argument in argv:
        head, equals, value = argument.partition("=")
        name, dot, key = head.removeprefix("--").partition(".")
        if not (argument.startswith("--") and dot and name in ("config", *methods)):
            rest.append(argument)
            continue
        if not equals:
            raise ValueError(f"{argument}: give a value, such as {head}=…")
        found.setdefault(name, {})[key] = value
    return rest, found


def make_configs(preset: str, methods, seed: int, overrides: dict) -> dict[str, ConfigDict]:
    """{method: config} of one seed: configs/<method>.py:<preset> with the overrides.

    Raises:
      ValueError: unknown method or preset, a key that no config has, or a value of another type.
    """
    if not methods:
        raise ValueError(f"no methods: choose from {', '.join(METHODS)}")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown method '{method}': choose from {', '.join(METHODS)}")
    modules = {method: importlib.import_module(f"configs.{method}") for method in methods}
    configs = {method: module.get_config(preset) for method, module in modules.items()}
    for name, keys in overrides.items():
        if name != "config" and name not in configs:
            raise ValueError(f"--{name}.{next(iter(keys))}: {name} is not among --methods")
        chosen = configs if name == "config" else {name: configs[name]}
        for key, text in keys.items():
            if key == "seed":
                raise ValueError(f"--{name}.seed={text}: seeds are 0 to n - 1 of --seeds=n")
            having = [
                config
                for config in chosen.values()
                if value_at(config, key, _ABSENT) is not _ABSENT
            ]
            if not having:
                raise ValueError(f"--{name}.{key}: no config of {', '.join(chosen)} has this key")
            for config in having:
                _set(config, key, text)
    for config in configs.values():
        config.seed = seed
    return configs


def change(config: ConfigDict, changes: dict) -> ConfigDict:
    """The config with other values of some keys; a function gets the value that the config has."""
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[last] = value(section[last]) if callable(value) else value
    return config


def _set(config: ConfigDict, key: str, text: str) -> None:
    node = config
    *parents, last = key.split(".")
    for part in parents:
        node = node[part]
    old = node[last]
    if hasattr(old, "keys"):
        raise ValueError(f"{key}={text}: give one of its keys, {', '.join(old)}")
    try:
        value = (
            text
            if isinstance(old, str)
            else ast.literal_eval(text.capitalize() if isinstance(old, bool) else text)
        )
        if isinstance(old, float) and isinstance(value, int):
            value = float(value)
        node[last] = value
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"{key}={text}: expected a value like {old!r}") from None


def flops_per_step(config: ConfigDict) -> float:
    """Floating-point operations of one training step, crops excluded, by XLA's count.

    The crops are left out since XLA counts a loop over images once, and since they are the same for all
    methods.
    """
    run = build(config)
    constants = {"lr": 1e-3, "weight_decay": 0.0, "teacher_momentum": 0.9, "teacher_temp": 0.04}
    tx = make_optimizer()
    step = make_train_step(
        backbone=run.backbone,
        loss=run.loss,
        make_crops=lambda batch: batch,
        tx=tx,
        schedules={k: lambda step, v=v: jnp.float32(v) for k, v in constants.items()},
        seed=0,
    )
    state = jax.eval_shape(lambda: create_state(run.backbone, run.loss, tx, jax.random.key(0)))
    views = config.views

    def crops(number, size):
        shape = (config.batch_size, number, *as_pair(size), run.backbone.in_channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    batch = {
        "global_crops": crops(2, views.global_size),
        "local_crops": crops(views.num_local, views.local_size),
    }
    return float(jax.jit(step).lower(state, batch).cost_analysis()["flops"])


def check_equal_steps(steps: dict[str, int], batches: dict[str, int]) -> None:
    """Raises ValueError unless all methods have the same number of steps and batch size."""
    for what, of in (("steps", steps), ("images in a batch", batches)):
        if len(set(of.values())) > 1:
            found = ", ".join(f"{method} {number}" for method, number in of.items())
            raise ValueError(f"--budget=steps, but the methods' {what} differ: {found}")


def check_equal_starts(configs: dict[str, ConfigDict]) -> None:
    """Raises ValueError unless all methods start from the same backbone weights, apart from those that
    only some have (registers and mask tokens)."""

    def start(run):
        return dict(paths((run.trained_backbone or run.random_backbone)()))

    weights = {method: start(build(config)) for method, config in configs.items()}
    common = sorted(set.intersection(*(set(of) for of in weights.values())))
    starts = {m: checksum({path: of[path] for path in common}) for m, of in weights.items()}
    if len(set(starts.values())) > 1:
        found = ", ".join(f"{method} {start[:12]}" for method, start in starts.items())
        raise ValueError(f"the methods start from different backbones: {found}")


def equal_flops(steps: dict[str, int], flops: dict[str, float]) -> dict[str, int]:
    """Steps with which every method uses the FLOPs of the most expensive one.

    Args:
      steps: of each method as configured; flops: of one of its steps.
    """
    most = max(steps[method] * flops[method] for method in steps)
    return {method: max(1, round(most / flops[method])) for method in steps}


def is_finished(workdir: Path, config: ConfigDict, steps: int) -> bool:
    """Whether the run was trained to the end, evaluated on all tasks without failure, and has this config.

    Automatic values are ignored. A key that the run's config lacks has the value of `with_added`; one that
    is not there either is ignored.
    """
    try:
        report = json.loads((workdir / "scores.json").read_text())
        theirs = _deciding(with_added(json.loads((workdir / "config.json").read_text())))
    except (OSError, ValueError):
        return False
    ours = _deciding(json.loads(json.dumps(config.to_dict())))  # tuples become lists, as on disk
    automatic = {*open_keys(config.to_dict())}
    if config.data.window.mode == "set" and not len(config.data.window.range):
        automatic.add("data.window.range")
    if not config.data.canvas_size:
        automatic.add("data.canvas_size")
    if config.model.position_interpolation is None:
        automatic.add("model.position_interpolation")
    compared = (theirs.keys() & ours.keys()) - automatic
    if any(theirs[key] != ours[key] for key in compared):
        return False
    done = report.get("seconds", {})
    asked = [task for task in config.evals.tasks if task not in report.get("left_out", ())]
    whole = not report.get("failed") and all(task in done for task in asked)
    return report.get("step") == steps and whole


def _deciding(config: dict) -> dict:
    """{"a.b": value} of the keys that affect weights and scores."""
    return {key: value for key, value in flatten(config).items() if not key.startswith(_FREE)}
