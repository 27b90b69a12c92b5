"""Presets of every method: where it runs, not what it does. Differences to base.py only."""

PRESETS = ("demo", "coco", "cifar10")


def apply(config, preset: str):
    """The config with a preset applied.

    Raises:
      ValueError: unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset '{preset}': choose one of {', '.join(PRESETS)}")
    {"demo": _demo, "coco": _coco, "cifar10": _cifar10}[preset](config)
    return config


def _coco(c):
    """ViT-S/16 at 224 on MS COCO: --config.data.dir=/path/to/coco. base.py is this recipe."""
    c.data.source = "coco"


def _cifar10(c):
    """ViT-T/4 at 32 on CIFAR-10 (50,000 images): --config.data.dir=/path/to/cifar10."""
    c.data.source = "cifar10"
    c.model.name, c.model.patch_size = "vit_tiny", 4
    c.views.global_size, c.views.local_size, c.views.num_local = 32, 16, 4
    c.views.blur_prob = (0.0, 0.0, 0.0)  # a 32-pixel image has no detail to spare
    c.evals.resize, c.evals.attention_size = 32, 96
    _small_loss(c, prototypes=4096, width=2048)


def _demo(c):
    """Scenes, small ViT: ends within 5 minutes on 2 CPU cores, evaluation included."""
    c.data.source = "scenes"
    _small_loss(c, prototypes=512, width=256)


def _small_loss(c, prototypes: int, width: int):
    if "dino" in c.loss:
        c.loss.dino.update({"out_dim": prototypes, "hidden_dim": width, "bottleneck_dim": 64})
    if "barlow_twins" in c.loss:
        c.loss.barlow_twins.hidden_dims = (width, width, width)
