"""Scores class by class, as rows with the names of the classes."""

from collections.abc import Sequence

from dinotwins_jax.data.base import printable


def take_classes(tasks: dict[str, dict]) -> dict[str, dict]:
    """Takes the scores by class out of {task: {name: scores}}.

    Returns:
      {task: {name: lists as of `class_scores`}} of those that had "classes", which is removed there.
    """
    found: dict[str, dict] = {}
    for task, parts in tasks.items():
        for name, part in parts.items():
            if isinstance(part, dict) and "classes" in part:
                found.setdefault(task, {})[name] = part.pop("classes")
    return found


def class_rows(columns: dict[str, list], names: Sequence[str]) -> list[dict]:
    """A dictionary a class: "class", its name, and an entry of each list; in the order of the classes."""
    return [
        {"class": printable(name), **dict(zip(columns, values, strict=True))}
        for name, *values in zip(names, *columns.values(), strict=True)
    ]
