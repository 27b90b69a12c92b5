"""What a check measures, in order of value: parts, their shares of the time, their items. Plain values."""

from typing import Any, NamedTuple


class Item(NamedTuple):
    """One measurement.

    seconds: a guess with compilation on a fast card; the pace of the items before corrects it.
    values: arguments of the part's `measure`; paces: whether its time tells of the pace, not where an item
    takes the time that there is.
    """

    name: str
    seconds: float
    values: dict[str, Any] | None = None
    paces: bool = True


class Part(NamedTuple):
    """Items that one process measures, a module with `serve`; share: of the time, before corrections."""

    name: str
    title: str
    module: str
    share: float
    items: tuple[Item, ...]


DEVICE = Part(
    "device",
    "Device and versions",
    "experiments.gpu.device",
    5,
    (Item("versions", 6), Item("rates", 8)),
)
NAMES = ("device", "attention", "precision", "step", "pytorch", "input", "training")

# Arguments of benchmark.settings.Settings, and config keys beside them.
_FULL = {"model": "vit_small", "batch_size": 64, "dtype": "bfloat16"}
_TOY = {
    **{"model": "vit_tiny", "patch_size": 8, "global_size": 16, "local_size": 8, "num_local": 1},
    **{"batch_size": 4, "prototypes": 32, "projector": 32, "dtype": "bfloat16", "drop_path": 0.0},
}
_TOY_KEYS = {
    **{"model.embed_dim": 48, "model.depth": 2, "model.num_heads": 3},
    **{"evals.n_last_blocks": 1, "evals.attention_size": 16},
}


def plan(size: str, platform: str) -> tuple[Part, ...]:
    """The parts after DEVICE.

    Args:
      size: "full" | "toy".
      platform: of the device, "gpu" | "tpu" | "cpu".
    """
    toy = size == "toy"
    settings, keys = (_TOY, _TOY_KEYS) if toy else (_FULL, {})
    flash = () if platform == "tpu" else ("cudnn",)  # values of config.model.attention

    def part(name: str, title: str, share: float, items) -> Part:
        return Part(name, title, f"experiments.gpu.{name}", share, tuple(items))

    def seconds(full: float) -> float:
        return 5.0 if toy else full

    few = keys if toy else {"model.depth": 4}
    step = {"settings": settings if toy else settings | {"batch_size": 32}, "keys": few}

    def gradients(name: str, reference: str = "", precision: str = "default", **changed) -> Item:
        values = step | {"settings": step["settings"] | changed, "precision": precision}
        return Item(name, seconds(20), values | {"reference": reference})

    plain = gradients("bfloat16, plain")
    highest = gradients("float32, highest precision", precision="highest", dtype="float32")
    return (
        part(
            *("attention", "Gradients of a step, flash against plain attention", 12),
            (
                plain,
                *(gradients(f"bfloat16, {name}", plain.name, attention=name) for name in flash),
                gradients("bfloat16, auto", plain.name, attention="auto"),
            ),
        ),
        part(
            *("precision", "Gradients of a step, bfloat16 against float32", 9),
            (
                highest,
                gradients("bfloat16, plain", highest.name),
                gradients("float32, default precision", highest.name, dtype="float32"),
                *(gradients(f"bfloat16, {name}", highest.name, attention=name) for name in flash),
            ),
        ),
        part("step", "A training step", 32, _steps(settings, keys, flash, toy, seconds)),
        part("pytorch", "A training step of PyTorch", 20, _pytorch(settings, keys, toy, seconds)),
        part(
            *("input", "From files to trained images", 8),
            (
                Item("host", seconds(8), {"settings": settings, "keys": keys}),
                Item("end to end", seconds(30), {"settings": settings, "keys": keys}),
            ),
        ),
        part(
            *("training", "CIFAR-10, ViT-T/4", 14),
            (
                Item("training", seconds(60), {"steps_per_second": 30.0}, paces=False),
                Item("probe", seconds(30)),
            ),
        ),
    )


def _steps(settings: dict, keys: dict, flash: tuple[str, ...], toy: bool, seconds) -> list[Item]:
    models = ("vit_tiny",) if toy else ("vit_small", "vit_base")
    small, middle, large = (4, 8, 8) if toy else (64, 128, 256)
    given, augmented = (
        [(name, augments) for name in ("xla", *flash)] for augments in (False, True)
    )
    wanted = [(m, small, *way) for m in models for way in given]
    wanted += [(models[0], small, *way) for way in augmented]
    wanted += [(m, large, *way) for m in models for way in given]
    if not toy:
        every = given + augmented
        wanted += [(m, b, *way) for b in (small, large, middle) for m in models for way in every]
    return [_step(settings, keys, seconds, *of) for of in dict.fromkeys(wanted)]


def _step(settings, keys, seconds, model, batch, attention, augments) -> Item:
    title = "plain" if attention == "xla" else attention
    name = f"{model}, batch {batch}, {title}{', augmentation' * augments}"
    changed = settings | {"model": model, "batch_size": batch, "attention": attention}
    guess = seconds((35 if model == "vit_small" else 40) + 15 * augments)
    return Item(name, guess, {"settings": changed, "keys": keys, "augments": augments})


def _pytorch(settings: dict, keys: dict, toy: bool, seconds) -> list[Item]:
    models = ("vit_tiny",) if toy else ("vit_small", "vit_base")
    guesses = {"eager": 15} if toy else {"torch.compile": 70, "eager": 15}
    return [
        Item(
            f"{model}, batch {settings['batch_size']}, {way}",
            seconds(guess),
            {
                "settings": settings | {"model": model},
                "keys": keys,
                "compile": way != "eager",
            },
        )
        for way, guess in guesses.items()
        for model in models
    ]
