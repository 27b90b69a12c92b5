"""From the config to the ViT of a run."""

import jax
import jax.numpy as jnp

from dinotwins_jax.devices.attention import attention_for
from dinotwins_jax.models import create_vit
from dinotwins_jax.models.vit import VisionTransformer


def make_backbone(config, devices: list[jax.Device] | None = None) -> VisionTransformer:
    """Builds the ViT of config.model for the devices of a run, all by default; position embeddings have the
    grid of the global crops.

    Raises ValueError for an unknown model, and for an attention that the devices lack.
    """
    fields = {name: value for name, value in config.model.to_dict().items() if value is not None}
    name, wanted = fields.pop("name"), fields.pop("attention")
    fields["dtype"] = jnp.dtype(fields["dtype"])
    try:
        vit = create_vit(name, image_size=config.views.global_size, **fields)
    except ValueError as error:
        raise ValueError(f"config.model.name: {error}") from error
    attention = attention_for(
        devices or jax.devices(),
        wanted,
        dtype=vit.dtype,
        head_dim=vit.embed_dim // vit.num_heads,
        plain_gradients=vit.plain_gradients,
    )
    return vit.clone(attention=attention)
