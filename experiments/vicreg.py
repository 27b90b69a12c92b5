"""A loss of one's own: VICReg (arXiv:2105.04906, eq. 1-6), named in the config, the package untouched.

python -m dinotwins_jax.main --config=experiments/vicreg.py --workdir=runs/vicreg
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import base, presets
from dinotwins_jax.losses import HeadSpec, Loss
from dinotwins_jax.models.heads import BarlowProjector


def vicreg(*, hidden_dims=(256, 256, 256), similarity=25.0, variance=25.0, covariance=1.0) -> Loss:
    """Invariance, variance and covariance of the student's two global views."""
    head = HeadSpec(BarlowProjector(hidden_dims), crops="global", teacher=False, per_view=True)

    def apply(loss_state, student, teacher, hparams):
        z = student["vicreg"].swapaxes(0, 1)  # [2, B, D]
        B, D = z.shape[1:]
        z0 = z - z.mean(axis=1, keepdims=True)
        spread = jnp.sqrt(jnp.mean(z0**2, axis=1) * B / (B - 1) + 1e-4)
        c = jnp.einsum("vbd,vbe->vde", z0, z0) / (B - 1)
        off_diagonal = jnp.sum(c**2) - jnp.sum(jnp.diagonal(c, axis1=1, axis2=2) ** 2)
        parts = {
            "invariance": jnp.mean((z[0] - z[1]) ** 2),
            "variance": jnp.mean(jnp.maximum(1 - spread, 0)),
            "covariance": off_diagonal / D,
        }
        weights = {"invariance": similarity, "variance": variance, "covariance": covariance}
        return sum(weights[k] * parts[k] for k in parts), loss_state, parts

    return Loss({"vicreg": head}, lambda: {}, apply)


def get_config(preset: str = "demo"):
    config = base.get_config()
    config.loss.vicreg = ConfigDict({"fn": "experiments.vicreg:vicreg", "weight": 1.0})
    config.views.num_local = 0
    return presets.apply(config, preset)
