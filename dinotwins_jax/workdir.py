"""Workdirs: one run each, with its config, and the check before a resume."""

import copy
import json
from pathlib import Path

import jax

from dinotwins_jax.checkpoint_folder import finished_steps, folder_of_checkpoints
from dinotwins_jax.devices.processes import warn
from dinotwins_jax.files import read_config, replace_text
from dinotwins_jax.settings.added import with_added
from dinotwins_jax.settings.keys import flatten

# Keys that may differ between two starts of one run: they change weights by rounding at most.
_FREE = (
    *("log.", "checkpoint.", "evals.", "data.num_workers", "data.dir", "debug_nans"),
    *("data.max_pixels", "data.probe."),
    *("mesh.", "parallel", "micro_batches", "model.remat", "model.attention", "model.scan_blocks"),
    *("model.plain_gradients", "data.coco.train_annotations", "data.coco.test_annotations"),
)
_ABSENT = object()
_OPEN = {
    "data.canvas_size": 0,
    "model.position_interpolation": None,
}  # values that stand for the one that the data give


def claim_workdir(workdir: Path, config: dict, force: bool = False) -> None:
    """Writes WORKDIR/config.json after checking that an existing run has the same config.

    Args:
      force: resume it although the config differs, with a warning that lists the differences.
    Raises:
      ValueError: the workdir holds checkpoints of another config, the message names the keys; or its
        config.json is damaged.
    """
    path = Path(workdir) / "config.json"
    config = json.loads(json.dumps(config))  # tuples become lists, as they do on disk
    if path.exists() and has_checkpoints(workdir):
        differ = _differences(read_config(path), config)
        if differ and not force:
            raise ValueError(
                f"{workdir} holds a run with another config: choose another --workdir, or continue it "
                f"with --resume=force; differs in {differ}"
            )
        if differ:
            warn(f"{workdir} is continued with another config: {differ}")
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def with_known_values(config, workdir: Path):
    """The config with what the run in a workdir has found out, to go on with: the window of a set, and the
    interpolation of positions of its initial weights."""
    path = Path(workdir) / "config.json"
    if not has_checkpoints(workdir) or not path.is_file():
        return config
    known, config = read_config(path), copy.deepcopy(config)
    if config.model.get("position_interpolation", "") is None:
        config.model.position_interpolation = known["model"].get("position_interpolation") or "dino"
    window, before = config.data.get("window", {}), known["data"].get("window", {})
    keys = ("mode", "percentiles", "per_band")
    open_set = window.get("mode") == "set" and not len(window.range)
    if open_set and all(json.loads(json.dumps(window[k])) == before.get(k) for k in keys):
        window.range = tuple(map(_tuple, before["range"]))
    return config


def has_checkpoints(workdir: Path) -> bool:
    """Whether there is a run to resume."""
    return bool(finished_steps(folder_of_checkpoints(workdir)))


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def _differences(theirs: dict, ours: dict) -> str:
    theirs, ours = flatten(with_added(theirs)), flatten(with_added(ours))
    differ = [
        f"{key} ({theirs.get(key, 'not there')} -> {ours.get(key, 'not there')})"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key, _ABSENT) not in (ours.get(key, _ABSENT), _OPEN.get(key, _ABSENT))
        and not key.startswith(_FREE)
    ]
    return ", ".join(differ[:5]) + (f" and {len(differ) - 5} more" if len(differ) > 5 else "")
