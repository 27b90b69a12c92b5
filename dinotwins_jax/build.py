"""Builds the parts of a run from its config and checks them before compiling or writing anything.

Modules below this one do not see `config`.
"""

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dinotwins_jax.data import data_section, open_source, probe_section
from dinotwins_jax.data.look import Look, look_at, settle_window
from dinotwins_jax.devices.placement import Placement, make_placement
from dinotwins_jax.devices.platforms import platform_of
from dinotwins_jax.durations import durations, terms_in_steps, total_steps
from dinotwins_jax.evals import check_tasks
from dinotwins_jax.evals.features import check_last_blocks
from dinotwins_jax.inputs import make_crops_of, moments_of, with_window
from dinotwins_jax.losses import WeightedSum, make_loss
from dinotwins_jax.models import create_vit
from dinotwins_jax.models.vit import VisionTransformer, as_pair
from dinotwins_jax.pretrained import read_backbone
from dinotwins_jax.schedules import cosine_schedule, teacher_temp_schedule
from dinotwins_jax.settings import advice, auto
from dinotwins_jax.settings.ranges import check_ranges
from dinotwins_jax.streams import INIT, stream
from dinotwins_jax.training.diagnosis import make_diagnosis
from dinotwins_jax.training.optim import make_optimizer
from dinotwins_jax.training.state import create_state, init_backbone
from dinotwins_jax.training.step import make_train_step


class Run(NamedTuple):
    """All parts of a run, built and checked, before anything is compiled or written."""

    config: ConfigDict  # with a value for every key
    recipe: list[str]  # lines: automatic values with reasons; empty where all were given
    advice: list[str]  # lines: valid settings that are known to work badly
    source: object  # of training
    look: Look  # at a few of its pictures
    probe_sources: tuple  # (train, test) of the probes
    canvas_size: int
    backbone: VisionTransformer
    loss: WeightedSum
    placement: Placement
    total_steps: int
    warmup_steps: int
    checkpoint_steps: int
    monitor_steps: int  # 0: never
    train_step: Callable  # (state, batch) -> (state, metrics)
    diagnose: Callable  # (state, batch) -> first module with non-finite values
    fresh_state: Callable  # () -> TrainState
    random_backbone: Callable  # () -> the backbone's parameters in fresh_state
    trained_backbone: Callable | None  # () -> the parameters of config.init_from, checked


class EvalRun(NamedTuple):
    """The parts of a run that evaluation needs, with the names of Run: no losses and no optimiser, and
    so no code that config.loss names."""

    config: ConfigDict
    source: object
    look: Look
    probe_sources: tuple
    canvas_size: int
    backbone: VisionTransformer  # mask_token: that of the weights, not of this
    placement: Placement


def build_for_evaluation(config: ConfigDict) -> EvalRun:
    """Builds the parts that evaluation needs on the devices present; raises as `build`."""
    return _without_losses(for_evaluation(config))


def _without_losses(config: ConfigDict, devices: list[jax.Device] | None = None) -> EvalRun:
    check_ranges(config)
    moments_of(config)  # checks them
    views = config.views.to_dict()
    placement = make_placement(
        config.parallel,
        config.batch_size,
        devices,
        data=config.mesh.data,
        fsdp=config.mesh.fsdp,
        micro_batches=config.micro_batches,
    )
    backbone = make_backbone(config, placement.platform)
    for name in ("global_size", "local_size"):
        if name == "global_size" or views["num_local"]:
            _check_crop(name, views[name], backbone.patch_size)
    _check_evals(config, backbone)
    source = open_source(data_section(config), "pretrain")
    settle_window(source, config.seed)
    config = with_window(config, source)
    return EvalRun(
        config=config,
        source=source,
        look=look_at(source),
        probe_sources=_probe_sources(data_section(config)),
        canvas_size=config.data.canvas_size
        or source.default_canvas(max(as_pair(views["global_size"]))),
        backbone=backbone,
        placement=placement,
    )


def build(
    config: ConfigDict, devices: list[jax.Device] | None = None, make_crops: Callable | None = None
) -> Run:
    """Builds a run from its config; raises every error that can be found without compiling.

    Args:
      devices: all devices by default.
      make_crops: batch -> crops, instead of the multi-crop of config.views.
    """
    base = _without_losses(config, devices)
    source, placement = base.source, base.placement
    config, recipe = _resolved(base.config, len(source), base.backbone.embed_dim)
    config.data.canvas_size = base.canvas_size  # for who loads the run without its data
    num_steps = total_steps(config, len(source))
    steps = durations(config, num_steps)
    loss = make_loss(_terms(config, num_steps))
    backbone = base.backbone.clone(mask_token=loss.masks is not None)
    if config.match_gradients_to not in ("", *config.loss):
        raise ValueError(
            f"config.match_gradients_to is '{config.match_gradients_to}': '' or a term of config.loss, "
            f"{' or '.join(config.loss)}"
        )
    tx = make_optimizer(
        config.optim.name,
        clip=config.optim.clip,
        clip_mode=config.optim.clip_mode,
        freeze_last_layer_steps=steps["optim.freeze_last_layer_epochs"],
        freeze_backbone_steps=steps["optim.freeze_backbone_epochs"],
        layer_decay=config.optim.layer_decay,
        patch_embed_lr_mult=config.optim.patch_embed_lr_mult,
        predictor_lr_mult=config.optim.predictor_lr_mult,
    )
    parts = {
        "backbone": backbone,
        "loss": loss,
        "make_crops": make_crops or make_crops_of(config, placement),
        "schedules": make_schedules(config, num_steps, steps),
        "seed": config.seed,
        "match_gradients_to": config.match_gradients_to,
    }
    train_step = make_train_step(
        **parts,
        tx=tx,
        axis_name=placement.axis_name,
        micro_batches=config.micro_batches,
        gather=placement.gather,
    )
    key, monitored = stream(config.seed, INIT), config.evals.monitor_every_epochs > 0
    jax.eval_shape(lambda: create_state(backbone, loss, tx, key))  # raises for shape mismatches
    start = partial(read_backbone, config.init_from, backbone, key) if config.init_from else None
    return Run(
        config=config,
        recipe=recipe,
        advice=[*advice.find(advice.Setting(config, len(source), num_steps)), *base.look.warnings],
        source=source,
        look=base.look,
        probe_sources=base.probe_sources,
        canvas_size=base.canvas_size,
        backbone=backbone,
        loss=loss,
        placement=placement,
        total_steps=num_steps,
        warmup_steps=steps["optim.warmup_epochs"],
        checkpoint_steps=max(steps["checkpoint.every_epochs"], 1),
        monitor_steps=max(steps["evals.monitor_every_epochs"], 1) if monitored else 0,
        train_step=train_step,
        diagnose=make_diagnosis(**parts),
        fresh_state=lambda: create_state(backbone, loss, tx, key),
        random_backbone=lambda: init_backbone(backbone, key),
        trained_backbone=start,
    )


def for_evaluation(config: ConfigDict) -> ConfigDict:
    """Adapts a config to the devices present, which may differ from those of the training."""
    here = copy.deepcopy(config)
    if auto.open_keys(config.to_dict()):  # before batch_size is changed below
        images = len(open_source(data_section(config), "pretrain"))
        here, _ = _resolved(here, images, make_backbone(config).embed_dim)
    here.parallel, here.micro_batches, here.batch_size = "jit", 1, jax.local_device_count()
    here.mesh.data, here.mesh.fsdp = 0, 1
    return here


def _resolved(config: ConfigDict, images: int, embed_dim: int) -> tuple[ConfigDict, list[str]]:
    """Returns the config with its open keys filled in, and the recipe as lines."""
    keys, config = auto.open_keys(config.to_dict()), copy.deepcopy(config)
    if not keys:
        return config, []
    facts = auto.Facts(
        images=images,
        batch_size=config.batch_size,
        steps=total_steps(config, images),
        epochs=config.total_epochs,
        embed_dim=embed_dim,
        optimizer=config.optim.name,
        has_weights=bool(config.init_from),
    )
    chosen = auto.resolve(keys, facts)
    config.update_from_flattened_dict({key: choice.value for key, choice in chosen.items()})
    return config, auto.table(config.to_dict(), chosen, facts)


def make_backbone(config: ConfigDict, platform: str | None = None) -> VisionTransformer:
    """Builds the ViT of config.model, to run on `platform` (that of the devices here by default); position
    embeddings have the grid of the global crops."""
    platform = platform or platform_of(jax.devices())
    fields = {name: value for name, value in config.model.to_dict().items() if value is not None}
    fields["dtype"] = jnp.dtype(fields["dtype"])
    halves = jnp.bfloat16, jnp.float16
    if fields["attention"] == "cudnn" and (platform != "gpu" or fields["dtype"] not in halves):
        raise ValueError(
            f"config.model.attention is 'cudnn': it needs a GPU, here is a {platform}, "
            f"and config.model.dtype bfloat16, which is {fields['dtype']}"
        )
    with _key("config.model.name"):
        return create_vit(fields.pop("name"), image_size=config.views.global_size, **fields)


def make_schedules(config: ConfigDict, num_steps: int, steps: dict[str, int]) -> dict:
    """Builds the schedules lr, weight_decay, teacher_momentum and teacher_temp, each step -> f32[].

    Differs: the teacher's temperature warms up step by step as in DINOv2, not epoch by epoch.
    """
    optim, teacher = config.optim, config.teacher
    peak = optim.lr * config.batch_size / 256
    return {
        "lr": cosine_schedule(peak, optim.final_lr, num_steps, steps["optim.warmup_epochs"]),
        "weight_decay": cosine_schedule(optim.weight_decay, optim.final_weight_decay, num_steps),
        "teacher_momentum": cosine_schedule(teacher.momentum, teacher.final_momentum, num_steps),
        "teacher_temp": teacher_temp_schedule(
            teacher.warmup_temp, teacher.temp, steps["teacher.warmup_temp_epochs"]
        ),
    }


def _terms(config: ConfigDict, num_steps: int) -> dict[str, dict]:
    """Returns the terms of config.loss for `make_loss`, with schedules for weights that change."""
    terms = terms_in_steps(config, num_steps)
    for term in terms.values():
        weight, warmup = float(term.get("weight", 1.0)), term.pop("weight_warmup_steps", 0)
        final = term.pop("final_weight", None)
        term["weight"] = weight
        if final is not None or warmup:
            final = weight if final is None else final
            term["weight"] = cosine_schedule(weight, final, num_steps, warmup)
    return terms


def _check_evals(config: ConfigDict, backbone: VisionTransformer) -> None:
    """Checks the keys of config.evals against the rest of the config."""
    evals = config.evals
    with _key("config.evals.tasks"):
        check_tasks(evals.tasks)
    check_last_blocks(backbone, evals.n_last_blocks)
    if evals.attention_size < config.model.patch_size:
        raise ValueError(
            f"config.evals.attention_size is {evals.attention_size}: at least one patch of "
            f"config.model.patch_size {config.model.patch_size} pixels"
        )


@contextlib.contextmanager
def _key(key: str):
    """Context manager that adds the config key to a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _check_crop(name: str, size, patch_size: int) -> None:
    if any(side % patch_size for side in as_pair(size)):
        raise ValueError(
            f"config.views.{name} {size} is not a multiple of config.model.patch_size {patch_size}"
        )


def _probe_sources(data: dict) -> tuple:
    """Opens the sources "train" and "test" and checks that their classes agree."""
    train, test = (open_source(probe_section(data), split) for split in ("train", "test"))
    labelled = train.labels is not None and test.labels is not None
    if labelled and train.class_names != test.class_names:
        raise ValueError(
            f"the classes of the training and test labels differ: {len(train.class_names)} and "
            f"{len(test.class_names)} names, or another order"
        )
    return train, test
