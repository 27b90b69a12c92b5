"""Backbones and heads. `create_vit` builds the standard ViT sizes."""

from dinotwins_jax.models.vit import VisionTransformer

# embed_dim, depth, num_heads of DeiT (arXiv:2012.12877), the sizes that DINO and DINOv2 train.
VARIANTS = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def create_vit(name: str, **overrides) -> VisionTransformer:
    """Creates a Vision Transformer by its usual name.

    Args:
      name: vit_tiny | vit_small | vit_base | vit_large.
      **overrides: any field of `VisionTransformer`; patch_size=16 and image_size=224 by default.
    Raises:
      ValueError: unknown name.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model '{name}': choose one of {', '.join(VARIANTS)}")
    return VisionTransformer(**{"patch_size": 16, "image_size": 224, **VARIANTS[name], **overrides})
