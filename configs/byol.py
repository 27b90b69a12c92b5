"""BYOL (arXiv:2006.07733) on the same backbone: the student predicts its teacher, no negatives.

    python -m dinotwins_jax.main --config=configs/byol.py:demo      # also :coco, :cifar10

Two global views with Barlow Twins' crops, which are BYOL's, and MoCo v3's batch norm after both heads.
"""

from dinotwins_jax.augment.presets import BARLOW_TWINS
from dinotwins_jax.configs import base, presets


def get_config(preset: str = "demo"):
    config = base.get_config()
    config.loss.byol = base.byol_terms()
    config.loss.byol.norm_output = True
    config.views.update(BARLOW_TWINS)
    return presets.apply(config, preset)
