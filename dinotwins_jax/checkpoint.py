"""Saves and restores a run with Orbax, and keeps two runs from sharing a workdir."""

import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from dinotwins_jax.files import replace_text
from dinotwins_jax.state import TrainState

# Keys that may differ between two starts of one run: they change no weight.
_FREE = ("log.", "checkpoint.", "evals.", "data.num_workers", "data.dir")
_ABSENT = object()


class Checkpoints:
    """The checkpoints of one workdir: state and data position together, written atomically."""

    def __init__(self, workdir: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.path = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def save(self, state: TrainState, data_position: dict) -> None:
        """Writes in the background; a step that is already there is left alone."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            items = {
                "state": ocp.args.StandardSave(state),
                "data": ocp.args.JsonSave(data_position),
            }
            self._manager.save(step, args=ocp.args.Composite(**items))

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, like: TrainState) -> tuple[TrainState, dict]:
        """The latest state, with the shapes and shardings of `like`, and the data position."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = {"state": ocp.args.StandardRestore(abstract), "data": ocp.args.JsonRestore()}
        restored = self._manager.restore(self.latest(), args=ocp.args.Composite(**items))
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def claim_workdir(workdir: Path, config: dict) -> None:
    """Writes WORKDIR/config.json, after a check that the run that is there is this one.

    Raises:
      ValueError: the workdir holds checkpoints of another config; the message names the keys.
    """
    path = Path(workdir) / "config.json"
    config = json.loads(json.dumps(config))  # tuples become lists, as they do on disk
    if path.exists() and any((path.parent / "checkpoints").glob("[0-9]*")):
        _check_same(workdir, json.loads(path.read_text()), config)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_same(workdir: Path, theirs: dict, ours: dict) -> None:
    theirs, ours = _flatten(theirs), _flatten(ours)
    differ = [
        f"{key} ({theirs.get(key, 'not there')} -> {ours.get(key, 'not there')})"
        for key in sorted(theirs.keys() | ours.keys())
        if (theirs.get(key, _ABSENT) != ours.get(key, _ABSENT)) and not key.startswith(_FREE)
    ]
    if differ:
        shown = ", ".join(differ[:5]) + (f" and {len(differ) - 5} more" if len(differ) > 5 else "")
        raise ValueError(
            f"{workdir} holds another run, choose another --workdir; differs in {shown}"
        )


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
