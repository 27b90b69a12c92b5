"""From the config to the parts of a run, checked before anything is compiled or written.

Nothing below sees `config`.
"""

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dinotwins_jax import advice, recipe
from dinotwins_jax.augment import image_keys, make_multi_crop
from dinotwins_jax.data import open_source
from dinotwins_jax.diagnosis import make_diagnosis
from dinotwins_jax.evals.features import check_last_blocks
from dinotwins_jax.evals.tasks import check_tasks
from dinotwins_jax.losses import Loss, make_loss
from dinotwins_jax.models import create_vit
from dinotwins_jax.models.vit import VisionTransformer, as_pair
from dinotwins_jax.optim import make_optimizer
from dinotwins_jax.parallel import Placement, make_placement
from dinotwins_jax.ranges import check_ranges
from dinotwins_jax.schedules import cosine_schedule, teacher_temp_schedule
from dinotwins_jax.start import read_backbone
from dinotwins_jax.state import create_state, init_backbone
from dinotwins_jax.step import INIT, make_train_step


class Run(NamedTuple):
    """All parts of a run, built and checked, before anything is compiled or written."""

    config: ConfigDict  # with a value for every key that the recipe has found one for
    recipe: list[str]  # lines: which, and why; none where everything was given
    advice: list[str]  # lines: settings that run and are no good
    source: object  # of training
    probe_sources: tuple  # (train, test) of the probes
    canvas_size: int
    backbone: VisionTransformer
    loss: Loss
    placement: Placement
    total_steps: int
    warmup_steps: int
    checkpoint_steps: int
    monitor_steps: int  # 0: never
    train_step: object
    diagnose: object  # (state, batch) -> where the step is not finite
    fresh_state: object  # () -> TrainState
    random_backbone: object  # () -> the backbone's parameters in fresh_state
    trained_backbone: object  # () -> those of config.init_from, read and checked; None without


def build(
    config: ConfigDict, devices: list[jax.Device] | None = None, make_crops: Callable | None = None
) -> Run:
    """Turns config into parts; every mistake that can be seen without compiling is raised here.

    Args:
      devices: all there are by default.
      make_crops: what the step does with a batch, as `views` of make_train_step, instead of the
        multi-crop of config.views.
    """
    check_ranges(config)
    views, data = config.views.to_dict(), config.data.to_dict()
    placement = make_placement(
        config.parallel,
        config.batch_size,
        devices,
        data=config.mesh.data,
        fsdp=config.mesh.fsdp,
        micro_batches=config.micro_batches,
    )
    backbone = make_backbone(config)
    for name in ("global_size", "local_size"):
        if name == "global_size" or views["num_local"]:
            _check_crop(name, views[name], backbone.patch_size)
    _check_evals(config, backbone)
    source, probe_sources = open_source(data, "pretrain"), _probe_sources(data)
    total_steps = _total_steps(config, len(source))
    config, found = _resolved(config, len(source))
    # Every duration is stated in epochs of total_epochs, and keeps its share when total_steps is set.
    steps = _durations(config, total_steps)
    loss = make_loss(_terms(config, total_steps))
    backbone = backbone.clone(mask_token=loss.masks is not None)
    if config.match_gradients_to not in ("", *config.loss):
        raise ValueError(
            f"config.match_gradients_to is '{config.match_gradients_to}': '' or a term of config.loss, "
            f"{' or '.join(config.loss)}"
        )
    tx = make_optimizer(
        config.optim.name,
        clip=config.optim.clip,
        clip_mode=config.optim.clip_mode,
        freeze_last_layer_steps=steps["freeze_last_layer"],
        freeze_backbone_steps=steps["freeze_backbone"],
        layer_decay=config.optim.layer_decay,
        patch_embed_lr_mult=config.optim.patch_embed_lr_mult,
        predictor_lr_mult=config.optim.predictor_lr_mult,
    )
    parts = {
        "backbone": backbone,
        "loss": loss,
        "views": make_crops or _make_views(views, placement),
        "schedules": make_schedules(config, total_steps, steps),
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
    key = jax.random.fold_in(jax.random.key(config.seed), INIT)
    jax.eval_shape(lambda: create_state(backbone, loss, tx, key))  # shapes that do not fit
    start = partial(read_backbone, config.init_from, backbone, key) if config.init_from else None
    return Run(
        config=config,
        recipe=found,
        advice=advice.find(advice.Setting(config, len(source), total_steps)),
        source=source,
        probe_sources=probe_sources,
        canvas_size=config.data.canvas_size
        or source.default_canvas(max(as_pair(views["global_size"]))),
        backbone=backbone,
        loss=loss,
        placement=placement,
        total_steps=total_steps,
        warmup_steps=steps["warmup"],
        checkpoint_steps=max(steps["checkpoint"], 1),
        monitor_steps=max(steps["monitor"], 1) if config.evals.monitor_every_epochs else 0,
        train_step=train_step,
        diagnose=make_diagnosis(**parts),
        fresh_state=lambda: create_state(backbone, loss, tx, key),
        random_backbone=lambda: init_backbone(backbone, key),
        trained_backbone=start,
    )


def for_evaluation(config: ConfigDict) -> ConfigDict:
    """The config for the devices that are here, which need not be those of the training."""
    here = copy.deepcopy(config)
    if recipe.open_keys(config.to_dict()):  # before the batch is another one
        here, _ = _resolved(here, len(open_source(config.data.to_dict(), "pretrain")))
    here.parallel, here.micro_batches, here.batch_size = "jit", 1, jax.local_device_count()
    here.mesh.data, here.mesh.fsdp = 0, 1
    return here


def _total_steps(config: ConfigDict, images: int) -> int:
    steps_per_epoch = max(images // config.batch_size, 1)
    return config.total_steps or round(config.total_epochs * steps_per_epoch)


def _resolved(config: ConfigDict, images: int) -> tuple[ConfigDict, list[str]]:
    """The config with values for the keys that it leaves open, and the recipe as lines."""
    keys = recipe.open_keys(config.to_dict())
    if not keys:
        return config, []
    facts = recipe.Facts(
        images=images,
        batch_size=config.batch_size,
        steps=_total_steps(config, images),
        epochs=config.total_epochs,
        embed_dim=make_backbone(config).embed_dim,
        optimizer=config.optim.name,
        has_weights=bool(config.init_from),
    )
    chosen, config = recipe.resolve(keys, facts), copy.deepcopy(config)
    config.update_from_flattened_dict({key: choice.value for key, choice in chosen.items()})
    return config, recipe.table(config.to_dict(), chosen, facts)


def make_backbone(config: ConfigDict) -> VisionTransformer:
    """The ViT of config.model; its positions are stored for the grid of the global crops."""
    fields = {name: value for name, value in config.model.to_dict().items() if value is not None}
    fields["dtype"] = jnp.dtype(fields["dtype"])
    if fields["attention"] == "cudnn" and (
        jax.default_backend() != "gpu" or fields["dtype"] not in (jnp.bfloat16, jnp.float16)
    ):
        raise ValueError(
            "config.model.attention is 'cudnn': it needs a GPU, here is a "
            f"{jax.default_backend()}, and config.model.dtype bfloat16, which is {fields['dtype']}"
        )
    with _key("config.model.name"):
        return create_vit(fields.pop("name"), image_size=config.views.global_size, **fields)


def make_schedules(config: ConfigDict, total_steps: int, steps: dict[str, int]) -> dict:
    """lr, weight_decay, teacher_momentum and teacher_temp, each step -> f32[].

    Differs: the teacher's temperature warms up step by step as in DINOv2, not epoch by epoch.
    """
    optim, teacher = config.optim, config.teacher
    peak = optim.lr * config.batch_size / 256
    return {
        "lr": cosine_schedule(peak, optim.final_lr, total_steps, steps["warmup"]),
        "weight_decay": cosine_schedule(optim.weight_decay, optim.final_weight_decay, total_steps),
        "teacher_momentum": cosine_schedule(teacher.momentum, teacher.final_momentum, total_steps),
        "teacher_temp": teacher_temp_schedule(
            teacher.warmup_temp, teacher.temp, steps["warmup_temp"]
        ),
    }


def _terms(config: ConfigDict, total_steps: int) -> dict[str, dict]:
    """The terms of config.loss, with a schedule for a weight that is not one number, and arguments
    "…_epochs" as "…_steps"."""
    terms = {name: term.to_dict() for name, term in config.loss.items()}
    for name, term in terms.items():
        for key in [key for key in term if key.endswith("_epochs")]:
            epochs = term.pop(key)
            if not 0 <= epochs <= config.total_epochs:
                raise ValueError(
                    f"config.loss.{name}.{key} is {epochs:g}: it must lie in [0, total_epochs "
                    f"{config.total_epochs:g}]"
                )
            steps = round(epochs / config.total_epochs * total_steps)
            term[key.removesuffix("epochs") + "steps"] = steps
        weight, warmup = float(term.get("weight", 1.0)), term.pop("weight_warmup_steps", 0)
        final = term.pop("final_weight", None)
        term["weight"] = weight
        if final is not None or warmup:
            final = weight if final is None else final
            term["weight"] = cosine_schedule(weight, final, total_steps, warmup)
    return terms


def _check_evals(config: ConfigDict, backbone: VisionTransformer) -> None:
    """What the keys of evals say together with others."""
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
    """Errors inside name the key of the config."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _durations(config: ConfigDict, total_steps: int) -> dict[str, int]:
    epochs = {
        "warmup": config.optim.warmup_epochs,
        "warmup_temp": config.teacher.warmup_temp_epochs,
        "freeze_last_layer": config.optim.freeze_last_layer_epochs,
        "freeze_backbone": config.optim.freeze_backbone_epochs,
        "checkpoint": config.checkpoint.every_epochs,
        "monitor": config.evals.monitor_every_epochs,
    }
    parts = ("warmup", "warmup_temp", "freeze_last_layer", "freeze_backbone")
    if max(epochs[part] for part in parts) > config.total_epochs:
        raise ValueError(
            f"config.total_epochs is {config.total_epochs:g}, shorter than one of its parts: optim."
            f"warmup_epochs {epochs['warmup']:g}, teacher.warmup_temp_epochs "
            f"{epochs['warmup_temp']:g}, optim.freeze_last_layer_epochs "
            f"{epochs['freeze_last_layer']:g}, optim.freeze_backbone_epochs "
            f"{epochs['freeze_backbone']:g}"
        )
    return {
        name: round(value / config.total_epochs * total_steps) for name, value in epochs.items()
    }


def _make_views(recipe: dict, placement: Placement):
    # A loop over images that are split over devices would gather them all on each device.
    split = placement.axis_name is None and placement.num_devices > 1
    multi_crop = make_multi_crop(**recipe, one_by_one=False if split else None)

    def views(batch, key):
        return multi_crop(batch["image"], batch["size"], image_keys(key, batch["place"]))

    return views


def _check_crop(name: str, size, patch_size: int) -> None:
    if any(side % patch_size for side in as_pair(size)):
        raise ValueError(
            f"config.views.{name} {size} is not a multiple of config.model.patch_size {patch_size}"
        )


def _probe_sources(data: dict) -> tuple:
    """Sources "train" and "test", whose labels must mean the same."""
    train, test = open_source(data, "train"), open_source(data, "test")
    labelled = train.labels is not None and test.labels is not None
    if labelled and train.class_names != test.class_names:
        raise ValueError(
            f"the classes of the training and test labels differ: {len(train.class_names)} and "
            f"{len(test.class_names)} names, or another order"
        )
    return train, test
