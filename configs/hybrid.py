"""DinoTwins (arXiv:2508.17509): DINO + Barlow Twins on one backbone, in one step.

    python -m dinotwins_jax.main --config=configs/hybrid.py:demo      # also :coco, :cifar10, :coco_cpu …

Barlow Twins acts on the student's two global views through a projector of its own. The abstract
leaves the composition open: loss.barlow_twins.pair and .views are the alternatives. Its loss is a
sum over the projection's dimensions, hundreds of times DINO's, and so is its gradient at first: with
one fixed weight it either dominates DINO early on (see the metrics "balance/…") or has no effect at the
end. So its gradient at the class tokens is scaled to weight times DINO's in every step. For a fixed
weight, as in papers: --config.match_gradients_to= --config.loss.barlow_twins.weight=0.003
"""

from dinotwins_jax.configs import base, presets


def get_config(preset: str = "demo"):
    config = base.get_config()
    config.loss.dino = base.dino_terms()
    config.loss.barlow_twins = base.barlow_twins_terms(weight=0.3)
    config.match_gradients_to = "dino"
    return presets.apply(config, preset)
