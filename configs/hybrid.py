"""DinoTwins (arXiv:2508.17509): DINO + Barlow Twins on one backbone, in one step.

    python -m dinotwins_jax.main --config=configs/hybrid.py:demo      # also :coco, :cifar10

Barlow Twins acts on the student's two global views through a projector of its own. The abstract
leaves the composition open: loss.barlow_twins.pair and .views are the alternatives.
"""

from configs import base, presets


def get_config(preset: str = "demo"):
    config = base.get_config()
    config.loss.dino = base.dino_terms()
    config.loss.barlow_twins = base.barlow_twins_terms()
    return presets.apply(config, preset)
