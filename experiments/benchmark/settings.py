"""Settings of a measured training step: method, model, crops, batch. Plain values, for any framework."""

import re
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import barlow_twins, dino, hybrid
from dinotwins_jax.models import VARIANTS

METHODS = {"hybrid": hybrid, "dino": dino, "barlow_twins": barlow_twins}


class Settings(NamedTuple):
    """method: of METHODS; model: a name of models.create_vit; sizes in pixels; num_local 0: only two
    global crops; prototypes: K of DINO; projector: D of Barlow Twins, three times; way: "plain", "remat",
    "micro4" (the batch in 4 parts), "data2" (over 2 devices), "fsdp2" or several joined by "+"; depth:
    blocks, None: the model's.
    """

    method: str = "hybrid"
    model: str = "vit_small"
    patch_size: int = 16
    global_size: int = 224
    local_size: int = 96
    num_local: int = 8
    batch_size: int = 4
    prototypes: int = 65536
    projector: int = 8192
    dtype: str = "float32"
    drop_path: float = 0.1
    attention: str = "xla"
    way: str = "plain"
    depth: int | None = None

    def text(self) -> str:
        """The settings in one line."""
        local = f" + {self.num_local} x {self.local_size}" if self.num_local else ""
        heads = f"K {self.prototypes:,}" if self.method != "barlow_twins" else ""
        heads += f" D {self.projector:,}" if self.method != "dino" else ""
        depth = f" of {self.depth} blocks" if self.depth else ""
        return (
            f"{self.method}, {self.model}/{self.patch_size}{depth}, 2 x {self.global_size}{local}, "
            f"{heads.strip()}, batch {self.batch_size}, {self.dtype}, {self.way}"
        )


def settings_of(method: str, model: str, **values) -> Settings:
    """Creates Settings; without local crops for Barlow Twins alone, which uses none."""
    if method == "barlow_twins":
        values["num_local"] = 0
    return Settings(method, model, **values)


def config_of(settings: Settings, directory: str = "") -> ConfigDict:
    """The method's config for COCO with these settings; directory "": generated scenes, without files.

    Raises:
      ValueError: unknown method or way.
    """
    if settings.method not in METHODS:
        raise ValueError(f"unknown method '{settings.method}': choose from {', '.join(METHODS)}")
    config = METHODS[settings.method].get_config("coco")
    config.data.source, config.data.dir = ("coco", directory) if directory else ("scenes", "")
    config.batch_size = settings.batch_size
    config.model.name, config.model.dtype = settings.model, settings.dtype
    config.model.attention, config.model.depth = settings.attention, settings.depth
    config.evals.n_last_blocks = min(config.evals.n_last_blocks, architecture(settings)["depth"])
    config.model.patch_size, config.model.drop_path_rate = settings.patch_size, settings.drop_path
    config.views.global_size, config.views.local_size = settings.global_size, settings.local_size
    config.views.num_local = settings.num_local
    config.optim.freeze_last_layer_epochs = 0.0  # everything is trained from the first step
    config.evals.attention_size = max(config.evals.attention_size, settings.patch_size)
    if "dino" in config.loss:
        config.loss.dino.out_dim = settings.prototypes
    if "barlow_twins" in config.loss:
        config.loss.barlow_twins.hidden_dims = (settings.projector,) * 3
    for part in settings.way.split("+"):
        _apply(config, part)
    return config


def _apply(config: ConfigDict, part: str) -> None:
    found = re.fullmatch(r"(micro|data|fsdp)(\d+)", part)
    if part == "remat":
        config.model.remat = True
    elif found and found[1] == "micro":
        config.micro_batches = int(found[2])
    elif found:
        config.mesh[found[1]] = int(found[2])
    elif part != "plain":
        raise ValueError(
            f"'{part}' is no way to train: plain, remat, micro<n>, data<n>, fsdp<n>, or several with +"
        )


def architecture(settings: Settings) -> dict[str, int]:
    """embed_dim, depth, num_heads of the settings' model."""
    given = {"depth": settings.depth} if settings.depth else {}
    return VARIANTS[settings.model] | given
