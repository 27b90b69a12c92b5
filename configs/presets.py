"""Presets for all methods: data set and size of a run, and published crops, as changes to base.py.

After the colon comes the data set, then published crops, joined with "+" and applied from left to right:
configs/hybrid.py:coco+dinov2_as_trained. The word "official" and those like it set the whole recipe of a
method's own repository (official.py). The word "auto" leaves the keys that depend on the number of
images, the batch and the steps to dinotwins_jax/settings/auto.py. Keys given on the command line are
applied last.
"""

from ml_collections import config_dict

from dinotwins_jax.augment.presets import PRESETS as VIEWS
from dinotwins_jax.configs import official
from dinotwins_jax.settings.auto import known_keys
from dinotwins_jax.settings.keys import LOSSES, terms_of

WORDS = (*VIEWS, *official.WORDS, "auto")
PRESETS = ("demo", "coco", "cifar10", "coco_cpu", "cifar10_cpu", "cifar10_lt", "cifar10_small")


def apply(config, preset: str):
    """Applies presets, such as "demo" or "coco+barlow_twins", to a config and returns it.

    Raises:
      ValueError: unknown preset, a word without a data set, or an official recipe that the method lacks.
    """
    place, *words = preset.split("+")
    if place not in PRESETS:
        hint = f" (as in {PRESETS[0]}+{place})" if place in WORDS else ""
        raise ValueError(f"unknown preset '{place}': choose one of {', '.join(PRESETS)}{hint}")
    {
        "demo": _demo,
        "coco": _coco,
        "cifar10": _cifar10,
        "coco_cpu": _coco_cpu,
        "cifar10_cpu": _cifar10_cpu,
        "cifar10_lt": _cifar10_lt,
        "cifar10_small": _cifar10_small,
    }[place](config)
    for word in words:
        if word == "auto":
            _auto(config)
        elif word in VIEWS:
            config.views.update(VIEWS[word])
        elif word in official.WORDS:
            official.apply(config, word, pixels=place == "coco")
        else:
            raise ValueError(f"unknown preset '+{word}': choose one of {', '.join(WORDS)}")
    return config


def _auto(c):
    """Sets every key with an automatic rule to None; `build` fills it in."""
    for key in known_keys(c.to_dict()):
        *sections, name = key.split(".")
        section = c
        for part in sections:
            section = section[part]
        section[name] = config_dict.placeholder(section.get_type(name))


def _coco(c):
    """ViT-S/16 at 224 on MS COCO, the recipe of base.py: --config.data.dir=/path/to/coco."""
    c.data.source = "coco"


def _cifar10(c):
    """ViT-T/4 at 32 on CIFAR-10 (50,000 images): --config.data.dir=/path/to/cifar10."""
    c.data.source = "cifar10"
    c.model.name, c.model.patch_size = "vit_tiny", 4
    c.views.global_size, c.views.local_size = 32, 16
    c.views.num_local = min(c.views.num_local, 4)
    c.views.blur_prob = (0.0, 0.0, 0.0)  # a 32-pixel image has no detail to spare
    c.evals.resize, c.evals.attention_size = 32, 96
    _small_heads(c, prototypes=4096, width=2048, bottleneck=256)


def _demo(c):
    """Scenes and a small ViT: 5 minutes at most on 2 CPU cores, evaluation included."""
    c.data.source = "scenes"
    c.batch_size, c.total_epochs = 128, 14.0
    _thousand_steps(c)
    c.model.patch_size = 8
    c.model.embed_dim, c.model.depth, c.model.num_heads = 96, 2, 3
    c.views.global_size, c.views.local_size = 32, 16
    c.evals.resize, c.evals.attention_size = 32, 64
    c.evals.pictures, c.evals.monitor_images = 4, 900


def _cifar10_cpu(c, epochs: float = 24.0):
    """CIFAR-10 with one block behind a convolutional stem: half an hour a method on a CPU core."""
    c.data.source = "cifar10"
    c.batch_size, c.total_epochs = 128, epochs
    _thousand_steps(c)
    c.checkpoint.every_epochs, c.evals.monitor_every_epochs = epochs / 24, epochs / 24
    c.evals.monitor_images = 3000
    c.model.patch_size, c.model.stem = 4, "conv4"
    c.model.embed_dim, c.model.depth, c.model.num_heads = 128, 1, 4
    c.teacher.temp = c.teacher.warmup_temp = 0.04
    for _, barlow_twins in terms_of(c, "barlow_twins") if c.match_gradients_to else ():
        barlow_twins.weight = 1.0
    c.views.global_size, c.views.local_size = 32, 16
    c.views.num_local = min(c.views.num_local, 2)
    c.views.local_scale = (0.15, 0.4)  # 0.05 of a 32-pixel image is 7 pixels
    c.views.blur_prob = (0.0, 0.0, 0.0)  # a 32-pixel image has no detail to spare
    c.evals.resize, c.evals.attention_size = 32, 64
    c.evals.supervised_steps = 2300  # 6 passes over all labels, 60 over a tenth


def _cifar10_lt(c):
    """`_cifar10_cpu` on 12,406 images with a long tail, 5,000 of the first class and 50 of the last."""
    _cifar10_cpu(c, epochs=48.0)
    c.data.subset.long_tail = 100.0


def _cifar10_small(c):
    """`_cifar10_cpu` on 500 images of five classes: the first 100 of each that a seed draws."""
    _cifar10_cpu(c, epochs=400.0)
    c.batch_size, c.data.subset.classes, c.data.subset.images = 64, 5, 100
    for _, term in terms_of(c, "dino", "ibot"):
        term.out_dim = 256  # prototypes, half of the images
    c.evals.label_fractions, c.evals.supervised_steps = (0.1, 1.0), 700


def _coco_cpu(c):
    """COCO, or a few thousand of its images, at 96 pixels with a small ViT, on 2 CPU cores."""
    c.data.source = "coco"
    c.batch_size, c.total_epochs = 64, 20.0
    _thousand_steps(c)
    c.model.patch_size = 16
    c.model.embed_dim, c.model.depth, c.model.num_heads = 128, 3, 4
    c.views.global_size, c.views.local_size = 96, 48
    c.evals.resize, c.evals.attention_size = 110, 192
    c.evals.monitor_every_epochs = 2.0


def _thousand_steps(c):
    """Adapts the schedules to a thousand steps of a narrow ViT, from a hundred thousand of a wide one.

    Everything that follows the student with a delay (center, teacher, their temperatures) has to follow
    faster, and initial weights have to be larger.
    """
    c.model.name, c.model.init_std, c.model.drop_path_rate = "vit_tiny", 0.1, 0.0
    c.model.layer_scale_init = None
    c.views.num_local = min(c.views.num_local, 4)
    c.teacher.momentum, c.teacher.final_momentum = 0.97, 0.99
    c.teacher.temp = c.teacher.warmup_temp = 0.02
    c.teacher.warmup_temp_epochs = 0.0
    c.optim.lr, c.optim.freeze_last_layer_epochs = 4e-3, 0.0
    c.optim.warmup_epochs = c.total_epochs / 14
    c.optim.final_weight_decay = 0.04
    c.evals.n_last_blocks = 1
    _small_heads(c, prototypes=1024, width=256, bottleneck=256)
    for _, dino in terms_of(c, "dino"):
        dino.use_bn, dino.center_momentum = True, 0.0
    for _ in terms_of(c, "byol"):  # a predictor that learns faster than its input prevents collapse
        c.optim.predictor_lr_mult = 30.0
        if len(c.loss) == 1:
            c.optim.lr, c.teacher.momentum, c.teacher.final_momentum = 1e-3, 0.9, 0.97
    for _, gram in terms_of(c, "gram"):
        gram.start_epochs, gram.refresh_epochs = c.total_epochs / 2, c.total_epochs / 8


def _small_heads(c, prototypes: int, width: int, bottleneck: int):
    """Narrows the heads of the package's own losses; heads of external losses stay as they are."""
    for _, term in terms_of(c, *LOSSES):
        if "out_dim" in term:
            term.out_dim = prototypes if "bottleneck_dim" in term else width // 2
        if "hidden_dim" in term:
            term.hidden_dim = width
        if "bottleneck_dim" in term:
            term.bottleneck_dim = bottleneck
        if "hidden_dims" in term:
            term.hidden_dims = (width,) * len(term.hidden_dims)
