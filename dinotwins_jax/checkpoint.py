"""Saves and restores a run with Orbax, and keeps two runs from sharing a workdir."""

import json
import math
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils

from dinotwins_jax.files import replace_text
from dinotwins_jax.state import TrainState

# Keys that may differ between two starts of one run: they change no weight, but for rounding.
_FREE = (
    *("log.", "checkpoint.", "evals.", "data.num_workers", "data.dir", "debug_nans"),
    *("mesh.", "parallel", "micro_batches", "model.remat"),
)
_ABSENT = object()


class CheckpointError(OSError):
    """A checkpoint that could not be written or read; the message says what is left."""


class Checkpoints:
    """The checkpoints of one workdir: state and data position together, written atomically.

    With every state goes a fingerprint of each of its arrays, so that one that was damaged on disk is
    found out, whatever the damage.
    """

    def __init__(self, workdir: Path, keep: int, best_metric: str = "", best_mode: str = "max"):
        """keep: the last so many, and beside them the best one by a metric, if one is named."""
        self.path = Path(workdir).absolute() / "checkpoints"
        for unfinished in sorted(self.path.glob("*.orbax-checkpoint-tmp*")):
            _say(
                f"checkpoint {unfinished.name.split('.')[0]} in {self.path} was never finished: dropped"
            )
        _drop_broken_metrics(self.path)
        self._best_metric, self._best_mode = best_metric, best_mode
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,
            preservation_policy=_last_and_best(keep, best_metric, best_mode),
            best_fn=(lambda metrics: metrics) if best_metric else None,  # asks Orbax to keep them
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)

    def save(self, state: TrainState, data_position: dict, metrics: dict | None = None) -> None:
        """Writes in the background; a step that is already there is left alone.

        Args:
          metrics: name -> value; the best metric's is kept.
        Raises:
          CheckpointError: this or the one before could not be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        value = (metrics or {}).get(self._best_metric)
        data = data_position | {"fingerprint": fingerprint(state)}
        items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(**items),
                metrics={} if value is None else {self._best_metric: float(value)},
            )
        except Exception as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Returns when everything is on disk. Raises CheckpointError when it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, the last one's at the end."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the best metric among those that are there; None when none has one."""
        found = {
            step: (self._manager.metrics(step) or {}).get(self._best_metric)
            for step in self.steps()
        }
        found = {step: value for step, value in found.items() if value is not None}
        choose = max if self._best_mode == "max" else min
        return choose(found, key=found.get) if found else None

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
        """A state, with the shapes and shardings of `like`, and the data position.

        Args:
          like: arrays, or shapes with shardings.
          step: None: the latest that is whole; those after it are moved to WORKDIR/damaged and named.
        Raises:
          ValueError: the state on disk is of another model or optimiser.
          CheckpointError: no checkpoint is whole.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        if step is not None:
            return self._restore_one(step, abstract)
        for step in reversed(self.steps()):
            try:
                found, reason = self._restore_one(step, abstract), ""
            except CheckpointError as error:
                found, reason = None, str(error)
            if _all_processes(found is not None):
                return found
            self._move_away(step, reason or "another process could not read it")
        raise CheckpointError(
            f"no checkpoint in {self.path} is whole; they are in {self._damaged} now: the same command "
            "starts from the beginning"
        )

    @property
    def _damaged(self) -> Path:
        return self.path.parent / "damaged"

    def _restore_one(self, step: int, abstract) -> tuple[TrainState, dict]:
        try:
            saved = self._manager.item_metadata(step)["state"]
            shapes = {p: tuple(leaf.shape) for p, leaf in _paths(saved)}
        except Exception as error:
            raise CheckpointError(_first_line(error)) from error
        if not shapes:
            raise CheckpointError("it has no description of its arrays")
        _check_shapes(step, shapes, {p: tuple(leaf.shape) for p, leaf in _paths(abstract)})
        items = {"state": ocp.args.StandardRestore(abstract), "data": ocp.args.JsonRestore()}
        try:
            _check_index(self.path / str(step) / "state")
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise CheckpointError(_first_line(error)) from error
        state, data = restored["state"], restored["data"]
        expected = data.pop("fingerprint")
        damaged = [p for p, value in fingerprint(state).items() if expected.get(p) != value]
        if damaged:
            raise CheckpointError(f"{damaged[0]} is not what was saved")
        return state, data

    def _move_away(self, step: int, reason: str) -> None:
        _say(f"checkpoint {step} in {self.path} is damaged ({reason}): moved to {self._damaged}")
        if jax.process_index() == 0:
            self._damaged.mkdir(exist_ok=True)
            shutil.rmtree(self._damaged / str(step), ignore_errors=True)
            (self.path / str(step)).rename(self._damaged / str(step))
        _all_processes(True)
        self._manager.reload()

    def _not_written(self, error: Exception) -> CheckpointError:
        if jax.process_index() == 0:
            for unfinished in self.path.glob("*.orbax-checkpoint-tmp*"):  # makes room, too
                shutil.rmtree(unfinished, ignore_errors=True)
        whole = [int(p.name) for p in self.path.glob("[0-9]*") if p.name.isdigit()]
        left = f"the one of step {max(whole)} is intact" if whole else "there is none before it"
        return CheckpointError(
            f"a checkpoint could not be written to {self.path} ({_first_line(error)}); {left}: when there "
            "is room, the same command goes on"
        )

    def close(self) -> None:
        """Waits until everything is on disk."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _drop_broken_metrics(path: Path) -> None:
    """Without its metric a checkpoint is as good as before; with a broken one Orbax cannot start."""
    for file in sorted(path.glob("[0-9]*/metrics/metrics")):
        try:
            json.loads(file.read_text())
        except (OSError, ValueError) as error:
            _say(
                f"the metric of checkpoint {file.parts[-3]} in {path} cannot be read ({error}): dropped"
            )
            if jax.process_index() == 0:
                shutil.rmtree(file.parent, ignore_errors=True)


def _last_and_best(keep: int, metric: str, mode: str):
    managers = ocp.checkpoint_managers
    policies = [managers.LatestN(keep)]
    if metric:
        best = managers.BestN(
            get_metric_fn=lambda metrics: metrics.get(
                metric, math.inf if mode == "min" else -math.inf
            ),
            reverse=mode == "min",
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
    return managers.AnyPreservationPolicy(policies)


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """u32[] of each array: its bits, each word times an odd number of its own, added modulo 2^32."""

    def of(x):
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        words = words.astype(jnp.uint32).reshape(-1)
        return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [of(x) for x in leaves]


def fingerprint(tree) -> dict[str, int]:
    """A number of every array that a change of any one of its values changes; the same however the
    arrays are spread over devices."""
    paths = _paths(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in paths]))
    return {path: int(value) for (path, _), value in zip(paths, sums, strict=True)}


def _paths(tree) -> list[tuple[str, object]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]


def _check_index(path: Path) -> None:
    """Raises ValueError unless the index of the arrays can be read.

    Orbax finds that out too, array by array, and prints a traceback for each.
    """
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
    if not tensorstore.KvStore.open(spec).result().list().result():
        raise ValueError("the index of its arrays is empty")


def _check_shapes(step: int, saved: dict, wanted: dict) -> None:
    differ = [p for p in saved.keys() | wanted.keys() if saved.get(p) != wanted.get(p)]
    if differ:
        path = min(differ)
        raise ValueError(
            f"the checkpoint of step {step} is of another model or optimiser: {path} has shape "
            f"{saved.get(path, 'none')} there and {wanted.get(path, 'none')} by this config "
            f"({len(differ)} arrays differ)"
        )


def _all_processes(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def _first_line(error: Exception) -> str:
    if "No space left on device" in str(error):  # at the end of a long line
        return "No space left on device"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(f"WARNING {text}", file=sys.stderr, flush=True)


def claim_workdir(workdir: Path, config: dict, force: bool = False) -> None:
    """Writes WORKDIR/config.json, after a check that the run that is there is this one.

    Args:
      force: go on with that run although it is not: say what differs.
    Raises:
      ValueError: the workdir holds checkpoints of another config; the message names the keys.
    """
    path = Path(workdir) / "config.json"
    config = json.loads(json.dumps(config))  # tuples become lists, as they do on disk
    if path.exists() and any((path.parent / "checkpoints").glob("[0-9]*")):
        differ = _differences(json.loads(path.read_text()), config)
        if differ and not force:
            raise ValueError(
                f"{workdir} holds another run, choose another --workdir, or go on with it all the same by "
                f"--resume=force; differs in {differ}"
            )
        if differ:
            _say(f"{workdir} goes on with another config: {differ}")
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _differences(theirs: dict, ours: dict) -> str:
    theirs, ours = _flatten(theirs), _flatten(ours)
    differ = [
        f"{key} ({theirs.get(key, 'not there')} -> {ours.get(key, 'not there')})"
        for key in sorted(theirs.keys() | ours.keys())
        if (theirs.get(key, _ABSENT) != ours.get(key, _ABSENT)) and not key.startswith(_FREE)
    ]
    return ", ".join(differ[:5]) + (f" and {len(differ) - 5} more" if len(differ) > 5 else "")


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
