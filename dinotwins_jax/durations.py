"""Durations of a run: conversion from the config's epochs to steps.

If total_steps is set, every duration keeps its share of total_epochs.
"""


def steps_per_epoch(config, images: int) -> int:
    """Steps of an epoch of `images` training images; the last, partial batch is dropped."""
    return max(images // config.batch_size, 1)


def total_steps(config, images: int) -> int:
    """Steps of the run; images: of the training set."""
    return config.total_steps or round(config.total_epochs * steps_per_epoch(config, images))


def to_steps(config, epochs: float, steps: int) -> int:
    """Converts epochs to steps in a run of `steps` steps."""
    return round(epochs / config.total_epochs * steps)


def durations(config, steps: int) -> dict[str, int]:
    """The durations of optimiser, teacher, checkpoints and monitor, in steps.

    Raises:
      ValueError: total_epochs is shorter than one of its parts.
    """
    parts = {
        "optim.warmup_epochs": config.optim.warmup_epochs,
        "teacher.warmup_temp_epochs": config.teacher.warmup_temp_epochs,
        "optim.freeze_last_layer_epochs": config.optim.freeze_last_layer_epochs,
        "optim.freeze_backbone_epochs": config.optim.freeze_backbone_epochs,
    }
    if max(parts.values()) > config.total_epochs:
        raise ValueError(
            f"config.total_epochs is {config.total_epochs:g}, shorter than one of its parts: "
            + ", ".join(f"{key} {epochs:g}" for key, epochs in parts.items())
        )
    intervals = {
        "checkpoint.every_epochs": config.checkpoint.every_epochs,
        "evals.monitor_every_epochs": config.evals.monitor_every_epochs,
    }
    return {key: to_steps(config, epochs, steps) for key, epochs in (parts | intervals).items()}


def terms_in_steps(config, steps: int) -> dict[str, dict]:
    """The terms of config.loss with every argument <name>_epochs as <name>_steps.

    Raises:
      ValueError: a duration outside [0, total_epochs].
    """
    terms = {name: term.to_dict() for name, term in config.loss.items()}
    for name, term in terms.items():
        for key in [key for key in term if key.endswith("_epochs")]:
            epochs = term.pop(key)
            if not 0 <= epochs <= config.total_epochs:
                raise ValueError(
                    f"config.loss.{name}.{key} is {epochs:g}: it must lie in [0, total_epochs "
                    f"{config.total_epochs:g}]"
                )
            term[f"{key.removesuffix('_epochs')}_steps"] = to_steps(config, epochs, steps)
    return terms
