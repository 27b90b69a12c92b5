"""Barlow Twins alone (arXiv:2103.03230), on the same backbone: the other baseline of the hybrid.

    python -m dinotwins_jax.main --config=configs/barlow_twins.py:demo      # also :coco, :cifar10

Two global views and no local ones. The EMA of the backbone is kept, as what is evaluated.
"""

from configs import base, presets


def get_config(preset: str = "demo"):
    config = base.get_config()
    config.loss.barlow_twins = base.barlow_twins_terms()
    config.views.num_local = 0
    return presets.apply(config, preset)
