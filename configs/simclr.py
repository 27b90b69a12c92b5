"""SimCLR (arXiv:2002.05709) on the same backbone: contrasts each view with the global batch.

    python -m dinotwins_jax.main --config=configs/simclr.py:demo      # also :coco, :cifar10

Two global views with Barlow Twins' crops. The loss uses no teacher; the EMA of the backbone is evaluated.
"""

from dinotwins_jax.augment.presets import BARLOW_TWINS
from dinotwins_jax.configs import base, presets


def get_config(preset: str = "demo"):
    config = base.get_config()
    config.loss.simclr = base.simclr_terms()
    config.views.update(BARLOW_TWINS)
    return presets.apply(config, preset)
