"""Access to config keys by dotted name "a.b.c", and the kinds of loss terms."""

from collections.abc import Iterator, Mapping
from typing import Any

# The package's losses, as in losses/__init__.py (a test compares the two).
LOSSES = ("dino", "barlow_twins", "ibot", "koleo", "gram", "byol", "simclr", "vicreg")
OF_PATCHES = ("ibot", "gram")  # losses of patch tokens alone
DISTILLING = ("dino", "ibot")  # losses with prototypes and a teacher temperature


def value_at(config: Mapping, key: str, default: Any = None) -> Any:
    """Value at "a.b.c"; the default if the config has no such key."""
    node = config
    for part in key.split("."):
        if not hasattr(node, "keys") or part not in node:
            return default
        node = node[part]
    return node


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Flattens {"a": {"b": value}} to {"a.b": value}; an empty section is a value."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def kind_of(name: str, term: Mapping) -> str:
    """Kind of a term of config.loss, one of LOSSES whatever its name; "" for an external loss."""
    fn = term.get("fn", name)
    module, _, attribute = fn.partition(":")
    if module == f"dinotwins_jax.losses.{attribute}":
        fn = attribute
    return fn if fn in LOSSES else ""


def terms_of(config: Mapping, *kinds: str) -> Iterator[tuple[str, Mapping]]:
    """Yields (name, term) for the terms of config.loss of the given kinds."""
    for name, term in config["loss"].items():
        if kind_of(name, term) in kinds:
            yield name, term
