"""DINO alone (arXiv:2104.14294): the baseline of the hybrid.

python -m dinotwins_jax.main --config=configs/dino.py:demo      # also :coco, :cifar10
"""

from dinotwins_jax.configs import base, presets


def get_config(preset: str = "demo"):
    config = base.get_config()
    config.loss.dino = base.dino_terms()
    return presets.apply(config, preset)
