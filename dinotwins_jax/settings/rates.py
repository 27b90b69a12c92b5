"""The learning rate's peak and end, from config.optim and the batch."""

import math
from collections.abc import Mapping

# optim.lr_scaling -> batch size -> factor from optim.lr to the peak.
SCALINGS = {
    "linear_256": lambda batch_size: batch_size / 256,  # DINO, Barlow Twins
    "sqrt_1024": lambda batch_size: math.sqrt(batch_size / 1024),  # DINOv2
}
FORMULAS = {
    "linear_256": "optim.lr times batch_size / 256",
    "sqrt_1024": "optim.lr times the root of batch_size / 1024",
}


def scaling(optim: Mapping) -> str:
    """The key of SCALINGS; that of DINO for a config from before optim.lr_scaling."""
    return optim.get("lr_scaling", "linear_256")


def peak_and_final(optim: Mapping, batch_size: int) -> tuple[float, float]:
    """The rates after the warm-up and at the end."""
    peak = optim["lr"] * SCALINGS[scaling(optim)](batch_size)
    ratio = optim.get("final_lr_ratio")
    return peak, optim["final_lr"] if ratio is None else ratio * peak
