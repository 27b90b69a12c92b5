"""Warnings about settings that run but are known to collapse, or have no effect."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from dinotwins_jax.settings.auto import half_life
from dinotwins_jax.settings.keys import DISTILLING, OF_PATCHES, kind_of, terms_of
from dinotwins_jax.settings.rates import FORMULAS, peak_and_final, scaling


class Setting(NamedTuple):
    """config: with all values filled in; images: of the training set; steps: of the whole run."""

    config: Any
    images: int
    steps: int

    def share(self, epochs: float) -> float:
        """A duration as a share of the run."""
        return epochs / self.config.total_epochs

    def has(self, *kinds: str) -> bool:
        """Whether a term is, or may be, of one of the kinds; an external loss may be of any kind."""
        return any(kind_of(name, term) in ("", *kinds) for name, term in self.config.loss.items())

    @property
    def distils(self) -> bool:
        """Whether a term has, or may have, a teacher temperature."""
        return self.has(*DISTILLING)


def find(setting: Setting) -> list[str]:
    """Returns one line per condition that holds: key, value, consequence, usual value."""
    sections = (_run, _teacher, _losses, _optimiser, _freezing, _log)
    return [f"config.{text}" for section in sections for text in section(setting, setting.config)]


def _run(s: Setting, c) -> Iterator[str]:
    if c.batch_size > s.images:
        yield (
            f"batch_size is {c.batch_size} and there are {s.images} images: a batch holds some of them "
            "twice, and losses over the batch treat the copies as different images"
        )
    if all(_weightless(term) for term in c.loss.values()):
        yield "all terms of loss have weight 0: nothing is trained"
    target = c.match_gradients_to
    if target and len(c.loss) == 1:
        yield f"match_gradients_to is '{target}', the only term: no effect"
    elif target and _weightless(c.loss[target]):
        yield f"match_gradients_to is '{target}', of weight 0: every other term is scaled to nothing"
    elif target and kind_of(target, c.loss[target]) in OF_PATCHES:
        yield (
            f"match_gradients_to is '{target}', which has no gradient at the class tokens: all terms keep "
            "their weights; usual is 'dino'"
        )
    channels = c.model.get("in_channels", 3)
    if channels != 3 and (keys := _of_colours(c.views)):
        yield (
            f"model.in_channels is {channels}: {' and '.join(keys)} need three channels and are off"
        )
    smallest = c.views.global_scale[0]
    if c.views.num_local == 0 and smallest > 0.3:
        yield (
            f"views.num_local is 0 and views.global_scale starts at {smallest:g}: two views of nearly "
            "the same part teach little; (0.14, 1.0) for DINO, (0.08, 1.0) for Barlow Twins"
        )
    uniform = c.model.get("drop_path_uniform", False)
    if c.model.drop_path_rate > 0 and c.model.depth == 1 and not uniform:
        yield (
            f"model.drop_path_rate is {c.model.drop_path_rate:g} and model.depth 1: the rate is 0 in "
            "the first block and grows from there: no effect"
        )


def _teacher(s: Setting, c) -> Iterator[str]:
    start, end = c.teacher.momentum, c.teacher.final_momentum
    if start == 1:
        yield (
            "teacher.momentum is 1 from the start: the teacher, which is evaluated, stays close "
            "to its initial weights"
        )
    elif half_life(start) > s.steps / 10:
        yield (
            f"teacher.momentum is {start:g}, a half-life of {half_life(start):,.0f} steps in a run of "
            f"{s.steps:,}: the teacher stays close to its initial weights for long; 1/40 of a run"
        )
    if s.distils and start < 0.5:
        yield (
            f"teacher.momentum is {start:g}: with the student of the last step as teacher, DINO does "
            "not train (arXiv:2104.14294, section 5.2); 0.9 and more"
        )
    if end < start:
        yield (
            f"teacher.final_momentum is {end:g}, below teacher.momentum {start:g}: the teacher becomes "
            "less stable towards the end"
        )
    temp, first, epochs = c.teacher.temp, c.teacher.warmup_temp, c.teacher.warmup_temp_epochs
    if not s.distils:
        if epochs > 0:
            yield (
                f"teacher.warmup_temp_epochs is {epochs:g}, and no term of loss has a teacher "
                "temperature: no effect"
            )
        return
    if temp > 0.07:
        yield (
            f"teacher.temp is {temp:g}: above 0.07 the teacher tends to give every prototype the same "
            "probability"
        )
    if any(term.student_temp <= temp for _, term in terms_of(c, *DISTILLING)):
        yield (
            f"teacher.temp is {temp:g}, not below student_temp: a teacher that is not sharper than the "
            "student lets both become uniform"
        )
    if epochs > 0 and first > temp:
        yield f"teacher.warmup_temp is {first:g}, above teacher.temp {temp:g}: a warm-up should rise"
    if epochs == 0 and first != temp:
        yield (
            f"teacher.warmup_temp is {first:g}, but teacher.warmup_temp_epochs is 0: no effect, the "
            f"teacher has {temp:g} from the start"
        )


def _losses(s: Setting, c) -> Iterator[str]:
    for name, term in terms_of(c, *DISTILLING):
        key = f"loss.{name}"
        if term.get("out_dim", 0) > s.images:
            yield (
                f"{key}.out_dim is {term.out_dim} prototypes for {s.images} images: more than the "
                "data can fill; a tenth of the images"
            )
        center = term.get("center_momentum", 0.9) if term.get("centering", "ema") == "ema" else 0.9
        if center > 0.999:
            yield (
                f"{key}.center_momentum is {center:g}: a center that hardly moves cannot keep one "
                "prototype from dominating; 0.9"
            )
        if center < 0.5 and c.batch_size < 16:
            yield (
                f"{key}.center_momentum is {center:g} with batch_size {c.batch_size}: the mean of so "
                "few images is noise; 0.9"
            )
    for name, term in terms_of(c, "barlow_twins"):
        key, lambd = f"loss.{name}", term.get("lambd", 0.0051)
        if c.batch_size < 16:
            yield (
                f"batch_size is {c.batch_size}: correlations of so few images, as in {key}, are noise; "
                "128 and more"
            )
        if lambd < 1e-5:
            yield (
                f"{key}.lambd is {lambd:g}: nothing keeps the features from being copies of each other; "
                "0.0051"
            )
        if lambd > 0.1:
            yield (
                f"{key}.lambd is {lambd:g}: the off-diagonal terms, D times as many, outweigh the "
                "agreement of the views; 0.0051"
            )


def _optimiser(s: Setting, c) -> Iterator[str]:
    lr, adamw = c.optim.lr, c.optim.name == "adamw"
    peak, final = peak_and_final(c.optim, c.batch_size)
    formula = FORMULAS[scaling(c.optim)]
    if lr == 0:
        yield "optim.lr is 0: nothing is trained"
    if 0 < peak < final:
        yield (
            f"optim.final_lr is {final:g}, above the peak {peak:g} ({formula}): the rate increases "
            "until the end"
        )
    if adamw and c.optim.clip == 0 and peak > 2e-3:
        yield (
            f"optim.clip is 0 with a peak rate of {peak:g} ({formula}): one bad "
            "batch may end the run; 3"
        )
    if adamw and peak > 0.02:
        yield (
            f"optim.lr is {lr:g}, a peak rate of {peak:g}: AdamW changes every weight by about that much "
            "per step; 0.0001 to 0.005"
        )
    if not adamw and 0 < lr < 0.01:
        yield (
            f"optim.lr is {lr:g} with lars, whose steps are a thousandth of it times the weights: "
            "almost nothing changes; 0.2"
        )
    faster = c.optim.predictor_lr_mult
    if any(True for _ in terms_of(c, "byol")) and faster < 5 and s.steps < 5_000:
        yield (
            f"optim.predictor_lr_mult is {faster:g} for byol in a run of {s.steps:,} steps: the "
            "predictor lags behind, and features collapse to one dimension; 10 to 30"
        )
    if faster != 1 and not s.has("byol"):
        yield f"optim.predictor_lr_mult is {faster:g}, and no term of loss has a predictor: no effect"


def _freezing(s: Setting, c) -> Iterator[str]:
    for key, share in {"warmup": "a tenth", "freeze_last_layer": "a hundredth",
                       "freeze_backbone": "a tenth"}.items():  # fmt: skip
        epochs = c.optim[f"{key}_epochs"]
        if s.share(epochs) > 0.5 and (key != "freeze_last_layer" or s.distils):
            yield f"optim.{key}_epochs is {epochs:g}, most of {c.total_epochs:g}; {share} is usual"
    if c.optim.freeze_backbone_epochs > 0 and not c.init_from:
        yield (
            f"optim.freeze_backbone_epochs is {c.optim.freeze_backbone_epochs:g} without init_from: "
            "heads learn from features of random weights"
        )


def _log(s: Setting, c) -> Iterator[str]:
    if s.share(c.checkpoint.every_epochs) > 1:
        yield (
            f"checkpoint.every_epochs is {c.checkpoint.every_epochs:g} of {c.total_epochs:g}: nothing "
            "is saved before the end"
        )
    if s.share(c.evals.monitor_every_epochs) > 1:
        yield (
            f"evals.monitor_every_epochs is {c.evals.monitor_every_epochs:g} of {c.total_epochs:g}: the "
            "monitor runs at checkpoints only"
        )


def _of_colours(views) -> list[str]:
    """The operations on colours that are on."""
    jitter = ("views.saturation", "views.hue") if views.jitter_prob else ()
    keys = (*jitter, "views.grayscale_prob")
    return [key for key in keys if views[key.removeprefix("views.")]]


def _weightless(term) -> bool:
    return term.get("weight", 1.0) == 0 and not term.get("final_weight")
