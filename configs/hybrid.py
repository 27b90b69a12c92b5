"""DinoTwins (arXiv:2508.17509): DINO + Barlow Twins on one backbone, in one step.

    python -m dinotwins_jax.main --config=configs/hybrid.py:demo      # also :coco, :cifar10

Barlow Twins acts on the student's two global views through a projector of its own. The abstract
leaves the composition open: loss.barlow_twins.pair and .views are the alternatives. Its loss is a
sum over the projection's dimensions, hundreds of times DINO's; the weight brings both to one scale
(0.024 is what the first release of Barlow Twins multiplied its loss by).
"""

from configs import base, presets


def get_config(preset: str = "demo"):
    config = base.get_config()
    config.loss.dino = base.dino_terms()
    config.loss.barlow_twins = base.barlow_twins_terms(weight=0.024)
    return presets.apply(config, preset)
