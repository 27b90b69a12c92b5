"""The config of a run as a --config file, for --config.KEY=VALUE without --config."""

from typing import Any

from ml_collections import ConfigDict, config_dict

from dinotwins_jax.buckets import at_hand
from dinotwins_jax.configuration import SHIPPED, config_of, load_config
from dinotwins_jax.settings.keys import value_at


def get_config(workdir: str) -> ConfigDict:
    """WORKDIR/config.json, with the types that flags need: tuples for lists, and types for unset keys."""
    shipped = load_config(f"{SHIPPED / 'hybrid.py'}:demo")
    with at_hand(workdir) as folder:
        return ConfigDict(_typed(config_of(folder).to_dict(), shipped))


def _typed(value: Any, like: ConfigDict) -> Any:
    """Nested values; `like`: the section of a shipped config, which knows the types of unset keys."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    section = {}
    for name, part in value.items():
        if part is None:
            kind = like.get_type(name) if name in like else str
            section[name] = config_dict.placeholder(kind)
        else:
            section[name] = _typed(part, value_at(like, name, {}))
    return section
