"""Automatic values for open config keys, from the number of images, the batch and the steps.

A key is open if its value is None, as the preset "auto" sets it (configs/presets.py); given values are
kept. Published recipes are for 1.3 million images and 10^5 steps. In a shorter run everything that follows
the student with a delay has to follow faster: in proportion to the run where the share is known; other
values are interpolated between what worked for SHORT runs here and the official value for LONG ones, by
the logarithm of the number of steps.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from dinotwins_jax.settings.keys import DISTILLING, terms_of, value_at
from dinotwins_jax.settings.rates import SCALINGS

SHORT, LONG = 1_000, 125_000  # steps: this project's CPU presets; DINOv2's 100 epochs of 1,250


class Facts(NamedTuple):
    """Facts about a run from which automatic values are computed.

    images: of the training set; batch_size: global; steps: of the whole run; epochs: config.total_epochs,
    the unit of durations; embed_dim: of the backbone; optimizer: adamw | lars; has_weights: the backbone
    starts from pretrained weights; lr_scaling: config.optim's.
    """

    images: int
    batch_size: int
    steps: int
    epochs: float
    embed_dim: int
    optimizer: str = "adamw"
    has_weights: bool = False
    lr_scaling: str = "linear_256"


class Choice(NamedTuple):
    """An automatic value and its reason."""

    value: float | int
    reason: str  # one line


def open_keys(config: Mapping) -> list[str]:
    """The keys "a.b.c" that have a rule below and whose value is None."""
    return [key for key in known_keys(config) if value_at(config, key) is None]


def known_keys(config: Mapping) -> list[str]:
    """The keys of the config that have a rule below: those of distillation only with a distilling term,
    that of a predictor only with a BYOL term."""
    distilling = dict(terms_of(config, *DISTILLING))
    predicts = any(True for _ in terms_of(config, "byol"))
    keys = []
    for rule in RULES:
        section, _, name = rule.partition(".")
        if section == "term":
            keys += [f"loss.{term}.{name}" for term, of in distilling.items() if name in of]
        elif (distilling or "temp" not in name) and (predicts or "predictor" not in name):
            keys.append(rule)
    return keys


def resolve(keys: list[str], facts: Facts) -> dict[str, Choice]:
    """Chooses a value and a reason for each key."""
    rules = {key: RULES.get(key) or RULES[f"term.{key.rpartition('.')[2]}"] for key in keys}
    return {key: rule(facts) for key, rule in rules.items()}


def table(config: Mapping, chosen: dict[str, Choice], facts: Facts) -> list[str]:
    """Formats the recipe as lines: automatic values with reasons, and given values."""
    head = f"recipe for {facts.images:,} images, batch {facts.batch_size}, {facts.steps:,} steps"
    rows = [
        (key, chosen.get(key, Choice(value_at(config, key), "given"))) for key in known_keys(config)
    ]
    wide = max(len(key) for key, _ in rows)
    lines = [f"  {key:<{wide}}  {choice.value:<9g}  {choice.reason}" for key, choice in rows]
    return [f"{head}:", *lines]


def _prototypes(facts: Facts) -> Choice:
    power = 2 ** round(math.log2(max(facts.images / 10, 1)))
    most = 2 ** int(math.log2(max(facts.images, 1)))
    value = min(max(power, 1024), 65536, most)
    return Choice(
        value,
        f"the power of two nearest to a tenth of {facts.images:,} images, 1,024 to 65,536 and no more "
        "than images",
    )


def _center_momentum(facts: Facts) -> Choice:
    if facts.batch_size < 32:
        return Choice(0.9, "DINO's; the mean of so small a batch is noise")
    value = round(0.9 * _longness(facts), 2)
    return Choice(value, _between(0.0, "DINO", 0.9, facts))


def _warmup_temp(facts: Facts) -> Choice:
    return _interpolated(0.02, 0.04, "DINO", facts)


def _temp(facts: Facts) -> Choice:
    return _interpolated(0.02, 0.07, "DINOv2", facts)


def _warmup_temp_epochs(facts: Facts) -> Choice:
    if _temp(facts).value == _warmup_temp(facts).value:
        return Choice(0.0, "the temperature is constant")
    return _share(0.3, 37_500, "DINOv2's 30 of 100 epochs", facts)


def _momentum(facts: Facts) -> Choice:
    official = half_life(0.996) * 1024 / facts.batch_size  # steps
    longest = max(facts.steps / 40, 1.0)
    anchor = "0.996 at batch 1,024"
    if official > longest:
        why = f"half-life {longest:.0f} steps, 1/40 of the run; {anchor} would be {official:,.0f} here"
    else:
        why = f"half-life {official:,.0f} steps, as many images as {anchor}"
    return Choice(_momentum_of(min(official, longest)), f"{why} (arXiv:2307.13813)")


def _final_momentum(facts: Facts) -> Choice:
    steps = max(facts.steps / 12, 1.0)
    return Choice(_momentum_of(steps), f"half-life {steps:.0f} steps, 1/12 of the run; official 1")


def _lr(facts: Facts) -> Choice:
    """Value of config.optim.lr, for the batch of its scaling."""
    if facts.optimizer == "lars":
        return Choice(0.2, "Barlow Twins' LARS, linear in the batch")
    peak = 1e-3 * (facts.batch_size / 512) ** 0.5 * 384 / facts.embed_dim
    why = "1e-3 at batch 512 and width 384 (DINO), by the root of the batch (DINOv2, arXiv:2205.10287)"
    why += " and 1 / width (arXiv:2203.03466)"
    if facts.has_weights:
        peak, why = peak / 10, f"{why}, a tenth of it for pretrained weights"
    lr = peak / SCALINGS[facts.lr_scaling](facts.batch_size)
    return Choice(_digits(lr), f"peak {_digits(peak)}: {why}")


def _warmup_epochs(facts: Facts) -> Choice:
    return _share(0.1, 12_500, "DINO's 10 of 100 epochs", facts)


def _weight_decay(facts: Facts) -> Choice:
    if facts.optimizer == "lars":
        return Choice(1e-6, "Barlow Twins' LARS")
    return Choice(0.04, "DINO")


def _final_weight_decay(facts: Facts) -> Choice:
    if facts.optimizer == "lars":
        return Choice(1e-6, "Barlow Twins' LARS: constant")
    return _interpolated(0.04, 0.4, "DINO", facts)


def _freeze_last_layer_epochs(facts: Facts) -> Choice:
    return _share(0.01, 1_250, "DINO's 1 of 100 epochs", facts)


def _freeze_backbone_epochs(facts: Facts) -> Choice:
    if not facts.has_weights:
        return Choice(0.0, "the backbone's weights are random too")
    return _share(
        0.1, 12_500, "as long as the warm-up: heads adapt before the backbone changes", facts
    )


def _predictor_lr_mult(facts: Facts) -> Choice:
    return _interpolated(30.0, 1.0, "BYOL", facts)


# "term" stands for every term of DISTILLING that has the key.
RULES = {
    "term.out_dim": _prototypes,
    "term.center_momentum": _center_momentum,
    "teacher.momentum": _momentum,
    "teacher.final_momentum": _final_momentum,
    "teacher.warmup_temp": _warmup_temp,
    "teacher.temp": _temp,
    "teacher.warmup_temp_epochs": _warmup_temp_epochs,
    "optim.lr": _lr,
    "optim.warmup_epochs": _warmup_epochs,
    "optim.weight_decay": _weight_decay,
    "optim.final_weight_decay": _final_weight_decay,
    "optim.freeze_last_layer_epochs": _freeze_last_layer_epochs,
    "optim.freeze_backbone_epochs": _freeze_backbone_epochs,
    "optim.predictor_lr_mult": _predictor_lr_mult,
}


def half_life(momentum: float) -> float:
    """Half-life of an EMA in steps; inf for momentum 1."""
    return math.inf if momentum >= 1 else math.log(0.5) / math.log(momentum) if momentum else 0.0


def _momentum_of(half_life: float) -> float:
    return 1 - _digits(1 - 0.5 ** (1 / half_life))


def _longness(facts: Facts) -> float:
    """0 for SHORT runs, 1 for LONG ones, log-linear in the steps between them."""
    share = math.log(max(facts.steps, 1) / SHORT) / math.log(LONG / SHORT)
    return min(max(share, 0.0), 1.0)


def _interpolated(short: float, long: float, whose: str, facts: Facts) -> Choice:
    value = _digits(short * (long / short) ** _longness(facts))
    return Choice(value, _between(short, whose, long, facts))


def _between(short: float, whose: str, long: float, facts: Facts) -> str:
    if facts.steps <= SHORT:
        return f"what worked here in runs of {SHORT:,} steps"
    if facts.steps >= LONG:
        return whose
    return f"between {short:g}, measured at {SHORT:,} steps, and {long:g} of {whose} at {LONG:,}"


def _share(share: float, longest: int, whose: str, facts: Facts) -> Choice:
    """Duration in epochs: a share of the run, at most `longest` steps."""
    steps = min(round(share * facts.steps), longest)
    why = f"{steps:,} steps" + (f", {share:.0%} of the run" if steps < longest else "")
    return Choice(steps / max(facts.steps, 1) * facts.epochs, f"{why} ({whose})")


def _digits(value: float) -> float:
    """Rounds to three significant digits."""
    return float(f"{value:.3g}")
