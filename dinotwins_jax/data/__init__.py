"""Image sources by name, and the host pipeline that makes batches of them. No jax here."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from dinotwins_jax.data.base import Source, allow_pixels, check_split
from dinotwins_jax.data.reading import RGB
from dinotwins_jax.data.store import as_stored
from dinotwins_jax.data.subset import subset
from dinotwins_jax.data.window import reading_with

SOURCES = {
    "scenes": "dinotwins_jax.data.scenes:Scenes",
    "coco": "dinotwins_jax.data.coco:Coco",
    "folder": "dinotwins_jax.data.folder:Folder",
    "cifar10": "dinotwins_jax.data.cifar10:Cifar10",
    "array_record": "dinotwins_jax.data.array_record:ArrayRecord",
    "tfds": "dinotwins_jax.data.tfds:Tfds",
}


def make_source(name: str, split: str, /, *, dir: str = "", **kwargs: Any) -> Source:
    """Creates the image source called `name`.

    Args:
      name: a key of SOURCES, or "pkg.module:factory" for a custom one; the factory takes (split, *,
        dir, ...).
      split: "pretrain" (labels may be missing), "train" or "test".
      dir: the data's directory; "" if the source needs none.
      kwargs: the source's own arguments.
    Raises:
      ValueError: unknown name or split, no such module or factory, or arguments that it does not
        accept.
    """
    check_split(split)
    if name in SOURCES and "://" in str(dir):
        raise ValueError(
            f"config.data.dir is '{dir}': data source {name!r} reads directories of this machine: mount "
            "that storage (a bucket: gcsfuse BUCKET FOLDER) and give the folder"
        )
    factory = _find(name)
    signature = inspect.signature(factory)
    try:
        signature.bind(split, dir=dir, **kwargs)
    except TypeError as err:
        raise ValueError(f"data source {name!r}: {err}; it takes {signature}") from None
    return factory(split, dir=dir, **kwargs)


def data_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section `data` of a config for `open_source`, with the channels that its model reads."""
    section = config["data"]
    section = section.to_dict() if hasattr(section, "to_dict") else dict(section)
    return section | {"in_channels": config.get("model", {}).get("in_channels", 3)}


def open_source(data: Mapping[str, Any], split: str) -> Source:
    """Creates the source that the section `data` of a config describes.

    Args:
      data: the section; "in_channels" in it (`data_section`) is the number of channels to read, by
        default 3.
    Raises:
      ValueError: as `make_source` and `subset`, or prepared data of other channels or another window.
    """
    source = make_source(data["source"], split, dir=data["dir"], **source_options(data))
    source = subset(source, split, data.get("subset") or {}, data["source"])
    if limit := int(data.get("max_pixels") or 0):
        allow_pixels(limit)
        source.max_pixels = limit  # travels to the decoding processes, as does the reading
    channels = data.get("in_channels", 3)
    if channels < 1:
        raise ValueError(f"config.model.in_channels is {channels}: it must be positive")
    reading = reading_with(channels, data.get("window"))
    if stored := getattr(source, "stored", None):
        reading = as_stored(reading, stored, data["dir"])
    if reading != RGB:
        source.reading = reading
    return source


def split_section(config: Mapping[str, Any], split: str) -> dict[str, Any]:
    """`data_section` for a split of a run: that of the probes' data unless it is "pretrain"."""
    data = data_section(config)
    return data if split == "pretrain" else probe_section(data)


def has_probe_data(data: Mapping[str, Any]) -> bool:
    """Whether the section `data` of a config names other data for the probes, in data.probe.

    Raises ValueError for a data.probe.dir without a source.
    """
    probe = data.get("probe") or {}
    if probe.get("dir") and not probe.get("source"):
        raise ValueError(
            f"config.data.probe.dir is '{probe['dir']}' without config.data.probe.source: name it too, "
            "such as folder"
        )
    return bool(probe.get("source"))


def probe_section(data: Mapping[str, Any]) -> dict[str, Any]:
    """The section of the probes' splits, "train" and "test": that of `data`, with the source, directory,
    canvas and options of data.probe if it names a source."""
    own = {key: value for key, value in data.items() if key != "probe"}
    return own | dict(data["probe"]) if has_probe_data(data) else own


def source_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the chosen source in the section `data` of a config."""
    return dict(data.get(data["source"]) or {})


def _find(name: str) -> Any:
    target = SOURCES.get(name, name)
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        near = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = f'{", ".join(SOURCES)}, or "pkg.module:factory"'
        raise ValueError(f"unknown data source {name!r}: known are {known}{hint}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        # A module that exists but fails to import something else is a different error: let it
        # propagate.
        if err.name is None or not f"{module_name}.".startswith(f"{err.name}."):
            raise
        raise ValueError(f"data source {name!r}: no module named {err.name!r}") from None
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"data source {name!r}: module {module_name} has no {attribute!r}{hint}")
    return getattr(module, attribute)
