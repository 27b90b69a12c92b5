"""DINOv2 (arXiv:2304.07193): DINO + iBOT + KoLeo, Sinkhorn-Knopp targets, registers, untied heads.

    python -m dinotwins_jax.main --config=configs/dinov2.py:demo      # also :coco, :cifar10

The student's global crops are masked for all losses. To share one head between DINO and iBOT, as in
DINOv2's short recipe: --config.loss.ibot.shared_head=dino. The official recipes:
configs/dinov2.py:coco+official and coco+official_long
"""

from dinotwins_jax.configs import base, presets


def get_config(preset: str = "demo"):
    return presets.apply(add_terms(base.get_config()), preset)


def add_terms(config):
    """Adds DINOv2's terms and schedules to a config."""
    config.loss.dino = base.dino_terms()
    config.loss.dino.centering = "sinkhorn_knopp"
    config.loss.ibot = base.ibot_terms()
    config.loss.koleo = base.koleo_terms()
    config.model.num_register_tokens, config.model.layer_scale_init = 4, 1e-5
    config.model.drop_path_rate = 0.3
    config.teacher.momentum, config.teacher.final_momentum = 0.994, 1.0
    config.teacher.temp, config.teacher.warmup_temp_epochs = 0.07, 30.0
    config.optim.lr, config.optim.final_weight_decay = 1e-3, 0.2  # lr: 0.004 at a batch of 1024
    return config
