"""VICReg (arXiv:2105.04906) on the same backbone: variance, invariance and covariance of two views.

    python -m dinotwins_jax.main --config=configs/vicreg.py:demo      # also :coco, :cifar10

Two global views with Barlow Twins' crops, which are VICReg's. The loss uses no teacher; the EMA of the
backbone is evaluated.
"""

from dinotwins_jax.augment.presets import BARLOW_TWINS
from dinotwins_jax.configs import base, presets


def get_config(preset: str = "demo"):
    config = base.get_config()
    config.loss.vicreg = base.vicreg_terms()
    config.views.update(BARLOW_TWINS)
    return presets.apply(config, preset)
