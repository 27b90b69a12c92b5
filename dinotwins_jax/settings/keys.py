"""Keys of a config as "a.b.c", and what kind a term of its loss is."""

from collections.abc import Iterator, Mapping
from typing import Any

# The package's losses, those of losses/__init__.py (a test holds the two together).
LOSSES = ("dino", "barlow_twins", "ibot", "koleo", "gram", "byol", "simclr", "vicreg")
DISTILLING = ("dino", "ibot")  # those with prototypes and a teacher's temperature


def value_at(config: Mapping, key: str, default: Any = None) -> Any:
    """The value at "a.b.c"; the default where the config has no such key."""
    node = config
    for part in key.split("."):
        if not hasattr(node, "keys") or part not in node:
            return default
        node = node[part]
    return node


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of {"a": {"b": value}}; an empty section is a value."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def kind_of(name: str, term: Mapping) -> str:
    """Which of LOSSES a term of config.loss is, whatever its name; "" for a loss from outside."""
    fn = term.get("fn", name)
    module, _, attribute = fn.partition(":")
    if module == f"dinotwins_jax.losses.{attribute}":
        fn = attribute
    return fn if fn in LOSSES else ""


def terms_of(config: Mapping, *kinds: str) -> Iterator[tuple[str, Mapping]]:
    """(name, term) of the terms of config.loss that are of one of the kinds."""
    for name, term in config["loss"].items():
        if kind_of(name, term) in kinds:
            yield name, term
