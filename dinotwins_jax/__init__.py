"""Self-supervised Vision Transformers in JAX: DINO, Barlow Twins and their hybrid."""

__version__ = "0.1.0"
