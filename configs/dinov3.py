"""DINOv3 (arXiv:2508.10104) at this size: DINOv2 with Gram anchoring in the last quarter of the run.

    python -m dinotwins_jax.main --config=configs/dinov3.py:demo      # also :coco, :cifar10

Gram anchoring keeps the similarities between patch features close to those of an earlier teacher. The
official recipes: configs/dinov3.py:coco+official, coco+official_gram and coco+official_short
"""

from dinotwins_jax.configs import base, dinov2, presets


def get_config(preset: str = "demo"):
    config = dinov2.add_terms(base.get_config())
    config.loss.gram = base.gram_terms()
    return presets.apply(config, preset)
