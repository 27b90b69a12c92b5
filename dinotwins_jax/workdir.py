"""Workdirs: one run each, with its config, and the check before a resume."""

import copy
import json
from pathlib import Path

import jax

from dinotwins_jax.checkpoint_folder import finished_steps, folder_of_checkpoints
from dinotwins_jax.devices.processes import warn
from dinotwins_jax.files import read_config, replace_text
from dinotwins_jax.settings.keys import flatten

# Keys that may differ between two starts of one run: they change weights by rounding at most.
_FREE = (
    *("log.", "checkpoint.", "evals.", "data.num_workers", "data.dir", "debug_nans"),
    *("data.max_pixels", "data.probe."),
    *("mesh.", "parallel", "micro_batches", "model.remat", "model.attention"),
    *("model.plain_gradients", "data.coco.train_annotations", "data.coco.test_annotations"),
)
# Keys that a config.json of before lacks, and the value that its run had.
_ADDED = {
    **{"views.vertical_flip": 0.0, "views.rotate90": 0.0, "data.folder.labels": ""},
    **{"model.in_channels": 3, "data.mean": [], "data.std": []},
    **{"data.window.mode": "", "data.window.range": [], "data.window.percentiles": [0.5, 99.5]},
    "data.window.per_band": False,
}
_ABSENT = object()
_OPEN = {"data.canvas_size": 0}  # values that stand for the one that the data give


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


def with_known_window(config, workdir: Path):
    """The config with the window of a set that the run in a workdir has computed, to go on with."""
    path = Path(workdir) / "config.json"
    window = config.data.get("window", {})
    if window.get("mode") != "set" or len(window.range) or not has_checkpoints(workdir):
        return config
    known = read_config(path)["data"].get("window", {}) if path.is_file() else {}
    same = all(
        json.loads(json.dumps(window[key])) == known.get(key)
        for key in ("mode", "percentiles", "per_band")
    )
    if not same:
        return config
    config = copy.deepcopy(config)
    config.data.window.range = tuple(map(_tuple, known["range"]))
    return config


def has_checkpoints(workdir: Path) -> bool:
    """Whether there is a run to resume."""
    return bool(finished_steps(folder_of_checkpoints(workdir)))


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def _differences(theirs: dict, ours: dict) -> str:
    theirs, ours = _ADDED | flatten(theirs), _ADDED | flatten(ours)
    differ = [
        f"{key} ({theirs.get(key, 'not there')} -> {ours.get(key, 'not there')})"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key, _ABSENT) not in (ours.get(key, _ABSENT), _OPEN.get(key, _ABSENT))
        and not key.startswith(_FREE)
    ]
    return ", ".join(differ[:5]) + (f" and {len(differ) - 5} more" if len(differ) > 5 else "")
