"""DINOv2 with Barlow Twins: DINO + iBOT + KoLeo + Barlow Twins on one backbone, in one step.

    python -m dinotwins_jax.main --config=configs/hybrid_dinov2.py:demo      # also :coco, :cifar10

As in hybrid.py, the gradients of Barlow Twins and KoLeo at the class tokens are scaled to their weight
times DINO's; iBOT does not reach the class tokens and keeps its weight.
"""

from dinotwins_jax.configs import base, dinov2, presets


def get_config(preset: str = "demo"):
    config = dinov2.add_terms(base.get_config())
    config.loss.barlow_twins = base.barlow_twins_terms(weight=0.3)
    config.match_gradients_to = "dino"
    return presets.apply(config, preset)
