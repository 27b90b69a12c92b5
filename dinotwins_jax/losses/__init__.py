"""Losses by name. An external loss is given as 'module:factory' and needs no change here."""

import difflib
import importlib

from dinotwins_jax.losses.base import HeadSpec, Loss, WeightedSum, weighted_sum

__all__ = ["LOSSES", "HeadSpec", "Loss", "WeightedSum", "make_loss", "weighted_sum"]

LOSSES = {
    name: f"dinotwins_jax.losses.{name}:{name}"
    for name in ("dino", "barlow_twins", "ibot", "koleo", "gram", "byol", "simclr", "vicreg")
}


def make_loss(terms: dict[str, dict]) -> WeightedSum:
    """Builds the weighted sum of losses that a config describes.

    Args:
      terms: name -> {"fn": a key of LOSSES or "module:factory" (default: the name itself),
        "weight": factor or schedule of factors (default 1), and the factory's own keyword arguments}.
    Raises:
      ValueError: unknown loss, or arguments that its factory does not accept.
    """
    losses = {}
    for name, spec in terms.items():
        arguments = dict(spec)
        weight = arguments.pop("weight", 1.0)
        factory = _find(arguments.pop("fn", name))
        try:
            losses[name] = (weight, factory(**arguments))
        except (TypeError, ValueError) as error:
            hint = "; config keys …_epochs are passed as …_steps" if "_steps'" in str(error) else ""
            raise ValueError(f"config.loss.{name}: {error}{hint}") from error
    return weighted_sum(losses)


def _find(fn: str):
    path = LOSSES.get(fn, fn)
    if ":" not in path:
        near = difflib.get_close_matches(fn, LOSSES, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        known = ", ".join(LOSSES)
        raise ValueError(
            f"unknown loss '{fn}'{hint}: choose one of {known}, or name yours as 'module:factory'"
        )
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loss '{fn}' cannot be imported: {error}") from error
