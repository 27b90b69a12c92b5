"""Configs by name, by path, and of a run."""

import copy
import difflib
import os
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dinotwins_jax.files import read_config
from dinotwins_jax.settings.added import with_added

SHIPPED = Path(__file__).parent / "configs"  # in a checkout a link to ../configs


class UsageError(ValueError):
    """Arguments that a command does not understand; the message is one line."""


def config_path(text: str) -> str:
    """The path of a config, with its presets: "hybrid:coco" -> "…/configs/hybrid.py:coco".

    Raises:
      UsageError: there is no such file and no shipped config of that name.
    """
    name, colon, presets = text.partition(":")
    if Path(name).is_file():
        return text
    shipped = shipped_names()
    if name in shipped:
        return f"{SHIPPED / name}.py{colon}{presets}"
    near = difflib.get_close_matches(Path(name).stem, shipped, n=1)
    hint = f"did you mean --config={near[0]}{colon}{presets}?" if near else "give a path, or one of"
    names = "" if near else f" {', '.join(shipped)}"
    raise UsageError(f"no such config file: {name}; {hint}{names}")


def config_name(path: str) -> str:
    """The shortest text that names a config: "hybrid:coco" for a shipped one, else its path."""
    file, colon, presets = path.partition(":")
    return f"{Path(file).stem}{colon}{presets}" if Path(file).parent == SHIPPED else path


def shipped_names() -> list[str]:
    """The names of the shipped configs."""
    helpers = {"__init__", "base", "official", "presets"}
    return sorted({path.stem for path in SHIPPED.glob("*.py")} - helpers)


def missing_key(config: ConfigDict, key: str) -> str:
    """Says which part of a key "a.b" the config lacks, and the nearest that it has; "" if it has it."""
    node, parent = config, "config"
    for part in key.split("."):
        if not hasattr(node, "keys") or part not in node:
            known = sorted(node.keys()) if hasattr(node, "keys") else []
            near = difflib.get_close_matches(part, known, n=1)
            hint = (
                f"did you mean '{near[0]}'?" if near else f"it has {', '.join(known) or 'no parts'}"
            )
            return f"--config.{key}: {parent} has no key '{part}'; {hint}"
        node, parent = node[part], f"{parent}.{part}"
    return ""


def named_config(config: ConfigDict | str, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config, or of a shipped one or a file by its name, with the values of some keys.

    Raises:
      UsageError: no such config or key, or a value of another type.
    """
    if isinstance(config, str | os.PathLike):
        config = load_config(config_path(os.fspath(config)))
    config = copy.deepcopy(config)
    for key, value in overrides.items():
        if missing := missing_key(config, key):
            raise UsageError(missing.removeprefix("--"))
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise UsageError(f"config.{key} is {value!r}: {' '.join(str(error).split())}") from None
    return config


def config_of(workdir: Path, without: str = "", *, opens_data: bool = False) -> ConfigDict:
    """The config of a run, WORKDIR/config.json, which may come from somebody else. Keys that came later
    than the run have the values that it had.

    Args:
      without: end of the error message where there is none.
      opens_data: whether the caller opens the data: a source that is code, "module:factory", is refused.
    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or its data source is code.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no run in {workdir}: it has no config.json{without}")
    config = with_added(read_config(path))
    for key, source in _sources(config["data"]) if opens_data else ():
        if not isinstance(source, str) or ":" in source:
            raise ValueError(
                f"{path} names code as its data source, '{source}', which is run only if the command line "
                f"names it: give the run's --config=… with --config.data.{key}={source}"
            )
    return ConfigDict(config)


def _sources(data: dict) -> list[tuple[str, object]]:
    """(key in config.data, data source) of the run's data and of its probes' own."""
    probe = data.get("probe")
    own = probe.get("source", "") if isinstance(probe, dict) else ""
    return [("source", data.get("source")), ("probe.source", own)]


def load_config(config_file: str) -> ConfigDict:
    """The config of "path.py" or "path.py:preset", as the flag reads it."""
    path, colon, preset = config_file.partition(":")
    get_config = runpy.run_path(path)["get_config"]
    return get_config(preset) if colon else get_config()
