"""Barlow Twins alone (arXiv:2103.03230) on the same backbone: the second baseline of the hybrid.

    python -m dinotwins_jax.main --config=configs/barlow_twins.py:demo      # also :coco, :cifar10

Two global views at the official crop scale and no local ones. The EMA of the backbone is what is
evaluated. The official recipe, LARS among it, which is for ResNets: configs/barlow_twins.py:coco+official
"""

from dinotwins_jax.augment.presets import BARLOW_TWINS
from dinotwins_jax.configs import base, presets


def get_config(preset: str = "demo"):
    config = base.get_config()
    config.loss.barlow_twins = base.barlow_twins_terms()
    config.views.update(BARLOW_TWINS)
    return presets.apply(config, preset)
